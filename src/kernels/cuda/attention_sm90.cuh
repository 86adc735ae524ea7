// What the attention kernels for Hopper's warp groups (128 threads) share: `wgmma` and tiles in its layout.
//
// Tiles lie in shared memory as blocks of 64 columns; the 16-byte chunk `c` of a block's row `r` (128 bytes) is at
// chunk `c ^ (r & 7)`: the hardware's 128-byte swizzle, if tiles start at multiples of 1,024 bytes. The same tile is
// read by rows (the sum runs along its columns) or by columns (the sum runs along its rows). Products are asynchronous:
// their accumulators and operands may not be touched before `group_wait`. A warp's part of an accumulator of 64 rows
// are C tiles of 16 rows, as in `attention.cuh`. Only sm_90a has these instructions.
#pragma once

#include "attention.cuh"

namespace attention {

// Threads of the two warp groups that compute.
constexpr int GROUP_THREADS = 256;

// Whether the code that the driver chose for this device has the kernel, which is empty where `wgmma` is missing.
template <typename Kernel> bool is_built(Kernel kernel) {
  cudaFuncAttributes attributes;
  if (cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess) return attributes.numRegs > 64;
  cudaGetLastError(); // the next launch has nothing to do with it
  return false;
}

} // namespace attention

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

namespace attention {
namespace {

// Describes a matrix in shared memory to `wgmma`: where it starts, the distance of its blocks of 64 columns (used when
// it is read by columns) and of its groups of 8 rows, in 16 bytes; 128-byte swizzle. Adding n moves by 16 n bytes.
__device__ __forceinline__ uint64_t group_descriptor(uint32_t address, int block_bytes) {
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) | static_cast<uint64_t>(block_bytes >> 4) << 16 |
         static_cast<uint64_t>(1024 >> 4) << 32 | static_cast<uint64_t>(1) << 62;
}

// c (+)= A B^T, 64 x 8 N x 16: 64 rows of A and 8 N rows of B, 16 columns of both.
template <typename T, int N>
__device__ __forceinline__ void group_multiply_rows(float (&c)[N][4], uint64_t a, uint64_t b, bool is_added);
// c += A B, 64 x 8 N x 16: A in registers as 16 rows a warp, 16 rows of B.
template <typename T, int N>
__device__ __forceinline__ void group_multiply_columns(float (&c)[N][4], const uint32_t (&a)[4], uint64_t b);

// The registers of an accumulator of 8 or 16 C tiles, in the instruction and as its operands; `mode`: "+f" or "=f".
#define GROUP_NAMES_8                                                                                                  \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                             \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define GROUP_NAMES_16                                                                                                 \
  GROUP_NAMES_8                                                                                                        \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                                 \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define GROUP_TILE(mode, c) mode(c[0]), mode(c[1]), mode(c[2]), mode(c[3])
#define GROUP_FOUR_TILES(mode, c, n)                                                                                   \
  GROUP_TILE(mode, c[n]), GROUP_TILE(mode, c[n + 1]), GROUP_TILE(mode, c[n + 2]), GROUP_TILE(mode, c[n + 3])
#define GROUP_OPERANDS_8(mode, c) GROUP_FOUR_TILES(mode, c, 0), GROUP_FOUR_TILES(mode, c, 4)
#define GROUP_OPERANDS_16(mode, c)                                                                                     \
  GROUP_OPERANDS_8(mode, c), GROUP_FOUR_TILES(mode, c, 8), GROUP_FOUR_TILES(mode, c, 12)

// Products of `N` C tiles, `COLUMNS` columns, of values of `TYPE`; the numbers are those of the operands that follow the
// accumulator.
#define GROUP_PRODUCTS(TYPE, type, N, COLUMNS, n0, n1, n2, n3, n4, n5)                                                 \
  template <>                                                                                                          \
  __device__ __forceinline__ void group_multiply_rows<TYPE>(float (&c)[N][4], uint64_t a, uint64_t b, bool is_added) { \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #n2 ", 0; "                                                        \
                 "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." type "." type " {" GROUP_NAMES_##N            \
                 "}, %" #n0 ", %" #n1 ", p, 1, 1, 0, 0; }"                                                             \
                 : GROUP_OPERANDS_##N("+f", c)                                                                         \
                 : "l"(a), "l"(b), "r"(static_cast<int>(is_added)));                                                   \
  }                                                                                                                    \
  template <>                                                                                                          \
  __device__ __forceinline__ void group_multiply_columns<TYPE>(float (&c)[N][4], const uint32_t (&a)[4], uint64_t b) { \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #n5 ", 0; "                                                        \
                 "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." type "." type " {" GROUP_NAMES_##N            \
                 "}, {%" #n0 ", %" #n1 ", %" #n2 ", %" #n3 "}, %" #n4 ", p, 1, 1, 1; }"                                \
                 : GROUP_OPERANDS_##N("+f", c)                                                                         \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1));                                        \
  }
