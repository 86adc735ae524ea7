// Causal grouped-query attention over a ragged batch, backward: dq, dk, dv from do, o and the kept log-sum-exp.
//
// Math: FlashAttention-2 (2307.08691), algorithm 2: p = exp(q k^T / sqrt(d) - lse), dp = do v^T, delta = rowsum(do o),
// ds = p (dp - delta); dv = p^T do, dk = ds^T q / sqrt(d), dq = ds k / sqrt(d). Two kernels make p and ds anew, one for
// dq and one for dk and dv, so that every sum has one owner and a fixed order: no atomics, the same bits every time.
// Where there is one that makes all three at once (`attention_backward_fused_sm90.cu`), the caller may choose it.
// Layout: q, o, do, dq [N, H d], k, v, dk, dv [N, K d] with any row stride; lse, delta f32 [H, N].
// Launch: dq: a block of 8 warps for each tile of 128 queries of one head, 16 rows a warp with q and do in registers,
// key tiles of 64 in two buffers. dk, dv: a block of 4 warps for each half (64 keys) of a key tile and key-value head,
// 16 keys a warp, over the query heads of that head and over the queries that see the keys; it computes the transposed
// scores, whose C fragments are the A fragments of the two products that follow. Heaviest tiles first. Where there are
// few tiles, or unequal ones, a tile's pairs of query head and tile of queries are split over several blocks, whose f32
// sums a third kernel adds in a fixed order (`KeySplit`).
// Bound: tensor cores, 6 d flops (dq) and 8 d flops (dk, dv) for each query, key and head.
#include "attention.cuh"

