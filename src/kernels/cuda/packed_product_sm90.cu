// Products of up to 256 rows with packed weights on Hopper's warp groups: see packed_product.cuh.
//
// Layout: columns of x in the order TILES: blocks of 64 columns of 8, 16, 32, 64, 128 or 256 rows in the hardware's swizzle, so
// that a block comes to shared memory in one copy.
//
// Launch: a block is a warp group with 64 rows of W (with SwiGLU 32 of gate and 32 of up), all rows of x and a part of K
// (blockIdx.x). The weights are the operand in registers: the values of the next 16 columns are made while `wgmma` multiplies
// the last ones; x is the one in shared memory, a ring of blocks that bulk copies fill. The adapters' ranks follow as 16 more
// columns at a time, with low-rank products [M, R] as x. Sums as in packed_product.cuh.
//
// Bound: bytes of the weights for few rows, of GGUF blocks the instructions of a value; tensor cores from 128 rows on.
#include "packed_product_sm90.cuh"

namespace {

constexpr int GROUP = 128, ROWS = 64;

template <int N> constexpr int stages() { return N == 32 ? 3 : N == 16 ? 4 : 6; }
// Blocks of a multiprocessor.
template <int N> constexpr int resident() { return N == 32 ? 2 : 3; }
template <int N> constexpr int stage_bytes() { return N * 8 * 128; }

template <typename T, int FORMAT, int N, bool IS_SWIGLU>
__global__ void __launch_bounds__(GROUP, (resident<N>())) product_sm90(const __grid_constant__ Product p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  constexpr int STAGES = stages<N>(), BYTES = stage_bytes<N>(), COLS = 8 * N;
  extern __shared__ __align__(1024) unsigned char memory[];
  __shared__ __align__(8) uint64_t barriers[2 * STAGES];
  float *sums = reinterpret_cast<float *>(memory);
  const uint32_t ring = static_cast<uint32_t>(__cvta_generic_to_shared(memory));
  const uint32_t full = static_cast<uint32_t>(__cvta_generic_to_shared(barriers)), empty = full + 8 * STAGES;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, K = p.x.cols;
  const Share share{static_cast<int>(blockIdx.x), p.splits, blockIdx.y, gridDim.y};
  const int2 chunks = chunks_of(p, share);
  const int count = 2 * (chunks.y - chunks.x); // blocks of 64 columns

  const Tile at = IS_SWIGLU ? Tile{0, static_cast<int>(blockIdx.y), 0} : find_tile<ROWS>(p, blockIdx.y);
  auto row_of = [&](int own, const Packed *&matrix) {
    matrix = IS_SWIGLU ? &p.w[own / 32] : &p.w[at.which];
    return min(IS_SWIGLU ? at.tile * 32 + own % 32 : at.tile * ROWS + own, matrix->rows - 1);
  };
  const Packed *own_matrix;
  int64_t from[2], row[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    row[half] = row_of(warp * 16 + g + half * 8, own_matrix);
    from[half] = row[half] * K + t * 32;
  }
  const Packed &w = *own_matrix;
  Piece<T, FORMAT> now[2], next[2];
  auto fetch = [&](Piece<T, FORMAT>(&to)[2], int chunk) {
#pragma unroll
    for (int half = 0; half < 2; half++) to[half].fetch(w, from[half] + chunk * CHUNK);
  };
  constexpr bool IS_AHEAD = FORMAT >= GGUF && is_fetched_ahead<Piece<T, FORMAT>>(FORMAT);
  constexpr bool IS_DENSE = FORMAT == DENSE || FORMAT == DENSE_OTHER;
  if (!IS_DENSE) fetch(now, chunks.x);
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      phase_init(full + 8 * i, 1);
      phase_init(empty + 8 * i, GROUP / 32);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  if (share.part == 0 && w.b && t == 0) {
#pragma unroll
    for (int half = 0; half < 2; half++) prefetch(static_cast<const T *>(w.b) + row[half] * w.rank);
  }
  launch_dependents();
  if (!p.waits_late) wait_for_dependency();
  __syncthreads();
  const uint8_t *x = static_cast<const uint8_t *>(p.x.data) + static_cast<int64_t>(chunks.x) * 2 * BYTES;
  if (threadIdx.x == 0) {
    // What other kernels wrote before is visible to bulk copies.
    asm volatile("fence.proxy.async;" ::: "memory");
    for (int i = 0; i < STAGES && i < count; i++)
      begin_block(ring + i * BYTES, x + static_cast<int64_t>(i) * BYTES, BYTES, full + 8 * i);
  }

  float acc[N][4];
#pragma unroll
  for (int n = 0; n < N; n++) acc[n][0] = acc[n][1] = acc[n][2] = acc[n][3] = 0.0f;
  // Two operands of 16 columns at a time, made while the two before them are multiplied.
  uint32_t left[2][2][4];
  auto make = [&](uint32_t(&to)[2][4], const Piece<T, FORMAT>(&pieces)[2], int part) {
    uint32_t top[4], low[4];
    pieces[0].values(top, part);
    pieces[1].values(low, part);
#pragma unroll
    for (int two = 0; two < 2; two++) {
      to[two][0] = top[2 * two], to[two][1] = low[2 * two];
      to[two][2] = top[2 * two + 1], to[two][3] = low[2 * two + 1];
    }
  };
  if (IS_DENSE) fetch(now, chunks.x);
  now[0].open(), now[1].open();
  make(left[0], now, 0);
  int block = 0;
  for (int chunk = chunks.x; chunk < chunks.y; chunk++) {
    const bool has_next = chunk + 1 < chunks.y;
    if (IS_AHEAD && has_next) fetch(next, chunk + 1);
#pragma unroll
    for (int part = 0; part < 4; part++) {
      const int stage = block % STAGES;
      if (part % 2 == 0) phase_wait(full + 8 * stage, block / STAGES & 1);
      const uint64_t right = group_descriptor(ring + stage * BYTES, 16) + part % 2 * (64 >> 4);
      group_fence();
      group_multiply<T, N>(acc, left[part % 2][0], right);
      group_multiply<T, N>(acc, left[part % 2][1], right + (32 >> 4));
      group_commit();
      group_wait<1>();
      if (part % 2 == 0 && block > 0) {
        // All of the block before has been multiplied: its place is free.
        const int before = block - 1, next_block = before + STAGES;
        if (lane == 0) phase_arrive(empty + 8 * (before % STAGES));
        if (threadIdx.x == 0 && next_block < count) {
          phase_wait(empty + 8 * (before % STAGES), before / STAGES & 1);
          begin_block(ring + before % STAGES * BYTES, x + static_cast<int64_t>(next_block) * BYTES, BYTES,
                      full + 8 * (before % STAGES));
        }
        // Who waits for the other warps does so for its own: registers of a warp hold what all of its lanes wait for next.
        __syncwarp();
      }
      if (part < 3) {
        make(left[(part + 1) % 2], now, part + 1);
        // The last operands are made: a piece that has no second place may come.
        if (part == 2 && !IS_AHEAD && !IS_DENSE && has_next) fetch(now, chunk + 1);
      } else if (has_next) {
        if (IS_AHEAD) {
#pragma unroll
          for (int half = 0; half < 2; half++) now[half] = next[half];
        } else if (IS_DENSE) {
          // Operands of 16-bit values are the piece itself: no register of it may change while they are multiplied.
          group_wait<0>();
          fetch(now, chunk + 1);
        }
        now[0].open(), now[1].open();
        make(left[0], now, 0);
      }
      if (part % 2 == 1) block++;
    }
  }
  if (p.waits_late) wait_for_dependency();
  add_adapters<T, N, GROUP, IS_SWIGLU>(acc, p, share, w, row, memory, [&]() {
    group_wait<0>();
    block_barrier<GROUP>();
  });

  store_sums<N, ROWS>(sums, warp, acc);
  __syncthreads();
  auto gate_of = [](int own) { return own; };
  auto up_of = [](int own) { return own + 32; };
  finish_sums<T, IS_SWIGLU, ROWS, COLS, GROUP>(p, at, share, sums, gate_of, up_of);
#endif
}

template <typename T, int FORMAT, int N, bool IS_SWIGLU> int launch(const Product &p, int tiles, cudaStream_t stream) {
  const size_t ring = stages<N>() * stage_bytes<N>(), sums = sizeof(float) * 8 * N * sums_step<ROWS>();
  const size_t bytes = ring > sums ? ring : sums;
  auto kernel = product_sm90<T, FORMAT, N, IS_SWIGLU>;
  const cudaError_t code = allow_shared_memory(kernel);
  if (code != cudaSuccess) return static_cast<int>(code);
  return launch_after(kernel, dim3(p.splits, tiles), GROUP, bytes, stream, p);
}

#ifndef PACKED_GGUF // whose files include this one for the kernel

template <typename T, int FORMAT> int launch_rows(const Product &p, bool is_swiglu, int tiles, cudaStream_t stream) {
  switch (p.x.stride) {
  case 8: return is_swiglu ? launch<T, FORMAT, 1, true>(p, tiles, stream) : launch<T, FORMAT, 1, false>(p, tiles, stream);
  case 16: return is_swiglu ? launch<T, FORMAT, 2, true>(p, tiles, stream) : launch<T, FORMAT, 2, false>(p, tiles, stream);
  case 32: return is_swiglu ? launch<T, FORMAT, 4, true>(p, tiles, stream) : launch<T, FORMAT, 4, false>(p, tiles, stream);
  case 64: return is_swiglu ? launch<T, FORMAT, 8, true>(p, tiles, stream) : launch<T, FORMAT, 8, false>(p, tiles, stream);
  case 128:
    return is_swiglu ? launch<T, FORMAT, 16, true>(p, tiles, stream) : launch<T, FORMAT, 16, false>(p, tiles, stream);
  case 256:
    return is_swiglu ? launch<T, FORMAT, 32, true>(p, tiles, stream) : launch<T, FORMAT, 32, false>(p, tiles, stream);
  }
  return static_cast<int>(cudaErrorInvalidValue);
}

template <typename T> int launch_format(const Product &p, int format, bool is_swiglu, int tiles, cudaStream_t stream) {
  switch (format) {
  case DENSE: return launch_rows<T, DENSE>(p, is_swiglu, tiles, stream);
  case DENSE_OTHER: return launch_rows<T, DENSE_OTHER>(p, is_swiglu, tiles, stream);
  }
  return static_cast<int>(cudaErrorInvalidValue);
}

#endif

} // namespace

#ifndef PACKED_GGUF
// The stride of x is its rows with what is missing to 8, 16, 32, 64, 128 or 256.
extern "C" int trainer_packed_product_sm90(const Product *product, int32_t format, int32_t is_swiglu, int32_t tiles,
                                           cudaStream_t stream) {
  const Product &p = *product;
  if (p.x.rows == 0 || tiles == 0) return 0;
  if (p.x.dtype == F16) return launch_format<__half>(p, format, is_swiglu != 0, tiles, stream);
  if (p.x.dtype == BF16) return launch_format<__nv_bfloat16>(p, format, is_swiglu != 0, tiles, stream);
  return static_cast<int>(cudaErrorInvalidValue);
}

// Whether the code for this card has the kernel.
extern "C" int trainer_has_packed_product_sm90() {
  return attention::is_built(product_sm90<__nv_bfloat16, DENSE, 8, false>) ? 1 : 0;
}
#endif
