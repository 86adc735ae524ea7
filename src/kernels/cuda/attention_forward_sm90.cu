// Causal grouped-query attention over a ragged batch, forward, by Hopper's warp groups; math and layout as
// `attention_forward.cu`.
//
// Launch: a block of three groups of 4 warps for each multiprocessor, which takes tiles of 128 queries of one head one
// after another. Two groups compute, 64 rows each. Each warp of the third fills one of the four buffers for tiles of
// 128 keys or values, two of them also the buffers for queries. While a group's probabilities of key tile j are
// multiplied with the values, its scores of tile j + 1 (after the last one: of the next query tile's first) become
// probabilities. The groups take turns at starting products, so that one's exponentials run beside the other's.
// Only sm_90a has these instructions; elsewhere the kernel is empty.
// Bound: tensor cores, 4 d flops for each query, key and head.
#include "attention_sm90.cuh"

namespace attention {
namespace {

constexpr int GROUP_KEYS = 128;
constexpr int GROUP_FORWARD_THREADS = GROUP_THREADS + 128; // the last group loads

// In shared memory: two buffers each for queries, keys and values; behind them the query tiles as in the work list, and
// the barriers.
constexpr int group_tiles_bytes(int d) { return (2 * QUERY_TILE + 4 * GROUP_KEYS) * d * 2; }
constexpr int group_shared_bytes(int d) { return group_tiles_bytes(d) + 2 * sizeof(QueryTile) + 6 * 2 * 8; }

} // namespace
} // namespace attention

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

namespace attention {
namespace {

// Which query tile and head a block takes as its `n`th, as a number in the work list of all heads: rows of one for each
// block, every other one backwards, because the list is sorted by work.
__device__ __forceinline__ int item_of(int n) {
  return n * gridDim.x + (n % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
}

// Barrier `id` of the two computing groups: one group waits for the other's arrival.
__device__ __forceinline__ void turn_wait(int id) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(GROUP_THREADS) : "memory");
}
__device__ __forceinline__ void turn_give(int id) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "n"(GROUP_THREADS) : "memory");
}

// Copies of this thread in groups.
__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT> __device__ __forceinline__ void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

// `load_blocks` by one warp, of `ROWS` rows of a tile of `TILE_ROWS`.
template <typename T, int ROWS, int TILE_ROWS, int D>
__device__ __forceinline__ void load_blocks_by_warp(uint32_t tile, const T *from, int64_t stride, int rows, int d) {
  constexpr int CHUNKS = D / 8, STEP = 32 / CHUNKS;
  static_assert(8 % STEP == 0 && ROWS % 8 == 0, "the swizzle repeats every 8 rows");
  const int lane = thread_anew() % 32, row = lane / CHUNKS, chunk = lane % CHUNKS;
  uint32_t to = tile + chunk / 8 * (TILE_ROWS * 128) + row * 128 + (((chunk & 7) ^ row) << 4);
  const T *source = from + row * stride + chunk * 8;
  if (rows >= ROWS && d == D) {
#pragma unroll 1
    for (int first = 0; first < ROWS; first += 8) {
#pragma unroll
      for (int i = 0; i < 8; i += STEP) {
        copy_16_bytes((to ^ (i << 4)) + i * 128, source, true);
        source += STEP * stride;
      }
      to += 8 * 128;
    }
    return;
  }
  const int left = chunk * 8 < d ? rows - row : 0;
#pragma unroll 1
  for (int i = 0; i < ROWS; i += STEP) {
    copy_16_bytes((to ^ ((i & 7) << 4)) + i * 128, i < left ? source : from, i < left);
    source += STEP * stride;
  }
}