namespace attention {
namespace {

// What is faster for dq, for dk and dv, and for all three, on compute capability 9.0.
constexpr int HOPPER_QUERIES = WARP_GROUPS;
constexpr int HOPPER_KEYS = WARP_GROUPS;
constexpr int HOPPER_ALL = WARP_GROUPS;

// delta: a group of `D / 8` lanes for each token and head, 8 columns a lane. Bound: bytes of do and o.
template <typename T, int D>
__global__ void __launch_bounds__(256) delta_kernel(float *delta, Matrix d_out, Matrix o, Sizes sizes) {
  constexpr int LANES = D / 8;
  int64_t row_of_head = (blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x) / LANES;
  int column = threadIdx.x % LANES * 8;
  bool is_there = row_of_head < static_cast<int64_t>(sizes.heads) * sizes.tokens;
  int64_t head = row_of_head / sizes.tokens, row = row_of_head % sizes.tokens;
  float sum = 0.0f;
  if (is_there && column < sizes.d) {
    float x[8], y[8];
    load_pack<T, 8>(x, static_cast<const T *>(d_out.data) + row * d_out.stride + head * sizes.d + column);
    load_pack<T, 8>(y, static_cast<const T *>(o.data) + row * o.stride + head * sizes.d + column);
#pragma unroll
    for (int i = 0; i < 8; i++) sum = fmaf(x[i], y[i], sum);
  }
#pragma unroll
  for (int step = LANES / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  if (is_there && column == 0) delta[row_of_head] = sum;
}

constexpr int QUERIES_THREADS = 256, QUERIES_KEYS = 64;
constexpr int queries_shared_bytes(int d) { return 4 * QUERIES_KEYS * d * 2; }

template <typename T, int D>
__global__ void __launch_bounds__(QUERIES_THREADS, 1)
    queries_kernel(Matrix dq, Matrix d_out, Matrix q, Matrix k, Matrix v, const float *lse, const float *delta,
                   const QueryTile *tiles, Sizes sizes) {
  if constexpr (is_multiplied<T>()) {
    constexpr int KEYS = QUERIES_KEYS, THREADS = QUERIES_THREADS, ROW = D * 2, STAGE = 2 * KEYS * ROW;
    static_assert(QUERY_TILE * ROW == STAGE, "q and do pass through the two stages");
    extern __shared__ __align__(1024) uint8_t attention_shared[];
    const uint32_t stages = shared_address(attention_shared);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int head = blockIdx.x % sizes.heads, d = sizes.d, column = head / sizes.group * d;
    const QueryTile tile = tiles[blockIdx.x / sizes.heads];
    const int prefix_count = ceil_div(tile.prefix_end - tile.prefix_start, KEYS);
    const int count = prefix_count + ceil_div(tile.end - tile.own_start, KEYS);

    const int64_t start = tile.start;
    const T *queries = static_cast<const T *>(q.data) + start * q.stride + head * d;
    const T *d_outs = static_cast<const T *>(d_out.data) + start * d_out.stride + head * d;
    load_tile<T, QUERY_TILE, D, THREADS>(stages, queries, q.stride, tile.end - tile.start, d, threadIdx.x);
    load_tile<T, QUERY_TILE, D, THREADS>(stages + STAGE, d_outs, d_out.stride, tile.end - tile.start, d, threadIdx.x);
    wait_for_copies();
    __syncthreads();
    uint32_t q_kept[D / 16][4], d_out_kept[D / 16][4];
    const uint32_t own_rows = stages + warp * 16 * ROW;
#pragma unroll
    for (int step = 0; step < D / 16; step++) {
      load_matrices(q_kept[step], (own_rows + lane_by_rows<D>(lane)) ^ (step << 5));
      load_matrices(d_out_kept[step], (own_rows + STAGE + lane_by_rows<D>(lane)) ^ (step << 5));
    }
    __syncthreads();

    auto first_key = [&](int j) {
      return j < prefix_count ? tile.prefix_start + j * KEYS : tile.own_start + (j - prefix_count) * KEYS;
    };
    auto load = [&](int j) {
      int thread = thread_anew();
      int64_t first = first_key(j);
      int rows = (j < prefix_count ? tile.prefix_end : tile.end) - static_cast<int>(first);
      uint32_t stage = stages + (j & 1) * STAGE;
      load_tile<T, KEYS, D, THREADS>(stage, static_cast<const T *>(k.data) + first * k.stride + column, k.stride, rows,
                                     d, thread);
      load_tile<T, KEYS, D, THREADS>(stage + KEYS * ROW, static_cast<const T *>(v.data) + first * v.stride + column,
                                     v.stride, rows, d, thread);
    };
    load(0);

    const int warp_row = tile.start + warp * 16;
    const float log2_scale = sizes.scale * LOG2_E;
    float row_lse[2], row_delta[2]; // rows g and g + 8 of the warp; the first times log2 e
#pragma unroll
    for (int i = 0; i < 2; i++) {
      int row = warp_row + 8 * i + g;
      int64_t at = static_cast<int64_t>(head) * sizes.tokens + row;
      row_lse[i] = row < tile.end ? lse[at] * LOG2_E : 0.0f;
      row_delta[i] = row < tile.end ? delta[at] : 0.0f;
    }
    float out[1][D / 8][4] = {};

#pragma unroll 1
    for (int j = 0; j < count; j++) {
      wait_for_copies();
      __syncthreads(); // tile j is there, and nobody reads tile j - 1 any more
      if (j + 1 < count) load(j + 1);
      const bool is_own = j >= prefix_count;
      const int first = first_key(j);
      if (warp_row >= tile.end || (is_own && first > warp_row + 15)) continue;
      const uint32_t k_tile = stages + (j & 1) * STAGE, v_tile = k_tile + KEYS * ROW;

      float s[KEYS / 8][4] = {}, dp[KEYS / 8][4] = {};
      multiply_rows_kept<T, D>(s, q_kept, k_tile + lane_by_columns<D>(lane));
      multiply_rows_kept<T, D>(dp, d_out_kept, v_tile + lane_by_columns<D>(lane));

      const int end = is_own ? tile.end : tile.prefix_end;
      if (first + KEYS > end || (is_own && first + KEYS - 1 > warp_row)) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
          // The last key, counted from this lane's first, that the row sees.
          int last = (is_own ? min(end - 1, warp_row + 8 * i + g) : end - 1) - first - 2 * t;
#pragma unroll
          for (int n = 0; n < KEYS / 8; n++) {
            if (8 * n > last) s[n][2 * i] = -INFINITY;
            if (8 * n + 1 > last) s[n][2 * i + 1] = -INFINITY;
          }
        }
      }
      uint32_t ds[1][KEYS / 16][4];
#pragma unroll
      for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
          float p = exp2_fast(fmaf(s[n][i], log2_scale, -row_lse[i / 2]));
          s[n][i] = p * (dp[n][i] - row_delta[i / 2]);
        }
      }
      as_left<T>(ds[0], s);
      multiply_columns<T, D>(out, ds, k_tile + lane_by_rows<D>(lane));
    }

