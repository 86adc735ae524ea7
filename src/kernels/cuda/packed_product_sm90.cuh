// What the products of few rows on Hopper's warp groups share: packed_product_sm90.cu, packed_codes_sm90.cu.
#pragma once

#include "attention_sm90.cuh"
#include "packed_product.cuh"

#ifdef __CUDACC__
namespace {

// Floats from a column of sums in shared memory to the next: lanes that store operands' sums, and lanes that read eight rows, ask
// different banks.
template <int ROWS> constexpr int sums_step() { return ROWS + 4; }

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
// the two rows of W of this lane. `memory`: 8 N rows of 128 bytes in the swizzle, with SwiGLU twice, free for all threads after
// `free_memory`; what comes from elsewhere is asked for before that.
template <typename T, int N, int THREADS, bool IS_SWIGLU, typename FreeMemory>
__device__ __forceinline__ void add_adapters(float (&acc)[N][4], const Product &p, const Share &share, const Packed &w,
                                             const int64_t (&row)[2], unsigned char *memory, FreeMemory free_memory) {
  constexpr int COLS = 8 * N, SOURCES = IS_SWIGLU ? 2 : 1, TIMES = (COLS * 4 + THREADS - 1) / THREADS;
  const int t = threadIdx.x % 4;
  const uint32_t ring = static_cast<uint32_t>(__cvta_generic_to_shared(memory));
  int most_rank = 0;
  for (int i = 0; i < SOURCES; i++) {
    const Packed &source = IS_SWIGLU ? p.w[i] : w;
    most_rank = max(most_rank, source.b ? source.rank : 0);
  }
  if (share.part != 0 || !p.low) most_rank = 0;
  if (most_rank == 0) free_memory();
#pragma unroll 1
  for (int rank = 0; rank < most_rank; rank += 16) {
    // With SwiGLU the two matrices have their own low-rank products, in blocks of their own beside each other; the other's rows add
    // zeros.
    uint32_t ranks[SOURCES][4];
    uint2 low[SOURCES][TIMES];
#pragma unroll
    for (int which = 0; which < SOURCES; which++) {
      const Packed &source = IS_SWIGLU ? p.w[which] : w;
      const bool is_there = source.b && rank < source.rank;
      uint2 half[2] = {make_uint2(0, 0), make_uint2(0, 0)};
      if (is_there && &source == &w) {
#pragma unroll
        for (int i = 0; i < 2; i++)
          half[i] = *reinterpret_cast<const uint2 *>(static_cast<const T *>(w.b) + row[i] * w.rank + rank + t * 4);
      }
      ranks[which][0] = half[0].x, ranks[which][1] = half[1].x, ranks[which][2] = half[0].y, ranks[which][3] = half[1].y;
#pragma unroll
      for (int i = 0; i < TIMES; i++) {
        const int at = i * THREADS + threadIdx.x, line = at / 4, four = at % 4;
        low[which][i] = make_uint2(0, 0);
        if (is_there && line < p.x.rows) low[which][i] = low_ranks<T>(p, line, source.first_low + rank + four * 4);
      }
    }
    if (rank == 0) free_memory();
#pragma unroll
    for (int which = 0; which < SOURCES; which++)
#pragma unroll
      for (int i = 0; i < TIMES; i++) {
        const int at = i * THREADS + threadIdx.x, line = at / 4, four = at % 4;
        if (line >= COLS) break;
        // Columns 2 t, 2 t + 1 and those plus 8 of a row of 128 bytes, in the swizzle.
        unsigned char *to = memory + (which * COLS + line) * 128;
        *reinterpret_cast<uint32_t *>(to + ((0 ^ (line & 7)) << 4) + four * 4) = low[which][i].x;
        *reinterpret_cast<uint32_t *>(to + ((1 ^ (line & 7)) << 4) + four * 4) = low[which][i].y;
      }
    group_publish();
    block_barrier<THREADS>();
    group_fence();
#pragma unroll
    for (int which = 0; which < SOURCES; which++)
      group_multiply<T, N>(acc, ranks[which], group_descriptor(ring + which * COLS * 128, 16));
    group_commit();
    group_wait<0>();
    block_barrier<THREADS>();
  }
}

// A warp's 16 rows of sums to their place, [COLS, sums_step].
template <int N, int ROWS> __device__ __forceinline__ void store_sums(float *sums, int warp, const float (&acc)[N][4]) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int n = 0; n < N; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) sums[(n * 8 + t * 2 + i % 2) * sums_step<ROWS>() + warp * 16 + g + i / 2 * 8] = acc[n][i];
}

