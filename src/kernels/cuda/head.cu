// The loss head: log-probability and entropy of tokens from logits that exist for a piece of the vocabulary at a time,
// and their gradient.
//
// Math, with z the scaled logits of a row: log_sum = log sum exp z, logprob = z[target] - log_sum, entropy = log_sum -
// sum(p z) with p = exp(z - log_sum); d_z = d_logprob (1[target] - p) - d_entropy p (log p + entropy).
//
// Layout: logits f32 [R, width], row after row; the running state of all rows is one array of doubles: sum [R],
// weighted sum [R], then as floats max [R] and target logit [R].
//
// update: one block of 256 threads a row reads its logits once; each thread keeps its own maximum and rescales its two
// sums when it grows; the block's sums are added in a fixed order and one thread merges them into the state in f64.
// Bound: bytes, 4 per logit; about 15 instructions.
// gradient: a block of 256 threads takes 4096 logits of a row, 16 bytes of the result per thread and step. Bound:
// bytes, 4 read and 2 or 4 written per logit; about 20 instructions.
// A row whose length or start is not a multiple of 16 bytes is taken value by value.

#include "common.cuh"

namespace {

constexpr int THREADS = 256, TILE = 4096;

struct State {
  double *sum, *weighted;
  float *max, *target;
};

__host__ __device__ __forceinline__ State state_of(double *values, int64_t rows) {
  float *floats = reinterpret_cast<float *>(values + 2 * rows);
  return {values, values + rows, floats, floats + rows};
}

// 16 bytes in one access, whatever control flow surrounds it.
template <typename T> __device__ __forceinline__ void store16(T *p, const float (&in)[16 / sizeof(T)]) {
  Pack<T, 16 / sizeof(T)> pack;
#pragma unroll
  for (int i = 0; i < 16 / sizeof(T); i++) pack.v[i] = from_float<T>(in[i]);
  const uint4 v = *reinterpret_cast<const uint4 *>(&pack);
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

__global__ void start(State state, int64_t rows) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (row >= rows) return;
  state.sum[row] = 0.0;
  state.weighted[row] = 0.0;
  state.max[row] = -INFINITY;
  state.target[row] = NAN;
}

// Sums of exp(z - max) and z exp(z - max) of one thread.
struct Running {
  float max = -INFINITY, sum = 0.0f, weighted = 0.0f;

  template <int N> __device__ __forceinline__ void add(const float (&z)[N]) {
    float top = z[0];
#pragma unroll
    for (int i = 1; i < N; i++) top = fmaxf(top, z[i]);
    if (top > max) {
      const float keep = expf(max - top);
      sum *= keep;
      weighted *= keep;
      max = top;
    }
    const float shift = max > -INFINITY ? max : 0.0f;
#pragma unroll
    for (int i = 0; i < N; i++) {
      const float e = expf(z[i] - shift);
      sum += e;
      weighted = fmaf(e, z[i], weighted);
    }
  }
};

__device__ __forceinline__ float block_max(float x, float *scratch) {
  x = warp_max(x);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  __syncthreads();
  if (lane == 0) scratch[warp] = x;
  __syncthreads();
  return warp_max(scratch[lane % (THREADS / 32)]);
}

template <bool IS_WIDE>
__global__ void __launch_bounds__(THREADS)
    update(State state, const float *logits, int64_t stride, int64_t width, int64_t first,
           const uint32_t *__restrict__ targets) {
  __shared__ float scratch[THREADS / 32 + 1];
  const int64_t row = blockIdx.x;
  logits += row * stride;
  Running running;
  if (IS_WIDE) {
    const float4 *packs = reinterpret_cast<const float4 *>(logits);
    const int64_t count = width / 4;
    int64_t i = threadIdx.x;
    for (; i + THREADS < count; i += 2 * THREADS) {
      const float4 a = packs[i], b = packs[i + THREADS];
      running.add({a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w});
    }
    if (i < count) {
      const float4 a = packs[i];
      running.add({a.x, a.y, a.z, a.w});
    }
  } else {
    for (int64_t i = threadIdx.x; i < width; i += THREADS) running.add({logits[i]});
  }
  const float max = block_max(running.max, scratch);
  const float rescale = running.max > -INFINITY ? expf(running.max - max) : 0.0f;
  const float sum = block_sum(running.sum * rescale, scratch);
  const float weighted = block_sum(running.weighted * rescale, scratch);
  if (threadIdx.x != 0) return;

  const float old = state.max[row], top = fmaxf(old, max);
  const double keep = old > -INFINITY ? exp(static_cast<double>(old) - top) : 0.0;
  const double take = max > -INFINITY ? exp(static_cast<double>(max) - top) : 1.0;
  state.sum[row] = state.sum[row] * keep + sum * take;
  state.weighted[row] = state.weighted[row] * keep + weighted * take;
  state.max[row] = top;
  const int64_t target = static_cast<int64_t>(targets[row]) - first;
  if (target >= 0 && target < width) state.target[row] = logits[target];
}

__global__ void finish(State state, int64_t rows, float *logprobs, float *entropies, float *log_sums,
                       uint8_t *is_argmax) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (row >= rows) return;
  const float max = state.max[row], target = state.target[row];
  const double log_sum = max + log(state.sum[row]);
  log_sums[row] = static_cast<float>(log_sum);
  logprobs[row] = static_cast<float>(target - log_sum);
  entropies[row] = static_cast<float>(log_sum - state.weighted[row] / state.sum[row]);
  is_argmax[row] = target >= max;
}

