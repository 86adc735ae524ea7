// What the attention kernels share: work lists, 16-bit matrix products on tensor cores, tiles in shared memory.
//
// Fragments of one `m16n8k16` product, for lane `4 g + t` (g: 0..8, t: 0..4; each register holds two neighbours):
//   A [16, 16]: a0 (g, 2t), a1 (g + 8, 2t), a2 (g, 2t + 8), a3 (g + 8, 2t + 8)        as (row, first column)
//   B [16, 8]:  b0 (2t, g), b1 (2t + 8, g)                                            as (first row, column)
//   C [16, 8]:  c0 (g, 2t), c1 (g, 2t + 1), c2 (g + 8, 2t), c3 (g + 8, 2t + 1)
// Two neighbouring C tiles, rounded to 16 bits, are an A tile: a0 = c0 c1, a1 = c2 c3, a2 and a3 the same of the
// second.
//
// A tile in shared memory has rows of `D` 16-bit values; the 16-byte chunk `c` of row `r` lies at chunk `c ^ (r & 7)`.
// The eight rows of an 8 x 8 matrix then lie in eight different groups of four banks, so `ldmatrix` has no conflicts.
// Tiles start at multiples of 1,024 bytes, so that moving by two chunks is an exclusive or of the address (see below).
#pragma once

#include <type_traits>

#include "common.cuh"

namespace attention {

// Rows of the tiles in the work lists (`attention/work.rs` has the same numbers).
constexpr int QUERY_TILE = 128, KEY_TILE = 128;

// Queries of one segment; they see the prefix wholly and their own segment's keys from `own_start` up to themselves.
struct alignas(16) QueryTile {
  int32_t start, end, own_start, prefix_start, prefix_end, unused[3];
};

// Keys of one segment and the views `first_view .. end_view` on them.
struct alignas(16) KeyTile {
  int32_t start, end, first_view, end_view;
};

// Queries that see the keys before `key_end` of a tile; if causal, each only keys that do not stand after it.
struct alignas(16) View {
  int32_t start, end, key_end, is_causal;
};

// How tiles of keys are split into parts, so that a few heavy tiles do not keep most of the device waiting: the part's
// sums go to a workspace, and `add_parts_kernel` adds those of a tile in the order of the parts.
//
// Tile `t` counts as `work[t + 1] - work[t]` steps for each query head and has one part for every `part_steps` steps of
// all its query heads, rounded up; its first part is `work[t] group / part_steps + t`, rounded down. This leaves at
// most one number of a tile without a part. The tiles of more than one part are the first ones.
struct KeySplit {
  const int32_t *work; // [num_tiles + 1]: running sums
  float *sums;         // [parts of the split tiles, K, 2, KEY_TILE, d]: of dk, not yet scaled, and of dv
  int32_t num_tiles;
  int32_t part_steps; // 0: every tile is one part
  int32_t num_parts;
  int32_t num_split_tiles;
};

struct Sizes {
  int32_t heads, group, d, tokens; // `group`: query heads of each key-value head
  float scale;
};

// How a launcher chooses its kernel.
constexpr int AUTOMATIC = 0, TENSOR_CORES = 1, WARP_GROUPS = 2, PLAIN = 3;

constexpr float LOG2_E = 1.4426950408889634f;

inline Sizes sizes_of(const Matrix &q, int heads, int kv_heads) {
  int d = q.cols / heads;
  return {heads, heads / kv_heads, d, q.rows, 1.0f / sqrtf(static_cast<float>(d))};
}

inline int compute_capability() {
  int device = 0, major = 0, minor = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return major * 10 + minor;
}

// Whether `wgmma` is to be tried; `on_hopper` is what is faster on compute capability 9.0.
inline bool is_by_warp_groups(int variant, int on_hopper, int capability) {
  return variant == WARP_GROUPS || (variant == AUTOMATIC && on_hopper == WARP_GROUPS && capability == 90);
}

// Whether heads of a matrix can be read 16 bytes at a time into the tiles of the tensor core kernels.
inline bool fits_tiles(const Matrix &m, int d) { return m.dtype != F32 && d % 8 == 0 && d <= 128 && is_aligned(m, 8); }

// The launchers of `attention_plain.cu`.
int plain_forward(Matrix o, float *lse, Matrix q, Matrix k, Matrix v, const QueryTile *tiles, int num_tiles,
                  Sizes sizes, cudaStream_t stream);
int plain_delta(float *delta, Matrix d_out, Matrix o, Sizes sizes, cudaStream_t stream);
int plain_backward_queries(Matrix dq, Matrix d_out, Matrix q, Matrix k, Matrix v, const float *lse, const float *delta,
                           const QueryTile *tiles, int num_tiles, Sizes sizes, cudaStream_t stream);
int plain_backward_keys(Matrix dk, Matrix dv, Matrix d_out, Matrix q, Matrix k, Matrix v, const float *lse,
                        const float *delta, const KeyTile *tiles, int num_tiles, const View *views, Sizes sizes,
                        cudaStream_t stream);
// The launchers of `attention_forward_sm90.cu` and `attention_backward_sm90.cu`; "not supported" without `wgmma`.
int warp_group_forward(Matrix o, float *lse, Matrix q, Matrix k, Matrix v, const QueryTile *tiles, int num_tiles,
                       Sizes sizes, cudaStream_t stream);
int warp_group_backward_queries(Matrix dq, Matrix d_out, Matrix q, Matrix k, Matrix v, const float *lse,
                                const float *delta, const QueryTile *tiles, int num_tiles, Sizes sizes,
                                cudaStream_t stream);
int warp_group_backward_keys(Matrix dk, Matrix dv, Matrix d_out, Matrix q, Matrix k, Matrix v, const float *lse,
                             const float *delta, const KeyTile *tiles, const View *views, KeySplit split, Sizes sizes,
                             cudaStream_t stream);
// Those of `attention_backward_fused_sm90.cu`: all gradients, with a workspace of `fused_sums` floats.
bool has_fused_backward(Sizes sizes);
int64_t fused_sums(Sizes sizes);
int warp_group_backward(Matrix dq, Matrix dk, Matrix dv, Matrix d_out, Matrix q, Matrix k, Matrix v, const float *lse,
                        const float *delta, float *sums, const QueryTile *query_tiles, int num_query_tiles,
                        const KeyTile *key_tiles, const View *views, KeySplit split, Sizes sizes, cudaStream_t stream);

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Launches with more than 48 KB of shared memory.
template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared_bytes, cudaStream_t stream,
           Arguments... arguments) {
  if (blocks == 0) return 0;
  if (blocks > INT32_MAX) return static_cast<int>(cudaErrorInvalidValue);
  cudaError_t code = allow_shared_memory(kernel);
  if (code != cudaSuccess) return static_cast<int>(code);
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, stream>>>(arguments...);
  return LAUNCHED();
}

