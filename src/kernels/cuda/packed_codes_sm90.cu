// Products of 9 to 256 rows with 4-bit codes on Hopper's warp groups: see packed_codes.cuh and packed_product.cuh.
//
// Layout: columns of x in the order TILES, scaled: blocks of 64 columns of 16, 32, 64, 128 or 256 rows in the hardware's swizzle,
// so that a block comes to shared memory in one copy.
//
// Launch: a block has GROUPS warp groups with 64 rows of W each (with SwiGLU 32 of gate and 32 of up) and all rows of x, which
// come through a ring of blocks in shared memory that the groups share: from the second-level cache once for 64 GROUPS rows of W. The
// weights are the operand in registers: a group makes those of the next 32 columns while `wgmma` multiplies the last ones, and the
// groups do not go in step. The first `whole` tiles are a block's each; the sums of the others are cut into `splits` parts, so that
// the last round of blocks is as long as the others' share. The adapters' ranks follow as 16 more columns at a time, with low-rank
// products [M, R] as x. Sums as in packed_product.cuh.
//
// Bound: the table for up to 64 rows, tensor cores from 128 on; bytes of x from the second-level cache if a block had one group.
#include <algorithm>

#include "packed_codes.cuh"
#include "packed_product_sm90.cuh"

namespace {

constexpr int GROUP = 128;

template <int N> constexpr int stages() { return N == 32 ? 4 : 6; }
template <int N> constexpr int stage_bytes() { return N * 8 * 128; }
// Blocks of a multiprocessor.
template <int N, int GROUPS> constexpr int resident() { return N >= 16 ? 1 : 4 / GROUPS; }

template <int N, int GROUPS, bool IS_NESTED, bool IS_SWIGLU>
__global__ void __launch_bounds__(GROUPS *GROUP, (resident<N, GROUPS>())) codes_sm90(const __grid_constant__ Product p,
                                                                                         bool is_bf16) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  constexpr int STAGES = stages<N>(), BYTES = stage_bytes<N>(), COLS = 8 * N;
  constexpr int ROWS = 64 * GROUPS, THREADS = GROUPS * GROUP;
  extern __shared__ __align__(1024) unsigned char memory[]; // ring, table; in the place of both the sums
  __shared__ __align__(8) uint64_t barriers[2 * STAGES];
  float *sums = reinterpret_cast<float *>(memory);
  constexpr uint32_t TABLE = table_address(STAGES * BYTES);
  const uint32_t ring = static_cast<uint32_t>(__cvta_generic_to_shared(memory));
  const uint32_t full = static_cast<uint32_t>(__cvta_generic_to_shared(barriers)), empty = full + 8 * STAGES;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, K = p.x.cols;

  const int block = static_cast<int>(blockIdx.x), cut = max(block - p.whole, 0);
  const bool is_whole = block < p.whole;
  const int tile = is_whole ? block : p.whole + cut / p.splits;
  const int64_t places = (static_cast<int>(gridDim.x) - p.whole) / p.splits;
  const Share share{is_whole ? 0 : cut % p.splits, is_whole ? 1 : p.splits, cut / p.splits, places};
  const int2 chunks = chunks_of(p, share);
  const int count = 2 * (chunks.y - chunks.x); // blocks of 64 columns

