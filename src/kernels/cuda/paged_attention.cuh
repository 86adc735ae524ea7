// What the kernels of paged_attention.cu share: a launch, pieces of contexts, where parts of results lie.
#pragma once

#include "mma.cuh"

#ifdef __CUDACC__
namespace {

constexpr int THREADS = 128, WARPS = THREADS / 32, RESIDENT = 3; // blocks of a multiprocessor
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
  bool q_is_direct;          // q is of the cache's type, pairs of values aligned
  const uint32_t *pieces;    // or none: their number, 3 words of no meaning, the pieces
  const uint32_t *members;   // rows of pieces that have more than one
};

// A part of a context: of which row, where that one's page list begins, and which other rows have the same pages.
struct Piece {
  uint32_t table, row, first_member, split_and_count;

  __device__ __forceinline__ int split() const { return static_cast<int>(split_and_count & 0xffffff); }
  __device__ __forceinline__ int count() const { return static_cast<int>(split_and_count >> 24); }
  __device__ __forceinline__ uint32_t member(const Attention &a, int i) const {
    return i == 0 ? row : a.members[first_member + i];
  }
};

__device__ __forceinline__ Piece piece_of(const Attention &a, int64_t index) {
  const uint4 four = reinterpret_cast<const uint4 *>(a.pieces)[1 + index];
  return {four.x, four.y, four.z, four.w};
}

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

// Neighbouring values of a row's result, or of its part for this split: a multiple of N from `col` on.
template <int N>
__device__ __forceinline__ void put(const Attention &a, int64_t row, int head, int context, int split, int col,
                                    float sum, const float (&x)[N]) {
  if (has_parts(a, context)) {
    store_pack<float, N>(a.partial + split_index(a, row, head, split) * a.d + col, x);
    return;
  }
  const int64_t at = row * a.out.stride + head * a.d + col;
#pragma unroll
  for (int i = 0; i < N; i++) store_any(a.out.data, a.out.dtype, at + i, sum > 0.0f ? x[i] / sum : 0.0f);
}

// Whether this split has a part of the row's result.
__device__ __forceinline__ bool has_part(const Attention &a, int context, int split) {
  return split == 0 || static_cast<int64_t>(split) * a.split_keys < context;
}

} // namespace
#endif
