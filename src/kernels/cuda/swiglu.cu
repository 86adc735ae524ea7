// The gated activation of the MLP and its gradients.
//
//   y = gate sigma(gate) up,  sigma(g) = 1 / (1 + exp(-g))
//   d_up = dy gate sigma(gate),  d_gate = dy up sigma(gate) (1 + gate (1 - sigma(gate)))
//
// where backward may take dy + d_low A for dy, the share of an adapter of rank R.
//
// Layout: all [N, I] of one type; `gate` and `up` are usually the two halves of the columns of one matrix. `d_low`
// [N, R] and A [R, I] are of the same type. Every value is read before the values of the same place are written, so
// outputs may lie on inputs, but not on `d_low` and A.
//
// Launch: 256 threads a block, 16-byte accesses; forward two of `gate` and `up` each in flight a thread, backward one
// of each of the three inputs. Matrices without gaps are one long row; rows that are not aligned go value by value.
// With `d_low`, 16-bit types and tensor cores a warp of 128 threads a block takes 64 columns of A into registers and
// walks 64 rows, 8 at a time.
//
// Bound: bytes. Forward 3 N I T, backward 5 N I T, with `activated` 6 N I T, where T is the size of the type. The
// exponential and the division are the approximate ones: their error (2 ulp, and that of the exponent for large
// arguments) is far below the rounding of 16-bit types.
//
// The share of the adapter: at 4.1 TB/s each of 132 multiprocessors takes a value of 12 bytes every 0.66 cycles of 1.7
// GHz, room for 84 instructions of a thread, of which the activation needs about 30. As multiplications and additions
// the share would take R more, and registers for 8 R values of A; packed in pairs for 4 R, and R more instructions to
// unpack them. A tensor core instruction adds 16 ranks to 128 values in under 10 of the 340 cycles that a quarter of
// a multiprocessor has for these, and leaves a thread 8 neighbouring columns if A's columns are dealt out accordingly.
#include "elementwise.cuh"

namespace {

__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }

template <typename T, int N>
__device__ __forceinline__ void activate(T *y, const Raw<T, N> &gate, const Raw<T, N> &up) {
  float g[N], u[N];
  unpack(g, gate);
  unpack(u, up);
#pragma unroll
  for (int i = 0; i < N; i++) u[i] *= g[i] * sigmoid(g[i]);
  store_values(y, u);
}

template <typename T, int N>
__global__ void __launch_bounds__(Plan::THREADS)
    forward_kernel(Rows<T> y, Rows<const T> gate, Rows<const T> up, int64_t rows, int64_t cols) {
  constexpr int UNROLL = 2;
  int64_t main = cols / N * N, step = blockDim.x * N;
  int64_t first = blockIdx.x * step * UNROLL + threadIdx.x * N;
  for (int64_t row = blockIdx.y * blockDim.y + threadIdx.y; row < rows; row += gridDim.y * blockDim.y) {
    T *to = y[row];
    const T *g = gate[row], *u = up[row];
    Raw<T, N> g_raw[UNROLL], u_raw[UNROLL];
#pragma unroll
    for (int i = 0; i < UNROLL; i++) {
      int64_t col = first + i * step;
      if (col < main) {
        g_raw[i] = load_raw<N>(g + col);
        u_raw[i] = load_raw<N>(u + col);
      }
    }
#pragma unroll
    for (int i = 0; i < UNROLL; i++) {
      int64_t col = first + i * step;
      if (col < main) activate(to + col, g_raw[i], u_raw[i]);
    }
    if (N > 1 && blockIdx.x == 0) {
      for (int64_t col = main + threadIdx.x; col < cols; col += blockDim.x) {
        activate(to + col, load_raw<1>(g + col), load_raw<1>(u + col));
      }
    }
  }
}

template <typename T, int N>
__device__ __forceinline__ void activate_backward(T *d_gate, T *d_up, T *activated, const float (&d)[N],
                                                  const Raw<T, N> &gate, const Raw<T, N> &up) {
  float g[N], u[N], to_gate[N], to_up[N], again[N];
  unpack(g, gate);
  unpack(u, up);
#pragma unroll
  for (int i = 0; i < N; i++) {
    float s = sigmoid(g[i]), silu = g[i] * s;
    to_up[i] = d[i] * silu;
    to_gate[i] = d[i] * u[i] * s * (1.0f + g[i] * (1.0f - s));
    again[i] = silu * u[i];
  }
  store_values(d_gate, to_gate);
  store_values(d_up, to_up);
  if (activated) store_values(activated, again);
}

// The gradient `d_low A` of rank `ranks` that belongs to dy.
template <typename T> struct LowRank {
  Rows<const T> d_low, a;
  int ranks;
};

// Adds `N` columns of one row of it.
template <typename T, int N>
__device__ __forceinline__ void add_low_rank(float (&d)[N], const LowRank<T> &low, int64_t row, int64_t col) {
  const T *factors = low.d_low[row];
#pragma unroll 4
  for (int k = 0; k < low.ranks; k++) {
    float a[N], factor = to_float(factors[k]);
    unpack(a, load_raw<N>(low.a[k] + col));
#pragma unroll
    for (int i = 0; i < N; i++) d[i] += factor * a[i];
  }
}