GROUP_PRODUCTS(__half, "f16", 8, 64, 32, 33, 34, 35, 36, 37)
GROUP_PRODUCTS(__half, "f16", 16, 128, 64, 65, 66, 67, 68, 69)
GROUP_PRODUCTS(__nv_bfloat16, "bf16", 8, 64, 32, 33, 34, 35, 36, 37)
GROUP_PRODUCTS(__nv_bfloat16, "bf16", 16, 128, 64, 65, 66, 67, 68, 69)
#undef GROUP_PRODUCTS

__device__ __forceinline__ void group_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void group_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most `LEFT` of the committed products are under way.
template <int LEFT> __device__ __forceinline__ void group_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}
// Makes this thread's writes to shared memory visible to `wgmma`.
__device__ __forceinline__ void group_publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Keeps the compiler from moving values of an accumulator over this point.
template <int N> __device__ __forceinline__ void group_pin(float (&c)[N][4]) {
#pragma unroll
  for (int n = 0; n < N; n++) {
#pragma unroll
    for (int i = 0; i < 4; i++) asm volatile("" : "+f"(c[n][i])::"memory");
  }
}

// Barriers in shared memory, of 8 bytes. A phase is over when `arrivals` threads have arrived; phases count from 0.
__device__ __forceinline__ void phase_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void phase_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Waits until the phase is over that has this parity and is the present one or the one before.
__device__ __forceinline__ void phase_wait(uint32_t barrier, int parity) {
  int is_over;
  do {
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.b32 %0, 1, 0, p; }"
                 : "=r"(is_over)
                 : "r"(barrier), "r"(parity)
                 : "memory");
  } while (!is_over);
}

// Registers of each thread of this warp group from here on.
template <int N> __device__ __forceinline__ void group_keep_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N> __device__ __forceinline__ void group_take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

// `load_tile` for tiles in blocks of 64 columns.
template <typename T, int ROWS, int D>
__device__ __forceinline__ void load_blocks(uint32_t tile, const T *from, int64_t stride, int rows, int d) {
  constexpr int CHUNKS = D / 8, STEP = GROUP_THREADS / CHUNKS;
  static_assert(STEP % 8 == 0 && ROWS % STEP == 0, "every pass has the same place in the swizzle");
  int thread = thread_anew(), row = thread / CHUNKS, chunk = thread % CHUNKS;
  uint32_t to = tile + chunk / 8 * (ROWS * 128) + row * 128 + (((chunk & 7) ^ (row & 7)) << 4);
  const T *source = from + row * stride + chunk * 8;
  bool is_column = chunk * 8 < d;
#pragma unroll
  for (int i = 0; i < ROWS / STEP; i++) {
    bool is_there = is_column && row + i * STEP < rows;
    copy_16_bytes(to + i * (STEP * 128), is_there ? source : from, is_there);
    source += STEP * stride;
  }
}

// Starts c = A B^T: 64 rows at `a` of a tile of `A_ROWS` rows, and the tile of 8 N rows at `b`; `D` columns.
template <typename T, int D, int A_ROWS, int N>
__device__ __forceinline__ void start_rows(float (&c)[N][4], uint32_t a, uint32_t b) {
  const uint64_t left = group_descriptor(a, 16), right = group_descriptor(b, 16);
#pragma unroll
  for (int step = 0; step < D / 16; step++) {
    const int block = step / 4, within = step % 4 * (32 >> 4); // 16 columns are 32 bytes
    group_multiply_rows<T>(c, left + block * (A_ROWS * 128 >> 4) + within, right + block * (N * 8 * 128 >> 4) + within,
                           step > 0);
  }
  group_commit();
}

// Starts c += A B: A tiles in registers, and the tile of `16 K` rows at `b`.
template <typename T, int K, int N>
__device__ __forceinline__ void start_columns(float (&c)[N][4], const uint32_t (&a)[K][4], uint32_t b) {
  const uint64_t right = group_descriptor(b, 16 * K * 128);
#pragma unroll
  for (int step = 0; step < K; step++) group_multiply_columns<T>(c, a[step], right + step * (16 * 128 >> 4));
  group_commit();
}

} // namespace
} // namespace attention

#endif