    const float factor[2] = {sizes.scale, sizes.scale};
    __syncthreads(); // the stages hold the results now
    T *to = static_cast<T *>(dq.data) + warp_row * dq.stride + head * d;
    store_rows<T, D>(to, dq.stride, tile.end - warp_row, d, out, factor, own_rows);
  }
}

constexpr int KEYS_THREADS = 128, KEYS_HALF = 64;

// Rows of a tile of queries, and buffers for them.
constexpr int keys_queries(int d, int capability) { return d == 64 || capability >= 90 ? 64 : 32; }
constexpr int keys_stages(int d, int capability) { return d == 64 || capability >= 80 ? 2 : 1; }
constexpr int keys_stage_bytes(int d, int queries) { return 2 * queries * d * 2; }
constexpr int keys_shared_bytes(int d, int queries, int stages) {
  return 2 * KEYS_HALF * d * 2 + stages * (keys_stage_bytes(d, queries) + 2 * queries * 4);
}

template <typename T, int D, int QUERIES, int STAGES> __device__ constexpr bool is_keys_built() {
#ifdef __CUDA_ARCH__
  return QUERIES == keys_queries(D, __CUDA_ARCH__ / 10) && STAGES == keys_stages(D, __CUDA_ARCH__ / 10) &&
         is_multiplied<T>();
#else
  return false;
#endif
}

