// Root-mean-square norms of rows, or of each head's part of a row.
//
//   r = 1 / sqrt(mean(x^2) + eps),  y = x r w
//   dx = r (w dy - x r^2 mean(w dy x)) (+ add),  dw = sum over rows and heads of dy x r
//
// Layout: `x` and `dx` [N, H d] of the residual type R, `y` and `dy` [N, H d] of the activation type T (R is T or f32),
// `w` [d] and `r` [N, H] f32. A unit is one head of one row; unit u is head u % H of row u / H. Sums are f32.
//
// Launch: a unit is held in registers, 8 values in each 16-byte access, and is read once. Up to 256 columns: 1 to 32
// lanes of a warp, 256 threads a block. Up to 16384 columns: a block of 32 to 512 threads with 1, 2 or 4 accesses each.
// What is longer or not aligned: a block of 256 threads that reads the unit twice, value by value. The weight's
// gradient: the two stages of column_sums.cuh over the units.
//
// Bound: bytes. Forward N H d (R + T) + 4 N H, backward N H d (2 R + T) (+ N H d R with `add`) + 4 N H, weight gradient
// N H d (R + T) + 4 N H, where a type stands for its size; the weight comes from the first-level cache.
#include "column_sums.cuh"
#include "elementwise.cuh"

namespace {

constexpr int THREADS = 256;
constexpr int GROUP_COLUMNS = 256;
constexpr int BLOCK_COLUMNS = 16384;

struct Units {
  int64_t count;
  int32_t heads;
  int32_t d;
};

// Where a unit begins.
template <typename T>
__device__ __forceinline__ T *unit_at(T *data, int64_t stride, const Units &units, uint32_t unit) {
  uint32_t row = unit / static_cast<uint32_t>(units.heads), head = unit % static_cast<uint32_t>(units.heads);
  return data + row * stride + static_cast<int64_t>(head) * units.d;
}

__device__ __forceinline__ float reciprocal_root(float sum, int d, float eps) {
  return 1.0f / sqrtf(sum / static_cast<float>(d) + eps);
}

// The sum over a group of `lanes` neighbours, a power of two.
__device__ __forceinline__ float group_sum(float x, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

template <typename R> __device__ __forceinline__ float squares(const Raw<R, 8> &x) {
  float v[8], sum = 0.0f;
  unpack(v, x);
#pragma unroll
  for (int i = 0; i < 8; i++) sum += v[i] * v[i];
  return sum;
}

template <typename R, typename T>
__device__ __forceinline__ void store_normed(T *y, const Raw<R, 8> &x, const float *weight, float r) {
  float v[8], w[8];
  unpack(v, x);
  unpack(w, load_raw<8>(weight));
#pragma unroll
  for (int i = 0; i < 8; i++) v[i] = v[i] * r * w[i];
  store_values(y, v);
}

template <typename R, typename T>
__global__ void __launch_bounds__(THREADS)
    norm_groups(T *y, int64_t y_stride, float *reciprocals, const R *x, int64_t x_stride, const float *weight,
                Units units, int shift, float eps) {
  int64_t unit = (blockIdx.x * static_cast<int64_t>(THREADS) + threadIdx.x) >> shift;
  int lane = threadIdx.x & ((1 << shift) - 1), col = lane * 8;
  bool is_inside = unit < units.count && col < units.d;
  Raw<R, 8> raw{};
  if (is_inside) raw = load_raw<8>(unit_at(x, x_stride, units, unit) + col);
  float r = reciprocal_root(group_sum(squares(raw), 1 << shift), units.d, eps);
  if (!is_inside) return;
  store_normed(unit_at(y, y_stride, units, unit) + col, raw, weight + col, r);
  if (lane == 0) reciprocals[unit] = r;
}

template <typename R, typename T, int PACKS>
__global__ void __launch_bounds__(PACKS == 4 ? 512 : 256)
    norm_blocks(T *y, int64_t y_stride, float *reciprocals, const R *x, int64_t x_stride, const float *weight,
                Units units, float eps) {
  __shared__ float scratch[33];
  const R *from = unit_at(x, x_stride, units, blockIdx.x);
  T *to = unit_at(y, y_stride, units, blockIdx.x);
  Raw<R, 8> raw[PACKS];
#pragma unroll
  for (int p = 0; p < PACKS; p++) {
    int col = (p * blockDim.x + threadIdx.x) * 8;
    raw[p] = Raw<R, 8>{};
    if (col < units.d) raw[p] = load_raw<8>(from + col);
  }
  float sum = 0.0f;
#pragma unroll
  for (int p = 0; p < PACKS; p++) sum += squares(raw[p]);
  float r = reciprocal_root(block_sum(sum, scratch), units.d, eps);
#pragma unroll
  for (int p = 0; p < PACKS; p++) {
    int col = (p * blockDim.x + threadIdx.x) * 8;
    if (col < units.d) store_normed(to + col, raw[p], weight + col, r);
  }
  if (threadIdx.x == 0) reciprocals[blockIdx.x] = r;
}

template <typename R, typename T>
__global__ void norm_values(T *y, int64_t y_stride, float *reciprocals, const R *x, int64_t x_stride,
                            const float *weight, Units units, float eps) {
  __shared__ float scratch[33];
  const R *from = unit_at(x, x_stride, units, blockIdx.x);
  T *to = unit_at(y, y_stride, units, blockIdx.x);
  float sum = 0.0f;
  for (int col = threadIdx.x; col < units.d; col += THREADS) {
    float v = to_float(from[col]);
    sum += v * v;
  }
  float r = reciprocal_root(block_sum(sum, scratch), units.d, eps);
  for (int col = threadIdx.x; col < units.d; col += THREADS)
    to[col] = from_float<T>(to_float(from[col]) * r * weight[col]);
  if (threadIdx.x == 0) reciprocals[blockIdx.x] = r;
}

// `out = w dy`; returns its product with `x`.
template <typename R, typename T>
__device__ __forceinline__ float weigh(float (&out)[8], const Raw<T, 8> &dy, const Raw<R, 8> &x, const float *weight) {
  float g[8], v[8], sum = 0.0f;
  unpack(g, dy);
  unpack(v, x);
  unpack(out, load_raw<8>(weight));
#pragma unroll
  for (int i = 0; i < 8; i++) {
    out[i] *= g[i];
    sum += out[i] * v[i];
  }
  return sum;
}

template <typename R>
__device__ __forceinline__ void store_gradient(R *dx, const float (&weighted)[8], const Raw<R, 8> &x,
                                               const Raw<R, 8> &add, float r, float projection) {
  float v[8], out[8];
  unpack(v, x);
  unpack(out, add);
#pragma unroll
  for (int i = 0; i < 8; i++) out[i] = r * (weighted[i] - v[i] * (r * r * projection)) + out[i];
  store_values(dx, out);
}

template <typename R, typename T>
__global__ void __launch_bounds__(THREADS)
    backward_groups(R *dx, int64_t dx_stride, const T *dy, int64_t dy_stride, const R *x, int64_t x_stride,
                    const float *weight, const float *reciprocals, const R *add, int64_t add_stride, Units units,
                    int shift) {
  int64_t unit = (blockIdx.x * static_cast<int64_t>(THREADS) + threadIdx.x) >> shift;
  int col = (threadIdx.x & ((1 << shift) - 1)) * 8;
  bool is_inside = unit < units.count && col < units.d;
  Raw<T, 8> dy_raw{};
  Raw<R, 8> x_raw{}, add_raw{};
  float weighted[8], sum = 0.0f, r = 0.0f;
  if (is_inside) {
    dy_raw = load_raw<8>(unit_at(dy, dy_stride, units, unit) + col);
    x_raw = load_raw<8>(unit_at(x, x_stride, units, unit) + col);
    if (add) add_raw = load_raw<8>(unit_at(add, add_stride, units, unit) + col);
    r = reciprocals[unit];
    sum = weigh(weighted, dy_raw, x_raw, weight + col);
  }
  float projection = group_sum(sum, 1 << shift) / static_cast<float>(units.d);
  if (is_inside) store_gradient(unit_at(dx, dx_stride, units, unit) + col, weighted, x_raw, add_raw, r, projection);
}

template <typename R, typename T, int PACKS>
__global__ void __launch_bounds__(PACKS == 4 ? 512 : 256)
    backward_blocks(R *dx, int64_t dx_stride, const T *dy, int64_t dy_stride, const R *x, int64_t x_stride,
                    const float *weight, const float *reciprocals, const R *add, int64_t add_stride, Units units) {
  __shared__ float scratch[33];
  dx = unit_at(dx, dx_stride, units, blockIdx.x);
  dy = unit_at(dy, dy_stride, units, blockIdx.x);
  x = unit_at(x, x_stride, units, blockIdx.x);
  if (add) add = unit_at(add, add_stride, units, blockIdx.x);
  float r = reciprocals[blockIdx.x];
  Raw<T, 8> dy_raw[PACKS];
  Raw<R, 8> x_raw[PACKS], add_raw[PACKS];
#pragma unroll
  for (int p = 0; p < PACKS; p++) {
    int col = (p * blockDim.x + threadIdx.x) * 8;
    dy_raw[p] = Raw<T, 8>{};
    x_raw[p] = Raw<R, 8>{};
    add_raw[p] = Raw<R, 8>{};
    if (col < units.d) {
      dy_raw[p] = load_raw<8>(dy + col);
      x_raw[p] = load_raw<8>(x + col);
      if (add) add_raw[p] = load_raw<8>(add + col);
    }
  }
  float weighted[PACKS][8], sum = 0.0f;
#pragma unroll
  for (int p = 0; p < PACKS; p++) {
    int col = (p * blockDim.x + threadIdx.x) * 8;
    if (col < units.d) sum += weigh(weighted[p], dy_raw[p], x_raw[p], weight + col);
  }
  float projection = block_sum(sum, scratch) / static_cast<float>(units.d);
#pragma unroll
  for (int p = 0; p < PACKS; p++) {
    int col = (p * blockDim.x + threadIdx.x) * 8;
    if (col < units.d) store_gradient(dx + col, weighted[p], x_raw[p], add_raw[p], r, projection);
  }
}

template <typename R, typename T>
__global__ void backward_values(R *dx, int64_t dx_stride, const T *dy, int64_t dy_stride, const R *x, int64_t x_stride,
                                const float *weight, const float *reciprocals, const R *add, int64_t add_stride,
                                Units units) {
  __shared__ float scratch[33];
  dx = unit_at(dx, dx_stride, units, blockIdx.x);
  dy = unit_at(dy, dy_stride, units, blockIdx.x);
  x = unit_at(x, x_stride, units, blockIdx.x);
  if (add) add = unit_at(add, add_stride, units, blockIdx.x);
  float r = reciprocals[blockIdx.x], sum = 0.0f;
  for (int col = threadIdx.x; col < units.d; col += THREADS) sum += weight[col] * to_float(dy[col]) * to_float(x[col]);
  float projection = block_sum(sum, scratch) / static_cast<float>(units.d);
  for (int col = threadIdx.x; col < units.d; col += THREADS) {
    float value = r * (weight[col] * to_float(dy[col]) - to_float(x[col]) * (r * r * projection));
    dx[col] = from_float<R>(add ? value + to_float(add[col]) : value);
  }
}

template <typename R, typename T, int N> struct Terms {
  Raw<T, N> dy;
  Raw<R, N> x;
  float reciprocal;
};

template <typename R, typename T, int N>
__global__ void __launch_bounds__(column_sums::THREADS)
    weight_partials(float *partials, const T *dy, int64_t dy_stride, const R *x, int64_t x_stride,
                    const float *reciprocals, Units units) {
  int col = column_sums::column<N>();
  float sums[N] = {};
  if (col < units.d) {
    auto load = [&](int64_t unit) {
      return Terms<R, T, N>{load_raw<N>(unit_at(dy, dy_stride, units, unit) + col),
                            load_raw<N>(unit_at(x, x_stride, units, unit) + col), reciprocals[unit]};
    };
    column_sums::for_each_row(units.count, load, [&](const Terms<R, T, N> &terms) {
      float g[N], v[N];
      unpack(g, terms.dy);
      unpack(v, terms.x);
#pragma unroll
      for (int i = 0; i < N; i++) sums[i] += g[i] * v[i] * terms.reciprocal;
    });
  }
  column_sums::write_partials(partials, sums, units.d);
}

// Whether every unit of the matrix begins where 8 values can be read at once.
bool has_aligned_units(const Matrix &m, int d) { return d % 8 == 0 && is_aligned(m, 8); }

bool has_aligned_values(const float *p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// The binary logarithm of the number of lanes that hold `d` columns.
int group_shift(int d) {
  int shift = 0;
  while ((8 << shift) < d) shift++;
  return shift;
}

int block_threads(int d, int packs) { return ((d / 8 + packs - 1) / packs + 31) / 32 * 32; }

unsigned group_blocks(const Units &units, int shift) {
  return static_cast<unsigned>(((units.count << shift) + THREADS - 1) / THREADS);
}

template <typename R, typename T>
void forward(const Matrix &y, float *reciprocals, const Matrix &x, const float *weight, const Units &units, float eps,
             cudaStream_t stream) {
  T *to = static_cast<T *>(y.data);
  const R *from = static_cast<const R *>(x.data);
  int d = units.d;
  unsigned count = static_cast<unsigned>(units.count);
  if (d > BLOCK_COLUMNS || !has_aligned_units(y, d) || !has_aligned_units(x, d) || !has_aligned_values(weight)) {
    norm_values<<<count, THREADS, 0, stream>>>(to, y.stride, reciprocals, from, x.stride, weight, units, eps);
  } else if (d <= GROUP_COLUMNS) {
    int shift = group_shift(d);
    norm_groups<<<group_blocks(units, shift), THREADS, 0, stream>>>(to, y.stride, reciprocals, from, x.stride, weight,
                                                                    units, shift, eps);
  } else if (d <= 256 * 8) {
    norm_blocks<R, T, 1>
        <<<count, block_threads(d, 1), 0, stream>>>(to, y.stride, reciprocals, from, x.stride, weight, units, eps);
  } else if (d <= 512 * 8) {
    norm_blocks<R, T, 2>
        <<<count, block_threads(d, 2), 0, stream>>>(to, y.stride, reciprocals, from, x.stride, weight, units, eps);
  } else {
    norm_blocks<R, T, 4>
        <<<count, block_threads(d, 4), 0, stream>>>(to, y.stride, reciprocals, from, x.stride, weight, units, eps);
  }
}

template <typename R, typename T>
void backward(const Matrix &dx, const Matrix &dy, const Matrix &x, const float *weight, const float *reciprocals,
              const Matrix &add, const Units &units, cudaStream_t stream) {
  R *to = static_cast<R *>(dx.data);
  const T *g = static_cast<const T *>(dy.data);
  const R *from = static_cast<const R *>(x.data), *more = static_cast<const R *>(add.data);
  int d = units.d;
  unsigned count = static_cast<unsigned>(units.count);
  bool is_fast = d <= BLOCK_COLUMNS && has_aligned_units(dx, d) && has_aligned_units(dy, d) &&
                 has_aligned_units(x, d) && has_aligned_values(weight) && (!more || has_aligned_units(add, d));
  if (!is_fast) {
    backward_values<<<count, THREADS, 0, stream>>>(to, dx.stride, g, dy.stride, from, x.stride, weight, reciprocals,
                                                   more, add.stride, units);
  } else if (d <= GROUP_COLUMNS) {
    int shift = group_shift(d);
    backward_groups<<<group_blocks(units, shift), THREADS, 0, stream>>>(
        to, dx.stride, g, dy.stride, from, x.stride, weight, reciprocals, more, add.stride, units, shift);
  } else if (d <= 256 * 8) {
    backward_blocks<R, T, 1><<<count, block_threads(d, 1), 0, stream>>>(to, dx.stride, g, dy.stride, from, x.stride,
                                                                        weight, reciprocals, more, add.stride, units);
  } else if (d <= 512 * 8) {
    backward_blocks<R, T, 2><<<count, block_threads(d, 2), 0, stream>>>(to, dx.stride, g, dy.stride, from, x.stride,
                                                                        weight, reciprocals, more, add.stride, units);
  } else {
    backward_blocks<R, T, 4><<<count, block_threads(d, 4), 0, stream>>>(to, dx.stride, g, dy.stride, from, x.stride,
                                                                        weight, reciprocals, more, add.stride, units);
  }
}

template <typename R, typename T, int N>
void partial_sums(float *partials, int splits, const Matrix &dy, const Matrix &x, const float *reciprocals,
                  const Units &units, cudaStream_t stream) {
  weight_partials<R, T, N><<<column_sums::grid(units.d, N, splits), column_sums::block(units.d, N), 0, stream>>>(
      partials, static_cast<const T *>(dy.data), dy.stride, static_cast<const R *>(x.data), x.stride, reciprocals,
      units);
}

} // namespace

// Calls `BODY` with the types of a residual stream and of activations.
#define WITH_TYPES(residual, activation, R, T, ...)                                                                    \
  WITH_TYPE(                                                                                                           \
      activation, T,                                                                                                   \
      if (residual == activation) {                                                                                    \
        using R = T;                                                                                                   \
        __VA_ARGS__;                                                                                                   \
      } else if (residual == F32) {                                                                                    \
        using R = float;                                                                                               \
        __VA_ARGS__;                                                                                                   \
      } else return static_cast<int>(cudaErrorInvalidValue))

extern "C" int trainer_rms_norm(Matrix y, float *reciprocals, Matrix x, const float *weight, int heads, float eps,
                                cudaStream_t stream) {
  if (x.rows == 0 || x.cols == 0) return 0;
  Units units{static_cast<int64_t>(x.rows) * heads, heads, x.cols / heads};
  WITH_TYPES(x.dtype, y.dtype, R, T, forward<R, T>(y, reciprocals, x, weight, units, eps, stream));
  return LAUNCHED();
}

extern "C" int trainer_rms_norm_backward(Matrix dx, Matrix dy, Matrix x, const float *weight, const float *reciprocals,
                                         Matrix add, int heads, cudaStream_t stream) {
  if (x.rows == 0 || x.cols == 0) return 0;
  Units units{static_cast<int64_t>(x.rows) * heads, heads, x.cols / heads};
  WITH_TYPES(x.dtype, dy.dtype, R, T, backward<R, T>(dx, dy, x, weight, reciprocals, add, units, stream));
  return LAUNCHED();
}

extern "C" int trainer_rms_norm_weight_gradient(float *grad, Matrix dy, Matrix x, const float *reciprocals,
                                                float *workspace, int splits, int heads, cudaStream_t stream) {
  if (x.rows == 0 || x.cols == 0) return 0;
  Units units{static_cast<int64_t>(x.rows) * heads, heads, x.cols / heads};
  bool is_fast = has_aligned_units(dy, units.d) && has_aligned_units(x, units.d);
  WITH_TYPES(x.dtype, dy.dtype, R, T,
             if (is_fast) partial_sums<R, T, 8>(workspace, splits, dy, x, reciprocals, units, stream);
             else partial_sums<R, T, 1>(workspace, splits, dy, x, reciprocals, units, stream));
  column_sums::finish(grad, workspace, splits, units.d, stream);
  return LAUNCHED();
}
