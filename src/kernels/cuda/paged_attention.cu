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
// Launch: a block for each (query row, key-value head, head tile, split); all heads of the tile share each load. Or, for
//   recorded steps, as many blocks as stay, which take pieces of a list from device memory: a part of a context and the rows
//   that have it, all of whose keys lie in the same pages.
//   attend_tiles: f16 and bf16, D 64 or 128, sm_80 on. Neighbouring rows of one sequence join in tiles of up to 64
//     (token, head) pairs, led by the first one's block; the other blocks leave at once. The rows of a piece are such a tile
//     too. 64 keys at a time come through a double buffer of cp.async; products run on tensor cores. A tile of at most 16
//     pairs (decoding) spreads the keys over its four warps, a larger one (a prompt, rows that share theirs) its pairs.
//   attend_plain: everything else; one row, up to 8 heads, 16 keys at a time in f32.
//   combine: a warp for each (row, head) whose context was split.
// Bound: bytes of keys and values for decoding, tensor cores or cache bandwidth for prompts.
#include "paged_attention_tiles.cuh"

namespace {

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
template <typename T, int DIMS, int VECTOR>
__device__ __forceinline__ void attend_row(const Attention &a, float (*keys)[DIMS * 32], float (*values)[DIMS * 32],
                                           int64_t row, int block, int split) {
  constexpr int WIDTH = DIMS * 32;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int kv_head = block / a.head_tiles, tile = block % a.head_tiles;
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
      const float one[1] = {o[h][i]};
      if (col < a.d) put(a, row, head0 + head, context, split, col, sum[h], one);
    }
    if (has_parts(a, context) && lane == 0)
      split_sums(a)[split_index(a, row, head0 + head, split)] = make_float2(maximum[h], sum[h]);
  }
}

