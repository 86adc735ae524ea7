// What the kernels share that draw the next tokens of decoding steps: what they read and write, a row's values, sums over a block.
//
// Lanes: {first, context} of each, as in paged_attention.cu. A lane with a context of 0 is empty: nothing is drawn.
#pragma once

#include "mma.cuh"

namespace {

constexpr int DRAW_CHUNK = 512, EACH = DRAW_CHUNK / 32; // values of a chunk, and of those for each lane of a warp

using Units = unsigned long long;

// The largest of a chunk, and the sum of exponentials above it.
struct Chunk {
  float largest, sum;
};

struct Draw {
  const float *logits; // [M, V]
  Chunk *chunks;       // [M, ceil(V / 512)], of what is drawn from before filters
  Chunk *plain;        // the same without the penalty, where there is one
  Units *found;        // [M, 2]: the border, and the weight of what was kept
  uint32_t *seen;      // [M, ceil(V / 32)]: bits of tokens seen before
  const double *uniforms;
  uint32_t *tokens, *positions;
  uint2 *rows;
  uint32_t *steps; // steps taken, for each lane
  uint32_t *drawn; // [steps, M]
  float *logprobs; // [2, steps, M]: plain, and under what was drawn from
  double top_p, min_p; // 1, 0: off
  float temperature;   // 0: the first of the largest
  float penalty;       // 1: off
  int32_t top_k;       // 0: off
  int32_t lanes, vocabulary, most_steps;
};

__device__ __forceinline__ int chunks_of(const Draw &d) { return (d.vocabulary + DRAW_CHUNK - 1) / DRAW_CHUNK; }

__device__ __forceinline__ float scaled(const Draw &d, float logit) {
  return d.temperature > 0.0f && d.temperature != 1.0f ? logit / d.temperature : logit;
}

__device__ __forceinline__ float penalised(const Draw &d, float logit) {
  return logit > 0.0f ? logit / d.penalty : logit * d.penalty;
}

// A row of logits and what was seen of its lane.
struct Source {
  const float *logits;
  const uint32_t *seen;

  __device__ Source(const Draw &d, int row)
      : logits(d.logits + static_cast<int64_t>(row) * d.vocabulary),
        seen(d.seen + static_cast<int64_t>(row) * ((d.vocabulary + 31) / 32)) {}

  // What is drawn from before filters.
  __device__ __forceinline__ float value(const Draw &d, int at) const {
    const float logit = __ldcg(logits + at);
    const bool is_seen = d.penalty != 1.0f && (__ldcg(seen + at / 32) >> (at % 32) & 1);
    return scaled(d, is_seen ? penalised(d, logit) : logit);
  }
  __device__ __forceinline__ float plain(const Draw &d, int at) const { return scaled(d, __ldcg(logits + at)); }
};

// The sum of what stands before each thread's value, and of all; `scratch` has an element for each warp.
template <typename T> __device__ T before(T x, T &all, T *scratch) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  T own = x;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const T other = __shfl_up_sync(0xffffffffu, own, step);
    if (lane >= step) own += other;
  }
  __syncthreads();
  if (lane == 31) scratch[warp] = own;
  __syncthreads();
  T sum = 0;
  all = 0;
  for (int i = 0; i < warps; i++) {
    if (i < warp) sum += scratch[i];
    all += scratch[i];
  }
  return sum + own - x;
}

// The weight of a chunk beside a row's largest: one without a weight has 0, one that is not finite spoils the sum.
__device__ __forceinline__ double weight_of(const Chunk &c, float largest) {
  const double above = c.largest == -INFINITY ? 0.0 : exp(static_cast<double>(c.largest) - largest);
  return static_cast<double>(c.sum) * above;
}

// The largest of a row of chunks.
__device__ float largest_of(const Chunk *chunks, int count, float *scratch) {
  float largest = -INFINITY;
  for (int i = threadIdx.x; i < count; i += blockDim.x) largest = fmaxf(largest, chunks[i].largest);
  largest = warp_max(largest);
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = largest;
  __syncthreads();
  for (int i = 0; i < static_cast<int>(blockDim.x) / 32; i++) largest = fmaxf(largest, scratch[i]);
  return largest;
}

// A row's largest, what stands before each thread's chunks (neighbours, so that sums go from the first to the last), and all.
struct Row {
  float largest;
  double before, total;
  int first, end; // the thread's chunks

  __device__ Row(const Chunk *chunks, int count, double *sums, float *numbers) : largest(largest_of(chunks, count, numbers)) {
    const int each = (count + blockDim.x - 1) / blockDim.x;
    first = min(static_cast<int>(threadIdx.x) * each, count), end = min(first + each, count);
    double own = 0.0;
    for (int i = first; i < end; i++) own += weight_of(chunks[i], largest);
    before = ::before(own, total, sums);
  }
  __device__ bool is_usable() const { return isfinite(total) && isfinite(largest); }
  __device__ double logprob(float value) const { return static_cast<double>(value) - largest - log(total); }
};

// Notes a lane's token and moves the lane on; for one thread. After the last step that was announced the lane is empty.
__device__ void take(const Draw &d, int row, uint2 place, uint32_t step, int token, double logprob, double sampling_logprob) {
  const int64_t to = static_cast<int64_t>(step) * d.lanes + row;
  d.drawn[to] = token;
  d.logprobs[to] = static_cast<float>(logprob);
  d.logprobs[static_cast<int64_t>(d.most_steps) * d.lanes + to] = static_cast<float>(sampling_logprob);
  if (d.penalty != 1.0f) d.seen[static_cast<int64_t>(row) * ((d.vocabulary + 31) / 32) + token / 32] |= 1u << (token % 32);
  d.tokens[row] = token;
  d.positions[row] = place.y;
  d.rows[row] = make_uint2(place.x, step + 1 < d.most_steps ? place.y + 1 : 0);
  d.steps[row] = step + 1;
}

} // namespace
