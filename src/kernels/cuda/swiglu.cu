// The gated activation of the MLP and its gradients.
//
//   y = gate sigma(gate) up,  sigma(g) = 1 / (1 + exp(-g))
//   d_up = dy gate sigma(gate),  d_gate = dy up sigma(gate) (1 + gate (1 - sigma(gate)))
//
// Layout: all [N, I] of one type; `gate` and `up` are usually the two halves of the columns of one matrix. Every value
// is read before the values of the same place are written, so outputs may lie on inputs.
//
// Launch: 256 threads a block, 16-byte accesses; forward two of `gate` and `up` each in flight a thread, backward one
// of each of the three inputs. Matrices without gaps are one long row; rows that are not aligned go value by value.
//
// Bound: bytes. Forward 3 N I T, backward 5 N I T, with `activated` 6 N I T, where T is the size of the type. The
// exponential and the division are the approximate ones: their error (2 ulp, and that of the exponent for large
// arguments) is far below the rounding of 16-bit types.
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
__device__ __forceinline__ void activate_backward(T *d_gate, T *d_up, T *activated, const Raw<T, N> &dy,
                                                  const Raw<T, N> &gate, const Raw<T, N> &up) {
  float d[N], g[N], u[N], to_gate[N], to_up[N], again[N];
  unpack(d, dy);
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

template <typename T, int N>
__global__ void __launch_bounds__(Plan::THREADS)
    backward_kernel(Rows<T> d_gate, Rows<T> d_up, Rows<T> activated, Rows<const T> dy, Rows<const T> gate,
                    Rows<const T> up, int64_t rows, int64_t cols) {
  int64_t main = cols / N * N;
  int64_t col = (blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x) * N;
  for (int64_t row = blockIdx.y * blockDim.y + threadIdx.y; row < rows; row += gridDim.y * blockDim.y) {
    T *to_gate = d_gate[row], *to_up = d_up[row];
    T *again = activated.data ? activated[row] : nullptr;
    const T *d = dy[row], *g = gate[row], *u = up[row];
    if (col < main) {
      Raw<T, N> d_raw = load_raw<N>(d + col), g_raw = load_raw<N>(g + col), u_raw = load_raw<N>(u + col);
      activate_backward(to_gate + col, to_up + col, again ? again + col : nullptr, d_raw, g_raw, u_raw);
    }
    if (N > 1 && blockIdx.x == 0) {
      for (int64_t i = main + threadIdx.x; i < cols; i += blockDim.x) {
        Raw<T, 1> d_raw = load_raw<1>(d + i), g_raw = load_raw<1>(g + i), u_raw = load_raw<1>(u + i);
        activate_backward(to_gate + i, to_up + i, again ? again + i : nullptr, d_raw, g_raw, u_raw);
      }
    }
  }
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
                                       cudaStream_t stream) {
  if (dy.rows == 0 || dy.cols == 0) return 0;
  Plan plan({dy, d_gate, d_up, gate, up, activated}, 1);
  WITH_TYPE(dy.dtype, T, {
    auto to_gate = rows_of<T>(d_gate), to_up = rows_of<T>(d_up), again = rows_of<T>(activated);
    auto d = rows_of<const T>(dy), g = rows_of<const T>(gate), u = rows_of<const T>(up);
    if (plan.is_fast) {
      backward_kernel<T, 8><<<plan.grid, plan.block, 0, stream>>>(to_gate, to_up, again, d, g, u, plan.rows, plan.cols);
    } else {
      backward_kernel<T, 1><<<plan.grid, plan.block, 0, stream>>>(to_gate, to_up, again, d, g, u, plan.rows, plan.cols);
    }
  });
  return LAUNCHED();
}
