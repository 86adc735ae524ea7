// Work on every value of a matrix, and sums of its columns.
//
//   axpby: y = alpha x + beta y     fill: y = value    dropout: y (+)= keep(x) / (1 - p)
//   column_sums: sums += sum of the rows     count_non_finite: count += values that are infinite or not a number
//
// Layout: matrices of any of the three types, `y` and `x` of one shape but not of one type; the arithmetic is f32.
// With `beta` 0 `axpby` does not read `y`: it is then a cast, a copy into another stride, a scaling. Outputs may lie on
// inputs.
//
// Dropout drops value c of row n where the upper 53 bits of mix(mix(key ^ token_keys[n]) + (c + 1) golden) are below
// 2^53 p, as `rng::is_kept` does; the host sends the least kept hash, so that the comparison is of whole numbers.
//
// Launch: the plan of elementwise.cuh, two accesses of each operand in flight a thread. Column sums: column_sums.cuh.
// Counting: at most 4096 blocks, an atomic addition of whole numbers for each warp that found any.
//
// Bound: bytes. With X and Y for the sizes of the types: axpby R C (X + Y), and Y again where beta is not 0; fill R C
// Y; dropout R C (X + Y), and Y again where added (on the fastest cards about as much 64-bit integer arithmetic: two
// multiplications a value); column_sums R C X + 8 splits C; count_non_finite R C X.
#include "column_sums.cuh"
#include "elementwise.cuh"

namespace {

// Accesses of 8 values under way for each operand of a thread.
template <typename Y, typename X> constexpr int UNROLL = sizeof(Y) + sizeof(X) == 8 ? 1 : 2;

struct Axpby {
  float alpha, beta;

  __device__ __forceinline__ int row(int64_t) const { return 0; }
  __device__ __forceinline__ float operator()(int, int64_t, float x) const { return alpha * x; }
  __device__ __forceinline__ float operator()(int, int64_t, float x, float y) const {
    return __fadd_rn(__fmul_rn(alpha, x), __fmul_rn(beta, y)); // as the CPU
  }
};

__device__ __forceinline__ uint64_t mix(uint64_t bits) {
  bits = (bits ^ (bits >> 30)) * 0xbf58476d1ce4e5b9u;
  bits = (bits ^ (bits >> 27)) * 0x94d049bb133111ebu;
  return bits ^ (bits >> 31);
}

struct Dropout {
  const uint64_t *token_keys;
  uint64_t key, least_kept;
  float scale;

  __device__ __forceinline__ uint64_t row(int64_t row) const { return mix(key ^ token_keys[row]); }
  __device__ __forceinline__ float operator()(uint64_t row_key, int64_t col, float x) const {
    uint64_t bits = mix(row_key + static_cast<uint64_t>(col + 1) * 0x9e3779b97f4a7c15u);
    return bits >= least_kept ? __fmul_rn(x, scale) : 0.0f;
  }
  __device__ __forceinline__ float operator()(uint64_t row_key, int64_t col, float x, float y) const {
    return __fadd_rn(y, (*this)(row_key, col, x));
  }
};

// `y = op(row, col, x)` or `op(row, col, x, y)`.
template <typename Y, typename X, int N, bool READS_Y, typename Op>
__global__ void __launch_bounds__(Plan::THREADS)
    combine_kernel(Rows<Y> y, Rows<const X> x, int64_t rows, int64_t cols, Op op) {
  constexpr int COUNT = UNROLL<Y, X>;
  int64_t main = cols / N * N, step = blockDim.x * N;
  int64_t first = blockIdx.x * step * COUNT + threadIdx.x * N;
  for (int64_t row = blockIdx.y * blockDim.y + threadIdx.y; row < rows; row += gridDim.y * blockDim.y) {
    Y *to = y[row];
    const X *from = x[row];
    auto state = op.row(row);
    Raw<X, N> x_raw[COUNT];
    Raw<Y, N> y_raw[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
      int64_t col = first + i * step;
      if (col < main) {
        x_raw[i] = load_raw<N>(from + col);
        if (READS_Y) y_raw[i] = load_raw<N>(to + col);
      }
    }
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
      int64_t col = first + i * step;
      if (col < main) {
        float a[N], b[N];
        unpack(a, x_raw[i]);
        if (READS_Y) unpack(b, y_raw[i]);
#pragma unroll
        for (int j = 0; j < N; j++) a[j] = READS_Y ? op(state, col + j, a[j], b[j]) : op(state, col + j, a[j]);
        store_values(to + col, a);
      }
    }
    if (N > 1 && blockIdx.x == 0) {
      for (int64_t col = main + threadIdx.x; col < cols; col += blockDim.x) {
        float a = to_float(from[col]);
        to[col] = from_float<Y>(READS_Y ? op(state, col, a, to_float(to[col])) : op(state, col, a));
      }
    }
  }
}

