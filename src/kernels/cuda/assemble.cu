// A matrix put together from parts of other matrices, zero where there is none.
//
//   out[row + i, col + j] = factor source[i, j] for each part (row, col, source, factor)
//
// Layout: `out` and the sources of any of the three types, each with its own stride; the products are f32 and rounded
// once. Where parts overlap the last one counts. `out` lies on no source.
//
// Launch: the plan of elementwise.cuh with its rows kept apart; a thread looks through the parts for its 8 values (or
// its one) and writes each of them once. The parts come with the kernel's parameters.
//
// Bound: bytes, the size of `out` and of the sources; at most a few megabytes, so that the launch counts as much.
#include "elementwise.cuh"

// `cols` columns of `rows` rows, placed at (`first_row`, `first_col`).
struct Part {
  const void *data;
  int64_t stride;
  int32_t first_row, first_col, rows, cols;
  int32_t dtype;
  float factor;
};

namespace {

constexpr int MOST_PARTS = 8;

struct Parts {
  Part part[MOST_PARTS];
  int32_t count;
  // Bit i: part i can be read 8 values at a time.
  uint32_t aligned;
};

// Reads the values of a part at `N` columns from `col` on, in the part's own columns, that lie inside of it.
template <typename S, int N>
__device__ __forceinline__ void read_part(float (&values)[N], const Part &part, int64_t row, int64_t col,
                                          bool is_fast) {
  const S *from = static_cast<const S *>(part.data) + row * part.stride;
  if (N > 1 && is_fast && col + N <= part.cols) {
    unpack(values, load_raw<N>(from + col));
#pragma unroll
    for (int i = 0; i < N; i++) values[i] *= part.factor;
  } else {
#pragma unroll
    for (int i = 0; i < N; i++) {
      if (col + i >= 0 && col + i < part.cols) values[i] = part.factor * to_float(from[col + i]);
    }
  }
}

template <typename T, int N>
__global__ void __launch_bounds__(Plan::THREADS)
    assemble_kernel(Rows<T> out, int64_t rows, int64_t cols, const __grid_constant__ Parts parts) {
  int64_t col = (blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x) * N;
  if (col >= cols) return;
  for (int64_t row = blockIdx.y * blockDim.y + threadIdx.y; row < rows; row += gridDim.y * blockDim.y) {
    float values[N] = {};
    for (int i = 0; i < parts.count; i++) {
      const Part &part = parts.part[i];
      int64_t part_row = row - part.first_row, part_col = col - part.first_col;
      if (part_row < 0 || part_row >= part.rows || part_col <= -N || part_col >= part.cols) continue;
      bool is_fast = parts.aligned >> i & 1;
      if (part.dtype == F32) read_part<float>(values, part, part_row, part_col, is_fast);
      if (part.dtype == F16) read_part<__half>(values, part, part_row, part_col, is_fast);
      if (part.dtype == BF16) read_part<__nv_bfloat16>(values, part, part_row, part_col, is_fast);
    }
    T *to = out[row] + col;
    if (N == 1 || col + N <= cols) {
      store_values(to, values);
    } else {
#pragma unroll
      for (int i = 0; i < N; i++) {
        if (col + i < cols) to[i] = from_float<T>(values[i]);
      }
    }
  }
}

} // namespace

extern "C" int trainer_assemble(Matrix out, const Part *parts, int count, cudaStream_t stream) {
  if (out.rows == 0 || out.cols == 0) return 0;
  if (count > MOST_PARTS) return static_cast<int>(cudaErrorInvalidValue);
  Parts all{};
  all.count = count;
  for (int i = 0; i < count; i++) {
    const Part &part = all.part[i] = parts[i];
    // What 8 do not divide at the end of its rows is read value by value.
    Matrix source{const_cast<void *>(part.data), part.stride, part.rows, 0, part.dtype, 0};
    if (part.first_col % 8 == 0 && is_aligned(source, 8)) all.aligned |= 1u << i;
  }
  Plan plan({out}, 1, false);
  WITH_TYPE(out.dtype, T, {
    auto to = rows_of<T>(out);
    if (plan.is_fast)
      assemble_kernel<T, 8><<<plan.grid, plan.block, 0, stream>>>(to, plan.rows, plan.cols, all);
    else
      assemble_kernel<T, 1><<<plan.grid, plan.block, 0, stream>>>(to, plan.rows, plan.cols, all);
  });
  return LAUNCHED();
}
