// What all kernels share: matrices as the host describes them, element types, 16-byte accesses, reductions.
//
// Every launcher is `extern "C"`, takes its stream last and returns CUDA's error code of the launch (0: none). Sums are
// f32 unless a kernel says otherwise. Types are 0: f32, 1: f16, 2: bf16.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

// Rows of contiguous columns, `stride` elements apart.
struct Matrix {
  void *data;
  int64_t stride;
  int32_t rows;
  int32_t cols;
  int32_t dtype;
  int32_t layout; // 0 but for rows that packed products read: see mma.cuh
};

constexpr int F32 = 0, F16 = 1, BF16 = 2;

template <typename T> __device__ __forceinline__ float to_float(T x) { return static_cast<float>(x); }
template <> __device__ __forceinline__ float to_float<__half>(__half x) { return __half2float(x); }
template <> __device__ __forceinline__ float to_float<__nv_bfloat16>(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T> __device__ __forceinline__ T from_float(float x) { return static_cast<T>(x); }
template <> __device__ __forceinline__ __half from_float<__half>(float x) { return __float2half_rn(x); }
template <> __device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

// `N` neighbouring values that move in one access; `N * sizeof(T)` is 16 where it matters.
template <typename T, int N> struct alignas(sizeof(T) * N) Pack {
  T v[N];
};

template <typename T, int N> __device__ __forceinline__ void load_pack(float (&out)[N], const T *p) {
  Pack<T, N> pack = *reinterpret_cast<const Pack<T, N> *>(p);
#pragma unroll
  for (int i = 0; i < N; i++) out[i] = to_float(pack.v[i]);
}

template <typename T, int N> __device__ __forceinline__ void store_pack(T *p, const float (&in)[N]) {
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; i++) pack.v[i] = from_float<T>(in[i]);
  *reinterpret_cast<Pack<T, N> *>(p) = pack;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
  return x;
}

// The sum over the block, in every thread; `scratch` has a float for each warp and one more. The order is fixed.
__device__ __forceinline__ float block_sum(float x, float *scratch) {
  x = warp_sum(x);
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = (blockDim.x + 31) / 32;
  __syncthreads();
  if (lane == 0) scratch[warp] = x;
  __syncthreads();
  float y = lane < warps ? scratch[lane] : 0.0f;
  return warp_sum(y);
}

// Whether rows can be read `n` elements at a time: their start, their distance and their length are multiples.
__host__ __forceinline__ bool is_aligned(const Matrix &m, int n) {
  int size = m.dtype == F32 ? 4 : 2;
  return m.cols % n == 0 && (m.stride % n == 0 || m.rows <= 1) && reinterpret_cast<uintptr_t>(m.data) % (n * size) == 0;
}

// Lets a kernel take as much shared memory as a block may have. The limit is state of the kernel in the whole process: it
// is never set to what one launch needs, which another thread could lower before the launch.
template <typename... Parameters> cudaError_t allow_shared_memory(void (*kernel)(Parameters...)) {
  int device = 0, most = 0;
  cudaFuncAttributes attributes;
  cudaError_t code = cudaGetDevice(&device);
  if (code == cudaSuccess) code = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (code == cudaSuccess) code = cudaFuncGetAttributes(&attributes, kernel);
  if (code != cudaSuccess) return code;
  most -= static_cast<int>(attributes.sharedSizeBytes);
  if (attributes.maxDynamicSharedSizeBytes >= most) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
}

// Calls `BODY` with `T` naming the element type of `code`; returns CUDA's "invalid value" for an unknown code.
#define WITH_TYPE(code, T, ...)                                                                                        \
  switch (code) {                                                                                                      \
  case F32: {                                                                                                          \
    using T = float;                                                                                                   \
    __VA_ARGS__;                                                                                                       \
    break;                                                                                                             \
  }                                                                                                                    \
  case F16: {                                                                                                          \
    using T = __half;                                                                                                  \
    __VA_ARGS__;                                                                                                       \
    break;                                                                                                             \
  }                                                                                                                    \
  case BF16: {                                                                                                         \
    using T = __nv_bfloat16;                                                                                           \
    __VA_ARGS__;                                                                                                       \
    break;                                                                                                             \
  }                                                                                                                    \
  default:                                                                                                             \
    return static_cast<int>(cudaErrorInvalidValue);                                                                    \
  }

#define LAUNCHED() static_cast<int>(cudaGetLastError())
