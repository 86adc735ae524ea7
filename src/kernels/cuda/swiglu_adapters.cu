// The gradients of the gated activation together with the thin products of the adapters around it.
//
//   dy' = dy + d_low A,  s = sigma(gate),  y = gate s up
//   d_up = dy' gate s,  d_gate = dy' up s (1 + gate (1 - s))
//   grad_A += d_low^T y,  grad_B_gate += f_gate d_gate^T low_gate,  grad_B_up += f_up d_up^T low_up
//
// The sums over rows take y, d_gate and d_up as they are rounded to the activations' type; sums are f32.
//
// Layout: dy, gate, up and their gradients [N, I], d_low [N, R], A [R, I], low_gate and low_up [N, r], all of one
// 16-bit type with rows at multiples of 16 bytes; R and r are multiples of 8 up to 32. grad_A f32 [<= R, I], grad_B f32
// [I, <= r]. Every value is read before the values of the same place are written, so d_gate and d_up may lie on dy,
// gate and up, but not on the other operands.
//
// Launch: blocks of four warps, each of 32 columns, walk down a share of the rows 8 at a time. Ranks are rounded up to 16
// or 32. A thread copies its own values to its own place in shared memory, five or seven steps ahead; only the rows of
// d_low, low_gate and low_up are shared, by one barrier a step.
// The sums stay in registers down the whole share; a second launch adds those of the shares in order, so that the
// result depends on shapes alone.
//
// All products are `m16n8k8`, whose 16 columns of tile `t` stand for columns 2 TILES `group` + 2 t (+ 1 for the second
// half) of the warp. So thread (`group`, `quad`) has 2 TILES neighbours of rows 2 `quad` and 2 `quad` + 1, accesses are
// half lines, and what the activation leaves in a thread is, after a change of halves between the two rows, just what the
// next products want of it. (With 64 columns a warp accesses are whole lines, but two blocks a multiprocessor are too few
// to hide the latency of the arithmetic: 685 microseconds at 8192 x 18944 and rank 16 on an H200.)
//
// Bound: bytes, 5 N I T. At 4.1 TB/s each of 132 multiprocessors takes a value of 10 bytes every 0.55 cycles of 1.7
// GHz, room for 70 instructions of a thread. A value takes about 26: 18 are the activation, the rounding and the exchange
// of halves, 2 the products.
#include "attention.cuh"
#include "elementwise.cuh"

namespace {

using attention::shared_address;

constexpr int THREADS = 128, WARPS = THREADS / 32;
constexpr int STEP_ROWS = 8;
constexpr int PARTS = 3; // the sums of A, of B of gate, of B of up
constexpr int MOST_RANKS = 32;

constexpr int TILES = 2;              // of 16 columns, of a warp
constexpr int COLS = 2 * TILES;       // of a thread
constexpr int WARP_COLS = 16 * TILES; // `swiglu_adapters.rs` knows this
constexpr int BYTES = 2 * COLS;       // of one access

// What follows from the ranks.
template <int RANKS> struct Sizes {
  static constexpr int GROUPS = RANKS / 8;
  static constexpr int PART = TILES * GROUPS * 32; // the sums of a part in a warp, four each
  static constexpr int PLANE = THREADS * BYTES;
  static constexpr int LOW_BYTES = PARTS * GROUPS * 128;
  static constexpr int SLOT = 6 * PLANE + LOW_BYTES;
  static constexpr int SLOTS = RANKS == 16 ? 6 : 8;
  static constexpr int BLOCKS = RANKS == 16 ? 4 : 2; // of a multiprocessor
};

// What a thread has of a row of one operand: `TILES` pairs of neighbours.
struct alignas(4 * TILES) Words {
  uint32_t pair[TILES];
};

template <typename T> struct Work {
  Rows<T> d_gate, d_up;
  Rows<const T> dy, gate, up, d_low, a, low_gate, low_up;
  int ranks, gate_ranks, up_ranks; // 0: there is no such adapter
  bool has_grad_a;
  int rows, cols, share;
  float4 *partials; // [shares, warps of all columns, PARTS, GROUPS, TILES, 32]
};

__device__ __forceinline__ float sigmoid(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(1.0f + attention::exp2_fast(-attention::LOG2_E * x)));
  return y;
}