template <typename T, int N, bool HAS_LOW>
__global__ void __launch_bounds__(Plan::THREADS)
    backward_kernel(Rows<T> d_gate, Rows<T> d_up, Rows<T> activated, Rows<const T> dy, Rows<const T> gate,
                    Rows<const T> up, int64_t rows, int64_t cols, LowRank<T> low) {
  int64_t main = cols / N * N;
  int64_t col = (blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x) * N;
  for (int64_t row = blockIdx.y * blockDim.y + threadIdx.y; row < rows; row += gridDim.y * blockDim.y) {
    T *to_gate = d_gate[row], *to_up = d_up[row];
    T *again = activated.data ? activated[row] : nullptr;
    const T *d = dy[row], *g = gate[row], *u = up[row];
    if (col < main) {
      Raw<T, N> d_raw = load_raw<N>(d + col), g_raw = load_raw<N>(g + col), u_raw = load_raw<N>(u + col);
      float values[N];
      unpack(values, d_raw);
      if (HAS_LOW) add_low_rank(values, low, row, col);
      activate_backward(to_gate + col, to_up + col, again ? again + col : nullptr, values, g_raw, u_raw);
    }
    if (N > 1 && blockIdx.x == 0) {
      for (int64_t i = main + threadIdx.x; i < cols; i += blockDim.x) {
        Raw<T, 1> g_raw = load_raw<1>(g + i), u_raw = load_raw<1>(u + i);
        float value[1] = {to_float(d[i])};
        if (HAS_LOW) add_low_rank(value, low, row, i);
        activate_backward(to_gate + i, to_up + i, again ? again + i : nullptr, value, g_raw, u_raw);
      }
    }
  }
}

constexpr int TILE_THREADS = 128;
constexpr int TILE_COLS = 64;
constexpr int TILE_ROWS = 64;
constexpr int MOST_RANKS = 64;

// Blocks of `backward_tiles` that share a multiprocessor: as many as its registers hold without spilling.
constexpr int tile_blocks(int steps) { return steps <= 2 ? 5 : steps == 3 ? 4 : 3; }

// Adds to a tile of 16 columns (d0, d1 | d2, d3: column `group` | `group` + 8, rows 2 `quad` and 2 `quad` + 1) the
// product of 16 ranks of A and of `d_low`.
template <typename T>
__device__ __forceinline__ void multiply(float &d0, float &d1, float &d2, float &d3, const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<T, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d0), "+f"(d1), "+f"(d2), "+f"(d3)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d0), "+f"(d1), "+f"(d2), "+f"(d3)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
}

// With `d_low`, of at most 16 STEPS ranks, where all rows are aligned. The instruction's 16 columns of tile `t` stand
// for columns 8 `group` + 2 t (+ 1 for the second half) of the warp's 64: four tiles leave thread (`group`, `quad`)
// with 8 neighbours of rows 2 `quad` and 2 `quad` + 1, and every access of the warp is four whole lines.
template <typename T, int STEPS>
__global__ void __launch_bounds__(TILE_THREADS, tile_blocks(STEPS))
    backward_tiles(Rows<T> d_gate, Rows<T> d_up, Rows<T> activated, Rows<const T> dy, Rows<const T> gate,
                   Rows<const T> up, int rows, int cols, LowRank<T> low) {
  int group = threadIdx.x % 32 / 4, quad = threadIdx.x % 4;
  int64_t warp = blockIdx.x * static_cast<int64_t>(TILE_THREADS / 32) + threadIdx.x / 32;
  int64_t across = (cols + TILE_COLS - 1) / TILE_COLS;
  int64_t first = warp / across * TILE_ROWS, end = first + TILE_ROWS < rows ? first + TILE_ROWS : rows;
  int64_t col = warp % across * TILE_COLS + group * 8;
  bool has_columns = col < cols;

  // Ranks that A does not have are 0 on both sides: what lies behind `d_low` may be no number.
  uint32_t a[STEPS][4][4];
#pragma unroll
  for (int step = 0; step < STEPS; step++) {
    Raw<T, 8> raw[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int k = step * 16 + i / 2 * 8 + quad * 2 + i % 2;
      raw[i] = Raw<T, 8>{};
      if (has_columns && k < low.ranks) raw[i] = load_raw<8>(low.a[k] + col);
    }
#pragma unroll
    for (int tile = 0; tile < 4; tile++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        uint32_t even = raw[2 * half].words[tile], odd = raw[2 * half + 1].words[tile];
        a[step][tile][2 * half] = __byte_perm(even, odd, 0x5410);
        a[step][tile][2 * half + 1] = __byte_perm(even, odd, 0x7632);
      }
    }
  }

  for (int64_t row = first; row < end; row += 8) {
    uint32_t b[STEPS][2];
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        int k = step * 16 + half * 8 + quad * 2;
        b[step][half] = 0;
        if (row + group < end && k < low.ranks)
          b[step][half] = *reinterpret_cast<const uint32_t *>(low.d_low[row + group] + k);
      }
    }
    Raw<T, 8> d_raw[2], g_raw[2], u_raw[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      int64_t at = row + quad * 2 + i;
      d_raw[i] = g_raw[i] = u_raw[i] = Raw<T, 8>{};
      if (has_columns && at < end) {
        d_raw[i] = load_raw<8>(dy[at] + col);
        g_raw[i] = load_raw<8>(gate[at] + col);
        u_raw[i] = load_raw<8>(up[at] + col);
      }
    }
    float d[2][8];
    unpack(d[0], d_raw[0]);
    unpack(d[1], d_raw[1]);
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
#pragma unroll
      for (int tile = 0; tile < 4; tile++) {
        int even = 2 * tile, odd = even + 1;
        multiply<T>(d[0][even], d[1][even], d[0][odd], d[1][odd], a[step][tile], b[step]);
      }
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
      int64_t at = row + quad * 2 + i;
      if (has_columns && at < end) {
        T *again = activated.data ? activated[at] + col : nullptr;
        activate_backward(d_gate[at] + col, d_up[at] + col, again, d[i], g_raw[i], u_raw[i]);
      }
    }
  }
}

