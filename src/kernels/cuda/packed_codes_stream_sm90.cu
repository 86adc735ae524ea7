// Gate, up and SwiGLU of up to 8 rows with 4-bit codes on Hopper: see packed_codes.cuh and packed_product.cuh.
//
// Layout: columns of x in the order FRAGMENTS, scaled.
//
// Launch: a block for each multiprocessor, with as many whole tiles as the others, give or take one; a tile is 16 rows of gate and the
// same of up. Its warps work side by side: ASK ask for codes, whole lines of each row, stage by stage (up to 16 chunks of 128 columns
// of a tile); CONVERT make the maxima of a stage; MATH take pairs of a stage's chunks in turn, and leave what they have of a tile's
// sums; END add those in the warps' order and write the outputs, while the next tile is multiplied. With programmatic launches codes are
// asked for, and the table is made, before the kernel before it is done.
//
// Which columns stand in which place of the operands: lane t of the four that share a row has, of each block of 64 columns, columns
// 16 t .. 16 t + 15. So all that one product adds has one maximum, which multiplies its sum, in f32, instead of each operand.
//
// The table's rows are 256 bytes apart, so that one instruction makes a place of a byte of codes and a lane; sums lie between them.
//
// Bound: bytes of the weights (0.52 per value), and what shared memory moves: for 4,096 values 64 accesses of the table, 16 of codes as
// they come and 16 as they go, 2 M of x. Sums are f32; their order depends on the shape and the card, not on M.
#include "packed_codes.cuh"
#include "packed_product_sm90.cuh"

namespace {

constexpr int MATH = 8, ASK = 2, CONVERT = 4, END = 2, THREADS = 32 * (MATH + ASK + CONVERT + END);
constexpr int ROWS = 32, COLS = 8, MOST_CHUNKS = 16, MOST_STAGES = 3, SLOTS = 2;
// In shared memory, from its beginning: the table, what nested maxima stand for, stages, x, low-rank products.
constexpr int TABLE = OTHERS, STEP = 256, MAP = TABLE + 256 * STEP, REST = MAP + 2 * 256 * 4;
static_assert(SLOTS * MATH * ROWS * COLS <= 256 * 32, "sums lie in half of each row of the table");

// How a launch cuts the work and shared memory.
struct Plan {
  int32_t tiles;            // of all blocks
  int32_t pieces, chunks;   // of a tile: stages, and chunks of each but the last
  int32_t stages, stage;    // in shared memory, and bytes of each
  int32_t x, low, x_stride; // places; a stride of 0: x stays where it is
};
// Bytes of a row of a stage: of codes, and of maxima in f32. Rows are apart as suits the banks.
__host__ __device__ constexpr int pitch_of(int chunks) { return chunks * 64 + 32; }
__host__ __device__ constexpr int scale_pitch_of(int chunks) { return (2 * chunks + 2) * 4; }

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

__device__ __forceinline__ void copy_async(uint32_t to, const void *from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ uint2 load_two(uint32_t place) {
  uint2 v;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(place));
  return v;
}
__device__ __forceinline__ float2 load_two_floats(uint32_t place) {
  const uint2 v = load_two(place);
  return make_float2(__uint_as_float(v.x), __uint_as_float(v.y));
}
__device__ __forceinline__ float load_float(uint32_t place) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(place) : "memory");
  return v;
}
__device__ __forceinline__ void store_two(uint32_t place, float one, float two) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(place), "f"(one), "f"(two) : "memory");
}
__device__ __forceinline__ void store_float(uint32_t place, float v) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(place), "f"(v) : "memory");
}

// The sum that a warp has of a row of a tile and a row of x.
__device__ __forceinline__ uint32_t place_of_sum(int slot, int warp, int row, int col) {
  const uint32_t at = ((slot * MATH + warp) * ROWS + row) * COLS + col;
  return TABLE + at / 32 * STEP + 128 + at % 32 * 4;
}

// Eight columns as four pairs. `own`: four times the lane.
__device__ __forceinline__ void values_of(uint32_t (&out)[4], uint32_t codes, uint32_t own) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    uint32_t place;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(place) : "r"(codes), "r"(own), "r"(0x5504 | i << 4));
    asm("ld.shared.b32 %0, [%1 + %2];" : "=r"(out[i]) : "r"(place), "n"(TABLE));
  }
}