template <typename T> __device__ __forceinline__ float2 unpack_two(uint32_t pair) {
  if constexpr (std::is_same_v<T, __half>) return __half22float2(*reinterpret_cast<const __half2 *>(&pair));
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

// The pairs of one tile in rows 2 `quad` and 2 `quad` + 1 as an A operand: a register for each column.
__device__ __forceinline__ void exchange_halves(uint32_t (&a)[2], uint32_t even, uint32_t odd) {
  a[0] = __byte_perm(even, odd, 0x5410);
  a[1] = __byte_perm(even, odd, 0x7632);
}

// c += a b of 16 x 8 by 8 x 8.
template <typename T>
__device__ __forceinline__ void multiply(float &c0, float &c1, float &c2, float &c3, const uint32_t (&a)[2],
                                         uint32_t b) {
  if constexpr (std::is_same_v<T, __half>) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)
        : "r"(a[0]), "r"(a[1]), "r"(b));
  } else {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)
        : "r"(a[0]), "r"(a[1]), "r"(b));
#endif
  }
}

// Copies the thread's part of a row, 8 bytes, to shared memory, or zeros.
__device__ __forceinline__ void copy(uint32_t to, const void *from, bool is_there) {
  static_assert(BYTES == 8, "one access");
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(from), "r"(is_there ? 8 : 0) : "memory");
#else
  uint2 x = is_there ? *static_cast<const uint2 *>(from) : make_uint2(0, 0);
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(to), "r"(x.x), "r"(x.y) : "memory");
#endif
}

// Ends a group of copies.
__device__ __forceinline__ void end_group() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for all but the last `LEFT` groups of this thread.
template <int LEFT> __device__ __forceinline__ void wait_for_groups() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
#endif
}

__device__ __forceinline__ void load_words(Words &x, uint32_t from) {
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(x.pair[0]), "=r"(x.pair[1]) : "r"(from) : "memory");
}

__device__ __forceinline__ void store_words(void *to, const Words &x) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)), "r"(x.pair[0]), "r"(x.pair[1])
               : "memory");
}

// The B operands of 8 rows, one for each 8 ranks, from neighbouring 8 x 8 matrices: with ranks as the inner dimension,
// or, transposed, with rows. Only the first 8 lanes for each matrix name a row, but all name one that exists.
__device__ __forceinline__ void load_low(uint32_t (&b)[2], uint32_t matrices, int lane) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(b[0]), "=r"(b[1])
               : "r"(matrices + lane % 16 * 16)
               : "memory");
}
__device__ __forceinline__ void load_low(uint32_t (&b)[4], uint32_t matrices, int lane) {
  attention::load_matrices(b, matrices + lane * 16);
}
__device__ __forceinline__ void load_low_transposed(uint32_t (&b)[2], uint32_t matrices, int lane) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(b[0]), "=r"(b[1])
               : "r"(matrices + lane % 16 * 16)
               : "memory");
}
__device__ __forceinline__ void load_low_transposed(uint32_t (&b)[4], uint32_t matrices, int lane) {
  attention::load_matrices_transposed(b, matrices + lane * 16);
}