template <typename T, int DIMS, int VECTOR> __global__ void __launch_bounds__(THREADS) attend_plain(Attention a) {
  __shared__ __align__(16) float keys[PLAIN_KEYS][DIMS * 32], values[PLAIN_KEYS][DIMS * 32];
  launch_dependents();
  wait_for_dependency();
  const int blocks = a.kv_heads * a.head_tiles;
  if (!a.pieces) {
    attend_row<T, DIMS, VECTOR>(a, keys, values, blockIdx.x / blocks, blockIdx.x % blocks, blockIdx.y);
    return;
  }
  const int64_t all = static_cast<int64_t>(a.pieces[0]) * blocks;
  for (int64_t at = blockIdx.x; at < all; at += gridDim.x) {
    const Piece piece = piece_of(a, at / blocks);
    if (piece.split() >= a.splits) continue;
    // One row after the other: those that share their keys find them in a cache.
    for (int i = 0; i < piece.count(); i++)
      attend_row<T, DIMS, VECTOR>(a, keys, values, piece.member(a, i), static_cast<int>(at % blocks), piece.split());
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

// Blocks for all rows and parts, or as many as stay for a list of so many pieces.
int grid_of(const Attention &a, int most_pieces, dim3 &grid) {
  const int blocks = a.kv_heads * a.head_tiles;
  grid = dim3(static_cast<uint32_t>(a.q.rows) * blocks, a.splits);
  if (!a.pieces) return 0;
  int device = 0, multiprocessors = 0;
  cudaError_t code = cudaGetDevice(&device);
  if (code == cudaSuccess) code = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  const int64_t all = static_cast<int64_t>(most_pieces) * blocks, most = static_cast<int64_t>(multiprocessors) * RESIDENT;
  grid = dim3(static_cast<uint32_t>(all < most ? all : most));
  return static_cast<int>(code);
}

template <typename T, int D> int launch_tiles(Attention a, int most_pieces, cudaStream_t stream) {
  int group = a.heads / a.kv_heads;
  a.head_tile = group < TILE_ROWS ? group : TILE_ROWS;
  a.head_tiles = (group + a.head_tile - 1) / a.head_tile;
  dim3 grid;
  const int done = grid_of(a, most_pieces, grid);
  if (done != 0) return done;
  auto kernel = a.pieces ? attend_pieces<T, D> : attend_tiles<T, D>;
  const cudaError_t code = allow_shared_memory(kernel);
  if (code != cudaSuccess) return static_cast<int>(code);
  return launch_after(kernel, grid, THREADS, tile_bytes<D>(), stream, a);
}

template <typename T, int VECTOR> int launch_plain(Attention a, int most_pieces, cudaStream_t stream) {
  int group = a.heads / a.kv_heads;
  a.head_tile = group < PLAIN_HEADS ? group : PLAIN_HEADS;
  a.head_tiles = (group + a.head_tile - 1) / a.head_tile;
  dim3 grid;
  const int done = grid_of(a, most_pieces, grid);
  if (done != 0) return done;
  if (a.d <= 64) return launch_after(attend_plain<T, 2, VECTOR>, grid, THREADS, 0, stream, a);
  if (a.d <= 128) return launch_after(attend_plain<T, 4, VECTOR>, grid, THREADS, 0, stream, a);
  return launch_after(attend_plain<T, 8, VECTOR>, grid, THREADS, 0, stream, a);
}

template <typename T> int launch(const Attention &a, int most_pieces, bool has_tiles, bool is_aligned, cudaStream_t stream) {
  if constexpr (sizeof(T) == 2) {
    if (has_tiles) return a.d == 64 ? launch_tiles<T, 64>(a, most_pieces, stream) : launch_tiles<T, 128>(a, most_pieces, stream);
  }
  constexpr int VECTOR = 16 / sizeof(T);
  return is_aligned && a.d % VECTOR == 0 ? launch_plain<T, VECTOR>(a, most_pieces, stream) : launch_plain<T, 1>(a, most_pieces, stream);
}

int attend(Attention a, int dtype, int most_pieces, cudaStream_t stream) {
  int device = 0, major = 0;
  cudaError_t code = cudaGetDevice(&device);
  if (code == cudaSuccess) code = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (code != cudaSuccess) return static_cast<int>(code);
  const bool is_aligned = is_aligned_to(a.keys, 32) && is_aligned_to(a.values, 32);
  const bool has_tiles = major >= 8 && is_aligned && (a.d == 64 || a.d == 128);
  a.q_is_direct = a.q.dtype == dtype && a.q.stride % 2 == 0 && is_aligned_to(a.q.data, 4);
  if (dtype == F32) return launch<float>(a, most_pieces, has_tiles, is_aligned, stream);
  if (dtype == F16) return launch<__half>(a, most_pieces, has_tiles, is_aligned, stream);
  return launch<__nv_bfloat16>(a, most_pieces, has_tiles, is_aligned, stream);
}

} // namespace

extern "C" int paged_attend(Matrix out, Matrix q, const void *keys, const void *values, int dtype,
                            const uint32_t *tables, const uint32_t *rows, float *partial, float scale_log2,
                            int kv_heads, int d, int page_tokens, int splits, int split_keys, cudaStream_t stream) {
  if (q.rows == 0 || q.cols == 0) return 0;
  Attention a{};
  a.out = out, a.q = q, a.keys = keys, a.values = values, a.tables = tables;
  a.rows = reinterpret_cast<const uint2 *>(rows), a.partial = partial, a.scale_log2 = scale_log2;
  a.heads = q.cols / d, a.kv_heads = kv_heads, a.d = d, a.page_tokens = page_tokens;
  a.splits = splits, a.split_keys = split_keys;
  const int done = attend(a, dtype, 0, stream);
  if (done != 0 || splits == 1) return done;
  int64_t warps = static_cast<int64_t>(q.rows) * a.heads;
  return launch_after(combine, static_cast<uint32_t>((warps + WARPS - 1) / WARPS), THREADS, 0, stream, a);
}

// Parts of the contexts of lanes by a list of up to `most_pieces`; q of the cache's type. Its rows are the lanes.
extern "C" int paged_attend_pieces(Matrix q, const void *keys, const void *values, const uint32_t *tables,
                                   const uint32_t *rows, const uint32_t *pieces, const uint32_t *members, int most_pieces,
                                   float *partial, float scale_log2, int kv_heads, int d, int page_tokens, int splits,
                                   int split_keys, cudaStream_t stream) {
  if (q.rows == 0 || q.cols == 0 || most_pieces == 0) return 0;
  Attention a{};
  a.q = q, a.keys = keys, a.values = values, a.tables = tables;
  a.rows = reinterpret_cast<const uint2 *>(rows), a.partial = partial, a.scale_log2 = scale_log2;
  a.heads = q.cols / d, a.kv_heads = kv_heads, a.d = d, a.page_tokens = page_tokens;
  a.splits = splits, a.split_keys = split_keys, a.keeps_parts = true;
  a.pieces = pieces, a.members = members;
  return attend(a, q.dtype, most_pieces, stream);
}