template <bool READS_Y, typename Op>
int combine(const Matrix &y, const Matrix &x, const Op &op, bool is_flat, cudaStream_t stream) {
  if (y.rows == 0 || y.cols == 0) return 0;
  WITH_TYPE(
      y.dtype, Y, WITH_TYPE(x.dtype, X, {
        Plan plan({y, x}, UNROLL<Y, X>, is_flat);
        auto to = rows_of<Y>(y);
        auto from = rows_of<const X>(x);
        if (plan.is_fast) {
          combine_kernel<Y, X, 8, READS_Y><<<plan.grid, plan.block, 0, stream>>>(to, from, plan.rows, plan.cols, op);
        } else {
          combine_kernel<Y, X, 1, READS_Y><<<plan.grid, plan.block, 0, stream>>>(to, from, plan.rows, plan.cols, op);
        }
      }));
  return LAUNCHED();
}

constexpr int FILL_UNROLL = 2;

template <typename T, int N>
__global__ void __launch_bounds__(Plan::THREADS) fill_kernel(Rows<T> y, int64_t rows, int64_t cols, float value) {
  int64_t main = cols / N * N, step = blockDim.x * N;
  int64_t first = blockIdx.x * step * FILL_UNROLL + threadIdx.x * N;
  float values[N];
#pragma unroll
  for (int i = 0; i < N; i++) values[i] = value;
  for (int64_t row = blockIdx.y * blockDim.y + threadIdx.y; row < rows; row += gridDim.y * blockDim.y) {
    T *to = y[row];
#pragma unroll
    for (int i = 0; i < FILL_UNROLL; i++) {
      int64_t col = first + i * step;
      if (col < main) store_values(to + col, values);
    }
    if (N > 1 && blockIdx.x == 0) {
      for (int64_t col = main + threadIdx.x; col < cols; col += blockDim.x) to[col] = from_float<T>(value);
    }
  }
}

__device__ __forceinline__ uint32_t is_non_finite(float x) { return !(fabsf(x) <= 3.402823466e38f); }

template <typename T, int N>
__global__ void __launch_bounds__(Plan::THREADS)
    count_kernel(uint32_t *count, Rows<const T> x, int64_t rows, int64_t cols) {
  int64_t main = cols / N * N, step = static_cast<int64_t>(gridDim.x) * blockDim.x * N;
  int64_t first = (blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x) * N;
  uint32_t found = 0;
  for (int64_t row = blockIdx.y * blockDim.y + threadIdx.y; row < rows; row += gridDim.y * blockDim.y) {
    const T *from = x[row];
#pragma unroll(N == 1 ? 1 : 4)
    for (int64_t col = first; col < main; col += step) {
      float v[N];
      unpack(v, load_raw<N>(from + col));
#pragma unroll
      for (int i = 0; i < N; i++) found += is_non_finite(v[i]);
    }
    if (N > 1 && blockIdx.x == 0) {
      for (int64_t col = main + threadIdx.x; col < cols; col += blockDim.x) found += is_non_finite(to_float(from[col]));
    }
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) found += __shfl_xor_sync(0xffffffffu, found, distance);
  if ((threadIdx.y * blockDim.x + threadIdx.x) % 32 == 0 && found) atomicAdd(count, found);
}

