// A paged key-value cache: attention of query rows over the pages of their sequences.
//
// Math: row n with query heads h of the H / K that share key-value head j:
//   out[n, h] = sum_i softmax_i(scale * q[n, h] . keys[i, j]) values[i, j],  i < rows[n].context
// with an online softmax in base 2 and f32 sums.
//
// Layout: keys and values of a layer are [P, T, K, D]; token i of a sequence lies in page
// tables[rows[n].first + i / T], place i % T. `rows` holds {first, context} of each query row. Partial results of rows
// whose context is split over blocks: f32 [N, H, S, D], then the pairs {maximum, sum} [N, H, S].
//
// Launch: a block for each (query row, key-value head, head tile, split); all heads of the tile share each load.
//   attend_tiles: f16 and bf16, D 64 or 128, sm_80 on. Neighbouring rows of one sequence join in tiles of up to 64
//     (token, head) pairs, led by the first one's block; the other blocks leave at once. 64 keys at a time come through
//     a double buffer of cp.async; products run on tensor cores. A tile of at most 16 pairs (decoding) spreads the keys
//     over its four warps, a larger one (a prompt) its pairs.
//   attend_plain: everything else; one row, up to 8 heads, 16 keys at a time in f32.
//   combine: a warp for each (row, head) whose context was split.
// Bound: bytes of keys and values for decoding, tensor cores or cache bandwidth for prompts.
#include "mma.cuh"

namespace {

constexpr int THREADS = 128, WARPS = THREADS / 32;
[[maybe_unused]] constexpr uint32_t NO_SLOT = 0xffffffffu; // not used where there are no tensor cores for tiles

struct Attention {
  Matrix out, q;
  const void *keys, *values;
  const uint32_t *tables;
  const uint2 *rows;
  float *partial;
  float scale_log2;
  int heads, kv_heads, d, page_tokens;
  int splits, split_keys;
  int head_tile, head_tiles; // heads of a block; blocks for the heads of one key-value head
  bool keeps_parts;          // parts also of contexts that are one part; who asks for that adds them
};

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ int64_t split_index(const Attention &a, int64_t row, int head, int split) {
  return (row * a.heads + head) * a.splits + split;
}

__device__ __forceinline__ float2 *split_sums(const Attention &a) {
  int64_t parts = static_cast<int64_t>(a.q.rows) * a.heads * a.splits * a.d;
  return reinterpret_cast<float2 *>(a.partial + (parts + 1) / 2 * 2);
}

// Whether a row's result is parts.
__device__ __forceinline__ bool has_parts(const Attention &a, int context) {
  return a.keeps_parts || context > a.split_keys;
}

// One value of a row's result, or of its part for this split.
__device__ __forceinline__ void put(const Attention &a, int64_t row, int head, int context, int split, int col,
                                    float sum, float x) {
  if (!has_parts(a, context)) {
    store_any(a.out.data, a.out.dtype, place_of(a.out, static_cast<int>(row), head * a.d + col),
              sum > 0.0f ? x / sum : 0.0f);
  } else {
    a.partial[split_index(a, row, head, split) * a.d + col] = x;
  }
}

// Whether this split has a part of the row's result.
__device__ __forceinline__ bool has_part(const Attention &a, int context, int split) {
  return split == 0 || static_cast<int64_t>(split) * a.split_keys < context;
}

// ---- 16-bit caches on tensor cores ----

#if __CUDA_ARCH__ >= 800

__device__ __forceinline__ void copy_async(uint32_t to, const void *from, bool is_there) {
  int bytes = is_there ? 16 : 0; // the rest is filled with zeros
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
}

#endif

constexpr int TILE_KEYS = 64, TILE_ROWS = 64;

// Bytes of dynamic shared memory: two stages of keys and values, then their slots.
template <int D> constexpr int tile_bytes() { return 2 * 2 * TILE_KEYS * D * 2 + 2 * TILE_KEYS * 4; }

// A warp's 16 (token, head) pairs. A thread has two of them, `lane / 4` and that plus 8.
template <int D> struct Accumulator {
  float o[D / 8][4];
  float maximum[2], sum[2];
};

#if __CUDA_ARCH__ >= 800

// Takes in `16 * BLOCKS` keys that lie in shared memory from row `row0` on; the first is key `key0` of the sequence.
template <typename T, int D, int BLOCKS>
__device__ __forceinline__ void take_keys(Accumulator<D> &acc, const uint32_t (&q)[D / 16][4], uint32_t keys,
                                          uint32_t values, int row0, int key0, const int (&limit)[2], bool is_masked,
                                          float scale_log2) {
  int lane = threadIdx.x % 32, matrix = lane / 8, line = lane % 8;
  float s[BLOCKS * 2][4];
#pragma unroll
  for (int i = 0; i < BLOCKS * 2; i++) s[i][0] = s[i][1] = s[i][2] = s[i][3] = 0.0f;
#pragma unroll
  for (int step = 0; step < D / 16; step++) {
#pragma unroll
    for (int block = 0; block < BLOCKS; block++) {
      // 8 keys x 8 dims each: (keys 0-7, dims 0-7), (0-7, 8-15), (8-15, 0-7), (8-15, 8-15)
      int row = row0 + block * 16 + matrix / 2 * 8 + line, chunk = step * 2 + matrix % 2;
      uint32_t b[4];
      load_matrices(b, keys + row * (D * 2) + ((chunk ^ (row & 7)) * 16));
      multiply<T>(s[block * 2], q[step], b[0], b[1]);
      multiply<T>(s[block * 2 + 1], q[step], b[2], b[3]);
    }
  }
  float top[2] = {acc.maximum[0], acc.maximum[1]};
#pragma unroll
  for (int i = 0; i < BLOCKS * 2; i++) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      s[i][j] *= scale_log2;
      if (is_masked && key0 + i * 8 + lane % 4 * 2 + j % 2 >= limit[j / 2]) s[i][j] = -INFINITY;
      top[j / 2] = fmaxf(top[j / 2], s[i][j]);
    }
  }
  float base[2];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    top[r] = fmaxf(top[r], __shfl_xor_sync(0xffffffffu, top[r], 1));
    top[r] = fmaxf(top[r], __shfl_xor_sync(0xffffffffu, top[r], 2));
    base[r] = top[r] == -INFINITY ? 0.0f : top[r];
    float shrink = exp2_fast(acc.maximum[r] - base[r]);
    acc.maximum[r] = top[r];
    acc.sum[r] *= shrink;
