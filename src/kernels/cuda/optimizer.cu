// AdamW over flat arrays, and sums of squares of the entries of a flat array.
//
//   g *= grad_scale;  m += (g - m) first_weight;  v = v second_decay + second_weight g g
//   p = p keep - step_size m / (sqrt(v) / root_correction + eps)
//
// Every operation of the update is rounded by itself, in the order of `optim/adamw.rs`: no multiplication is contracted
// with an addition, division and root are IEEE's, denormals are kept. The result is the CPU's to the bit; only the bits
// of a "not a number" may differ.
//
// Layout: values, gradients and moments f32; sums f64, offsets u32 [E + 1] of the entries' elements.
//
// Launch: AdamW one thread for 4 elements, 16 bytes of each of the four arrays in flight; value by value where the four
// do not lie alike. Sums of squares one block for an entry, of some ten thousand elements; the thread and the place in its
// sums that an element has depend on its place in the entry alone, so that the bits do not depend on where the entry lies.
//
// Bound: bytes. AdamW 28 an element (16 read, 12 written); sums of squares 4 an element.
#include "elementwise.cuh"

struct AdamWFactors {
  float grad_scale, keep, first_weight, second_decay, second_weight, step_size, root_correction, eps;
};

namespace {

constexpr int THREADS = 256;

__device__ __forceinline__ void update(float &p, float g, float &m, float &v, const AdamWFactors &f) {
  float kept = __fmul_rn(p, f.keep);
  g = __fmul_rn(g, f.grad_scale);
  m = __fadd_rn(m, __fmul_rn(__fsub_rn(g, m), f.first_weight));
  v = __fadd_rn(__fmul_rn(v, f.second_decay), __fmul_rn(__fmul_rn(f.second_weight, g), g));
  float denominator = __fadd_rn(__fdiv_rn(__fsqrt_rn(v), f.root_correction), f.eps);
  p = __fsub_rn(kept, __fdiv_rn(__fmul_rn(f.step_size, m), denominator));
}

template <int N>
__global__ void __launch_bounds__(THREADS)
    adamw_kernel(float *values, const float *grads, float *first, float *second, int64_t count, AdamWFactors factors) {
  int64_t at = (blockIdx.x * static_cast<int64_t>(THREADS) + threadIdx.x) * N;
  if (at + N <= count) {
    auto p_raw = load_raw<N>(values + at), g_raw = load_raw<N>(grads + at), m_raw = load_raw<N>(first + at),
         v_raw = load_raw<N>(second + at);
    float p[N], g[N], m[N], v[N];
    unpack(p, p_raw);
    unpack(g, g_raw);
    unpack(m, m_raw);
    unpack(v, v_raw);
#pragma unroll
    for (int i = 0; i < N; i++) update(p[i], g[i], m[i], v[i], factors);
    store_values(values + at, p);
    store_values(first + at, m);
    store_values(second + at, v);
  } else {
    for (int64_t i = at; i < count; i++) update(values[i], grads[i], first[i], second[i], factors);
  }
}

// The sum over the block, in every thread.
__device__ __forceinline__ double block_sum_f64(double x) {
  __shared__ double scratch[THREADS / 32];
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  double sum = 0.0;
#pragma unroll
  for (int warp = 0; warp < THREADS / 32; warp++) sum += scratch[warp];
  return sum;
}

__device__ __forceinline__ double square(float x) {
  double wide = x;
  return wide * wide;
}

// This thread's part of the sum of squares of `count` elements.
__device__ __forceinline__ double thread_squares(const float *values, int64_t count) {
  bool is_aligned = reinterpret_cast<uintptr_t>(values) % 16 == 0;
  double sums[4] = {};
#pragma unroll 4
  for (int64_t at = threadIdx.x * 4; at < count; at += THREADS * 4) {
    float v[4] = {};
    if (is_aligned && at + 4 <= count) {
      unpack(v, load_raw<4>(values + at));
    } else {
#pragma unroll
      for (int i = 0; i < 4; i++)
        if (at + i < count) v[i] = values[at + i];
    }
#pragma unroll
    for (int i = 0; i < 4; i++) sums[i] += square(v[i]);
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

__global__ void __launch_bounds__(THREADS)
    entry_squares(double *sums, const float *values, int64_t count, const uint32_t *offsets) {
  int64_t begin = offsets[blockIdx.x], end = min(static_cast<int64_t>(offsets[blockIdx.x + 1]), count);
  double sum = block_sum_f64(thread_squares(values + begin, end - begin));
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

bool is_aligned_array(const void *p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

} // namespace

extern "C" int trainer_adamw(float *values, const float *grads, float *first, float *second, int64_t count,
                             AdamWFactors factors, cudaStream_t stream) {
  if (count == 0) return 0;
  if (is_aligned_array(values) && is_aligned_array(grads) && is_aligned_array(first) && is_aligned_array(second)) {
    unsigned blocks = static_cast<unsigned>((count + THREADS * 4 - 1) / (THREADS * 4));
    adamw_kernel<4><<<blocks, THREADS, 0, stream>>>(values, grads, first, second, count, factors);
  } else {
    unsigned blocks = static_cast<unsigned>((count + THREADS - 1) / THREADS);
    adamw_kernel<1><<<blocks, THREADS, 0, stream>>>(values, grads, first, second, count, factors);
  }
  return LAUNCHED();
}

extern "C" int trainer_sums_of_squares(double *sums, const float *values, int64_t count, const uint32_t *offsets,
                                       int entries, cudaStream_t stream) {
  if (entries == 0) return 0;
  entry_squares<<<entries, THREADS, 0, stream>>>(sums, values, count, offsets);
  return LAUNCHED();
}
