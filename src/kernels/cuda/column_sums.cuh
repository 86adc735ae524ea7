// Sums over rows in two stages of fixed order: blocks of 256 threads write partial sums [splits, columns], each of its
// tile of columns and its share of the rows; a second launch adds these in order.
#pragma once

#include "common.cuh"

namespace column_sums {

constexpr int THREADS = 256;

// The block's first column, and that of the thread, which has `N`.
template <int N> __device__ __forceinline__ int tile() { return blockIdx.x * blockDim.x * N; }
template <int N> __device__ __forceinline__ int column() { return tile<N>() + threadIdx.x * N; }

// Calls `use(load(row))` for the rows of the thread, in order, with the loads of four rows under way.
template <typename Load, typename Use> __device__ __forceinline__ void for_each_row(int64_t rows, Load load, Use use) {
  constexpr int BATCH = 4;
  int64_t share = (rows + gridDim.y - 1) / gridDim.y;
  int64_t first = blockIdx.y * share, end = first + share < rows ? first + share : rows;
  int64_t row = first + threadIdx.y, step = blockDim.y;
  for (; row + (BATCH - 1) * step < end; row += BATCH * step) {
    decltype(load(row)) loaded[BATCH];
#pragma unroll
    for (int i = 0; i < BATCH; i++) loaded[i] = load(row + i * step);
#pragma unroll
    for (int i = 0; i < BATCH; i++) use(loaded[i]);
  }
  for (; row < end; row += step) use(load(row));
}

// Adds the threads' sums of each column and writes the block's partial sums.
template <int N> __device__ __forceinline__ void write_partials(float *partials, const float (&sums)[N], int columns) {
  __shared__ float shared[THREADS * N];
  int width = blockDim.x * N;
#pragma unroll
  for (int i = 0; i < N; i++) shared[threadIdx.y * width + threadIdx.x * N + i] = sums[i];
  __syncthreads();
  int thread = threadIdx.y * blockDim.x + threadIdx.x, col = tile<N>() + thread;
  if (thread < width && col < columns) {
    float sum = 0.0f;
    for (int row = 0; row < blockDim.y; row++) sum += shared[row * width + thread];
    partials[blockIdx.y * static_cast<int64_t>(columns) + col] = sum;
  }
}

// `sums[c] +=` the partial sums of column c: 32 columns a block, the splits shared among 8 threads of a column.
static __global__ void add_partials(float *sums, const float *partials, int splits, int columns) {
  __shared__ float shared[8][32];
  int col = blockIdx.x * 32 + threadIdx.x;
  float sum = 0.0f;
  if (col < columns) {
#pragma unroll 4
    for (int split = threadIdx.y; split < splits; split += 8)
      sum += partials[split * static_cast<int64_t>(columns) + col];
  }
  shared[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0 && col < columns) {
    for (int row = 1; row < 8; row++) sum += shared[row][threadIdx.x];
    sums[col] += sum;
  }
}

// The first stage's block and grid, with `n` columns a thread.
inline dim3 block(int columns, int n) {
  unsigned across = 1;
  while (across < 32 && across * n < static_cast<unsigned>(columns)) across *= 2;
  return dim3(across, THREADS / across);
}

inline dim3 grid(int columns, int n, int splits) {
  unsigned width = block(columns, n).x * n;
  return dim3((columns + width - 1) / width, splits);
}

inline void finish(float *sums, const float *partials, int splits, int columns, cudaStream_t stream) {
  add_partials<<<(columns + 31) / 32, dim3(32, 8), 0, stream>>>(sums, partials, splits, columns);
}

} // namespace column_sums