  const Tile at = IS_SWIGLU ? Tile{0, tile, 0} : find_tile<ROWS>(p, tile);
  auto row_of = [&](int own, const Packed *&matrix) {
    matrix = IS_SWIGLU ? &p.w[own / 32 % 2] : &p.w[at.which];
    const int row = IS_SWIGLU ? at.tile * (ROWS / 2) + own / 64 * 32 + own % 32 : at.tile * ROWS + own;
    return min(row, matrix->rows - 1);
  };
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      phase_init(full + 8 * i, 1);
      phase_init(empty + 8 * i, THREADS / 32);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }

  const Packed *own_matrix;
  // Of each of its rows, where this lane's next codes are, and which block of 64 values they are in.
  int64_t row[2];
  const uint8_t *from[2];
  uint32_t values_block[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    row[half] = row_of(warp * 16 + g + half * 8, own_matrix);
    const int first = chunks.x * CHUNK + t * 32;
    from[half] = own_matrix->data + (row[half] * K + first) / 2;
    values_block[half] = static_cast<uint32_t>(row[half]) * (K / 64) + first / 64;
  }
  const Packed &w = *own_matrix;
  struct Chunk {
    Codes codes[2];
    Maximum<IS_NESTED> maxima[2];
  } now, next;
  auto fetch = [&](Chunk &to) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      to.codes[half].fetch(from[half]);
      to.maxima[half].fetch(w, values_block[half]);
      from[half] += CHUNK / 2;
      values_block[half] += CHUNK / 64;
    }
  };
  fetch(now);
  fill_table<THREADS>(TABLE, memory, p.w[0].values);
  if (share.part == 0 && w.b && t == 0) {
#pragma unroll
    for (int half = 0; half < 2; half++) prefetch(static_cast<const __half *>(w.b) + row[half] * w.rank);
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
  __half2 scale[2];
  const uint32_t place = own_place(TABLE);
  auto take_scales = [&]() {
#pragma unroll
    for (int half = 0; half < 2; half++) scale[half] = now.maxima[half].scale(w);
  };
  auto make = [&](uint32_t(&to)[2][4], int part) {
    uint32_t top[4], low[4];
    now.codes[0].values(top, part, place, scale[0]);
    now.codes[1].values(low, part, place, scale[1]);
#pragma unroll
    for (int two = 0; two < 2; two++) {
      to[two][0] = top[2 * two], to[two][1] = low[2 * two];
      to[two][2] = top[2 * two + 1], to[two][3] = low[2 * two + 1];
    }
  };
  take_scales();
  make(left[0], 0);
  int x_block = 0;
  for (int chunk = chunks.x; chunk < chunks.y; chunk++) {
    const bool has_next = chunk + 1 < chunks.y;
    if (has_next) fetch(next);
#pragma unroll
    for (int part = 0; part < 4; part++) {
      const int stage = x_block % STAGES;
      if (part % 2 == 0) phase_wait(full + 8 * stage, x_block / STAGES & 1);
      const uint64_t right = group_descriptor(ring + stage * BYTES, 16) + part % 2 * (64 >> 4);
      group_fence();
      group_multiply<__half, N>(acc, left[part % 2][0], right);
      group_multiply<__half, N>(acc, left[part % 2][1], right + (32 >> 4));
      group_commit();
      group_wait<1>();
      if (part % 2 == 0) {
        // This warp has multiplied the block before; the one before that is free when the other group has too, which may be a
        // block behind.
        if (x_block > 0 && lane == 0) phase_arrive(empty + 8 * ((x_block - 1) % STAGES));
        const int before = x_block - 2, next_block = before + STAGES;
        if (threadIdx.x == 0 && before >= 0 && next_block < count) {
          phase_wait(empty + 8 * (before % STAGES), before / STAGES & 1);
          begin_block(ring + before % STAGES * BYTES, x + static_cast<int64_t>(next_block) * BYTES, BYTES,
                      full + 8 * (before % STAGES));
        }
        // Who waits for the other warps does so for its own: registers of a warp hold what all of its lanes wait for next.
        __syncwarp();
      }
      if (part < 3) {
        make(left[(part + 1) % 2], part + 1);
      } else if (has_next) {
        now = next;
        take_scales();
        make(left[0], 0);
      }
      if (part % 2 == 1) x_block++;
    }
  }
  if (p.waits_late) wait_for_dependency();
  auto free_ring = [&]() {
    group_wait<0>();
    block_barrier<THREADS>();
  };
  if (is_bf16) add_adapters<__nv_bfloat16, N, THREADS, IS_SWIGLU>(acc, p, share, w, row, memory, free_ring);
  else add_adapters<__half, N, THREADS, IS_SWIGLU>(acc, p, share, w, row, memory, free_ring);

  store_sums<N, ROWS>(sums, warp, acc);
  block_barrier<THREADS>();
  auto gate_of = [](int own) { return own / 32 * 64 + own % 32; };
  auto up_of = [](int own) { return own / 32 * 64 + own % 32 + 32; };
  if (is_bf16) finish_sums<__nv_bfloat16, IS_SWIGLU, ROWS, COLS, THREADS>(p, at, share, sums, gate_of, up_of);
  else finish_sums<__half, IS_SWIGLU, ROWS, COLS, THREADS>(p, at, share, sums, gate_of, up_of);
#endif
}