// Whether the device has tensor cores that multiply both 16-bit types.
bool has_tensor_cores() {
  int device = 0, major = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  return major >= 8;
}

template <typename T>
void backward_by_tiles(Rows<T> d_gate, Rows<T> d_up, Rows<T> activated, Rows<const T> dy, Rows<const T> gate,
                       Rows<const T> up, int rows, int cols, const LowRank<T> &low, cudaStream_t stream) {
  int64_t across = (cols + TILE_COLS - 1) / TILE_COLS, down = (rows + TILE_ROWS - 1) / TILE_ROWS;
  constexpr int WARPS = TILE_THREADS / 32;
  unsigned blocks = static_cast<unsigned>((across * down + WARPS - 1) / WARPS);
  auto launch = [&](auto kernel) {
    kernel<<<blocks, TILE_THREADS, 0, stream>>>(d_gate, d_up, activated, dy, gate, up, rows, cols, low);
  };
  if (low.ranks <= 16)
    launch(backward_tiles<T, 1>);
  else if (low.ranks <= 32)
    launch(backward_tiles<T, 2>);
  else if (low.ranks <= 48)
    launch(backward_tiles<T, 3>);
  else
    launch(backward_tiles<T, 4>);
}

} // namespace

extern "C" int trainer_swiglu(Matrix y, Matrix gate, Matrix up, cudaStream_t stream) {
  if (y.rows == 0 || y.cols == 0) return 0;
  Plan plan({y, gate, up}, 2);
  WITH_TYPE(y.dtype, T, {
    auto to = rows_of<T>(y);
    auto g = rows_of<const T>(gate), u = rows_of<const T>(up);
    if (plan.is_fast)
      forward_kernel<T, 8><<<plan.grid, plan.block, 0, stream>>>(to, g, u, plan.rows, plan.cols);
    else
      forward_kernel<T, 1><<<plan.grid, plan.block, 0, stream>>>(to, g, u, plan.rows, plan.cols);
  });
  return LAUNCHED();
}

extern "C" int trainer_swiglu_backward(Matrix d_gate, Matrix d_up, Matrix dy, Matrix gate, Matrix up, Matrix activated,
                                       Matrix d_low, Matrix a, cudaStream_t stream) {
  if (dy.rows == 0 || dy.cols == 0) return 0;
  if (d_low.cols > MOST_RANKS) return static_cast<int>(cudaErrorInvalidValue);
  bool has_low = d_low.cols > 0, is_tiled = has_low && dy.dtype != F32 && has_tensor_cores() && is_aligned(d_low, 2);
  for (const Matrix &m : {dy, d_gate, d_up, gate, up, activated, a}) is_tiled = is_tiled && is_aligned(m, 8);
  Plan plan({dy, d_gate, d_up, gate, up, activated, a}, 1, !has_low);
  WITH_TYPE(dy.dtype, T, {
    auto to_gate = rows_of<T>(d_gate), to_up = rows_of<T>(d_up), again = rows_of<T>(activated);
    auto d = rows_of<const T>(dy), g = rows_of<const T>(gate), u = rows_of<const T>(up);
    LowRank<T> low{rows_of<const T>(d_low), rows_of<const T>(a), d_low.cols};
    auto launch = [&](auto kernel) {
      kernel<<<plan.grid, plan.block, 0, stream>>>(to_gate, to_up, again, d, g, u, plan.rows, plan.cols, low);
    };
    if (is_tiled) {
      if constexpr (!std::is_same_v<T, float>)
        backward_by_tiles(to_gate, to_up, again, d, g, u, dy.rows, dy.cols, low, stream);
    } else if (plan.is_fast && has_low) {
      launch(backward_kernel<T, 8, true>);
    } else if (plan.is_fast) {
      launch(backward_kernel<T, 8, false>);
    } else if (has_low) {
      launch(backward_kernel<T, 1, true>);
    } else {
      launch(backward_kernel<T, 1, false>);
    }
  });
  return LAUNCHED();
}