__device__ __forceinline__ uint32_t shared_address(const void *p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Whether the tensor cores that this pass of the compiler builds for multiply values of type `T`.
template <typename T> __device__ constexpr bool is_multiplied() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  return std::is_same<T, __half>::value;
#else
  return true;
#endif
}

// 2^x; 0 for minus infinity.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two values in one register, the first in its lower half.
template <typename T> __device__ __forceinline__ uint32_t pack_two(float low, float high);
template <> __device__ __forceinline__ uint32_t pack_two<__half>(float low, float high) {
  __half2 two = __floats2half2_rn(low, high);
  return *reinterpret_cast<uint32_t *>(&two);
}
template <> __device__ __forceinline__ uint32_t pack_two<__nv_bfloat16>(float low, float high) {
  __nv_bfloat162 two = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<uint32_t *>(&two);
}

__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

// c += a b of 16 x 16 by 16 x 8.
template <typename T>
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void multiply_add<__half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  // The halves of the inner dimension: columns 0..8 of A are a0 and a1, columns 8..16 are a2 and a3.
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(b0));
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}

template <>
__device__ __forceinline__ void multiply_add<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                                            uint32_t b1) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// Copies 16 bytes to shared memory, or zeros; without waiting where the hardware can (see `wait_for_copies`).
__device__ __forceinline__ void copy_16_bytes(uint32_t to, const void *from, bool is_there) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(is_there ? 16 : 0) : "memory");
#else
  uint4 x = is_there ? *static_cast<const uint4 *>(from) : make_uint4(0, 0, 0, 0);
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
#endif
}

// Waits for all copies of this thread; a barrier must follow before other threads read them.
__device__ __forceinline__ void wait_for_copies() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// The number of this thread, read anew: what is computed from it is not kept in registers through a loop.
__device__ __forceinline__ int thread_anew() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// Copies `rows` rows of `d` values to a tile of `ROWS` rows of `D`; the rest of the tile is set to 0.
template <typename T, int ROWS, int D, int THREADS>
__device__ __forceinline__ void load_tile(uint32_t tile, const T *from, int64_t stride, int rows, int d, int thread) {
  constexpr int CHUNKS = D / 8, STEP = THREADS / CHUNKS;
  static_assert(STEP % 8 == 0 && ROWS % STEP == 0, "every pass has the same place in the swizzle");
  int row = thread / CHUNKS, chunk = thread % CHUNKS;
  uint32_t to = tile + row * (D * 2) + ((chunk ^ (row & 7)) << 4);
  const T *source = from + row * stride + chunk * 8;
  bool is_column = chunk * 8 < d;
#pragma unroll
  for (int i = 0; i < ROWS / STEP; i++) {
    bool is_there = is_column && row + i * STEP < rows;
    copy_16_bytes(to + i * (STEP * D * 2), is_there ? source : from, is_there);
    source += STEP * stride;
  }
}