template <typename T, int D, int QUERIES, int STAGES>
__global__ void __launch_bounds__(KEYS_THREADS, 2)
    keys_kernel(Matrix dk, Matrix dv, Matrix d_out, Matrix q, Matrix k, Matrix v, const float *lse, const float *delta,
                const KeyTile *tiles, const View *views, KeySplit split, Sizes sizes) {
  if constexpr (is_keys_built<T, D, QUERIES, STAGES>()) {
    constexpr int THREADS = KEYS_THREADS, ROW = D * 2, STAGE = keys_stage_bytes(D, QUERIES);
    static_assert(2 * QUERIES <= THREADS, "a thread for each lse and delta of a tile");
    extern __shared__ __align__(1024) uint8_t attention_shared[];
    const uint32_t k_tile = shared_address(attention_shared), v_tile = k_tile + KEYS_HALF * ROW;
    const uint32_t stages = v_tile + KEYS_HALF * ROW;
    // For each stage: the log-sum-exps times log2 e, then the deltas.
    float *const row_values = reinterpret_cast<float *>(attention_shared + 2 * KEYS_HALF * ROW + STAGES * STAGE);
    const int kv_heads = sizes.heads / sizes.group, kv_head = blockIdx.x % kv_heads, d = sizes.d;
    const int half = blockIdx.x / kv_heads;
    const KeyPart part = find_part(split, half / 2, sizes.group);
    if (part.index >= part.count) return;
    const KeyTile tile = tiles[part.tile];
    const int first_key = tile.start + half % 2 * KEYS_HALF, end_key = min(tile.end, first_key + KEYS_HALF);
    if (first_key >= end_key) return;
    QueryWalk<QUERIES> walk(views, tiles + part.tile, part, first_key, kv_head * sizes.group, sizes.group);

    auto load = [&](int stage) {
      int thread = thread_anew();
      const int64_t first = walk.row;
      const int rows = walk.view.end - walk.row, at = walk.head * d;
      uint32_t to = stages + stage * STAGE;
      load_tile<T, QUERIES, D, THREADS>(to, static_cast<const T *>(q.data) + first * q.stride + at, q.stride, rows, d,
                                        thread);
      load_tile<T, QUERIES, D, THREADS>(to + QUERIES * ROW,
                                        static_cast<const T *>(d_out.data) + first * d_out.stride + at, d_out.stride,
                                        rows, d, thread);
    };
    // This thread's lse or delta. An infinite lse makes the probabilities of rows that are not there 0.
    auto load_row_value = [&]() {
      int thread = thread_anew(), at = walk.row + thread % QUERIES;
      bool is_lse = thread < QUERIES, is_there = at < walk.view.end && thread < 2 * QUERIES;
      if (!is_there) return is_lse ? INFINITY : 0.0f;
      int64_t offset = static_cast<int64_t>(walk.head) * sizes.tokens + at;
      return is_lse ? lse[offset] * LOG2_E : delta[offset];
    };

    const int64_t first = first_key;
    load_tile<T, KEYS_HALF, D, THREADS>(k_tile, static_cast<const T *>(k.data) + first * k.stride + kv_head * d,
                                        k.stride, end_key - first_key, d, threadIdx.x);
    load_tile<T, KEYS_HALF, D, THREADS>(v_tile, static_cast<const T *>(v.data) + first * v.stride + kv_head * d,
                                        v.stride, end_key - first_key, d, threadIdx.x);
    int stage = 0;
    float row_value = 0.0f;
    if (walk.left > 0) {
      if (STAGES == 2) load(0);
      row_value = load_row_value();
    }
    const float log2_scale = sizes.scale * LOG2_E;
    const int warp_key = first_key + threadIdx.x / 32 * 16;
    float out_k[1][D / 8][4] = {}, out_v[1][D / 8][4] = {};

#pragma unroll 1
    while (walk.left > 0) {
      if (STAGES == 1) {
        __syncthreads(); // nobody reads the last tile any more
        load(0);
      }
      if (threadIdx.x < 2 * QUERIES) row_values[stage * 2 * QUERIES + threadIdx.x] = row_value;
      wait_for_copies();
      __syncthreads(); // this tile is there, and nobody reads the last one any more
      const int first_row = walk.row, key_end = walk.view.key_end;
      const bool is_causal = walk.view.is_causal != 0;
      walk.advance();
      if (walk.left > 0) {
        if (STAGES == 2) load(stage ^ 1);
        row_value = load_row_value();
      }
      const uint32_t q_tile = stages + stage * STAGE, d_out_tile = q_tile + QUERIES * ROW;
      const int lane = thread_anew() % 32, g = lane / 4, t = lane % 4;
      const float *values = row_values + stage * 2 * QUERIES + 2 * t;
      if (STAGES == 2) stage ^= 1;
      if (warp_key >= key_end || (is_causal && warp_key > first_row + QUERIES - 1)) continue;
      const uint32_t own_rows = (warp_key - first_key) * ROW + lane_by_rows<D>(lane);

      float s[1][QUERIES / 8][4] = {}, dp[1][QUERIES / 8][4] = {};
      multiply_rows<T, D>(s, k_tile + own_rows, q_tile + lane_by_columns<D>(lane));
      multiply_rows<T, D>(dp, v_tile + own_rows, d_out_tile + lane_by_columns<D>(lane));

      if (is_causal ? warp_key + 15 > first_row : warp_key + 16 > key_end) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
          int key = warp_key + 8 * i + g;
          // The first query, counted from this lane's first, that sees the key.
          int from = (is_causal ? key - first_row : key < key_end ? 0 : QUERIES) - 2 * t;
#pragma unroll
          for (int n = 0; n < QUERIES / 8; n++) {
            if (8 * n < from) s[0][n][2 * i] = -INFINITY;
            if (8 * n + 1 < from) s[0][n][2 * i + 1] = -INFINITY;
          }
        }
      }
      uint32_t left[1][QUERIES / 16][4];
#pragma unroll
      for (int n = 0; n < QUERIES / 8; n++) {
        float2 two = *reinterpret_cast<const float2 *>(values + 8 * n);
#pragma unroll
        for (int i = 0; i < 4; i++) s[0][n][i] = exp2_fast(fmaf(s[0][n][i], log2_scale, -(i % 2 ? two.y : two.x)));
      }
      as_left<T>(left[0], s[0]);
      multiply_columns<T, D>(out_v, left, d_out_tile + lane_by_rows<D>(lane));
#pragma unroll
      for (int n = 0; n < QUERIES / 8; n++) {
        float2 two = *reinterpret_cast<const float2 *>(values + QUERIES + 8 * n);
#pragma unroll
        for (int i = 0; i < 4; i++) s[0][n][i] *= dp[0][n][i] - (i % 2 ? two.y : two.x);
      }
      as_left<T>(left[0], s[0]);
      multiply_columns<T, D>(out_k, left, q_tile + lane_by_rows<D>(lane));
    }

    wait_for_copies();
    __syncthreads(); // all parts of the tiles of keys and values have come, even if no query was there to wait for them
    // Only this warp reads its rows of the tiles of keys and values.
    if (part.place >= 0) {
      float *to = part_sums(split, part, kv_heads, kv_head, d) + (warp_key - tile.start) * d;
      store_sums<D>(to, end_key - warp_key, d, out_k[0]);
      store_sums<D>(to + KEY_TILE * d, end_key - warp_key, d, out_v[0]);
      return;
    }
    const uint32_t own_rows = (warp_key - first_key) * ROW;
    const float scales[2] = {sizes.scale, sizes.scale}, ones[2] = {1.0f, 1.0f};
    T *to_k = static_cast<T *>(dk.data) + warp_key * dk.stride + kv_head * d;
    T *to_v = static_cast<T *>(dv.data) + warp_key * dv.stride + kv_head * d;
    store_rows<T, D>(to_k, dk.stride, end_key - warp_key, d, out_k, scales, k_tile + own_rows);
    store_rows<T, D>(to_v, dv.stride, end_key - warp_key, d, out_v, ones, v_tile + own_rows);
  }
}