// Writes the first `rows` rows of a warp's C tiles, row `8 i + g` times `factor[i]`, through the warp's own 16 rows,
// from `tile` on, of a tile of `TILE_ROWS`.
template <typename T, int TILE_ROWS, int D>
__device__ __forceinline__ void store_blocks(T *to, int64_t stride, int rows, int d, const float (&c)[D / 8][4],
                                             const float (&factor)[2], uint32_t tile) {
  constexpr int CHUNKS = D / 8;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int i = 0; i < 2; i++) {
#pragma unroll
    for (int n = 0; n < CHUNKS; n++) {
      uint32_t address = tile + n / 8 * (TILE_ROWS * 128) + (8 * i + g) * 128 + (((n & 7) ^ g) << 4) + 4 * t;
      uint32_t two = pack_two<T>(c[n][2 * i] * factor[i], c[n][2 * i + 1] * factor[i]);
      asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(two) : "memory");
    }
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < CHUNKS / 2; i++) {
    const int row = (32 * i + lane) / CHUNKS, chunk = lane % CHUNKS;
    uint4 x;
    uint32_t address = tile + chunk / 8 * (TILE_ROWS * 128) + row * 128 + (((chunk & 7) ^ (row & 7)) << 4);
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(address)
                 : "memory");
    if (row < rows && chunk * 8 < d) *reinterpret_cast<uint4 *>(to + row * stride + chunk * 8) = x;
  }
}

} // namespace
} // namespace attention

#endif