#pragma unroll
    for (int i = 0; i < D / 8; i++) {
      acc.o[i][r * 2] *= shrink;
      acc.o[i][r * 2 + 1] *= shrink;
    }
  }
#pragma unroll
  for (int i = 0; i < BLOCKS * 2; i++) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      s[i][j] = exp2_fast(s[i][j] - base[j / 2]);
      acc.sum[j / 2] += s[i][j];
    }
  }
#pragma unroll
  for (int block = 0; block < BLOCKS; block++) {
    const float(&left)[4] = s[block * 2], (&right)[4] = s[block * 2 + 1];
    uint32_t p[4] = {pack_pair<T>(left[0], left[1]), pack_pair<T>(left[2], left[3]), pack_pair<T>(right[0], right[1]),
                     pack_pair<T>(right[2], right[3])};
#pragma unroll
    for (int step = 0; step < D / 16; step++) {
      // 8 keys x 8 dims each, transposed: (keys 0-7, dims 0-7), (8-15, 0-7), (0-7, 8-15), (8-15, 8-15)
      int row = row0 + block * 16 + matrix % 2 * 8 + line, chunk = step * 2 + matrix / 2;
      uint32_t b[4];
      load_matrices_transposed(b, values + row * (D * 2) + ((chunk ^ (row & 7)) * 16));
      multiply<T>(acc.o[step * 2], p, b[0], b[1]);
      multiply<T>(acc.o[step * 2 + 1], p, b[2], b[3]);
    }
  }
}

#endif