// dk and dv of the tiles that were split: a thread for each 8 columns of a row of one of the two. Bound: bytes of the
// sums.
template <typename T>
__global__ void __launch_bounds__(256)
    add_parts_kernel(Matrix dk, Matrix dv, const KeyTile *tiles, KeySplit split, Sizes sizes) {
  const int d = sizes.d, chunks = d / 8, kv_heads = sizes.heads / sizes.group;
  int64_t at = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  const int column = static_cast<int>(at % chunks) * 8;
  at /= chunks;
  const int row = static_cast<int>(at % KEY_TILE), part = static_cast<int>(at / KEY_TILE);
  const bool is_v = part % 2 != 0;
  const int kv_head = part / 2 % kv_heads, t = part / 2 / kv_heads;
  if (t >= split.num_split_tiles) return;
  const KeyTile tile = tiles[t];
  if (tile.start + row >= tile.end) return;
  const int64_t first = first_part(split, t, sizes.group), count = count_parts(split, t, sizes.group);
  const int64_t step = static_cast<int64_t>(kv_heads) * (2 * KEY_TILE) * d;
  const float *from = split.sums + first * step + ((kv_head * 2 + is_v) * KEY_TILE + row) * d + column;
  float sum[8] = {};
#pragma unroll 4
  for (int i = 0; i < count; i++, from += step) {
    float low[4], high[4];
    load_pack<float, 4>(low, from);
    load_pack<float, 4>(high, from + 4);
#pragma unroll
    for (int j = 0; j < 4; j++) sum[j] += low[j], sum[4 + j] += high[j];
  }
  if (!is_v) {
#pragma unroll
    for (int j = 0; j < 8; j++) sum[j] *= sizes.scale;
  }
  const Matrix &to = is_v ? dv : dk;
  store_pack<T, 8>(static_cast<T *>(to.data) + (tile.start + row) * to.stride + kv_head * d + column, sum);
}

template <typename T>
int add_parts(Matrix dk, Matrix dv, const KeyTile *tiles, KeySplit split, Sizes sizes, cudaStream_t stream) {
  int64_t threads =
      static_cast<int64_t>(split.num_split_tiles) * (sizes.heads / sizes.group) * 2 * KEY_TILE * (sizes.d / 8);
  return launch(add_parts_kernel<T>, (threads + 255) / 256, 256, 0, stream, dk, dv, tiles, split, sizes);
}

template <typename T> int delta(float *delta, Matrix d_out, Matrix o, Sizes sizes, cudaStream_t stream) {
  int64_t lanes = static_cast<int64_t>(sizes.heads) * sizes.tokens * (sizes.d <= 64 ? 8 : 16);
  auto kernel = sizes.d <= 64 ? delta_kernel<T, 64> : delta_kernel<T, 128>;
  return launch(kernel, (lanes + 255) / 256, 256, 0, stream, delta, d_out, o, sizes);
}

