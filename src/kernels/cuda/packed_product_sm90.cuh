// What the products of few rows on Hopper's warp groups share: packed_product_sm90.cu, packed_codes_sm90.cu.
#pragma once

#include "attention_sm90.cuh"
#include "packed_product.cuh"

#ifdef __CUDACC__
namespace {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

using attention::group_commit;
using attention::group_descriptor;
using attention::group_fence;
using attention::group_publish;
using attention::group_wait;
using attention::phase_arrive;
using attention::phase_init;
using attention::phase_wait;

#define GROUP_NAMES_1 "%0, %1, %2, %3"
#define GROUP_NAMES_2 "%0, %1, %2, %3, %4, %5, %6, %7"
#define GROUP_NAMES_4 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define GROUP_OPERANDS_1(mode, c) GROUP_TILE(mode, c[0])
#define GROUP_OPERANDS_2(mode, c) GROUP_TILE(mode, c[0]), GROUP_TILE(mode, c[1])
#define GROUP_OPERANDS_4(mode, c) GROUP_FOUR_TILES(mode, c, 0)
#define GROUP_NAMES_32                                                                                                 \
  GROUP_NAMES_16                                                                                                       \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, "   \
  "%86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, "   \
  "%107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, " \
  "%126, %127"
#define GROUP_OPERANDS_32(mode, c)                                                                                     \
  GROUP_OPERANDS_16(mode, c), GROUP_FOUR_TILES(mode, c, 16), GROUP_FOUR_TILES(mode, c, 20),                            \
      GROUP_FOUR_TILES(mode, c, 24), GROUP_FOUR_TILES(mode, c, 28)

// c += A B^T, 64 x 8 N x 16: A in registers as 16 rows a warp, 8 N rows of B.
template <typename T, int N>
__device__ __forceinline__ void group_multiply(float (&c)[N][4], const uint32_t (&a)[4], uint64_t b);
#define GROUP_PRODUCT(TYPE, type, N, COLUMNS, n0, n1, n2, n3, n4)                                                      \
  template <>                                                                                                          \
  __device__ __forceinline__ void group_multiply<TYPE, N>(float (&c)[N][4], const uint32_t (&a)[4], uint64_t b) {      \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." type "." type " {" GROUP_NAMES_##N            \
                 "}, {%" #n0 ", %" #n1 ", %" #n2 ", %" #n3 "}, %" #n4 ", 1, 1, 1, 0;"                                  \
                 : GROUP_OPERANDS_##N("+f", c)                                                                         \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                                \
  }
GROUP_PRODUCT(__half, "f16", 1, 8, 4, 5, 6, 7, 8)
GROUP_PRODUCT(__half, "f16", 2, 16, 8, 9, 10, 11, 12)
GROUP_PRODUCT(__half, "f16", 4, 32, 16, 17, 18, 19, 20)
GROUP_PRODUCT(__half, "f16", 8, 64, 32, 33, 34, 35, 36)
GROUP_PRODUCT(__half, "f16", 16, 128, 64, 65, 66, 67, 68)
GROUP_PRODUCT(__half, "f16", 32, 256, 128, 129, 130, 131, 132)
GROUP_PRODUCT(__nv_bfloat16, "bf16", 1, 8, 4, 5, 6, 7, 8)
GROUP_PRODUCT(__nv_bfloat16, "bf16", 2, 16, 8, 9, 10, 11, 12)
GROUP_PRODUCT(__nv_bfloat16, "bf16", 4, 32, 16, 17, 18, 19, 20)
GROUP_PRODUCT(__nv_bfloat16, "bf16", 8, 64, 32, 33, 34, 35, 36)
GROUP_PRODUCT(__nv_bfloat16, "bf16", 16, 128, 64, 65, 66, 67, 68)
GROUP_PRODUCT(__nv_bfloat16, "bf16", 32, 256, 128, 129, 130, 131, 132)
#undef GROUP_PRODUCT

// Begins a copy of a block of x; the barrier's phase is over when it is there.
__device__ __forceinline__ void begin_block(uint32_t to, const void *from, int bytes, uint32_t barrier) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}

// The adapters: 16 ranks at a time as a block of 16 columns of x; lane t has ranks 4 t .. 4 t + 3. `w` and `row`: the matrix and
// the two rows of W of this lane. `memory`: 8 N rows of 128 bytes in the swizzle, free.
template <typename T, int N, int THREADS, bool IS_SWIGLU>
__device__ __forceinline__ void add_adapters(float (&acc)[N][4], const Product &p, const Share &share, const Packed &w,
                                             const int64_t (&row)[2], unsigned char *memory) {
  constexpr int COLS = 8 * N;
  const int t = threadIdx.x % 4;
  const uint32_t ring = static_cast<uint32_t>(__cvta_generic_to_shared(memory));
  int most_rank = 0;
  for (int i = 0; i < p.count; i++) most_rank = max(most_rank, p.w[i].b ? p.w[i].rank : 0);
  if (share.part != 0 || !p.low || !(IS_SWIGLU ? most_rank > 0 : w.b != nullptr)) return;
  for (int rank = 0; rank < (IS_SWIGLU ? most_rank : w.rank); rank += 16) {
    // With SwiGLU the two matrices have their own low-rank products, in blocks of their own; the other's rows add zeros.
    for (int which = 0; which < (IS_SWIGLU ? 2 : 1); which++) {
      const Packed &source = IS_SWIGLU ? p.w[which] : w;
      const bool is_there = source.b && rank < source.rank;
#pragma unroll 2
      for (int i = threadIdx.x; i < COLS * 4; i += THREADS) {
        const int line = i / 4, four = i % 4;
        uint2 ranks = make_uint2(0, 0);
        if (is_there && line < p.x.rows) ranks = low_ranks<T>(p, line, source.first_low + rank + four * 4);
        // Columns 2 t, 2 t + 1 and those plus 8 of a row of 128 bytes, in the swizzle.
        unsigned char *to = memory + line * 128;
        *reinterpret_cast<uint32_t *>(to + ((0 ^ (line & 7)) << 4) + four * 4) = ranks.x;
        *reinterpret_cast<uint32_t *>(to + ((1 ^ (line & 7)) << 4) + four * 4) = ranks.y;
      }
      group_publish();
      block_barrier<THREADS>();
      uint2 half[2] = {make_uint2(0, 0), make_uint2(0, 0)};
      if (is_there && &source == &w) {
#pragma unroll
        for (int i = 0; i < 2; i++)
          half[i] = *reinterpret_cast<const uint2 *>(static_cast<const T *>(w.b) + row[i] * w.rank + rank + t * 4);
      }
      const uint32_t ranks[4] = {half[0].x, half[1].x, half[0].y, half[1].y};
      group_fence();
      group_multiply<T, N>(acc, ranks, group_descriptor(ring, 16));
      group_commit();
      group_wait<0>();
      block_barrier<THREADS>();
    }
  }
}

#endif

} // namespace
#endif