// The stage that a warp is at: its number in the ring, the parity of the ring's round, and the tile and the piece of it that lie there.
struct Walk {
  int at = 0, parity = 0, tile = 0, piece = 0;

  __device__ __forceinline__ void next(const Plan &plan) {
    if (++at == plan.stages) at = 0, parity ^= 1;
    if (++piece == plan.pieces) piece = 0, tile++;
  }
};

#endif

template <typename T, bool IS_NESTED>
__global__ void __launch_bounds__(THREADS, 1)
    codes_stream(const __grid_constant__ Product p, const __grid_constant__ Plan plan) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(128) float memory[];
  __shared__ __align__(8) uint64_t barriers[2 * MOST_STAGES + 2 * SLOTS];
  // Of a stage: its codes and maxima are there; they are done with. Of a tile's sums: they are there; they are added.
  const uint32_t full = shared_address(barriers), empty = full + 8 * MOST_STAGES;
  const uint32_t done = empty + 8 * MOST_STAGES, ready = done + 8 * SLOTS;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, K = p.x.cols, chunks = K / CHUNK;
  const int tile_first = static_cast<int>(static_cast<int64_t>(plan.tiles) * blockIdx.x / gridDim.x);
  const int tile_end = static_cast<int>(static_cast<int64_t>(plan.tiles) * (blockIdx.x + 1) / gridDim.x);
  const int tiles = tile_end - tile_first, all = tiles * plan.pieces;
  if (threadIdx.x == 0) {
    for (int i = 0; i < MOST_STAGES; i++) phase_init(full + 8 * i, 32 * ASK + CONVERT), phase_init(empty + 8 * i, MATH);
    for (int i = 0; i < SLOTS; i++) phase_init(done + 8 * i, MATH), phase_init(ready + 8 * i, END);
  }
  __syncthreads();
  launch_dependents();

  // Of a tile of this block: its first row, and how many rows there are of it.
  auto row_at = [&](int tile) { return (tile_first + tile) * 16; };
  auto rows_at = [&](int tile) { return min(16, p.w[0].rows - row_at(tile)); };
  auto chunks_at = [&](const Walk &walk) { return min(plan.chunks, chunks - walk.piece * plan.chunks); };
  const int pitch = pitch_of(plan.chunks), scale_pitch = scale_pitch_of(plan.chunks), codes_bytes = ROWS * pitch;

  if (warp >= MATH && warp < MATH + ASK) {
    // Asks for codes, the rows in turn. What there is not of a tile is what was there before: its sums go nowhere.
    const int own = warp - MATH;
    Walk walk;
#pragma unroll 1
    for (int i = 0; i < all; i++, walk.next(plan)) {
      const int sixteens = chunks_at(walk) * 4, rows = rows_at(walk.tile) - own;
      if (i >= plan.stages) phase_wait(empty + 8 * walk.at, walk.parity ^ 1);
#pragma unroll 1
      for (int half = 0; half < 2; half++) {
        const uint8_t *from = p.w[half].data + static_cast<int64_t>(row_at(walk.tile) + own) * (K / 2) +
                              walk.piece * plan.chunks * 64 + lane * 16;
        uint32_t to = REST + walk.at * plan.stage + (half * 16 + own) * pitch + lane * 16;
#pragma unroll
        for (int row = 0; row < 16; row += ASK) {
          if (row < rows) {
            if (lane < sixteens) copy_async(to, from);
            if (lane + 32 < sixteens) copy_async(to + 512, from + 512);
          }
          from += ASK * (K / 2), to += ASK * pitch;
        }
      }
      asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(full + 8 * walk.at) : "memory");
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
    return;
  }

  // The table, by all others.
  {
    constexpr int OTHER_THREADS = THREADS - 32 * ASK;
    const int thread = warp < MATH ? threadIdx.x : threadIdx.x - 32 * ASK;
    fill_table<OTHER_THREADS, STEP>(TABLE, memory, p.w[0].values, thread);
    if (IS_NESTED)
      for (int i = thread; i < 512; i += OTHER_THREADS) store_float(MAP + i * 4, __ldg(p.w[i / 256].map + i % 256));
    asm volatile("bar.sync 1, %0;" ::"n"(OTHER_THREADS) : "memory");
  }

  if (warp < MATH) {
    const int g = lane / 4, t = lane % 4;
    uint32_t own;
    asm volatile("mov.b32 %0, %1;" : "=r"(own) : "r"(lane * 4) : "memory");
    if (!p.waits_late) wait_for_dependency();
    // Rows of x lie in shared memory where there is room for them, in the order in which they are read.
    const bool is_there = g < p.x.rows;
    const int line = is_there ? g : 0;
    const __half *own_x = static_cast<const __half *>(p.x.data) + line * p.x.stride;
    const char *x = reinterpret_cast<const char *>(own_x) + t % 2 * 128 + t / 2 * 16;
    int of_block = 32;
    if (plan.x_stride) {
      for (int row = 0; row < p.x.rows; row++) {
        const __half *from = static_cast<const __half *>(p.x.data) + row * p.x.stride;
        for (int i = threadIdx.x; i < K / 8; i += MATH * 32) {
          const int part = i / 4 % 4, of = i % 4;
          const int place = (i & ~15) + of / 2 * 8 + part % 2 * 4 + of % 2 * 2 + part / 2;
          copy_async(plan.x + row * plan.x_stride + place * 16, from + i * 8);
        }
      }
      asm volatile("cp.async.wait_all;" ::: "memory");
      asm volatile("bar.sync 2, %0;" ::"n"(MATH * 32) : "memory");
      x = reinterpret_cast<const char *>(memory) + (plan.x - shared_address(memory)) + line * plan.x_stride + t * 16;
      of_block = 128;
    }
    float acc[2][4] = {};
    int mine = warp; // which pair of a stage's chunks; they are dealt in turn
    Walk walk;
#pragma unroll 1
    for (int i = 0; i < all; i++, walk.next(plan)) {
      const int here = chunks_at(walk), pair = mine;
      mine -= (here + 1) / 2;
      if (mine < 0) mine += MATH;
      phase_wait(full + 8 * walk.at, walk.parity);
      if (pair * 2 < here) {
        const uint32_t base = REST + walk.at * plan.stage;
        const uint32_t codes = base + g * pitch + pair * 128 + t * 8;
        const uint32_t scales = base + codes_bytes + g * scale_pitch + pair * 16;
        const char *x_at = x + (walk.piece * plan.chunks + pair * 2) * (CHUNK * 2);
        const bool is_pair = pair * 2 + 1 < here;
#pragma unroll
        for (int c = 0; c < 2; c++) {
          // A second chunk that there is not is multiplied by zeros.
          uint4 right[2][2] = {};
          if (is_there && (c == 0 || is_pair)) {
#pragma unroll
            for (int b = 0; b < 2; b++)
#pragma unroll
              for (int q = 0; q < 2; q++)
                right[b][q] = *reinterpret_cast<const uint4 *>(x_at + c * (CHUNK * 2) + b * of_block + q * 64);
          }
          float2 scale[2][2];
#pragma unroll
          for (int mt = 0; mt < 2; mt++)
#pragma unroll
            for (int half = 0; half < 2; half++)
              scale[mt][half] = load_two_floats(scales + (mt * 16 + half * 8) * scale_pitch + c * 8);
#pragma unroll
          for (int b = 0; b < 2; b++) {
            uint2 word[2][2];
#pragma unroll
            for (int mt = 0; mt < 2; mt++)
#pragma unroll
              for (int half = 0; half < 2; half++)
                word[mt][half] = load_two(codes + (mt * 16 + half * 8) * pitch + c * 64 + b * 32);
#pragma unroll
            for (int mt = 0; mt < 2; mt++) {
              float sum[4] = {};
#pragma unroll
              for (int q = 0; q < 2; q++) {
                uint32_t top[4], low[4];
                values_of(top, q ? word[mt][0].y : word[mt][0].x, own);
                values_of(low, q ? word[mt][1].y : word[mt][1].x, own);
                const uint32_t one[4] = {top[0], low[0], top[1], low[1]}, two[4] = {top[2], low[2], top[3], low[3]};
                multiply<__half>(sum, one, right[b][q].x, right[b][q].y);
                multiply<__half>(sum, two, right[b][q].z, right[b][q].w);
              }
              const float up = b ? scale[mt][0].y : scale[mt][0].x, down = b ? scale[mt][1].y : scale[mt][1].x;
              acc[mt][0] = fmaf(sum[0], up, acc[mt][0]), acc[mt][1] = fmaf(sum[1], up, acc[mt][1]);
              acc[mt][2] = fmaf(sum[2], down, acc[mt][2]), acc[mt][3] = fmaf(sum[3], down, acc[mt][3]);
            }
          }
        }
        __syncwarp();
      }
      if (lane == 0) phase_arrive(empty + 8 * walk.at);
      if (walk.piece + 1 == plan.pieces) {
        const int slot = walk.tile % SLOTS;
        if (walk.tile >= SLOTS) phase_wait(ready + 8 * slot, (walk.tile / SLOTS - 1) & 1);
#pragma unroll
        for (int mt = 0; mt < 2; mt++)
#pragma unroll
          for (int half = 0; half < 2; half++) {
            const uint32_t to = place_of_sum(slot, warp, mt * 16 + half * 8 + g, t * 2);
            store_two(to, acc[mt][half * 2], acc[mt][half * 2 + 1]);
            acc[mt][half * 2] = acc[mt][half * 2 + 1] = 0.0f;
          }
        __syncwarp();
        if (lane == 0) phase_arrive(done + 8 * slot);
      }
    }
  } else if (warp < MATH + ASK + CONVERT) {
    // A lane has the maxima of a chunk of every eighth row.
    constexpr int EACH = ROWS / 2 / CONVERT, AHEAD = 2;
    const int convert = warp - MATH - ASK, c = lane % 16;
    uint32_t codes[AHEAD][EACH];
    float2 values[AHEAD][EACH];
    Walk ask, walk;
    auto row_of = [&](int j) { return (j * CONVERT + convert) * 2 + lane / 16; };
#pragma unroll 1
    for (int i = -AHEAD; i < all; i++) {
      if (i >= 0) {
        if (i >= plan.stages) phase_wait(empty + 8 * walk.at, walk.parity ^ 1);
#pragma unroll
        for (int j = 0; j < EACH; j++) {
          const int row = row_of(j);
          float one = values[0][j].x, two = values[0][j].y;
          if (IS_NESTED) {
            const float offset = p.w[row / 16].offset;
            const uint32_t map = MAP + row / 16 * 1024;
            two = fmaf(load_float(map + (codes[0][j] >> 8) * 4), one, offset);
            one = fmaf(load_float(map + (codes[0][j] & 255) * 4), one, offset);
          }
          if (c < plan.chunks)
            store_two(REST + walk.at * plan.stage + codes_bytes + row * scale_pitch + c * 8, one * X_SCALE,
                      two * X_SCALE);
        }
        __syncwarp();
        if (lane == 0) phase_arrive(full + 8 * walk.at);
        walk.next(plan);
      }
#pragma unroll
      for (int j = 0; j < EACH; j++) codes[0][j] = codes[1][j], values[0][j] = values[1][j];
      if (i + AHEAD < all) {
        const int last_chunk = chunks_at(ask) - 1, last_row = rows_at(ask.tile) - 1;
#pragma unroll
        for (int j = 0; j < EACH; j++) {
          const int row = row_of(j);
          const Packed &w = p.w[row / 16];
          const uint32_t block = static_cast<uint32_t>(row_at(ask.tile) + min(row % 16, last_row)) * (K / 64) +
                                 (ask.piece * plan.chunks + min(c, last_chunk)) * 2;
          if (IS_NESTED) {
            codes[1][j] = __ldg(reinterpret_cast<const uint16_t *>(w.codes + block));
            values[1][j].x = __ldg(w.nested + (block >> 8));
          } else {
            values[1][j] = __ldg(reinterpret_cast<const float2 *>(w.absmax + block));
          }
        }
        ask.next(plan);
      }
    }
  } else {
    // The ends of tiles.
    const int thread = threadIdx.x - 32 * (MATH + ASK + CONVERT), lines = p.x.rows;
    wait_for_dependency();
    for (int i = thread; i < lines * p.low_cols; i += END * 32)
      store_float(plan.low + i * 4, to_float(static_cast<const T *>(p.low)[i]));
    asm volatile("bar.sync 3, %0;" ::"n"(END * 32) : "memory");
#pragma unroll 1
    for (int tile = 0; tile < tiles; tile++) {
      const int slot = tile % SLOTS;
      phase_wait(done + 8 * slot, tile / SLOTS & 1);
#pragma unroll 1
      for (int i = thread; i < 16 * lines; i += END * 32) {
        const int own = i % 16, line = i / 16, row = row_at(tile) + own;
        if (own >= rows_at(tile)) continue;
        float results[2];
#pragma unroll
        for (int j = 0; j < 2; j++) {
          const Packed &w = p.w[j];
          float sum = 0.0f;
#pragma unroll
          for (int k = 0; k < MATH; k++) sum += load_float(place_of_sum(slot, k, own + j * 16, line));
          const T *b = static_cast<const T *>(w.b);
#pragma unroll 2
          for (int rank = 0; b && rank < w.rank; rank += 8) {
            float v[8];
            load_pack<T, 8>(v, b + static_cast<int64_t>(row) * w.rank + rank);
            const uint32_t low = plan.low + (line * p.low_cols + w.first_low + rank) * 4;
#pragma unroll
            for (int k = 0; k < 8; k++) sum = fmaf(v[k], load_float(low + k * 4), sum);
          }
          results[j] = to_float(from_float<T>(with_bias(w, row, sum)));
        }
        const float gate = results[0], sigmoid = __fdividef(1.0f, 1.0f + __expf(-gate)); // as swiglu.cu
        const float activated = results[1] * (gate * sigmoid);
        const int64_t to = place_of(p.out, line, row);
        if (is_scaled(p.out)) static_cast<__half *>(p.out.data)[to] = from_float<__half>(to_scaled(activated));
        else static_cast<T *>(p.out.data)[to] = from_float<T>(activated);
      }
      __syncwarp();
      if (lane == 0) phase_arrive(ready + 8 * slot);
    }
  }