template <typename T, int RANKS>
__global__ void __launch_bounds__(THREADS, Sizes<RANKS>::BLOCKS)
    backward_kernel(const __grid_constant__ Work<T> work) {
  using S = Sizes<RANKS>;
  constexpr int GROUPS = S::GROUPS, PLANE = S::PLANE, SLOTS = S::SLOTS;
  extern __shared__ __align__(128) uint8_t adapters_shared[];
  int lane = threadIdx.x % 32, group = lane / 4, quad = lane % 4;
  int across = (work.cols + WARPS * WARP_COLS - 1) / (WARPS * WARP_COLS);
  int warp = blockIdx.x % across * WARPS + threadIdx.x / 32, share = blockIdx.x / across;
  int first = share * work.share, end = min(first + work.share, work.rows);
  int col = (warp * 8 + group) * COLS;
  bool has_columns = col < work.cols;

  // A, whose missing ranks are 0 as those of `d_low` are.
  uint32_t a[TILES][GROUPS][2];
#pragma unroll
  for (int j = 0; j < GROUPS; j++) {
    Words pairs[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      int k = 8 * j + 2 * quad + i;
      pairs[i] = Words{};
      if (has_columns && k < work.ranks) pairs[i] = *reinterpret_cast<const Words *>(work.a[k] + col);
    }
#pragma unroll
    for (int t = 0; t < TILES; t++) exchange_halves(a[t][j], pairs[0].pair[t], pairs[1].pair[t]);
  }

  // Where the thread's copies come from and go to. One thread for each row of 8 ranks copies it: the 8 x 8 matrices lie
  // one behind the other, first those of `d_low`, then those of gate's and of up's adapter.
  uint32_t shared = shared_address(adapters_shared), own = shared + threadIdx.x * BYTES, lows = shared + 6 * PLANE;
  int64_t top = first + 2 * quad;
  const T *dy = work.dy[top] + col, *gate = work.gate[top] + col, *up = work.up[top] + col;
  int part = threadIdx.x / (8 * GROUPS), low_row = first + threadIdx.x % 8, low_rank = threadIdx.x / 8 % GROUPS * 8;
  Rows<const T> low = part == 0 ? work.d_low : part == 1 ? work.low_gate : work.low_up;
  bool is_low = part < PARTS;
  bool has_low = low_rank < (part == 0 ? work.ranks : part == 1 ? work.gate_ranks : work.up_ranks);
  const T *low_from = has_low ? low[low_row] + low_rank : work.dy.data;
  int64_t low_step = has_low ? low.stride * STEP_ROWS : 0;

  int next = first, next_slot = 0;
  auto copy_step = [&] {
    if (next < end) {
      uint32_t to = own + next_slot * S::SLOT;
#pragma unroll
      for (int i = 0; i < 2; i++) {
        bool is_there = has_columns && next + 2 * quad + i < end;
        copy(to + i * PLANE, dy + i * work.dy.stride, is_there);
        copy(to + (2 + i) * PLANE, gate + i * work.gate.stride, is_there);
        copy(to + (4 + i) * PLANE, up + i * work.up.stride, is_there);
      }
      if (is_low) {
        bool is_there = has_low && next + static_cast<int>(threadIdx.x % 8) < end;
        attention::copy_16_bytes(lows + next_slot * S::SLOT + threadIdx.x * 16, low_from, is_there);
      }
      dy += work.dy.stride * STEP_ROWS;
      gate += work.gate.stride * STEP_ROWS;
      up += work.up.stride * STEP_ROWS;
      low_from += low_step;
    }
    next += STEP_ROWS;
    next_slot = (next_slot + 1) % SLOTS;
    end_group();
  };
#pragma unroll 1
  for (int i = 0; i < SLOTS - 1; i++) copy_step();

  float sums[PARTS][TILES][GROUPS][4] = {};
  T *to_gate = work.d_gate[top] + col, *to_up = work.d_up[top] + col;
  int slot = 0;
#pragma unroll 1
  for (int row = first; row < end; row += STEP_ROWS) {
    // The copies of this step are there, and all have used the slot of the step before, which is the next to be filled.
    wait_for_groups<SLOTS - 2>();
    __syncthreads();
    copy_step();

    uint32_t from = own + slot * S::SLOT, low_matrices = lows + slot * S::SLOT;
    Words dy_pairs[2], gate_pairs[2], up_pairs[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      load_words(dy_pairs[i], from + i * PLANE);
      load_words(gate_pairs[i], from + (2 + i) * PLANE);
      load_words(up_pairs[i], from + (4 + i) * PLANE);
    }
    uint32_t d_low[GROUPS], b[PARTS][GROUPS];
    load_low(d_low, low_matrices, lane);
#pragma unroll
    for (int p = 0; p < PARTS; p++) load_low_transposed(b[p], low_matrices + p * GROUPS * 128, lane);

    float d[2][COLS];
#pragma unroll
    for (int t = 0; t < TILES; t++) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        float2 two = unpack_two<T>(dy_pairs[i].pair[t]);
        d[i][2 * t] = two.x;
        d[i][2 * t + 1] = two.y;
      }
    }
#pragma unroll
    for (int j = 0; j < GROUPS; j++) {
#pragma unroll
      for (int t = 0; t < TILES; t++)
        multiply<T>(d[0][2 * t], d[1][2 * t], d[0][2 * t + 1], d[1][2 * t + 1], a[t][j], d_low[j]);
    }

    Words d_gate[2], d_up[2];