template <typename T, int D> __global__ void __launch_bounds__(THREADS, 3) attend_tiles(Attention a) {
#if __CUDA_ARCH__ >= 800
  extern __shared__ __align__(128) unsigned char shared[];
  constexpr int STAGE = TILE_KEYS * D * 2; // bytes of a stage's keys, and of its values
  uint32_t *slots = reinterpret_cast<uint32_t *>(shared + 4 * STAGE);
  uint32_t shared_at = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, split = blockIdx.y;
  launch_dependents();
  wait_for_dependency();
  int blocks_per_row = a.kv_heads * a.head_tiles;
  int64_t row0 = blockIdx.x / blocks_per_row;
  int kv_head = blockIdx.x % blocks_per_row / a.head_tiles, tile = blockIdx.x % a.head_tiles;
  int group = a.heads / a.kv_heads;
  int head0 = kv_head * group + tile * a.head_tile, heads = min(a.head_tile, group - tile * a.head_tile);

  // The tile's rows: neighbours in one sequence, up to a position that is a multiple of the tile's tokens.
  int max_tokens = TILE_ROWS / a.head_tile;
  uint2 first = a.rows[row0];
  auto continues = [&](uint2 row, int distance) {
    return row.x == first.x && row.y == first.y + distance && (row.y - 1) % max_tokens != 0;
  };
  if (row0 > 0 && first.y > 0 && (first.y - 1) % max_tokens != 0) {
    uint2 before = a.rows[row0 - 1];
    if (before.x == first.x && before.y + 1 == first.y) return;
  }
  int tokens = 0;
  for (int from = 0; from < max_tokens; from += 32) {
    int at = from + lane;
    bool is_in = at == 0 || (at < max_tokens && row0 + at < a.q.rows && continues(a.rows[row0 + at], at));
    uint32_t missing = ~__ballot_sync(0xffffffffu, is_in);
    if (missing != 0) {
      tokens = from + __ffs(missing) - 1;
      break;
    }
    tokens = from + 32;
  }
  int last = static_cast<int>(first.y) + tokens - 1; // keys that the last row sees
  int64_t start64 = static_cast<int64_t>(split) * a.split_keys;
  if (split > 0 && start64 >= last) return;
  int start = static_cast<int>(start64);
  int end = static_cast<int>(min(static_cast<int64_t>(last), start64 + a.split_keys));
  int num_tiles = max(0, (end - start + TILE_KEYS - 1) / TILE_KEYS);

  int pairs = tokens * heads;
  bool is_narrow = pairs <= 16;
  int pair0 = is_narrow ? 0 : warp * 16;

  // The slot of key `threadIdx.x` of a tile; fewer threads have one than there are.
  auto slot_of = [&](int index) -> uint32_t {
    int key = start + index * TILE_KEYS + threadIdx.x;
    if (threadIdx.x >= TILE_KEYS || key >= end) return NO_SLOT;
    return a.tables[first.x + key / a.page_tokens] * a.page_tokens + key % a.page_tokens;
  };
  auto load_tile = [&](int stage) {
    constexpr int CHUNKS = D / 8;
#pragma unroll
    for (int i = 0; i < TILE_KEYS * CHUNKS / THREADS; i++) {
      int key = (i * THREADS + threadIdx.x) / CHUNKS, chunk = threadIdx.x % CHUNKS;
      uint32_t slot = slots[stage * TILE_KEYS + key];
      bool is_there = slot != NO_SLOT;
      int64_t from = ((is_there ? slot : 0) * static_cast<int64_t>(a.kv_heads) + kv_head) * D + chunk * 8;
      uint32_t to = shared_at + stage * 2 * STAGE + key * (D * 2) + ((chunk ^ (key & 7)) * 16);
      copy_async(to, static_cast<const T *>(a.keys) + from, is_there);
      copy_async(to + STAGE, static_cast<const T *>(a.values) + from, is_there);
    }
    copy_commit();
  };

  if (threadIdx.x < TILE_KEYS) {
    slots[threadIdx.x] = slot_of(0);
    slots[TILE_KEYS + threadIdx.x] = slot_of(1);
  }
  __syncthreads();
  if (num_tiles > 0) load_tile(0);

  // Queries as the left operand: rows `lane / 4` and that plus 8, dims in pairs.
  uint32_t q[D / 16][4];
  int limit[2];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    int pair = pair0 + lane / 4 + r * 8;
    bool is_there = pair < pairs;
    int token = is_there ? pair / heads : 0, head = is_there ? pair % heads : 0;
    limit[r] = is_there ? min(end, static_cast<int>(first.y) + token) : 0;
    int64_t at = (row0 + token) * a.q.stride + static_cast<int64_t>(head0 + head) * D + lane % 4 * 2;
#pragma unroll
    for (int step = 0; step < D / 16; step++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        int64_t from = at + step * 16 + half * 8;
        float x = is_there ? load_any(a.q.data, a.q.dtype, from) : 0.0f;
        float y = is_there ? load_any(a.q.data, a.q.dtype, from + 1) : 0.0f;
        q[step][half * 2 + r] = pack_pair<T>(x, y);
      }
    }
  }

  Accumulator<D> acc;