// `out` may be `logits`: a thread reads what it then writes.
template <typename T, bool IS_WIDE>
__global__ void __launch_bounds__(THREADS)
    gradient(T *out, int64_t out_stride, const float *logits, int64_t stride, int width, int64_t first,
             const uint32_t *__restrict__ targets, const float *__restrict__ log_sums,
             const float *__restrict__ entropies, const float *__restrict__ d_logprobs,
             const float *__restrict__ d_entropies, float scale) {
  constexpr int N = IS_WIDE ? 16 / sizeof(T) : 1;
  const int64_t row = blockIdx.x;
  const int start = blockIdx.y * TILE, end = min(start + TILE, width);
  out += row * out_stride;
  logits += row * stride;
  const float log_sum = log_sums[row], d_logprob = d_logprobs[row];
  const float entropy = d_entropies ? entropies[row] : 0.0f, d_entropy = d_entropies ? d_entropies[row] : 0.0f;
  const int64_t in_chunk = static_cast<int64_t>(targets[row]) - first;
  const int target = in_chunk >= 0 && in_chunk < width ? static_cast<int>(in_chunk) : -1;
#pragma unroll 2
  for (int at = start + threadIdx.x * N; at < end; at += THREADS * N) {
    float z[N], d[N];
    if constexpr (IS_WIDE) {
#pragma unroll
      for (int i = 0; i < N; i += 4) {
        const float4 four = *reinterpret_cast<const float4 *>(logits + at + i);
        z[i] = four.x, z[i + 1] = four.y, z[i + 2] = four.z, z[i + 3] = four.w;
      }
    } else {
      z[0] = logits[at];
    }
#pragma unroll
    for (int i = 0; i < N; i++) {
      const float log_p = z[i] - log_sum;
      // A logit of -inf has p = 0; its log p must stay finite for the product.
      const float factor = fmaf(d_entropy, fmaxf(log_p, -1000.0f) + entropy, d_logprob);
      d[i] = scale * fmaf(-expf(log_p), factor, at + i == target ? d_logprob : 0.0f);
    }
    if constexpr (IS_WIDE)
      store16(out + at, d);
    else
      out[at] = from_float<T>(d[0]);
  }
}

// A row for each block; `tiles` of a row where a block takes one.
int grid_of(int64_t rows, int64_t cols, dim3 &grid) {
  const int64_t tiles = (cols + TILE - 1) / TILE;
  if (tiles > 65535) return static_cast<int>(cudaErrorInvalidValue);
  grid = dim3(static_cast<unsigned>(rows), static_cast<unsigned>(tiles));
  return 0;
}

template <typename T>
int launch_gradient(const Matrix &out, const Matrix &logits, int64_t first, const uint32_t *targets,
                    const float *log_sums, const float *entropies, const float *d_logprobs, const float *d_entropies,
                    float scale, cudaStream_t stream) {
  dim3 grid;
  if (int code = grid_of(out.rows, out.cols, grid)) return code;
  T *data = static_cast<T *>(out.data);
  const float *from = static_cast<const float *>(logits.data);
  if (is_aligned(out, 16 / sizeof(T)) && is_aligned(logits, 4))
    gradient<T, true><<<grid, THREADS, 0, stream>>>(data, out.stride, from, logits.stride, out.cols, first, targets,
                                                    log_sums, entropies, d_logprobs, d_entropies, scale);
  else
    gradient<T, false><<<grid, THREADS, 0, stream>>>(data, out.stride, from, logits.stride, out.cols, first, targets,
                                                     log_sums, entropies, d_logprobs, d_entropies, scale);
  return LAUNCHED();
}

} // namespace

extern "C" int trainer_head_start(double *state, int64_t rows, cudaStream_t stream) {
  if (rows == 0) return 0;
  start<<<(rows + THREADS - 1) / THREADS, THREADS, 0, stream>>>(state_of(state, rows), rows);
  return LAUNCHED();
}

extern "C" int trainer_head_forward_chunk(double *state, Matrix logits, int64_t first, const uint32_t *targets,
                                          cudaStream_t stream) {
  if (logits.rows == 0 || logits.cols == 0) return 0;
  const State views = state_of(state, logits.rows);
  const float *data = static_cast<const float *>(logits.data);
  if (is_aligned(logits, 4))
    update<true><<<logits.rows, THREADS, 0, stream>>>(views, data, logits.stride, logits.cols, first, targets);
  else
    update<false><<<logits.rows, THREADS, 0, stream>>>(views, data, logits.stride, logits.cols, first, targets);
  return LAUNCHED();
}

extern "C" int trainer_head_finish(double *state, int64_t rows, float *logprobs, float *entropies, float *log_sums,
                                   uint8_t *is_argmax, cudaStream_t stream) {
  if (rows == 0) return 0;
  finish<<<(rows + THREADS - 1) / THREADS, THREADS, 0, stream>>>(state_of(state, rows), rows, logprobs, entropies,
                                                                 log_sums, is_argmax);
  return LAUNCHED();
}

// `d_entropies` may be null: zeros.
extern "C" int trainer_head_backward_chunk(Matrix d_logits, Matrix logits, int64_t first, const uint32_t *targets,
                                           const float *log_sums, const float *entropies, const float *d_logprobs,
                                           const float *d_entropies, float scale, cudaStream_t stream) {
  if (d_logits.rows == 0 || d_logits.cols == 0) return 0;
  WITH_TYPE(d_logits.dtype, T,
            return launch_gradient<T>(d_logits, logits, first, targets, log_sums, entropies, d_logprobs, d_entropies,
                                      scale, stream))
}