template <typename T, int D>
int backward_queries(Matrix dq, Matrix d_out, Matrix q, Matrix k, Matrix v, const float *lse, const float *delta,
                     const QueryTile *tiles, int num_tiles, Sizes sizes, cudaStream_t stream) {
  int64_t blocks = static_cast<int64_t>(num_tiles) * sizes.heads;
  return launch(queries_kernel<T, D>, blocks, QUERIES_THREADS, queries_shared_bytes(D), stream, dq, d_out, q, k, v, lse,
                delta, tiles, sizes);
}

template <typename T, int D, int QUERIES, int STAGES>
int backward_keys(Matrix dk, Matrix dv, Matrix d_out, Matrix q, Matrix k, Matrix v, const float *lse,
                  const float *delta, const KeyTile *tiles, const View *views, KeySplit split, Sizes sizes,
                  cudaStream_t stream) {
  int64_t blocks = static_cast<int64_t>(split.num_parts) * (KEY_TILE / KEYS_HALF) * (sizes.heads / sizes.group);
  return launch(keys_kernel<T, D, QUERIES, STAGES>, blocks, KEYS_THREADS, keys_shared_bytes(D, QUERIES, STAGES), stream,
                dk, dv, d_out, q, k, v, lse, delta, tiles, views, split, sizes);
}

template <typename T>
int backward_keys(int capability, Matrix dk, Matrix dv, Matrix d_out, Matrix q, Matrix k, Matrix v, const float *lse,
                  const float *delta, const KeyTile *tiles, const View *views, KeySplit split, Sizes sizes,
                  cudaStream_t stream) {
  auto run = sizes.d <= 64      ? backward_keys<T, 64, 64, 2>
             : capability >= 90 ? backward_keys<T, 128, 64, 2>
             : capability >= 80 ? backward_keys<T, 128, 32, 2>
                                : backward_keys<T, 128, 32, 1>;
  return run(dk, dv, d_out, q, k, v, lse, delta, tiles, views, split, sizes, stream);
}

} // namespace
} // namespace attention

extern "C" int trainer_attention_delta(float *delta, Matrix d_out, Matrix o, int32_t heads, int32_t variant,
                                       cudaStream_t stream) {
  using namespace attention;
  if (o.rows == 0) return 0;
  Sizes sizes = sizes_of(o, heads, heads);
  bool is_fast = fits_tiles(d_out, sizes.d) && fits_tiles(o, sizes.d);
  if (!is_fast || variant == PLAIN) return plain_delta(delta, d_out, o, sizes, stream);
  if (o.dtype == F16) return attention::delta<__half>(delta, d_out, o, sizes, stream);
  return attention::delta<__nv_bfloat16>(delta, d_out, o, sizes, stream);
}

extern "C" int trainer_attention_backward_queries(Matrix dq, Matrix d_out, Matrix q, Matrix k, Matrix v,
                                                  const float *lse, const float *delta,
                                                  const attention::QueryTile *tiles, int32_t num_tiles, int32_t heads,
                                                  int32_t kv_heads, int32_t variant, cudaStream_t stream) {
  using namespace attention;
  if (num_tiles == 0) return 0;
  Sizes sizes = sizes_of(q, heads, kv_heads);
  int capability = compute_capability();
  if (q.dtype == BF16 && capability < 80) return static_cast<int>(cudaErrorNotSupported);
  bool is_fast = fits_tiles(dq, sizes.d) && fits_tiles(d_out, sizes.d) && fits_tiles(q, sizes.d) &&
                 fits_tiles(k, sizes.d) && fits_tiles(v, sizes.d);
  if (!is_fast || variant == PLAIN) {
    return plain_backward_queries(dq, d_out, q, k, v, lse, delta, tiles, num_tiles, sizes, stream);
  }
  if (is_by_warp_groups(variant, HOPPER_QUERIES, capability)) {
    int code = warp_group_backward_queries(dq, d_out, q, k, v, lse, delta, tiles, num_tiles, sizes, stream);
    if (code != static_cast<int>(cudaErrorNotSupported)) return code;
  }
  auto run = q.dtype == F16
                 ? (sizes.d <= 64 ? backward_queries<__half, 64> : backward_queries<__half, 128>)
                 : (sizes.d <= 64 ? backward_queries<__nv_bfloat16, 64> : backward_queries<__nv_bfloat16, 128>);
  return run(dq, d_out, q, k, v, lse, delta, tiles, num_tiles, sizes, stream);
}