#pragma unroll
  for (int i = 0; i < D / 8; i++) acc.o[i][0] = acc.o[i][1] = acc.o[i][2] = acc.o[i][3] = 0.0f;
  acc.maximum[0] = acc.maximum[1] = -INFINITY;
  acc.sum[0] = acc.sum[1] = 0.0f;
  int unmasked = min(end, static_cast<int>(first.y)); // keys below this are seen by all rows

  for (int i = 0; i < num_tiles; i++) {
    uint32_t next = slot_of(i + 2);
    if (i + 1 < num_tiles) {
      load_tile((i + 1) % 2);
      copy_wait<1>();
    } else {
      copy_wait<0>();
    }
    __syncthreads();
    uint32_t keys = shared_at + i % 2 * 2 * STAGE, values = keys + STAGE;
    int key0 = start + i * TILE_KEYS;
    bool is_masked = key0 + TILE_KEYS > unmasked;
    if (is_narrow) {
      take_keys<T, D, 1>(acc, q, keys, values, warp * 16, key0 + warp * 16, limit, is_masked, a.scale_log2);
    } else if (pair0 < pairs) {
#pragma unroll 1
      for (int at = 0; at < TILE_KEYS; at += 32)
        take_keys<T, D, 2>(acc, q, keys, values, at, key0 + at, limit, is_masked, a.scale_log2);
    }
    if (threadIdx.x < TILE_KEYS) slots[i % 2 * TILE_KEYS + threadIdx.x] = next;
    __syncthreads();
  }

#pragma unroll
  for (int r = 0; r < 2; r++) {
    acc.sum[r] += __shfl_xor_sync(0xffffffffu, acc.sum[r], 1);
    acc.sum[r] += __shfl_xor_sync(0xffffffffu, acc.sum[r], 2);
  }
  if (!is_narrow) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      int pair = pair0 + lane / 4 + r * 8;
      if (pair >= pairs) continue;
      int token = pair / heads, head = head0 + pair % heads, context = static_cast<int>(first.y) + token;
      if (!has_part(a, context, split)) continue;
#pragma unroll
      for (int i = 0; i < D / 8; i++) {
        int col = i * 8 + lane % 4 * 2;
        put(a, row0 + token, head, context, split, col, acc.sum[r], acc.o[i][r * 2]);
        put(a, row0 + token, head, context, split, col + 1, acc.sum[r], acc.o[i][r * 2 + 1]);
      }
      if (has_parts(a, context) && lane % 4 == 0)
        split_sums(a)[split_index(a, row0 + token, head, split)] = make_float2(acc.maximum[r], acc.sum[r]);
    }
    return;
  }

  // The warps' parts, [warp][pair][dim], added in the order of the warps. The stages are free.
  float *parts = reinterpret_cast<float *>(shared);
  float2 *sums = reinterpret_cast<float2 *>(parts + WARPS * 16 * D);
#pragma unroll
  for (int r = 0; r < 2; r++) {
    int pair = lane / 4 + r * 8;
#pragma unroll
    for (int i = 0; i < D / 8; i++) {
      float2 two = make_float2(acc.o[i][r * 2], acc.o[i][r * 2 + 1]);
      *reinterpret_cast<float2 *>(parts + (warp * 16 + pair) * D + i * 8 + lane % 4 * 2) = two;
    }
    if (lane % 4 == 0) sums[warp * 16 + pair] = make_float2(acc.maximum[r], acc.sum[r]);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < pairs * D; i += THREADS) {
    int pair = i / D, col = i % D;
    int token = pair / heads, head = head0 + pair % heads, context = static_cast<int>(first.y) + token;
    if (!has_part(a, context, split)) continue;
    float top = -INFINITY, sum = 0.0f, x = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) top = fmaxf(top, sums[w * 16 + pair].x);
    float base = top == -INFINITY ? 0.0f : top;
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      float2 part = sums[w * 16 + pair];
      float weight = exp2_fast(part.x - base);
      sum += weight * part.y;
      x += weight * parts[(w * 16 + pair) * D + col];
    }
    put(a, row0 + token, head, context, split, col, sum, x);
    if (has_parts(a, context) && col == 0)
      split_sums(a)[split_index(a, row0 + token, head, split)] = make_float2(top, sum);
  }
