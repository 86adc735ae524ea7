// What kernels for few rows share: products of 16-bit operands on tensor cores, values of any type, launches that begin while
// the kernel before them ends.
#pragma once

#include "common.cuh"

__device__ __forceinline__ float load_any(const void *data, int dtype, int64_t at) {
  if (dtype == F32) return static_cast<const float *>(data)[at];
  if (dtype == F16) return to_float(static_cast<const __half *>(data)[at]);
  return to_float(static_cast<const __nv_bfloat16 *>(data)[at]);
}

__device__ __forceinline__ void store_any(void *data, int dtype, int64_t at, float x) {
  if (dtype == F32) static_cast<float *>(data)[at] = x;
  else if (dtype == F16) static_cast<__half *>(data)[at] = from_float<__half>(x);
  else static_cast<__nv_bfloat16 *>(data)[at] = from_float<__nv_bfloat16>(x);
}

__device__ __forceinline__ void load_eight(float (&x)[8], const void *data, int dtype, int64_t at) {
  if (dtype == F32) load_pack<float, 8>(x, static_cast<const float *>(data) + at);
  else if (dtype == F16) load_pack<__half, 8>(x, static_cast<const __half *>(data) + at);
  else load_pack<__nv_bfloat16, 8>(x, static_cast<const __nv_bfloat16 *>(data) + at);
}

__device__ __forceinline__ void store_eight(void *data, int dtype, int64_t at, const float (&x)[8]) {
  if (dtype == F32) store_pack<float, 8>(static_cast<float *>(data) + at, x);
  else if (dtype == F16) store_pack<__half, 8>(static_cast<__half *>(data) + at, x);
  else store_pack<__nv_bfloat16, 8>(static_cast<__nv_bfloat16 *>(data) + at, x);
}

// 16 bytes that are read once: they do not displace what others read again.
__device__ __forceinline__ uint4 load_streaming(const uint8_t *p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

// Asks for the cache's line at an address, which is read soon.
__device__ __forceinline__ void prefetch(const void *p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

template <typename T> __device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  Pack<T, 2> pair;
  pair.v[0] = from_float<T>(low);
  pair.v[1] = from_float<T>(high);
  return *reinterpret_cast<uint32_t *>(&pair);
}
template <> __device__ __forceinline__ uint32_t pack_pair<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t *>(&pair);
}
template <> __device__ __forceinline__ uint32_t pack_pair<__half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t *>(&pair);
}

// c [16, 8] += a [16, 16] b [16, 8] in f32. Lane 4 g + t has, of a, rows g and g + 8 (registers 0, 2 and 1, 3), columns
// 2 t, 2 t + 1 (0, 1) and those plus 8 (2, 3); of b the same rows as a's columns in column g; of c columns 2 t, 2 t + 1 of
// rows g and g + 8.
template <typename T>
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void multiply<__half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(b0));
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[2]), "r"(a[3]), "r"(b1));
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}
template <>
__device__ __forceinline__ void multiply<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                                        uint32_t b1) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  __trap(); // these cards have no bf16 products, and the launchers refuse
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// Orders of the columns of rows that a product reads. PLAIN: as they are. FRAGMENTS: within 128 columns, 8 at a time of each
// of the four lanes that share a row. TILES: blocks of 64 columns, rows (`stride` of them) 128 bytes apart in the 128-byte
// swizzle, within two blocks 16 columns of an operand at a time.
constexpr int PLAIN = 0, FRAGMENTS = 1, TILES = 2;

// Types of rows of products with 4-bit codes: f16, a 64th of each value of an activation of type f16 or bf16; a finite value stays
// finite.
constexpr int SCALED_F16 = 3, SCALED_BF16 = 4;
constexpr float X_SCALE = 64.0f;
__host__ __device__ __forceinline__ bool is_scaled(const Matrix &m) { return m.dtype >= SCALED_F16; }
__host__ __forceinline__ int activation_type(const Matrix &m) {
  return m.dtype == SCALED_F16 ? F16 : m.dtype == SCALED_BF16 ? BF16 : m.dtype;
}
__device__ __forceinline__ float to_scaled(float x) {
  const float scaled = x * (1.0f / X_SCALE), most = 65504.0f;
  return fabsf(x) < INFINITY ? fminf(fmaxf(scaled, -most), most) : scaled;
}

// Where a value of such a matrix lies.
__device__ __forceinline__ int64_t place_of(const Matrix &m, int row, int col) {
  if (m.layout == PLAIN) return row * m.stride + col;
  if (m.layout == FRAGMENTS)
    return row * m.stride + (col & ~127) + ((col >> 3 & 3) << 5) + ((col >> 5 & 3) << 3) + (col & 7);
  const int within = ((col >> 2 & 7) << 4) + ((col >> 5 & 3) << 1) + (col & 1) + ((col & 2) << 2);
  const int unit = within >> 3 & 7, block = (col >> 7) * 2 + (within >> 6);
  return block * m.stride * 64 + row * 64 + ((unit ^ (row & 7)) << 3) + (within & 7);
}

// Stores 8 neighbouring columns, the first a multiple of 8, in a 16-bit type or scaled.
template <typename T> __device__ __forceinline__ void store_columns(const Matrix &m, int row, int col, const float (&v)[8]) {
  static_assert(sizeof(T) == 2, "pairs are words");
  uint32_t pairs[4];
#pragma unroll
  for (int i = 0; i < 4; i++)
    pairs[i] = is_scaled(m) ? pack_pair<__half>(to_scaled(v[2 * i]), to_scaled(v[2 * i + 1])) : pack_pair<T>(v[2 * i], v[2 * i + 1]);
  uint16_t *data = static_cast<uint16_t *>(m.data);
  if (m.layout != TILES) {
    *reinterpret_cast<uint4 *>(data + place_of(m, row, col)) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    return;
  }
  // Neighbouring pairs are a unit of 8 apart, within the row's swizzle.
  const int within = (col >> 5 & 3) << 1, units = col >> 2 & 7, block = (col >> 7) * 2 + (units >> 2);
  data += block * m.stride * 64 + row * 64 + within;
#pragma unroll
  for (int i = 0; i < 4; i++)
    *reinterpret_cast<uint32_t *>(data + (((units * 2 & 7) + i ^ (row & 7)) << 3)) = pairs[i];
}

// What the kernel before this one wrote may be read after `wait_for_dependency`; `launch_dependents` lets the next one begin
// where it does not read what this one writes.
__device__ __forceinline__ void wait_for_dependency() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void launch_dependents() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Launches a kernel that calls `wait_for_dependency` before it touches what other kernels touch; where the card can, it begins
// while the one before it ends.
template <typename... Params, typename... Args>
int launch_after(void (*kernel)(Params...), dim3 grid, unsigned threads, size_t shared, cudaStream_t stream,
                 const Args &...args) {
  int device = 0, major = 0;
  cudaError_t code = cudaGetDevice(&device);
  if (code == cudaSuccess) code = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (code != cudaSuccess) return static_cast<int>(code);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid, config.blockDim = dim3(threads), config.dynamicSmemBytes = shared, config.stream = stream;
  config.attrs = &attribute, config.numAttrs = major >= 9 ? 1 : 0;
  return static_cast<int>(cudaLaunchKernelEx(&config, kernel, args...));
}