extern "C" int trainer_attention_backward_keys(Matrix dk, Matrix dv, Matrix d_out, Matrix q, Matrix k, Matrix v,
                                               const float *lse, const float *delta, const attention::KeyTile *tiles,
                                               const attention::View *views, attention::KeySplit split, int32_t heads,
                                               int32_t kv_heads, int32_t variant, cudaStream_t stream) {
  using namespace attention;
  if (split.num_tiles == 0) return 0;
  Sizes sizes = sizes_of(q, heads, kv_heads);
  int capability = compute_capability();
  if (q.dtype == BF16 && capability < 80) return static_cast<int>(cudaErrorNotSupported);
  bool is_fast = fits_tiles(dk, sizes.d) && fits_tiles(dv, sizes.d) && fits_tiles(d_out, sizes.d) &&
                 fits_tiles(q, sizes.d) && fits_tiles(k, sizes.d) && fits_tiles(v, sizes.d);
  if (!is_fast || variant == PLAIN) {
    return plain_backward_keys(dk, dv, d_out, q, k, v, lse, delta, tiles, split.num_tiles, views, sizes, stream);
  }
  int code = static_cast<int>(cudaErrorNotSupported);
  if (is_by_warp_groups(variant, HOPPER_KEYS, capability)) {
    code = warp_group_backward_keys(dk, dv, d_out, q, k, v, lse, delta, tiles, views, split, sizes, stream);
  }
  if (code == static_cast<int>(cudaErrorNotSupported)) {
    auto run = q.dtype == F16 ? backward_keys<__half> : backward_keys<__nv_bfloat16>;
    code = run(capability, dk, dv, d_out, q, k, v, lse, delta, tiles, views, split, sizes, stream);
  }
  if (code != 0 || split.num_split_tiles == 0) return code;
  auto add = q.dtype == F16 ? add_parts<__half> : add_parts<__nv_bfloat16>;
  return add(dk, dv, tiles, split, sizes, stream);
}

// Floats of workspace that `trainer_attention_backward` needs; 0: it does not take these matrices on this device.
extern "C" int64_t trainer_attention_backward_sums(Matrix dq, Matrix dk, Matrix dv, Matrix d_out, Matrix q, Matrix k,
                                                   Matrix v, int32_t heads, int32_t kv_heads, int32_t variant) {
  using namespace attention;
  Sizes sizes = sizes_of(q, heads, kv_heads);
  for (const Matrix &m : {dq, dk, dv, d_out, q, k, v}) {
    if (!fits_tiles(m, sizes.d)) return 0;
  }
  if (!is_by_warp_groups(variant, HOPPER_ALL, compute_capability()) || !has_fused_backward(sizes)) return 0;
  return fused_sums(sizes);
}

// All gradients by one kernel; `sums`: workspace. dq may differ in its last bits from one time to the next.
extern "C" int trainer_attention_backward(Matrix dq, Matrix dk, Matrix dv, Matrix d_out, Matrix q, Matrix k, Matrix v,
                                          const float *lse, const float *delta, float *sums,
                                          const attention::QueryTile *query_tiles, int32_t num_query_tiles,
                                          const attention::KeyTile *key_tiles, const attention::View *views,
                                          attention::KeySplit split, int32_t heads, int32_t kv_heads,
                                          cudaStream_t stream) {
  using namespace attention;
  if (split.num_tiles == 0) return 0;
  Sizes sizes = sizes_of(q, heads, kv_heads);
  int code = warp_group_backward(dq, dk, dv, d_out, q, k, v, lse, delta, sums, query_tiles, num_query_tiles, key_tiles,
                                 views, split, sizes, stream);
  if (code != 0 || split.num_split_tiles == 0) return code;
  auto add = q.dtype == F16 ? add_parts<__half> : add_parts<__nv_bfloat16>;
  return add(dk, dv, key_tiles, split, sizes, stream);
}