template <typename T, int N>
__global__ void __launch_bounds__(column_sums::THREADS)
    sum_kernel(float *partials, Rows<const T> x, int64_t rows, int columns) {
  int col = column_sums::column<N>();
  float sums[N] = {};
  if (col < columns) {
    auto load = [&](int64_t row) { return load_raw<N>(x[row] + col); };
    column_sums::for_each_row(rows, load, [&](const Raw<T, N> &raw) {
      float v[N];
      unpack(v, raw);
#pragma unroll
      for (int i = 0; i < N; i++) sums[i] += v[i];
    });
  }
  column_sums::write_partials(partials, sums, columns);
}

} // namespace

extern "C" int trainer_axpby(Matrix y, float alpha, Matrix x, float beta, cudaStream_t stream) {
  Axpby op{alpha, beta};
  return beta == 0.0f ? combine<false>(y, x, op, true, stream) : combine<true>(y, x, op, true, stream);
}

extern "C" int trainer_dropout(Matrix y, Matrix x, const uint64_t *token_keys, uint64_t key, uint64_t least_kept,
                               float scale, int is_added, cudaStream_t stream) {
  Dropout op{token_keys, key, least_kept, scale};
  return is_added ? combine<true>(y, x, op, false, stream) : combine<false>(y, x, op, false, stream);
}

extern "C" int trainer_fill(Matrix y, float value, cudaStream_t stream) {
  if (y.rows == 0 || y.cols == 0) return 0;
  Plan plan({y}, FILL_UNROLL);
  WITH_TYPE(y.dtype, T, {
    auto to = rows_of<T>(y);
    if (plan.is_fast)
      fill_kernel<T, 8><<<plan.grid, plan.block, 0, stream>>>(to, plan.rows, plan.cols, value);
    else
      fill_kernel<T, 1><<<plan.grid, plan.block, 0, stream>>>(to, plan.rows, plan.cols, value);
  });
  return LAUNCHED();
}

extern "C" int trainer_count_non_finite(uint32_t *count, Matrix x, cudaStream_t stream) {
  if (x.rows == 0 || x.cols == 0) return 0;
  Plan plan({x}, 4);
  constexpr unsigned MOST = 4096;
  plan.grid.x = plan.grid.x < MOST ? plan.grid.x : MOST;
  unsigned most_high = MOST / plan.grid.x;
  plan.grid.y = plan.grid.y < most_high ? plan.grid.y : most_high;
  WITH_TYPE(x.dtype, T, {
    auto from = rows_of<const T>(x);
    if (plan.is_fast)
      count_kernel<T, 8><<<plan.grid, plan.block, 0, stream>>>(count, from, plan.rows, plan.cols);
    else
      count_kernel<T, 1><<<plan.grid, plan.block, 0, stream>>>(count, from, plan.rows, plan.cols);
  });
  return LAUNCHED();
}

extern "C" int trainer_column_sums(float *sums, Matrix x, float *workspace, int splits, cudaStream_t stream) {
  if (x.rows == 0 || x.cols == 0) return 0;
  int columns = x.cols;
  WITH_TYPE(x.dtype, T, {
    auto from = rows_of<const T>(x);
    if (is_aligned(x, 8)) {
      sum_kernel<T, 8><<<column_sums::grid(columns, 8, splits), column_sums::block(columns, 8), 0, stream>>>(
          workspace, from, x.rows, columns);
    } else {
      sum_kernel<T, 1><<<column_sums::grid(columns, 1, splits), column_sums::block(columns, 1), 0, stream>>>(
          workspace, from, x.rows, columns);
    }
  });
  column_sums::finish(sums, workspace, splits, columns, stream);
  return LAUNCHED();
}