// Where a lane reads for `ldmatrix`: the tile's row `x` and, for the upper eight columns, the next chunk.
//
// By rows: lanes 0..16 address rows 0..16 at columns 0..8, lanes 16..32 the same rows at columns 8..16. The four
// matrices are a0, a1, a2, a3 of an A tile; transposed, of rows along the inner dimension, they are b0 and b1 of the B
// tile of columns 0..8, then b0 and b1 of columns 8..16.
// By columns: lanes 0..8 rows 0..8 at columns 0..8, lanes 8..16 the same rows at 8..16, then rows 8..16 alike. The
// four matrices are b0, b1 of the B tile whose columns are rows 0..8, then b0, b1 of rows 8..16.
// The chunk `2 s + h` of row r is `(2 s) ^ (h ^ (r & 7))` in memory: step `s` is the address `^ (s << 5)`.
template <int D> __device__ __forceinline__ uint32_t lane_by_rows(int lane) {
  return (lane & 15) * (D * 2) + (((lane >> 4) ^ (lane & 7)) << 4);
}
template <int D> __device__ __forceinline__ uint32_t lane_by_columns(int lane) {
  return (((lane >> 4) << 3) + (lane & 7)) * (D * 2) + ((((lane >> 3) & 1) ^ (lane & 7)) << 4);
}

// One part of a tile of keys, `index` of `count`; its number in the workspace, -1 for a tile that is one part.
struct KeyPart {
  int tile, index, count, place;
};

__device__ __forceinline__ int first_part(const KeySplit &split, int tile, int group) {
  return split.work[tile] * group / split.part_steps + tile;
}

__device__ __forceinline__ int count_parts(const KeySplit &split, int tile, int group) {
  return max(1, ceil_div((split.work[tile + 1] - split.work[tile]) * group, split.part_steps));
}

// Part `part` of all; its `index` is not below its `count` if the number has no part.
__device__ __forceinline__ KeyPart find_part(const KeySplit &split, int part, int group) {
  if (split.part_steps == 0) return {part, 0, 1, -1};
  int tile = 0, end = split.num_tiles;
  while (end - tile > 1) {
    int middle = (tile + end) / 2;
    (first_part(split, middle, group) <= part ? tile : end) = middle;
  }
  int count = count_parts(split, tile, group);
  return {tile, part - first_part(split, tile, group), count, count > 1 ? part : -1};
}

// The way of a part of a tile of keys over query heads, views and tiles of `QUERIES` queries.
template <int QUERIES> struct QueryWalk {
  const View *views;
  const KeyTile *tile; // read anew where a view ends, to keep registers free
  int first_key;
  int left; // tiles from this one to the end of the part
  int head, index, row;
  View view;

  // The position before all keys from `first_key` on have met anything.
  __device__ __forceinline__ QueryWalk(const View *views, const KeyTile *tile, const KeyPart &part, int first_key,
                                       int first_head, int group)
      : views(views), tile(tile), first_key(first_key), head(first_head), index(tile->first_view) {
    int steps = 0;
    for (int i = tile->end_view - 1; i >= index; i--) steps += open(i);
    // `view` is the first one now.
    int64_t all = static_cast<int64_t>(steps) * group;
    int from = static_cast<int>(all * part.index / part.count);
    left = static_cast<int>(all * (part.index + 1) / part.count) - from;
    if (left == 0) return;
    head += from / steps;
    from %= steps;
    for (int count = view_steps(); count <= from; count = open(++index)) from -= count;
    row += from * QUERIES;
  }

  // Tiles from `row` to the end of the view.
  __device__ __forceinline__ int view_steps() const { return ceil_div(max(view.end - row, 0), QUERIES); }

  // Goes to the first query of view `i` that sees a key; returns the view's number of tiles.
  __device__ __forceinline__ int open(int i) {
    view = views[i];
    row = view.is_causal ? max(view.start, first_key) : view.start;
    if (view.key_end <= first_key) row = view.end;
    return view_steps();
  }

  // Goes to the next tile, if one is left.
  __device__ __forceinline__ void advance() {
    if (--left == 0) return;
    row += QUERIES;
    while (row >= view.end) {
      if (++index == tile->end_view) index = tile->first_view, head++;
      open(index);
    }
  }
};

