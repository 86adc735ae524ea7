// Draws the next token of each lane of a decoding step from its logits, notes it and moves the lane on. Where lanes stand is read
// from device memory, so that a recorded step can be repeated.
//
// Lanes: {first, context} of each, as in paged_attention.cu. A lane with a context of 0 is empty: nothing is drawn.
//
// chunk_kernel, draw_kernel: the distribution of a row of logits in chunks of 512: the largest and the sum of exponentials of
//   each, in f32; then, in f64, the sum over the chunks from the first to the last, the chunk and the token at which it passes
//   `uniform` times the total, as rollout/sampler.rs does. Bound: bytes, 4 M V read once.
#include "mma.cuh"

namespace {

constexpr int THREADS = 256, DRAW_CHUNK = 512, DRAW_THREADS = 512;

// The largest of a chunk (and the first place where it is), and the sum of exponentials above it.
struct Chunk {
  float largest, sum;
};

struct Draw {
  const float *logits; // [M, V]
  Chunk *chunks;       // [M, ceil(V / 512)]
  const double *uniforms;
  uint32_t *tokens, *positions;
  uint2 *rows;
  uint32_t *steps;      // steps taken, for each lane
  uint32_t *drawn;      // [steps, M]
  float *logprobs;      // [2, steps, M]: plain, and under what was drawn from
  float temperature;    // 0: the first of the largest
  int32_t lanes, vocabulary, most_steps;
};

__device__ __forceinline__ float scaled(const Draw &d, float logit) {
  return d.temperature > 0.0f && d.temperature != 1.0f ? logit / d.temperature : logit;
}

__global__ void __launch_bounds__(THREADS) chunk_kernel(const __grid_constant__ Draw d) {
  launch_dependents();
  wait_for_dependency();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = blockIdx.y;
  const int chunk = blockIdx.x * (THREADS / 32) + warp, count = (d.vocabulary + DRAW_CHUNK - 1) / DRAW_CHUNK;
  if (chunk >= count) return;
  const float *logits = d.logits + static_cast<int64_t>(row) * d.vocabulary;
  float v[DRAW_CHUNK / 32], largest = -INFINITY, sum = 0.0f;
#pragma unroll
  for (int i = 0; i < DRAW_CHUNK / 32; i++) {
    const int at = chunk * DRAW_CHUNK + i * 32 + lane;
    v[i] = at < d.vocabulary ? scaled(d, __ldcg(logits + at)) : -INFINITY;
    largest = fmaxf(largest, v[i]);
  }
  largest = warp_max(largest);
  const float base = largest == -INFINITY ? 0.0f : largest;
#pragma unroll
  for (int i = 0; i < DRAW_CHUNK / 32; i++) sum += expf(v[i] - base); // a NaN or an infinity spoils the sum
  sum = warp_sum(sum);
  if (lane == 0) d.chunks[static_cast<int64_t>(row) * count + chunk] = {largest, sum};
}

// The sums of what stands before each thread's value, and of all.
__device__ double before(double x, double &all, double *scratch) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = DRAW_THREADS / 32;
  double own = x;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const double other = __shfl_up_sync(0xffffffffu, own, step);
    if (lane >= step) own += other;
  }
  __syncthreads();
  if (lane == 31) scratch[warp] = own;
  __syncthreads();
  double sum = 0.0;
  all = 0.0;
  for (int i = 0; i < warps; i++) {
    if (i < warp) sum += scratch[i];
    all += scratch[i];
  }
  return sum + own - x;
}

