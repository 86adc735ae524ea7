// Picking rows of a matrix, and adding up rows that belong together.
//
//   gather_rows: y[i] = table[rows[i]]
//   sum_rows: grad[targets[u]] (+)= sum of dy[sources[s]], s from offsets[u] to offsets[u + 1] in order
//
// Layout: matrices of any of the three types; indices are u32. Targets are distinct, so no two blocks write one value.
// The table may lie in the host's memory, mapped into the device's addresses: its rows are read once, in whole lines. A
// row outside its matrix reads as "not a number"; a target outside `grad` is left out.
//
// Launch: the plan of elementwise.cuh, a row of the result for each row of threads. Sums are f32, one thread for each 8
// columns of a target, with the loads of four rows under way.
//
// Bound: bytes. gather_rows R D (table + y) + 4 R; sum_rows R D dy + U D grad (twice where added) + 4 (R + 2 U), where
// a matrix stands for the size of its type.
#include "elementwise.cuh"

namespace {

__device__ __forceinline__ float not_a_number() { return __uint_as_float(0x7fffffffu); }

template <typename Y, typename X, int N>
__global__ void __launch_bounds__(Plan::THREADS) gather_kernel(Rows<Y> y, Rows<const X> table, uint32_t table_rows,
                                                               const uint32_t *indices, int64_t rows, int64_t cols) {
  int64_t main = cols / N * N, first = (blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x) * N;
  for (int64_t row = blockIdx.y * blockDim.y + threadIdx.y; row < rows; row += gridDim.y * blockDim.y) {
    uint32_t index = indices[row];
    bool is_inside = index < table_rows;
    Y *to = y[row];
    const X *from = table[index];
    if (first < main) {
      float v[N];
      if (is_inside) {
        unpack(v, load_raw<N>(from + first));
      } else {
#pragma unroll
        for (int i = 0; i < N; i++) v[i] = not_a_number();
      }
      store_values(to + first, v);
    }
    if (N > 1 && blockIdx.x == 0) {
      for (int64_t col = main + threadIdx.x; col < cols; col += blockDim.x) {
        to[col] = from_float<Y>(is_inside ? to_float(from[col]) : not_a_number());
      }
    }
  }
}

// Where the sources of one target are.
struct Sources {
  const uint32_t *rows;
  uint32_t first, end, dy_rows;
};

// The sum of `N` columns, from `col` on, of the sources.
template <typename X, int N>
__device__ __forceinline__ void sum_sources(float (&sum)[N], Rows<const X> dy, const Sources &sources, int64_t col) {
#pragma unroll
  for (int i = 0; i < N; i++) sum[i] = 0.0f;
#pragma unroll 4
  for (uint32_t s = sources.first; s < sources.end; s++) {
    uint32_t row = sources.rows[s];
    bool is_inside = row < sources.dy_rows;
    float v[N];
    unpack(v, load_raw<N>(dy[is_inside ? row : 0] + col));
#pragma unroll
    for (int i = 0; i < N; i++) sum[i] += is_inside ? v[i] : not_a_number();
  }
}

template <typename G, typename X, int N>
__global__ void __launch_bounds__(Plan::THREADS)
    sum_kernel(Rows<G> grad, uint32_t grad_rows, Rows<const X> dy, uint32_t dy_rows, const uint32_t *targets,
               const uint32_t *offsets, const uint32_t *sources, uint32_t num_sources, int64_t num_targets,
               int64_t cols, bool is_added) {
  int64_t main = cols / N * N, first = (blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x) * N;
  for (int64_t u = blockIdx.y * blockDim.y + threadIdx.y; u < num_targets; u += gridDim.y * blockDim.y) {
    uint32_t target = targets[u];
    if (target >= grad_rows) continue;
    Sources mine{sources, offsets[u], min(offsets[u + 1], num_sources), dy_rows};
    G *to = grad[target];
    if (first < main) {
      float sum[N];
      sum_sources<X, N>(sum, dy, mine, first);
      if (is_added) {
        float old[N];
        unpack(old, load_raw<N>(to + first));
#pragma unroll
        for (int i = 0; i < N; i++) sum[i] += old[i];
      }
      store_values(to + first, sum);
    }
    if (N > 1 && blockIdx.x == 0) {
      for (int64_t col = main + threadIdx.x; col < cols; col += blockDim.x) {
        float sum[1];
        sum_sources<X, 1>(sum, dy, mine, col);
        to[col] = from_float<G>(is_added ? to_float(to[col]) + sum[0] : sum[0]);
      }
    }
  }
}

// A matrix whose rows are picked: its stride counts, however many rows there are.
Matrix picked(Matrix m) {
  m.rows = 2;
  return m;
}

} // namespace

extern "C" int trainer_gather_rows(Matrix y, Matrix table, const uint32_t *rows, cudaStream_t stream) {
  if (y.rows == 0 || y.cols == 0) return 0;
  Plan plan({y, picked(table)}, 1, false);
  WITH_TYPE(
      y.dtype, Y, WITH_TYPE(table.dtype, X, {
        auto to = rows_of<Y>(y);
        auto from = rows_of<const X>(table);
        if (plan.is_fast) {
          gather_kernel<Y, X, 8><<<plan.grid, plan.block, 0, stream>>>(to, from, table.rows, rows, y.rows, y.cols);
        } else {
          gather_kernel<Y, X, 1><<<plan.grid, plan.block, 0, stream>>>(to, from, table.rows, rows, y.rows, y.cols);
        }
      }));
  return LAUNCHED();
}

extern "C" int trainer_sum_rows(Matrix grad, Matrix dy, const uint32_t *targets, const uint32_t *offsets,
                                const uint32_t *sources, uint32_t num_sources, int num_targets, int is_added,
                                cudaStream_t stream) {
  if (num_targets == 0 || grad.cols == 0) return 0;
  Matrix results = picked(grad);
  results.rows = num_targets > 1 ? num_targets : 2;
  Plan plan({results, picked(dy)}, 1, false);
  WITH_TYPE(grad.dtype, G, WITH_TYPE(dy.dtype, X, {
              auto to = rows_of<G>(grad);
              auto from = rows_of<const X>(dy);
              if (plan.is_fast) {
                sum_kernel<G, X, 8><<<plan.grid, plan.block, 0, stream>>>(to, grad.rows, from, dy.rows, targets,
                                                                          offsets, sources, num_sources, num_targets,
                                                                          grad.cols, is_added);
              } else {
                sum_kernel<G, X, 1><<<plan.grid, plan.block, 0, stream>>>(to, grad.rows, from, dy.rows, targets,
                                                                          offsets, sources, num_sources, num_targets,
                                                                          grad.cols, is_added);
              }
            }));
  return LAUNCHED();
}