#endif
}

// ---- any type, any head size up to 256 ----

constexpr int PLAIN_HEADS = 8, PLAIN_KEYS = 16, HEADS_PER_WARP = PLAIN_HEADS / WARPS;

// Adds the upper half of `2 * COUNT` values of each lane to the lower half of its partner, and the other way round.
template <int COUNT> __device__ __forceinline__ void fold(float (&x)[16]) {
  bool is_upper = threadIdx.x & (COUNT * 2);
#pragma unroll
  for (int i = 0; i < COUNT; i++) {
    float other = __shfl_xor_sync(0xffffffffu, is_upper ? x[i] : x[i + COUNT], COUNT * 2);
    x[i] = (is_upper ? x[i + COUNT] : x[i]) + other;
  }
}

// Sums each of 16 values over the warp; lane l gets the sum of value l / 2.
__device__ __forceinline__ float sum_each(float (&x)[16]) {
  fold<8>(x);
  fold<4>(x);
  fold<2>(x);
  fold<1>(x);
  return x[0] + __shfl_xor_sync(0xffffffffu, x[0], 1);
}

// `DIMS`: dims per lane, so that D <= 32 * DIMS. `VECTOR`: elements of a 16-byte load, or 1.
template <typename T, int DIMS, int VECTOR> __global__ void __launch_bounds__(THREADS) attend_plain(Attention a) {
  constexpr int WIDTH = DIMS * 32;
  __shared__ __align__(16) float keys[PLAIN_KEYS][WIDTH], values[PLAIN_KEYS][WIDTH];
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, split = blockIdx.y;
  launch_dependents();
  wait_for_dependency();
  int blocks_per_row = a.kv_heads * a.head_tiles;
  int64_t row = blockIdx.x / blocks_per_row;
  int kv_head = blockIdx.x % blocks_per_row / a.head_tiles, tile = blockIdx.x % a.head_tiles;
  int group = a.heads / a.kv_heads;
  int head0 = kv_head * group + tile * a.head_tile, heads = min(a.head_tile, group - tile * a.head_tile);
  uint2 place = a.rows[row];
  int context = static_cast<int>(place.y);
  if (!has_part(a, context, split)) return;
  int64_t start = static_cast<int64_t>(split) * a.split_keys;
  int64_t end = min(static_cast<int64_t>(context), start + a.split_keys);

  float q[HEADS_PER_WARP][DIMS], o[HEADS_PER_WARP][DIMS], maximum[HEADS_PER_WARP], sum[HEADS_PER_WARP];
#pragma unroll
  for (int h = 0; h < HEADS_PER_WARP; h++) {
    int head = warp + h * WARPS;
    maximum[h] = -INFINITY;
    sum[h] = 0.0f;
#pragma unroll
    for (int i = 0; i < DIMS; i++) {
      int col = i * 32 + lane;
      int64_t at = row * a.q.stride + static_cast<int64_t>(head0 + head) * a.d + col;
      q[h][i] = head < heads && col < a.d ? load_any(a.q.data, a.q.dtype, at) * a.scale_log2 : 0.0f;
      o[h][i] = 0.0f;
    }
  }

  for (int64_t key0 = start; key0 < end; key0 += PLAIN_KEYS) {
    __syncthreads();
    for (int i = threadIdx.x; i < PLAIN_KEYS * (WIDTH / VECTOR); i += THREADS) {
      int line = i / (WIDTH / VECTOR), col = i % (WIDTH / VECTOR) * VECTOR;
      int64_t key = key0 + line;
      float k[VECTOR], v[VECTOR];
#pragma unroll
      for (int j = 0; j < VECTOR; j++) k[j] = v[j] = 0.0f;
      if (key < end && col < a.d) {
        int64_t page = a.tables[place.x + key / a.page_tokens];
        int64_t slot = page * a.page_tokens + key % a.page_tokens;
        int64_t at = (slot * a.kv_heads + kv_head) * a.d + col;
        load_pack<T, VECTOR>(k, static_cast<const T *>(a.keys) + at);
        load_pack<T, VECTOR>(v, static_cast<const T *>(a.values) + at);
      }
#pragma unroll
      for (int j = 0; j < VECTOR; j++) {
        keys[line][col + j] = k[j];
        values[line][col + j] = v[j];
      }
    }
    __syncthreads();
    float s[HEADS_PER_WARP][PLAIN_KEYS];
#pragma unroll
    for (int key = 0; key < PLAIN_KEYS; key++) {
      float k[DIMS];
#pragma unroll
      for (int i = 0; i < DIMS; i++) k[i] = keys[key][i * 32 + lane];
#pragma unroll
      for (int h = 0; h < HEADS_PER_WARP; h++) {
        s[h][key] = 0.0f;
#pragma unroll
        for (int i = 0; i < DIMS; i++) s[h][key] += q[h][i] * k[i];
      }
    }
    float p[HEADS_PER_WARP];
#pragma unroll
    for (int h = 0; h < HEADS_PER_WARP; h++) {
      float score = sum_each(s[h]);
      if (key0 + lane / 2 >= end) score = -INFINITY;
      float top = fmaxf(maximum[h], warp_max(score)); // finite: the first key of the tile is there
      float shrink = exp2_fast(maximum[h] - top);
      maximum[h] = top;
      p[h] = exp2_fast(score - top);
      sum[h] = sum[h] * shrink + 0.5f * warp_sum(p[h]); // two lanes have each key
#pragma unroll
      for (int i = 0; i < DIMS; i++) o[h][i] *= shrink;
    }
#pragma unroll
    for (int key = 0; key < PLAIN_KEYS; key++) {
      float v[DIMS];
#pragma unroll
      for (int i = 0; i < DIMS; i++) v[i] = values[key][i * 32 + lane];
#pragma unroll
      for (int h = 0; h < HEADS_PER_WARP; h++) {
        float weight = __shfl_sync(0xffffffffu, p[h], key * 2);
#pragma unroll
        for (int i = 0; i < DIMS; i++) o[h][i] += weight * v[i];
      }
    }
  }

#pragma unroll
  for (int h = 0; h < HEADS_PER_WARP; h++) {
    int head = warp + h * WARPS;
    if (head >= heads) continue;
#pragma unroll
    for (int i = 0; i < DIMS; i++) {
      int col = i * 32 + lane;
      if (col < a.d) put(a, row, head0 + head, context, split, col, sum[h], o[h][i]);
    }
    if (has_parts(a, context) && lane == 0)
      split_sums(a)[split_index(a, row, head0 + head, split)] = make_float2(maximum[h], sum[h]);
  }
}