template <int N, int GROUPS, bool IS_NESTED, bool IS_SWIGLU>
int launch(const Product &p, bool is_bf16, int blocks, cudaStream_t stream) {
  auto kernel = codes_sm90<N, GROUPS, IS_NESTED, IS_SWIGLU>;
  int table = 0;
  const cudaError_t code = shared_with_table(kernel, stages<N>() * stage_bytes<N>(), table);
  if (code != cudaSuccess) return static_cast<int>(code);
  const size_t sums = sizeof(float) * 8 * N * sums_step<64 * GROUPS>(), before = static_cast<size_t>(table);
  // Tiles are dealt for two blocks of two groups on a multiprocessor; a third one would take from some what others have.
  const size_t least = GROUPS == 2 ? 80 << 10 : 0, bytes = std::max({before, sums, least});
  return launch_after(kernel, dim3(blocks), GROUPS * GROUP, bytes, stream, p, is_bf16);
}

template <int N, int GROUPS> int launch_kind(const Product &p, bool is_bf16, bool is_swiglu, int blocks, cudaStream_t stream) {
  if (p.w[0].absmax)
    return is_swiglu ? launch<N, GROUPS, false, true>(p, is_bf16, blocks, stream)
                     : launch<N, GROUPS, false, false>(p, is_bf16, blocks, stream);
  return is_swiglu ? launch<N, GROUPS, true, true>(p, is_bf16, blocks, stream)
                   : launch<N, GROUPS, true, false>(p, is_bf16, blocks, stream);
}

} // namespace

// The stride of x is its rows with what is missing to 16, 32, 64, 128 or 256. `groups`: 1 or 2 for up to 64 rows, 2 for more.
extern "C" int trainer_packed_codes_sm90(const Product *product, int32_t groups, int32_t is_swiglu, int32_t tiles,
                                         cudaStream_t stream) {
  const Product &p = *product;
  if (p.x.rows == 0 || tiles == 0) return 0;
  if (!is_scaled(p.x)) return static_cast<int>(cudaErrorInvalidValue);
  const bool is_bf16 = p.x.dtype == SCALED_BF16, swiglu = is_swiglu != 0;
  const int blocks = p.whole + (tiles - p.whole) * p.splits;
  switch (p.x.stride * 4 + groups) {
  case 16 * 4 + 1: return launch_kind<2, 1>(p, is_bf16, swiglu, blocks, stream);
  case 16 * 4 + 2: return launch_kind<2, 2>(p, is_bf16, swiglu, blocks, stream);
  case 32 * 4 + 1: return launch_kind<4, 1>(p, is_bf16, swiglu, blocks, stream);
  case 32 * 4 + 2: return launch_kind<4, 2>(p, is_bf16, swiglu, blocks, stream);
  case 64 * 4 + 1: return launch_kind<8, 1>(p, is_bf16, swiglu, blocks, stream);
  case 64 * 4 + 2: return launch_kind<8, 2>(p, is_bf16, swiglu, blocks, stream);
  case 128 * 4 + 2: return launch_kind<16, 2>(p, is_bf16, swiglu, blocks, stream);
  case 256 * 4 + 2: return launch_kind<32, 2>(p, is_bf16, swiglu, blocks, stream);
  }
  return static_cast<int>(cudaErrorInvalidValue);
}