#pragma unroll
    for (int t = 0; t < TILES; t++) {
      uint32_t y[2];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        float2 g = unpack_two<T>(gate_pairs[i].pair[t]), u = unpack_two<T>(up_pairs[i].pair[t]);
        float s0 = sigmoid(g.x), s1 = sigmoid(g.y), d0 = d[i][2 * t], d1 = d[i][2 * t + 1];
        float silu0 = g.x * s0, silu1 = g.y * s1;
        y[i] = attention::pack_two<T>(silu0 * u.x, silu1 * u.y);
        d_up[i].pair[t] = attention::pack_two<T>(d0 * silu0, d1 * silu1);
        d_gate[i].pair[t] = attention::pack_two<T>(d0 * u.x * s0 * (1.0f + g.x * (1.0f - s0)),
                                                   d1 * u.y * s1 * (1.0f + g.y * (1.0f - s1)));
      }
      uint32_t x[PARTS][2];
      exchange_halves(x[0], y[0], y[1]);
      exchange_halves(x[1], d_gate[0].pair[t], d_gate[1].pair[t]);
      exchange_halves(x[2], d_up[0].pair[t], d_up[1].pair[t]);
#pragma unroll
      for (int p = 0; p < PARTS; p++) {
#pragma unroll
        for (int j = 0; j < GROUPS; j++) {
          float (&c)[4] = sums[p][t][j];
          multiply<T>(c[0], c[1], c[2], c[3], x[p], b[p][j]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
      if (has_columns && row + 2 * quad + i < end) {
        store_words(to_gate + i * work.d_gate.stride, d_gate[i]);
        store_words(to_up + i * work.d_up.stride, d_up[i]);
      }
    }
    to_gate += work.d_gate.stride * STEP_ROWS;
    to_up += work.d_up.stride * STEP_ROWS;
    slot = (slot + 1) % SLOTS;
  }

  float4 *partials = work.partials + (static_cast<int64_t>(share) * across * WARPS + warp) * (PARTS * S::PART) + lane;
#pragma unroll
  for (int p = 0; p < PARTS; p++) {
    if (!(p == 0 ? work.has_grad_a : p == 1 ? work.gate_ranks > 0 : work.up_ranks > 0)) continue;
#pragma unroll
    for (int t = 0; t < TILES; t++) {
#pragma unroll
      for (int j = 0; j < GROUPS; j++) {
        const float (&c)[4] = sums[p][t][j];
        partials[p * S::PART + (j * TILES + t) * 32] = make_float4(c[0], c[1], c[2], c[3]);
      }
    }
  }
}

// A gradient f32 that the sums of a part, times a factor, are added to; `ranks` are those that it has.
struct Gradient {
  float *data;
  int64_t rank_stride, col_stride;
  int ranks;
  float factor;
};

struct Gradients {
  Gradient parts[PARTS];
};

// Adds the partial sums of the shares in order: a warp for each warp of columns, 8 ranks and part (`blockIdx.y`), each
// thread the sums that the thread of the same place has left.
template <int RANKS>
__global__ void __launch_bounds__(256)
    add_partials(const __grid_constant__ Gradients gradients, const float4 *partials, int shares, int warps, int cols) {
  using S = Sizes<RANKS>;
  const Gradient &to = gradients.parts[blockIdx.y];
  int lane = threadIdx.x % 32, group = lane / 4, quad = lane % 4;
  int unit = blockIdx.x * (256 / 32) + threadIdx.x / 32, j = unit % S::GROUPS, warp = unit / S::GROUPS;
  int col = (warp * 8 + group) * COLS;
  if (warp >= warps || col >= cols || 8 * j >= to.ranks) return;
  float4 sums[TILES] = {};
  const float4 *from = partials + (warp * static_cast<int64_t>(PARTS) + blockIdx.y) * S::PART + j * TILES * 32 + lane;
#pragma unroll 2
  for (int share = 0; share < shares; share++) {
#pragma unroll
    for (int t = 0; t < TILES; t++) {
      float4 x = from[t * 32];
      sums[t].x += x.x;
      sums[t].y += x.y;
      sums[t].z += x.z;
      sums[t].w += x.w;
    }
    from += static_cast<int64_t>(warps) * PARTS * S::PART;
  }
#pragma unroll
  for (int i = 0; i < 2; i++) {
    int rank = 8 * j + 2 * quad + i;
    if (rank >= to.ranks) continue;
    float *at = to.data + rank * to.rank_stride + col * to.col_stride;
#pragma unroll
    for (int t = 0; t < TILES; t++) {
      at[2 * t * to.col_stride] += to.factor * (i == 0 ? sums[t].x : sums[t].y);
      at[(2 * t + 1) * to.col_stride] += to.factor * (i == 0 ? sums[t].z : sums[t].w);
    }
  }
}

