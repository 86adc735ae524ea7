// y = silu(gate) up of a few rows, in the order of columns that products read: where gate and up are of unlike formats, so that
// no product ends in it.
//
// gate, up: f32 [M, O], sums that are rounded to T as a product rounds them; y [M, O] of type T. O is a multiple of 8.
//
// Launch: a lane for 8 columns of a row, blocks of 256 lanes. Bound: launch; 10 M O bytes.
#include "mma.cuh"

namespace {

constexpr int THREADS = 256;

template <typename T> __global__ void __launch_bounds__(THREADS) swiglu_rows(Matrix y, Matrix gate, Matrix up) {
  launch_dependents();
  wait_for_dependency();
  const int col = (blockIdx.x * THREADS + threadIdx.x) * 8, row = blockIdx.y;
  if (col >= y.cols) return;
  float g[8], u[8], v[8];
  load_pack<float, 8>(g, static_cast<const float *>(gate.data) + row * gate.stride + col);
  load_pack<float, 8>(u, static_cast<const float *>(up.data) + row * up.stride + col);
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const float one = to_float(from_float<T>(g[i])), other = to_float(from_float<T>(u[i]));
    const float sigmoid = __fdividef(1.0f, 1.0f + __expf(-one)); // as swiglu.cu
    v[i] = other * (one * sigmoid);
  }
  store_columns<T>(y, row, col, v);
}

} // namespace

extern "C" int trainer_swiglu_rows(Matrix y, Matrix gate, Matrix up, cudaStream_t stream) {
  if (y.rows == 0 || y.cols == 0) return 0;
  if (y.cols % 8 != 0 || y.rows > 65535) return static_cast<int>(cudaErrorInvalidValue);
  const dim3 grid((y.cols / 8 + THREADS - 1) / THREADS, y.rows);
  if (y.dtype == F16) return launch_after(swiglu_rows<__half>, grid, THREADS, 0, stream, y, gate, up);
  if (y.dtype == BF16) return launch_after(swiglu_rows<__nv_bfloat16>, grid, THREADS, 0, stream, y, gate, up);
  return static_cast<int>(cudaErrorInvalidValue);
}
