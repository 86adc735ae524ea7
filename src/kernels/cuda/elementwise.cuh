// What memory-bound kernels share: 16-byte accesses that stay bits until they are used, and launch shapes for work on
// every value of matrices.
#pragma once

#include <type_traits>

#include "common.cuh"

namespace {

// `N` values as they lie in memory. Unlike `Pack` they are not taken apart when they arrive, so that several loads are
// under way before the first is waited for.
template <typename T, int N> struct alignas(16) Raw {
  uint32_t words[N * sizeof(T) / 4];
};
template <typename T> struct Raw<T, 1> {
  T value;
};

template <int N, typename T> __device__ __forceinline__ Raw<T, N> load_raw(const T *p) {
  Raw<T, N> raw;
  if constexpr (N == 1) {
    raw.value = *p;
  } else {
#pragma unroll
    for (int i = 0; i < N * sizeof(T) / 16; i++) {
      uint4 four = reinterpret_cast<const uint4 *>(p)[i];
      raw.words[4 * i] = four.x;
      raw.words[4 * i + 1] = four.y;
      raw.words[4 * i + 2] = four.z;
      raw.words[4 * i + 3] = four.w;
    }
  }
  return raw;
}

template <typename T, int N> __device__ __forceinline__ void unpack(float (&out)[N], const Raw<T, N> &raw) {
  if constexpr (N == 1) {
    out[0] = to_float(raw.value);
  } else if constexpr (std::is_same_v<T, float>) {
#pragma unroll
    for (int i = 0; i < N; i++) out[i] = __uint_as_float(raw.words[i]);
  } else {
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
      if constexpr (std::is_same_v<T, __half>) {
        float2 two = __half22float2(*reinterpret_cast<const __half2 *>(&raw.words[i]));
        out[2 * i] = two.x;
        out[2 * i + 1] = two.y;
      } else {
        out[2 * i] = __uint_as_float(raw.words[i] << 16);
        out[2 * i + 1] = __uint_as_float(raw.words[i] & 0xffff0000u);
      }
    }
  }
}

// Rounds and writes `N` values. The store is spelled out because an assignment of 16 bytes is at times taken apart into
// stores of 2 or 4.
template <typename T, int N> __device__ __forceinline__ void store_values(T *p, const float (&in)[N]) {
  if constexpr (N == 1) {
    *p = from_float<T>(in[0]);
  } else {
    uint32_t words[N * sizeof(T) / 4];
    if constexpr (std::is_same_v<T, float>) {
#pragma unroll
      for (int i = 0; i < N; i++) words[i] = __float_as_uint(in[i]);
    } else {
#pragma unroll
      for (int i = 0; i < N / 2; i++) {
        if constexpr (std::is_same_v<T, __half>) {
          __half2 two = __floats2half2_rn(in[2 * i], in[2 * i + 1]);
          words[i] = *reinterpret_cast<const uint32_t *>(&two);
        } else {
          __nv_bfloat162 two = __floats2bfloat162_rn(in[2 * i], in[2 * i + 1]);
          words[i] = *reinterpret_cast<const uint32_t *>(&two);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < N * sizeof(T) / 16; i++) {
      asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p + i * 16 / sizeof(T))),
                   "r"(words[4 * i]), "r"(words[4 * i + 1]), "r"(words[4 * i + 2]), "r"(words[4 * i + 3])
                   : "memory");
    }
  }
}

// The rows of a matrix whose type is known.
template <typename T> struct Rows {
  T *data;
  int64_t stride;

  __device__ __forceinline__ T *operator[](int64_t row) const { return data + row * stride; }
};

template <typename T> Rows<T> rows_of(const Matrix &m) { return {static_cast<T *>(m.data), m.stride}; }

// Rows, columns and launch shape of work on every value of matrices of one shape, absent ones having no data: blocks of
// 256 threads, as many along a row as it has accesses (a power of two), the others on rows below. A thread has `unroll`
// accesses of 8 values (or of one, where 8 are not aligned), a block's width apart; what 8 do not divide at the end of
// a row is left to the block at its begin. With `is_flat` matrices without gaps are one long row.
struct Plan {
  static constexpr int THREADS = 256;

  int64_t rows, cols;
  bool is_fast = true;
  dim3 grid, block;

  template <int COUNT>
  Plan(const Matrix (&matrices)[COUNT], int unroll, bool is_flat = true)
      : rows(matrices[0].rows), cols(matrices[0].cols) {
    for (const Matrix &m : matrices) is_flat = is_flat && (!m.data || m.rows <= 1 || m.stride == m.cols);
    for (Matrix m : matrices) {
      m.cols = 0;
      if (is_flat) m.rows = 1;
      is_fast = is_fast && is_aligned(m, 8);
    }
    if (is_flat) {
      cols *= rows;
      rows = 1;
    }
    int64_t accesses = is_fast ? (cols + 7) / 8 : cols;
    unsigned across = 1;
    while (across < THREADS && across < accesses) across *= 2;
    block = dim3(across, THREADS / across);
    int64_t width = static_cast<int64_t>(across) * unroll, height = (rows + block.y - 1) / block.y;
    grid = dim3(static_cast<unsigned>((accesses + width - 1) / width),
                static_cast<unsigned>(height < 65535 ? height : 65535));
  }
};

} // namespace