// Adds the parts of rows whose context was split, in the order of the splits.
__global__ void __launch_bounds__(THREADS) combine(Attention a) {
  launch_dependents();
  wait_for_dependency();
  int64_t index = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / 32;
  int lane = threadIdx.x % 32;
  int64_t row = index / a.heads;
  int head = index % a.heads;
  if (row >= a.q.rows) return;
  int context = static_cast<int>(a.rows[row].y);
  if (context <= a.split_keys) return;
  int splits = min(a.splits, (context - 1) / a.split_keys + 1);
  const float2 *sums = split_sums(a) + split_index(a, row, head, 0);
  const float *parts = a.partial + split_index(a, row, head, 0) * a.d;
  float top = -INFINITY;
  for (int s = lane; s < splits; s += 32) top = fmaxf(top, sums[s].x);
  top = warp_max(top);
  float sum = 0.0f;
  float x[8] = {};
  for (int s = 0; s < splits; s++) {
    float2 part = sums[s];
    float weight = exp2_fast(part.x - top);
    sum += weight * part.y;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      if (i * 32 + lane < a.d) x[i] += weight * parts[static_cast<int64_t>(s) * a.d + i * 32 + lane];
    }
  }
#pragma unroll
  for (int i = 0; i < 8; i++) {
    int col = i * 32 + lane;
    if (col < a.d)
      store_any(a.out.data, a.out.dtype, place_of(a.out, static_cast<int>(row), head * a.d + col), x[i] / sum);
  }
}