template <typename T, int RANKS> int backward(const Work<T> &work, const Gradients &gradients, cudaStream_t stream) {
  using S = Sizes<RANKS>;
  int across = (work.cols + WARPS * WARP_COLS - 1) / (WARPS * WARP_COLS), warps = across * WARPS;
  int shares = (work.rows + work.share - 1) / work.share;
  int code = attention::launch(backward_kernel<T, RANKS>, static_cast<int64_t>(across) * shares, THREADS,
                               S::SLOTS * S::SLOT, stream, work);
  if (code != 0) return code;
  int most = 0;
  for (const Gradient &part : gradients.parts) most = part.ranks > most ? part.ranks : most;
  if (most == 0) return 0;
  dim3 grid((warps * S::GROUPS + 7) / 8, PARTS);
  add_partials<RANKS><<<grid, 256, 0, stream>>>(gradients, work.partials, shares, warps, work.cols);
  return LAUNCHED();
}

} // namespace

// Each of `share` rows, a multiple of 8, leaves sums in the workspace. Adapters that are left out have no data.
extern "C" int trainer_swiglu_backward_adapters(Matrix d_gate, Matrix d_up, Matrix dy, Matrix gate, Matrix up,
                                                Matrix d_low, Matrix a, Matrix grad_a, Matrix low_gate,
                                                Matrix grad_b_gate, float gate_factor, Matrix low_up, Matrix grad_b_up,
                                                float up_factor, float *workspace, int share, cudaStream_t stream) {
  if (dy.rows == 0 || dy.cols == 0) return 0;
  int ranks = max(d_low.cols, max(low_gate.cols, low_up.cols));
  bool fits =
      ranks <= MOST_RANKS && share > 0 && share % STEP_ROWS == 0 && reinterpret_cast<uintptr_t>(workspace) % 16 == 0;
  // Rows behind the last one are addressed, though not read.
  for (const Matrix &m : {d_gate, d_up, dy, gate, up, d_low, a, low_gate, low_up})
    fits = fits && is_aligned(m, 8) && m.stride % 8 == 0;
  if (!fits) return static_cast<int>(cudaErrorInvalidValue);
  if (dy.dtype == F32 || attention::compute_capability() < (dy.dtype == F16 ? 75 : 80))
    return static_cast<int>(cudaErrorNotSupported);
  auto by_column = [](const Matrix &m, float factor) {
    return Gradient{static_cast<float *>(m.data), 1, m.stride, m.cols, factor};
  };
  Gradients gradients{{{static_cast<float *>(grad_a.data), grad_a.stride, 1, grad_a.rows, 1.0f},
                       by_column(grad_b_gate, gate_factor),
                       by_column(grad_b_up, up_factor)}};
  auto run = [&](auto zero) {
    using T = decltype(zero);
    Work<T> work{rows_of<T>(d_gate),
                 rows_of<T>(d_up),
                 rows_of<const T>(dy),
                 rows_of<const T>(gate),
                 rows_of<const T>(up),
                 rows_of<const T>(d_low),
                 rows_of<const T>(a),
                 rows_of<const T>(low_gate),
                 rows_of<const T>(low_up),
                 d_low.cols,
                 low_gate.cols,
                 low_up.cols,
                 grad_a.rows > 0,
                 dy.rows,
                 dy.cols,
                 share,
                 reinterpret_cast<float4 *>(workspace)};
    return ranks <= 16 ? backward<T, 16>(work, gradients, stream) : backward<T, 32>(work, gradients, stream);
  };
  return dy.dtype == F16 ? run(__half()) : run(__nv_bfloat16());
}