// The end of a block, as `finish`, from its own sums in shared memory. Of a tile whose sum is cut, each of its blocks adds all parts,
// in their order, for some of the columns: it waits until the others' are there. Blocks of a tile are neighbours in the order in
// which blocks begin, so that the first of those that wait have all of theirs, whatever else the card does.
template <typename T, bool IS_SWIGLU, int ROWS, int COLS, int THREADS, typename GateOf, typename UpOf>
__device__ __forceinline__ void finish_sums(const Product &p, const Tile &at, const Share &share, const float *sums,
                                            GateOf gate_of, UpOf up_of) {
  constexpr int STEP = sums_step<ROWS>(), N = 8, OUTPUTS = IS_SWIGLU ? ROWS / 2 : ROWS, GROUPS = OUTPUTS / N;
  const Packed &w = p.w[at.which];
  const bool is_split = share.parts > 1;
  const int cols = min(COLS, p.x.rows);
  const int first = cols * share.part / share.parts, end = cols * (share.part + 1) / share.parts;
  const int64_t place = share.place, step = share.step * (ROWS * COLS);
  float *parts = p.partial + place * (ROWS * COLS);
  if (is_split) {
    // What the others add.
    float *mine = parts + share.part * step;
    const int others = ROWS * (cols - (end - first));
    for (int i = threadIdx.x * 4; i < others; i += THREADS * 4) {
      const int row = i % ROWS, at = i / ROWS, col = at < first ? at : at + end - first;
      __stcg(reinterpret_cast<float4 *>(mine + col * ROWS + row), *reinterpret_cast<const float4 *>(sums + col * STEP + row));
    }
    __threadfence();
    block_barrier<THREADS>();
    if (threadIdx.x == 0) {
      uint32_t *arrived = p.arrived + place;
      const uint32_t all = share.parts;
      atomicAdd(arrived, 1);
      while (*static_cast<volatile uint32_t *>(arrived) < all) __nanosleep(32);
      // The last one to see all leaves the counter as it was.
      if (atomicAdd(arrived, 1) == 2 * all - 1) *static_cast<volatile uint32_t *>(arrived) = 0;
      __threadfence();
    }
    block_barrier<THREADS>();
  }
  // Eight rows of a column.
  auto add = [&](float (&sum)[N], int row, int col) {
    const float *own = sums + col * STEP + row;
#pragma unroll 4
    for (int part = 0; part < share.parts; part++) {
      const float *from = parts + part * step + col * ROWS + row;
      const bool is_own = part == share.part;
#pragma unroll
      for (int i = 0; i < N; i += 4) {
        const float4 more = is_own ? *reinterpret_cast<const float4 *>(own + i) : __ldcg(reinterpret_cast<const float4 *>(from + i));
        sum[i] += more.x, sum[i + 1] += more.y, sum[i + 2] += more.z, sum[i + 3] += more.w;
      }
    }
  };
  // Who reads the residual stream does so several times before he adds to it; a loop that is gone through once is not to be long.
  constexpr int TIMES = (GROUPS * COLS + THREADS - 1) / THREADS, AT_ONCE = IS_SWIGLU ? (TIMES < 8 ? 1 : 2) : TIMES < 4 ? TIMES : 4;
#pragma unroll AT_ONCE
  for (int i = threadIdx.x; i < GROUPS * (end - first); i += THREADS) {
    const int own = i % GROUPS * N, line = first + i / GROUPS, row = at.tile * OUTPUTS + own;
    if (row >= w.rows) continue;
    if constexpr (IS_SWIGLU) {
      float gate[N] = {}, up[N] = {};
      add(gate, gate_of(own), line);
      add(up, up_of(own), line);
#pragma unroll
      for (int j = 0; j < N; j++) {
        const float one = to_float(from_float<T>(with_bias(p.w[0], row + j, gate[j])));
        const float two = to_float(from_float<T>(with_bias(p.w[1], row + j, up[j])));
        const float sigmoid = __fdividef(1.0f, 1.0f + __expf(-one)); // as swiglu.cu
        up[j] = two * (one * sigmoid);
      }
      store_columns<T>(p.out, line, row, up);
    } else {
      const int to = at.first_out + row;
      float sum[N] = {};
      add(sum, own, line);
      float onto[N] = {};
      if (p.residual.data) load_eight(onto, p.residual.data, p.residual.dtype, line * p.residual.stride + to);
#pragma unroll
      for (int j = 0; j < N; j++) sum[j] = onto[j] + with_bias(w, row + j, sum[j]);
      store_eight(p.out.data, p.out.dtype, line * p.out.stride + to, sum);
    }
  }
}

#endif

} // namespace
#endif