// c += A B^T, 16 M by 8 N, of A rows at `a` (by rows) and B rows at `b` (by columns), both of length `D`.
template <typename T, int D, int M, int N>
__device__ __forceinline__ void multiply_rows(float (&c)[M][N][4], uint32_t a, uint32_t b) {
#pragma unroll
  for (int step = 0; step < D / 16; step++) {
    uint32_t left[M][4];
#pragma unroll
    for (int m = 0; m < M; m++) load_matrices(left[m], (a ^ (step << 5)) + m * (16 * D * 2));
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      uint32_t right[4];
      load_matrices(right, (b ^ (step << 5)) + n * (8 * D * 2));
#pragma unroll
      for (int m = 0; m < M; m++) {
        multiply_add<T>(c[m][n], left[m], right[0], right[1]);
        multiply_add<T>(c[m][n + 1], left[m], right[2], right[3]);
      }
    }
  }
}

// The same of 16 rows of A that are kept in registers.
template <typename T, int D, int N>
__device__ __forceinline__ void multiply_rows_kept(float (&c)[N][4], const uint32_t (&a)[D / 16][4], uint32_t b) {
#pragma unroll
  for (int step = 0; step < D / 16; step++) {
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      uint32_t right[4];
      load_matrices(right, (b ^ (step << 5)) + n * (8 * D * 2));
      multiply_add<T>(c[n], a[step], right[0], right[1]);
      multiply_add<T>(c[n + 1], a[step], right[2], right[3]);
    }
  }
}

// c += A B of 16 M by `16 K` A tiles in registers and `16 K` rows of B of length `D` at `b` (by rows).
template <typename T, int D, int M, int K>
__device__ __forceinline__ void multiply_columns(float (&c)[M][D / 8][4], const uint32_t (&a)[M][K][4], uint32_t b) {
#pragma unroll
  for (int step = 0; step < K; step++) {
#pragma unroll
    for (int n = 0; n < D / 8; n += 2) {
      uint32_t right[4];
      load_matrices_transposed(right, (b ^ (n << 4)) + step * (16 * D * 2));
#pragma unroll
      for (int m = 0; m < M; m++) {
        multiply_add<T>(c[m][n], a[m][step], right[0], right[1]);
        multiply_add<T>(c[m][n + 1], a[m][step], right[2], right[3]);
      }
    }
  }
}

// Neighbouring C tiles as A tiles.
template <typename T, int N> __device__ __forceinline__ void as_left(uint32_t (&a)[N / 2][4], const float (&c)[N][4]) {
#pragma unroll
  for (int n = 0; n < N; n++) {
    a[n / 2][n % 2 * 2] = pack_two<T>(c[n][0], c[n][1]);
    a[n / 2][n % 2 * 2 + 1] = pack_two<T>(c[n][2], c[n][3]);
  }
}

// Writes the first `rows` rows of a warp's C tiles as they are to rows of `d` floats.
template <int D> __device__ __forceinline__ void store_sums(float *to, int rows, int d, const float (&c)[D / 8][4]) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int i = 0; i < 2; i++) {
#pragma unroll
    for (int n = 0; n < D / 8; n++) {
      if (8 * i + g < rows && 8 * n < d) {
        *reinterpret_cast<float2 *>(to + (8 * i + g) * d + 8 * n + 2 * t) = make_float2(c[n][2 * i], c[n][2 * i + 1]);
      }
    }
  }
}

// Where the sums of a part for one key-value head begin: those of dk, behind them those of dv.
__device__ __forceinline__ float *part_sums(const KeySplit &split, const KeyPart &part, int kv_heads, int kv_head,
                                            int d) {
  return split.sums + (static_cast<int64_t>(part.place) * kv_heads + kv_head) * (2 * KEY_TILE * d);
}

// Writes the first `rows` rows of a warp's C tiles, row `8 i + g` times `factor[i]`, through `tile`, which only this
// warp uses and which begins with a row that is a multiple of 8.
template <typename T, int D, int M>
__device__ __forceinline__ void store_rows(T *to, int64_t stride, int rows, int d, const float (&c)[M][D / 8][4],
                                           const float (&factor)[2 * M], uint32_t tile) {
  constexpr int CHUNKS = D / 8;
  int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 2 * M; i++) {
#pragma unroll
    for (int n = 0; n < CHUNKS; n++) {
      const float *pair = &c[i / 2][n][i % 2 * 2];
      uint32_t address = tile + (8 * i + g) * (D * 2) + ((n ^ g) << 4) + 4 * t;
      asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(pack_two<T>(pair[0] * factor[i], pair[1] * factor[i]))
                   : "memory");
    }
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < M * CHUNKS / 2; i++) {
    int row = (32 * i + lane) / CHUNKS, chunk = lane % CHUNKS;
    uint4 x;
    uint32_t address = tile + row * (D * 2) + ((chunk ^ (row & 7)) << 4);
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(address)
                 : "memory");
    if (row < rows && chunk * 8 < d) *reinterpret_cast<uint4 *>(to + row * stride + chunk * 8) = x;
  }
}

} // namespace attention