#endif
}

template <typename T, bool IS_NESTED> int launch(const Product &p, int blocks, cudaStream_t stream) {
  auto kernel = codes_stream<T, IS_NESTED>;
  int device = 0, most = 0;
  cudaError_t code = allow_shared_memory(kernel);
  if (code == cudaSuccess) code = cudaGetDevice(&device);
  if (code == cudaSuccess) code = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (code != cudaSuccess) return static_cast<int>(code);
  most -= OTHERS; // in which the kernel's own variables lie
  const int chunks = p.x.cols / CHUNK, least = (chunks + MOST_CHUNKS - 1) / MOST_CHUNKS;
  Plan plan = {};
  plan.tiles = (p.w[0].rows + 15) / 16;
  plan.chunks = ((chunks + least - 1) / least + 1) / 2 * 2, plan.pieces = (chunks + plan.chunks - 1) / plan.chunks;
  plan.stage = ROWS * (pitch_of(plan.chunks) + scale_pitch_of(plan.chunks));
  const int low = p.x.rows * p.low_cols * 4, x_stride = p.x.cols * 2 + 64, x = p.x.rows * x_stride;
  auto fits = [&](int stages, int x) { return REST + stages * plan.stage + x + low <= most; };
  plan.x_stride = fits(2, x) ? x_stride : 0;
  const int own_x = plan.x_stride ? x : 0;
  plan.stages = fits(MOST_STAGES, own_x) ? MOST_STAGES : 2;
  if (p.x.rows > COLS || !fits(plan.stages, own_x)) return static_cast<int>(cudaErrorInvalidValue);
  plan.x = REST + plan.stages * plan.stage, plan.low = plan.x + own_x;
  return launch_after(kernel, dim3(blocks < plan.tiles ? blocks : plan.tiles), THREADS, plan.low + low, stream, p, plan);
}
template <typename T> int launch_kind(const Product &p, int blocks, cudaStream_t stream) {
  return p.w[0].absmax ? launch<T, false>(p, blocks, stream) : launch<T, true>(p, blocks, stream);
}

} // namespace

// SwiGLU of the first two matrices. `blocks`: as many as there are at a time.
extern "C" int trainer_packed_codes_stream_sm90(const Product *product, int32_t blocks, cudaStream_t stream) {
  const Product &p = *product;
  if (p.x.rows == 0) return 0;
  if (p.count != 2 || p.splits != 1 || p.x.layout != FRAGMENTS) return static_cast<int>(cudaErrorInvalidValue);
  if (p.x.dtype == SCALED_F16) return launch_kind<__half>(p, blocks, stream);
  if (p.x.dtype == SCALED_BF16) return launch_kind<__nv_bfloat16>(p, blocks, stream);
  return static_cast<int>(cudaErrorInvalidValue);
}
