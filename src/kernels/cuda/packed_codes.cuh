// What products of few rows with 4-bit codes share (packed_codes.cu, packed_codes_sm90.cu, packed_codes_stream_sm90.cu): how codes become
// operands.
//
// x is f16, its values 1 / X_SCALE of what they are (SCALED_F16 and SCALED_BF16 in mma.cuh), so that an activation of four million
// still fits. A byte of two codes is looked up in shared memory, where each of its 256 pairs of f16 values stands once for each lane,
// so that no two lanes ask one bank; a block's maximum times X_SCALE, in f16, multiplies the pair. An operand is thus within 2^-9.4 of
// the exact value (a product of which all three are rounded to 11 bits), where training's bf16 is within 2^-8. Sums are f32. No block waits for all its maxima before it begins: a chunk's come with its codes.
//
// Bound: for two values two integer instructions, an access of a bank by each lane and a product of pairs: 64 values a clock and
// multiprocessor, about twice what device memory delivers (34 on an H200).
#pragma once

#include "packed_product.cuh"

// The table begins at a multiple of its size among the addresses of shared memory, so that a byte's row and a lane's place in it are
// put together by one instruction.
constexpr int TABLE_BYTES = 256 * 32 * 4;

// Shared memory of a kernel whose block uses the first `before` bytes, and the table behind them. `before` counts from the beginning
// of all shared memory, of which the system and the kernel's own variables have the first `OTHERS`.
constexpr int OTHERS = 2048;
constexpr int table_address(int before) { return (before + OTHERS + TABLE_BYTES - 1) / TABLE_BYTES * TABLE_BYTES; }
template <typename... Parameters> cudaError_t shared_with_table(void (*kernel)(Parameters...), int before, int &bytes) {
  int device = 0, most = 0;
  cudaFuncAttributes attributes;
  cudaError_t code = allow_shared_memory(kernel);
  if (code == cudaSuccess) code = cudaGetDevice(&device);
  if (code == cudaSuccess) code = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (code == cudaSuccess) code = cudaFuncGetAttributes(&attributes, kernel);
  // Where a block may have no more than the table's end, that is the end of what it may have besides its variables.
  const int own = most - static_cast<int>(attributes.sharedSizeBytes), all = table_address(before) + TABLE_BYTES;
  bytes = all < own ? all : own;
  return code;
}

#ifdef __CUDACC__
namespace {

__device__ __forceinline__ uint32_t shared_address(const void *p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Fills the table, whose rows are STEP bytes apart, by THREADS threads, of which this one is number `thread`; to be followed by a
// barrier. `memory`: the block's dynamic shared memory.
template <int THREADS, int STEP = 128>
__device__ __forceinline__ void fill_table(uint32_t table, const void *memory, const float *values, unsigned thread = threadIdx.x) {
  if (shared_address(memory) > OTHERS) __trap();
  const float value = __ldg(values + thread % 16);
#pragma unroll
  for (int i = thread; i < TABLE_BYTES / 16; i += THREADS) {
    // 8 accesses of 16 bytes for each byte; its high nibble is the first code.
    const int byte = i / 8;
    const uint32_t pair =
        pack_pair<__half>(__shfl_sync(0xffffffffu, value, byte >> 4, 16), __shfl_sync(0xffffffffu, value, byte, 16));
    asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(table + i * 16 + byte * (STEP - 128)), "r"(pair) : "memory");
  }
}

// This lane's place in a row of the table, to be asked for behind the barrier: accesses do not move before it. The compiler is not to
// know of what it is made.
__device__ __forceinline__ uint32_t own_place(uint32_t table) {
  uint32_t own;
  asm volatile("mov.b32 %0, %1;" : "=r"(own) : "r"(table + threadIdx.x % 32 * 4) : "memory");
  return own;
}

// 32 columns of a row: 16 bytes of codes.
struct Codes {
  uint4 v;

  __device__ __forceinline__ void fetch(const uint8_t *from) { v = load_streaming(from); }
  // Columns 8 part .. 8 part + 7 as four pairs. `own`: this lane's place.
  __device__ __forceinline__ void values(uint32_t (&out)[4], int part, uint32_t own, __half2 scale) const {
    const uint32_t word = part == 0 ? v.x : part == 1 ? v.y : part == 2 ? v.z : v.w;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const uint32_t row = i == 0 ? word << 7 : word >> (8 * i - 7), place = row & 0x7f80 | own;
      uint32_t bits;
      asm("ld.shared.b32 %0, [%1];" : "=r"(bits) : "r"(place));
      const __half2 scaled = __hmul2(*reinterpret_cast<const __half2 *>(&bits), scale);
      out[i] = *reinterpret_cast<const uint32_t *>(&scaled);
    }
  }
};

// The maximum of a block of 64 values of a row: a lane reads its own one along with the codes. IS_NESTED: maxima are codes, whose
// factor is `value`.
template <bool IS_NESTED> struct Maximum {
  uint32_t code;
  float value;

  __device__ __forceinline__ void fetch(const Packed &w, uint32_t block) {
    if (IS_NESTED) {
      code = __ldg(w.codes + block);
      value = __ldg(w.nested + (block >> 8));
    } else {
      value = __ldg(w.absmax + block);
    }
  }
  // As the operands take it.
  __device__ __forceinline__ __half2 scale(const Packed &w) const {
    const float maximum = IS_NESTED ? fmaf(__ldg(w.map + code), value, w.offset) : value;
    return __float2half2_rn(maximum * X_SCALE);
  }
};

} // namespace
#endif