bool is_aligned_to(const void *p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

template <typename T, int D> int launch_tiles(Attention a, cudaStream_t stream) {
  int group = a.heads / a.kv_heads;
  a.head_tile = group < TILE_ROWS ? group : TILE_ROWS;
  a.head_tiles = (group + a.head_tile - 1) / a.head_tile;
  const cudaError_t code = allow_shared_memory(attend_tiles<T, D>);
  if (code != cudaSuccess) return static_cast<int>(code);
  dim3 grid(static_cast<uint32_t>(a.q.rows) * a.kv_heads * a.head_tiles, a.splits);
  return launch_after(attend_tiles<T, D>, grid, THREADS, tile_bytes<D>(), stream, a);
}

template <typename T, int VECTOR> int launch_plain(Attention a, cudaStream_t stream) {
  int group = a.heads / a.kv_heads;
  a.head_tile = group < PLAIN_HEADS ? group : PLAIN_HEADS;
  a.head_tiles = (group + a.head_tile - 1) / a.head_tile;
  dim3 grid(static_cast<uint32_t>(a.q.rows) * a.kv_heads * a.head_tiles, a.splits);
  if (a.d <= 64) return launch_after(attend_plain<T, 2, VECTOR>, grid, THREADS, 0, stream, a);
  if (a.d <= 128) return launch_after(attend_plain<T, 4, VECTOR>, grid, THREADS, 0, stream, a);
  return launch_after(attend_plain<T, 8, VECTOR>, grid, THREADS, 0, stream, a);
}

} // namespace

extern "C" int paged_attend(Matrix out, Matrix q, const void *keys, const void *values, int dtype,
                            const uint32_t *tables, const uint32_t *rows, float *partial, float scale_log2,
                            int kv_heads, int d, int page_tokens, int splits, int split_keys, int keeps_parts,
                            cudaStream_t stream) {
  if (q.rows == 0 || q.cols == 0) return 0;
  Attention a{};
  a.out = out, a.q = q, a.keys = keys, a.values = values, a.tables = tables;
  a.rows = reinterpret_cast<const uint2 *>(rows), a.partial = partial, a.scale_log2 = scale_log2;
  a.heads = q.cols / d, a.kv_heads = kv_heads, a.d = d, a.page_tokens = page_tokens;
  a.splits = splits, a.split_keys = split_keys, a.keeps_parts = keeps_parts != 0;
  int device = 0, major = 0;
  cudaError_t code = cudaGetDevice(&device);
  if (code == cudaSuccess) code = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (code != cudaSuccess) return static_cast<int>(code);
  bool is_aligned_cache = is_aligned_to(keys, 32) && is_aligned_to(values, 32);
  int done;
  if (dtype == F32) {
    done = is_aligned_cache && d % 4 == 0 ? launch_plain<float, 4>(a, stream) : launch_plain<float, 1>(a, stream);
  } else if (major >= 8 && is_aligned_cache && (d == 64 || d == 128)) {
    if (dtype == F16) done = d == 64 ? launch_tiles<__half, 64>(a, stream) : launch_tiles<__half, 128>(a, stream);
    else done = d == 64 ? launch_tiles<__nv_bfloat16, 64>(a, stream) : launch_tiles<__nv_bfloat16, 128>(a, stream);
  } else if (dtype == F16) {
    done = is_aligned_cache && d % 8 == 0 ? launch_plain<__half, 8>(a, stream) : launch_plain<__half, 1>(a, stream);
  } else {
    done = is_aligned_cache && d % 8 == 0 ? launch_plain<__nv_bfloat16, 8>(a, stream)
                                          : launch_plain<__nv_bfloat16, 1>(a, stream);
  }
  if (done != 0 || splits == 1 || a.keeps_parts) return done;
  int64_t warps = static_cast<int64_t>(q.rows) * a.heads;
  return launch_after(combine, static_cast<uint32_t>((warps + WARPS - 1) / WARPS), THREADS, 0, stream, a);
}