namespace attention {
namespace {

template <typename T, int D>
__global__ void __launch_bounds__(GROUP_FORWARD_THREADS, 1)
    group_forward_kernel(Matrix o, float *lse, Matrix q, Matrix k, Matrix v, const QueryTile *tiles, int num_items,
                         Sizes sizes) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  constexpr int KEYS = GROUP_KEYS, TILE = KEYS * D * 2, Q_TILE = QUERY_TILE * D * 2; // bytes
  static_assert(QUERY_TILE == 2 * 64, "64 rows a group");
  extern __shared__ __align__(1024) uint8_t attention_shared[];
  const uint32_t q_tiles = shared_address(attention_shared);
  const uint32_t k_tiles = q_tiles + 2 * Q_TILE, v_tiles = k_tiles + 2 * TILE;
  QueryTile *const own_tiles = reinterpret_cast<QueryTile *>(attention_shared + group_tiles_bytes(D));
  // Each for two buffers: whether it is filled, and whether it may be filled again.
  const uint32_t barriers = q_tiles + group_tiles_bytes(D) + 2 * sizeof(QueryTile);
  const uint32_t q_full = barriers, q_empty = barriers + 16, k_full = barriers + 32, v_full = barriers + 48;
  const uint32_t k_empty = barriers + 64, v_empty = barriers + 80;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, d = sizes.d;
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; i++) {
      phase_init(q_full + 8 * i, 2);  // two loading warps
      phase_init(q_empty + 8 * i, 8); // the computing warps, as below
      phase_init(k_full + 8 * i, 1);
      phase_init(k_empty + 8 * i, 8);
      phase_init(v_full + 8 * i, 1);
      phase_init(v_empty + 8 * i, 8);
    }
  }
  __syncthreads();

  if (warp >= 8) {
    group_keep_registers<56>();
    const int loader = warp - 8; // of keys 0, keys 1, values 0 or values 1
    const uint32_t full = k_full + 8 * loader, empty = k_empty + 8 * loader;
    const T *const source = static_cast<const T *>(loader < 2 ? k.data : v.data);
    const int64_t stride = loader < 2 ? k.stride : v.stride;
    // Waits until at most `left` of this warp's groups of copies are under way, then tells those who compute.
    auto publish = [&](auto left, uint32_t barrier) {
      copies_wait<left>();
      group_publish();
      __syncwarp();
      if (lane == 0) phase_arrive(barrier);
    };
    constexpr std::integral_constant<int, 0> none_left;
    constexpr std::integral_constant<int, 1> one_left;
    int num_loaded = 0, j = loader % 2; // the key tile, of all those of a query tile
    QueryTile next = tiles[item_of(0) / sizes.heads];
#pragma unroll 1
    for (int n = 0; item_of(n) < num_items; n++) {
      const QueryTile tile = next;
      if (item_of(n + 1) < num_items) next = tiles[item_of(n + 1) / sizes.heads];
      const int head = item_of(n) % sizes.heads, column = head / sizes.group * d;
      // The queries are loaded by those who load keys: values of the last key tile before may still be waited for when
      // they are needed.
      bool has_queries = loader < 2;
      if (has_queries) {
        phase_wait(q_empty + n % 2 * 8, (n / 2 + 1) % 2);
        if (loader == 0 && lane == 0) own_tiles[n % 2] = tile;
        const int64_t first = tile.start + loader * 64;
        load_blocks_by_warp<T, 64, QUERY_TILE, D>(q_tiles + n % 2 * Q_TILE + loader * (64 * 128),
                                                  static_cast<const T *>(q.data) + first * q.stride + head * d,
                                                  q.stride, tile.end - static_cast<int>(first), d);
        copies_commit();
      }
      const int prefix_count = ceil_div(tile.prefix_end - tile.prefix_start, KEYS);
      const int count = prefix_count + ceil_div(tile.end - tile.own_start, KEYS);
#pragma unroll 1
      for (; j < count; j += 2) {
        phase_wait(empty, (num_loaded + 1) % 2);
        const bool is_own = j >= prefix_count;
        const int64_t first = is_own ? tile.own_start + (j - prefix_count) * KEYS : tile.prefix_start + j * KEYS;
        const int rows = (is_own ? tile.end : tile.prefix_end) - static_cast<int>(first);
        load_blocks_by_warp<T, KEYS, KEYS, D>(k_tiles + loader * TILE, source + first * stride + column, stride, rows,
                                              d);
        copies_commit();
        if (has_queries) publish(one_left, q_full + n % 2 * 8);
        has_queries = false;
        publish(none_left, full);
        num_loaded++;
      }
      if (has_queries) publish(none_left, q_full + n % 2 * 8);
      j -= count;
    }
    return;
  }

  group_take_registers<224>();
  const int group = __shfl_sync(0xffffffffu, warp / 4, 0), g = lane / 4, t = lane % 4; // one group for a warp
  const float log2_scale = sizes.scale * LOG2_E, slack = 8.0f / log2_scale;
  float out[D / 8][4] = {}, s[KEYS / 8][4];
  uint32_t p[KEYS / 16][4];
  float shift[2] = {-INFINITY, -INFINITY}, sum[2] = {}; // of rows g and g + 8 of the warp
  // Query tile `n` of the block, its key tile `j`, the `total`th of all.
  int n = 0, j = 0, total = 0, count, prefix_count, first_masked;

  auto open = [&]() {
    phase_wait(q_full + n % 2 * 8, n / 2 % 2);
    const QueryTile &tile = own_tiles[n % 2];
    prefix_count = ceil_div(tile.prefix_end - tile.prefix_start, KEYS);
    count = prefix_count + ceil_div(tile.end - tile.own_start, KEYS);
    first_masked = prefix_count + (tile.start + 1 - tile.own_start) / KEYS;
    j = 0;
  };
  // The keys that key tile `j` begins with, after its last one, and whether it is the own segment's.
  auto keys_of = [&](int &first, int &end) {
    const QueryTile &tile = own_tiles[n % 2];
    const bool is_own = j >= prefix_count;
    first = is_own ? tile.own_start + (j - prefix_count) * KEYS : tile.prefix_start + j * KEYS;
    end = is_own ? tile.end : tile.prefix_end;
    return is_own;
  };
  // Whether some row does not see all of key tile `j`.
  auto is_masked = [&]() { return j >= prefix_count ? j >= first_masked : j + 1 == prefix_count; };
  auto start_scores = [&](int i) {
    start_rows<T, D, QUERY_TILE>(s, q_tiles + n % 2 * Q_TILE + group * (64 * 128), k_tiles + i % 2 * TILE);
  };
  auto start_values = [&](int i) { start_columns<T>(out, p, v_tiles + i % 2 * TILE); };
  // All lanes of a warp have waited for the products that read the buffer.
  auto release = [&](uint32_t barrier) {
    if (lane == 0) phase_arrive(barrier);
  };
  auto mask = [&]() {
    if (!is_masked()) return;
    int first, end;
    const bool is_own = keys_of(first, end);
    const int row = own_tiles[n % 2].start + warp * 16 + g;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      // The last key, counted from this lane's first, that the row sees.
      int last = (is_own ? min(end - 1, row + 8 * i) : end - 1) - first - 2 * t;
#pragma unroll
      for (int m = 0; m < KEYS / 8; m++) {
        if (8 * m > last) s[m][2 * i] = -INFINITY;
        if (8 * m + 1 > last) s[m][2 * i + 1] = -INFINITY;
      }
    }
  };
  // Turns scores into probabilities; `factor` is what older sums are to be multiplied with. Returns whether any is
  // not 1.
  auto soften = [&](float (&factor)[2]) {
    float top[2];
    bool has_grown = false;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      top[i] = fmaxf(s[0][2 * i], s[0][2 * i + 1]);
#pragma unroll
      for (int m = 1; m < KEYS / 8; m++) top[i] = fmaxf(top[i], fmaxf(s[m][2 * i], s[m][2 * i + 1]));
      top[i] = fmaxf(top[i], __shfl_xor_sync(0xffffffffu, top[i], 1));
      top[i] = fmaxf(top[i], __shfl_xor_sync(0xffffffffu, top[i], 2));
      has_grown |= top[i] > shift[i] + slack;
      factor[i] = 1.0f;
    }
    has_grown = __any_sync(0xffffffffu, has_grown) != 0;
    if (has_grown) {
      // The first tile holds a key for every row, so that no shift stays infinite.
#pragma unroll
      for (int i = 0; i < 2; i++) {
        float larger = fmaxf(shift[i], top[i]);
        factor[i] = exp2_fast((shift[i] - larger) * log2_scale);
        shift[i] = larger;
        sum[i] *= factor[i];
      }
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float shift2 = shift[i] * log2_scale;
#pragma unroll
      for (int m = 0; m < KEYS / 8; m++) {
        s[m][2 * i] = exp2_fast(fmaf(s[m][2 * i], log2_scale, -shift2));
        s[m][2 * i + 1] = exp2_fast(fmaf(s[m][2 * i + 1], log2_scale, -shift2));
        sum[i] += s[m][2 * i] + s[m][2 * i + 1];
      }
      asm volatile("" : "+f"(sum[i])); // the additions run beside the exponentials
    }
    return has_grown;
  };
  // Writes the log-sum-exps of query tile `i`, whose values are to be multiplied with `inverse`.
  auto close = [&](int i, const float (&last_shift)[2], float (&last_sum)[2], float (&inverse)[2]) {
    const QueryTile &tile = own_tiles[i % 2];
    float *to = lse + static_cast<int64_t>(item_of(i) % sizes.heads) * sizes.tokens;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      last_sum[h] += __shfl_xor_sync(0xffffffffu, last_sum[h], 1);
      last_sum[h] += __shfl_xor_sync(0xffffffffu, last_sum[h], 2);
      inverse[h] = 1.0f / last_sum[h];
      int row = tile.start + warp * 16 + 8 * h + g;
      if (t == 0 && row < tile.end) to[row] = last_shift[h] * sizes.scale + logf(last_sum[h]);
    }
  };
  auto store = [&](int i, const float (&inverse)[2]) {
    const QueryTile &tile = own_tiles[i % 2];
    const int64_t row = tile.start + warp * 16;
    T *to = static_cast<T *>(o.data) + row * o.stride + item_of(i) % sizes.heads * d;
    // Only this warp read these rows of the tile of queries.
    store_blocks<T, QUERY_TILE, D>(to, o.stride, tile.end - static_cast<int>(row), d, out, inverse,
                                   q_tiles + i % 2 * Q_TILE + warp * (16 * 128));
    __syncwarp();
    release(q_empty + i % 2 * 8);
  };

  float factor[2], inverse[2];
  open();
  phase_wait(k_full, 0);
  group_pin(s);
  group_fence();
  start_scores(0);
  group_wait<0>();
  group_pin(s);
  release(k_empty);
  mask();
  soften(factor); // nothing is summed yet
  as_left<T>(p, s);
  if (group == 1) turn_give(1);