__global__ void __launch_bounds__(DRAW_THREADS) draw_kernel(const __grid_constant__ Draw d) {
  __shared__ double scratch[DRAW_THREADS / 32];
  __shared__ float largest_of[DRAW_THREADS / 32];
  __shared__ int chosen;
  __shared__ double chosen_before;
  launch_dependents();
  wait_for_dependency();
  const int row = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint2 place = d.rows[row];
  if (place.y == 0) return;
  const uint32_t step = d.steps[row];
  const int count = (d.vocabulary + DRAW_CHUNK - 1) / DRAW_CHUNK;
  const Chunk *chunks = d.chunks + static_cast<int64_t>(row) * count;
  const float *logits = d.logits + static_cast<int64_t>(row) * d.vocabulary;

  float largest = -INFINITY;
  for (int i = threadIdx.x; i < count; i += DRAW_THREADS) largest = fmaxf(largest, chunks[i].largest);
  largest = warp_max(largest);
  if (lane == 0) largest_of[warp] = largest;
  if (threadIdx.x == 0) chosen = -1;
  __syncthreads();
  for (int i = 0; i < DRAW_THREADS / 32; i++) largest = fmaxf(largest, largest_of[i]);

  // Each thread has neighbouring chunks, so that sums go from the first to the last.
  const int each = (count + DRAW_THREADS - 1) / DRAW_THREADS, first = threadIdx.x * each;
  const int end = min(first + each, count);
  auto weight_of = [&](int i) {
    const Chunk c = chunks[i];
    // A chunk without a weight has 0, one that is not finite spoils the sum.
    const double above = c.largest == -INFINITY ? 0.0 : exp(static_cast<double>(c.largest) - largest);
    return static_cast<double>(c.sum) * above;
  };
  double own = 0.0, total;
  for (int i = first; i < end; i++) own += weight_of(i);
  double sum = before(own, total, scratch);
  const bool is_greedy = d.temperature == 0.0f;
  const double target = is_greedy ? 0.0 : d.uniforms[static_cast<int64_t>(step) * d.lanes + row] * total;
  if (is_greedy) {
    int mine = count;
    for (int i = first; i < end && mine == count; i++)
      if (chunks[i].largest == largest) mine = i;
#pragma unroll
    for (int s = 16; s > 0; s /= 2) mine = min(mine, __shfl_xor_sync(0xffffffffu, mine, s));
    __shared__ int first_of[DRAW_THREADS / 32];
    if (lane == 0) first_of[warp] = mine;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int i = 0; i < DRAW_THREADS / 32; i++) mine = min(mine, first_of[i]);
      chosen = min(mine, count - 1);
    }
  } else {
    // One thread has the chunk in which the sum passes the target; where rounding leaves none, the last one that weighs.
    for (int i = first; i < end; i++) {
      const double weight = weight_of(i);
      if (weight > 0.0 && sum <= target && target < sum + weight) {
        chosen = i;
        chosen_before = sum;
      }
      sum += weight;
    }
    __syncthreads();
    if (threadIdx.x == 0 && chosen < 0) {
      double at = 0.0;
      for (int i = 0; i < count; i++) {
        const double weight = weight_of(i);
        if (weight > 0.0) {
          chosen = i;
          chosen_before = at;
          at += weight;
        }
      }
      chosen = max(chosen, 0);
    }
  }
  __syncthreads();

  // The token: a thread for each of the chunk.
  const int chunk = chosen, at = chunk * DRAW_CHUNK + threadIdx.x;
  const float logit = at < d.vocabulary ? scaled(d, __ldcg(logits + at)) : -INFINITY;
  __shared__ int token;
  if (is_greedy) {
    if (threadIdx.x == 0) token = d.vocabulary;
    __syncthreads();
    if (logit == largest) atomicMin(&token, at);
  } else {
    const double weight = logit == -INFINITY ? 0.0 : exp(static_cast<double>(logit) - largest);
    double all;
    const double here = before(weight, all, scratch), rest = target - chosen_before;
    if (threadIdx.x == 0) token = -1;
    __syncthreads();
    if (weight > 0.0 && here <= rest && rest < here + weight) token = at;
    __syncthreads();
    // Where rounding leaves none: the last one that weighs.
    const bool is_missing = token < 0;
    __syncthreads();
    if (is_missing && weight > 0.0) atomicMax(&token, at);
  }
  __syncthreads();
  const int picked = min(max(token, 0), d.vocabulary - 1);
  if (at == picked || (threadIdx.x == 0 && picked / DRAW_CHUNK != chunk)) {
    const double logprob = static_cast<double>(scaled(d, logits[picked])) - largest - log(total);
    const bool is_usable = isfinite(total) && isfinite(largest);
    const int64_t to = static_cast<int64_t>(step) * d.lanes + row;
    d.drawn[to] = picked;
    d.logprobs[to] = is_usable ? static_cast<float>(logprob) : NAN;
    d.logprobs[static_cast<int64_t>(d.most_steps) * d.lanes + to] = is_greedy ? 0.0f : static_cast<float>(logprob);
    d.tokens[row] = picked;
    d.positions[row] = place.y;
    // After the last step that was announced the lane is empty.
    d.rows[row] = make_uint2(place.x, step + 1 < d.most_steps ? place.y + 1 : 0);
    d.steps[row] = step + 1;
  }
}

} // namespace

extern "C" int trainer_decode_draw(const Draw *draw, cudaStream_t stream) {
  const Draw &d = *draw;
  if (d.lanes == 0) return 0;
  const int count = (d.vocabulary + DRAW_CHUNK - 1) / DRAW_CHUNK, warps = THREADS / 32;
  const int code = launch_after(chunk_kernel, dim3((count + warps - 1) / warps, d.lanes), THREADS, 0, stream, d);
  return code != 0 ? code : launch_after(draw_kernel, d.lanes, DRAW_THREADS, 0, stream, d);
}
