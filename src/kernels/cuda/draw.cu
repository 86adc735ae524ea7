// Draws the next token of each lane of a decoding step from its logits, notes it and moves the lane on. Where lanes stand is read
// from device memory, so that a recorded step can be repeated.
//
// Order and rules are those of rollout/sampler.rs: repetition penalty, temperature, filters (draw_filtered.cu), then the first id,
// in ascending order, at which the sum of probabilities passes a number from 0 to 1. Penalty and temperature have the host's bits.
//
// chunk_kernel: the row in chunks of 512: the largest and the sum of exponentials of each, in f32, with a penalty also without it.
//   Bound: bytes, 4 M V read once.
// draw_kernel, without filters: in f64, the sum over the chunks from the first to the last, the chunk and the token at which it
//   passes `uniform` times the total.
#include "draw.cuh"

namespace {

constexpr int THREADS = 256, DRAW_THREADS = 512;

__device__ __forceinline__ Chunk chunk_of(const float (&v)[EACH]) {
  float largest = -INFINITY, sum = 0.0f;
#pragma unroll
  for (int i = 0; i < EACH; i++) largest = fmaxf(largest, v[i]);
  largest = warp_max(largest);
  const float base = largest == -INFINITY ? 0.0f : largest;
#pragma unroll
  for (int i = 0; i < EACH; i++) sum += expf(v[i] - base); // a NaN or an infinity spoils the sum
  return {largest, warp_sum(sum)};
}

__global__ void __launch_bounds__(THREADS) chunk_kernel(const __grid_constant__ Draw d) {
  launch_dependents();
  wait_for_dependency();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = blockIdx.y;
  const int chunk = blockIdx.x * (THREADS / 32) + warp, count = chunks_of(d);
  if (chunk >= count) return;
  const Source source(d, row);
  float v[EACH];
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const int at = chunk * DRAW_CHUNK + i * 32 + lane;
    v[i] = at < d.vocabulary ? source.value(d, at) : -INFINITY;
  }
  const int64_t to = static_cast<int64_t>(row) * count + chunk;
  const Chunk own = chunk_of(v);
  if (lane == 0) d.chunks[to] = own;
  if (d.penalty == 1.0f) return;
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const int at = chunk * DRAW_CHUNK + i * 32 + lane;
    v[i] = at < d.vocabulary ? source.plain(d, at) : -INFINITY;
  }
  const Chunk plain = chunk_of(v);
  if (lane == 0) d.plain[to] = plain;
}

__global__ void __launch_bounds__(DRAW_THREADS) draw_kernel(const __grid_constant__ Draw d) {
  __shared__ double scratch[DRAW_THREADS / 32];
  __shared__ float numbers[DRAW_THREADS / 32];
  __shared__ int chosen;
  __shared__ double chosen_before;
  launch_dependents();
  wait_for_dependency();
  const int row = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint2 place = d.rows[row];
  if (place.y == 0) return;
  const uint32_t step = d.steps[row];
  const int count = chunks_of(d);
  const Chunk *chunks = d.chunks + static_cast<int64_t>(row) * count;
  const Source source(d, row);
  if (threadIdx.x == 0) chosen = -1;
  const Row own(chunks, count, scratch, numbers);
  const Row plain = d.penalty == 1.0f ? own : Row(d.plain + static_cast<int64_t>(row) * count, count, scratch, numbers);
  const float largest = own.largest;

  double sum = own.before;
  const bool is_greedy = d.temperature == 0.0f;
  const double target = is_greedy ? 0.0 : d.uniforms[static_cast<int64_t>(step) * d.lanes + row] * own.total;
  if (is_greedy) {
    int mine = count;
    for (int i = own.first; i < own.end && mine == count; i++)
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
    for (int i = own.first; i < own.end; i++) {
      const double weight = weight_of(chunks[i], largest);
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
        const double weight = weight_of(chunks[i], largest);
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
  const float value = at < d.vocabulary ? source.value(d, at) : -INFINITY;
  __shared__ int token;
  if (is_greedy) {
    if (threadIdx.x == 0) token = d.vocabulary;
    __syncthreads();
    if (value == largest) atomicMin(&token, at);
  } else {
    const double weight = value == -INFINITY ? 0.0 : exp(static_cast<double>(value) - largest);
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
  if (threadIdx.x == 0) {
    const int picked = min(max(token, 0), d.vocabulary - 1);
    const bool is_usable = own.is_usable() && plain.is_usable();
    const double logprob = is_usable ? plain.logprob(source.plain(d, picked)) : NAN;
    take(d, row, place, step, picked, logprob, is_greedy ? 0.0 : own.logprob(source.value(d, picked)));
  }
}

} // namespace

extern "C" int trainer_draw_chunks(const Draw *draw, cudaStream_t stream) {
  const Draw &d = *draw;
  if (d.lanes == 0) return 0;
  const int count = (d.vocabulary + DRAW_CHUNK - 1) / DRAW_CHUNK, warps = THREADS / 32;
  return launch_after(chunk_kernel, dim3((count + warps - 1) / warps, d.lanes), THREADS, 0, stream, d);
}

extern "C" int trainer_draw(const Draw *draw, cudaStream_t stream) {
  if (draw->lanes == 0) return 0;
  return launch_after(draw_kernel, draw->lanes, DRAW_THREADS, 0, stream, *draw);
}