#pragma unroll 1
  while (true) {
    const bool is_new = j + 1 == count;
    if (is_new) {
      if (item_of(n + 1) >= num_items) break;
      n++;
      open();
    } else {
      j++;
    }
    phase_wait(k_full + (total + 1) % 2 * 8, (total + 1) / 2 % 2);
    turn_wait(1 + group);
    group_pin(s);
    group_pin(out);
    group_fence();
    // No branch up to the wait: where paths meet earlier the compiler makes products wait for each other.
    start_scores(total + 1);
    phase_wait(v_full + total % 2 * 8, total / 2 % 2);
    start_values(total);
    turn_give(2 - group);
    group_wait<1>();
    group_pin(s);
    release(k_empty + (total + 1) % 2 * 8);
    mask();
    const float last_shift[2] = {shift[0], shift[1]};
    float last_sum[2] = {sum[0], sum[1]};
    if (is_new) shift[0] = shift[1] = -INFINITY, sum[0] = sum[1] = 0.0f;
    const bool is_rescaled = soften(factor);
    // This branch also keeps the compiler from moving the exponentials behind the wait.
    if (is_new) close(n - 1, last_shift, last_sum, inverse);
    group_wait<0>();
    group_pin(out);
    release(v_empty + total % 2 * 8);
    if (is_new) {
      store(n - 1, inverse);
#pragma unroll
      for (int m = 0; m < D / 8; m++) {
#pragma unroll
        for (int i = 0; i < 4; i++) out[m][i] = 0.0f;
      }
    } else if (is_rescaled) {
#pragma unroll
      for (int m = 0; m < D / 8; m++) {
#pragma unroll
        for (int i = 0; i < 4; i++) out[m][i] *= factor[i / 2];
      }
    }
    as_left<T>(p, s);
    total++;
  }
  if (group == 0) turn_wait(1); // the other group's last turn
  phase_wait(v_full + total % 2 * 8, total / 2 % 2);
  group_pin(out);
  group_fence();
  start_values(total);
  group_wait<0>();
  group_pin(out);
  close(n, shift, sum, inverse);
  store(n, inverse);
#endif
}

template <typename T, int D>
int group_forward(Matrix o, float *lse, Matrix q, Matrix k, Matrix v, const QueryTile *tiles, int num_tiles,
                  Sizes sizes, cudaStream_t stream) {
  auto kernel = group_forward_kernel<T, D>;
  if (!is_built(kernel)) return static_cast<int>(cudaErrorNotSupported);
  int64_t items = static_cast<int64_t>(num_tiles) * sizes.heads;
  if (items > INT32_MAX / 2) return static_cast<int>(cudaErrorInvalidValue); // a block looks beyond the last one
  int device = 0, multiprocessors = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  int64_t blocks = items < multiprocessors ? items : multiprocessors;
  return launch(kernel, blocks, GROUP_FORWARD_THREADS, group_shared_bytes(D), stream, o, lse, q, k, v, tiles,
                static_cast<int>(items), sizes);
}

} // namespace

int warp_group_forward(Matrix o, float *lse, Matrix q, Matrix k, Matrix v, const QueryTile *tiles, int num_tiles,
                       Sizes sizes, cudaStream_t stream) {
  auto run = q.dtype == F16 ? (sizes.d <= 64 ? group_forward<__half, 64> : group_forward<__half, 128>)
                            : (sizes.d <= 64 ? group_forward<__nv_bfloat16, 64> : group_forward<__nv_bfloat16, 128>);
  return run(o, lse, q, k, v, tiles, num_tiles, sizes, stream);
}

} // namespace attention
