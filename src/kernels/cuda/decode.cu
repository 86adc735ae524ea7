// What a decoding step does beside its products and attention: norms, the heads of queries and keys and where keys and values
// go. All of it reads where lanes stand from device memory, so that a recorded step can be repeated.
//
// Lanes: {first, context} of each, as in paged_attention.cu: its pages begin at tables[first], and it has `context` tokens,
// the one of this step included. A lane with a context of 0 is empty: it computes, and stores and draws nothing.
//
// norm_kernel: a block for each row. low_kernel: a block for 8 or 16 rows and 16 ranks, on tensor cores. combine_kernel: a warp for
//   each head, adds what attention left in parts. heads_kernel: likewise; queries and keys are normed (Qwen3) and turned, then
//   keys and values go to their page.
//
// Bound: launch, and the instructions themselves, which come from memory when a block goes through them once: these kernels are short
// as code.
#include "mma.cuh"

namespace {

constexpr int HEAD_WARPS = 4, ROW_THREADS = 512, MOST_ROW_THREADS = 1024, N = 8;

// MOST: units of a thread.
template <typename R, typename T, int MOST>
__global__ void __launch_bounds__(MOST_ROW_THREADS) norm_kernel(Matrix y, Matrix x, const float *weight, float eps) {
  __shared__ float scratch[MOST_ROW_THREADS / 32 + 1];
  const int threads = blockDim.x;
#pragma unroll
  for (int i = 0; i < MOST; i++) prefetch(weight + min((i * threads + static_cast<int>(threadIdx.x)) * N, x.cols - N));
  launch_dependents();
  wait_for_dependency();
  const R *from = static_cast<const R *>(x.data) + blockIdx.x * x.stride;
  float v[MOST][N] = {}, w[MOST][N], sum = 0.0f;
#pragma unroll
  for (int i = 0; i < MOST; i++) {
    const int col = (i * threads + threadIdx.x) * N;
    if (col >= x.cols) break;
    load_pack<R, N>(v[i], from + col);
    load_pack<float, N>(w[i], weight + col);
  }
#pragma unroll
  for (int i = 0; i < MOST; i++)
#pragma unroll
    for (int j = 0; j < N; j++) sum += v[i][j] * v[i][j];
  sum = block_sum(sum, scratch);
  const float r = 1.0f / sqrtf(sum / static_cast<float>(x.cols) + eps);
#pragma unroll
  for (int i = 0; i < MOST; i++) {
    const int col = (i * threads + threadIdx.x) * N;
    if (col >= x.cols) break;
#pragma unroll
    for (int j = 0; j < N; j++) w[i][j] *= v[i][j] * r;
    store_columns<T>(y, blockIdx.x, col, w[i]);
  }
}

// Low-rank products of rows: A [R, K] and rows of one type, [M, R] of the activations' type.
struct LowRank {
  const void *a;
  void *low;
  float *partial;    // [parts, M, R], where there is more than one part of the columns
  uint32_t *arrived; // a counter for each block of a part, zero
  int32_t ranks, cols, parts;
};

// Where 8 neighbouring columns of a row lie, of the order in which a product reads them.
__device__ __forceinline__ int64_t unit_place(const Matrix &x, int line, int unit) {
  if (x.layout != TILES) return line * x.stride + unit * N;
  return static_cast<int64_t>(unit / 8) * x.stride * 64 + line * 64 + ((unit % 8 ^ (line & 7)) << 3);
}

// Low-rank products of 8 NT rows in the order in which a product reads them, with `A`s in that order: the warps have every so many-th
// step of 32 columns, of which a lane has 8 neighbours of two ranks and of NT rows. Which place of an operand they take is free as long
// as both agree. T is the type of the rows as they lie, and of the `A`s, O that of the activations.
constexpr int LOW_RANKS = 16, UNITS = 4;

template <typename T, typename O, int NT> __global__ void __launch_bounds__(MOST_ROW_THREADS) low_kernel(Matrix x, LowRank low) {
  constexpr int AT_ONCE = NT == 1 ? 4 : 3; // steps whose loads are in flight together
  extern __shared__ float sums[];          // [warps, 16, 8 NT]
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int first_line = blockIdx.x * 8 * NT, first_rank = blockIdx.y * LOW_RANKS, part = blockIdx.z;
  const int first = low.cols / N * part / low.parts, units = low.cols / N * (part + 1) / low.parts;
  const T *data = static_cast<const T *>(x.data), *a[2];
#pragma unroll
  for (int half = 0; half < 2; half++)
    a[half] = static_cast<const T *>(low.a) + static_cast<int64_t>(min(first_rank + g + half * 8, low.ranks - 1)) * low.cols;
#pragma unroll 1
  for (int unit = first + warp * UNITS + t; unit < units; unit += warps * UNITS) prefetch(a[0] + unit * N), prefetch(a[1] + unit * N);
  // A product that follows finds the rows complete when it begins, and waits for what this kernel makes of them.
  wait_for_dependency();
  launch_dependents();
  float acc[NT][4] = {};
#pragma unroll 1
  for (int step = first + warp * UNITS; step < units; step += warps * UNITS * AT_ONCE) {
    uint4 left[AT_ONCE][2] = {}, right[AT_ONCE][NT] = {};
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      const int unit = step + i * warps * UNITS + t;
      if (unit >= units) continue;
#pragma unroll
      for (int half = 0; half < 2; half++) left[i][half] = *reinterpret_cast<const uint4 *>(a[half] + unit * N);
#pragma unroll
      for (int j = 0; j < NT; j++) {
        const int line = min(first_line + j * 8 + g, x.rows - 1);
        right[i][j] = *reinterpret_cast<const uint4 *>(data + unit_place(x, line, unit));
      }
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      const uint32_t one[4] = {left[i][0].x, left[i][1].x, left[i][0].y, left[i][1].y};
      const uint32_t two[4] = {left[i][0].z, left[i][1].z, left[i][0].w, left[i][1].w};
#pragma unroll
      for (int j = 0; j < NT; j++) {
        multiply<T>(acc[j], one, right[i][j].x, right[i][j].y);
        multiply<T>(acc[j], two, right[i][j].z, right[i][j].w);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < NT; j++)
#pragma unroll
    for (int i = 0; i < 4; i++)
      sums[(warp * LOW_RANKS + g + i / 2 * 8) * (8 * NT) + j * 8 + t * 2 + i % 2] = acc[j][i];
  __syncthreads();
  const int rank = threadIdx.x % LOW_RANKS, own = threadIdx.x / LOW_RANKS, line = first_line + own;
  const bool is_there = own < 8 * NT && line < x.rows && first_rank + rank < low.ranks;
  const int64_t to = static_cast<int64_t>(line) * low.ranks + first_rank + rank;
  float sum = 0.0f;
  if (is_there) {
#pragma unroll 8
    for (int i = 0; i < warps; i++) sum += sums[(i * LOW_RANKS + rank) * (8 * NT) + own];
  }
  if (low.parts > 1) {
    // The last one adds the parts in their order.
    __shared__ bool is_last;
    const int64_t all = static_cast<int64_t>(x.rows) * low.ranks;
    if (is_there) __stcg(low.partial + part * all + to, sum);
    __threadfence();
    __syncthreads();
    uint32_t *arrived = low.arrived + blockIdx.y * gridDim.x + blockIdx.x;
    if (threadIdx.x == 0) is_last = atomicAdd(arrived, 1) == low.parts - 1;
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    if (threadIdx.x == 0) *arrived = 0;
    if (is_there) {
      sum = 0.0f;
#pragma unroll 4
      for (int i = 0; i < low.parts; i++) sum += __ldcg(low.partial + i * all + to);
    }
  }
  if (is_there) static_cast<O *>(low.low)[to] = from_float<O>(sum * (is_scaled(x) ? X_SCALE : 1.0f));
}

// The end of attention: the parts of a row's context in the order of the parts.
struct Combine {
  Matrix out; // [M, H D]
  const float *partial;
  const uint2 *rows;
  int32_t heads, d, splits, split_keys;
};

// Neighbouring floats, as many at a time as there may be.
template <int COUNT> __device__ __forceinline__ void load_floats(float (&x)[COUNT], const float *from) {
  constexpr int AT_A_TIME = COUNT % 4 == 0 ? 4 : 2;
#pragma unroll
  for (int i = 0; i < COUNT; i += AT_A_TIME) {
    const Pack<float, AT_A_TIME> pack = *reinterpret_cast<const Pack<float, AT_A_TIME> *>(from + i);
#pragma unroll
    for (int j = 0; j < AT_A_TIME; j++) x[i + j] = pack.v[j];
  }
}

// A warp for each head. PER: values of a head that a lane has, D / 32.
template <typename T, int PER> __global__ void __launch_bounds__(HEAD_WARPS * 32) combine_kernel(const __grid_constant__ Combine c) {
  constexpr int D = PER * 32, FIRST = 4;
  __shared__ __align__(16) float exact[HEAD_WARPS][D];
  launch_dependents();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, head = blockIdx.x * HEAD_WARPS + warp, row = blockIdx.y;
  const int64_t floats = static_cast<int64_t>(c.out.rows) * c.heads * c.splits * D;
  const float2 *sums = reinterpret_cast<const float2 *>(c.partial + (floats + 1) / 2 * 2);
  const int context = static_cast<int>(c.rows[row].y); // written before this step began
  const int splits = min(c.splits, (context + c.split_keys - 1) / c.split_keys);
  wait_for_dependency();
  if (head >= c.heads) return;
  const int64_t first = (static_cast<int64_t>(row) * c.heads + head) * c.splits;
  const float *parts = c.partial + first * D + lane * PER;
  // The first few come beside their sums.
  float some[FIRST][PER];
#pragma unroll
  for (int s = 0; s < FIRST; s++)
    if (s < splits) load_floats(some[s], parts + s * D);
  float top = -INFINITY;
  for (int s = lane; s < splits; s += 32) top = fmaxf(top, sums[first + s].x);
  top = warp_max(top);
  float sum = 0.0f, x[PER] = {};
  auto add = [&](int s, const float(&part)[PER]) {
    const float2 own = sums[first + s];
    const float weight = exp2f(own.x - top);
    sum += weight * own.y;
#pragma unroll
    for (int i = 0; i < PER; i++) x[i] += weight * part[i];
  };
#pragma unroll
  for (int s = 0; s < FIRST; s++)
    if (s < splits) add(s, some[s]);
#pragma unroll 4
  for (int s = FIRST; s < splits; s++) {
    float part[PER];
    load_floats(part, parts + static_cast<int64_t>(s) * D);
    add(s, part);
  }
  const float scale = splits > 0 ? 1.0f / sum : 0.0f;
#pragma unroll
  for (int i = 0; i < PER; i += 2)
    *reinterpret_cast<float2 *>(&exact[warp][lane * PER + i]) = make_float2(x[i] * scale, x[i + 1] * scale);
  __syncwarp();
  // Eight columns at a time, in whose order the product reads them.
  if (lane * N >= D) return;
  float v[N];
  load_pack<float, N>(v, &exact[warp][lane * N]);
  store_columns<T>(c.out, row, head * D + lane * N, v);
}

struct Heads {
  Matrix qkv; // [M, (H + 2 K) D], queries and keys in place
  const float *q_norm, *k_norm;
  const float2 *table; // [M, D / 2]
  void *keys, *values;
  const uint32_t *tables;
  const uint2 *rows;
  float eps;
  int32_t heads, kv_heads, d, page_tokens;
};

// PER: values of a head that a lane has, D / 32: those at multiples of 32 from its own on.
template <typename T, int PER> __global__ void __launch_bounds__(HEAD_WARPS * 32) heads_kernel(const __grid_constant__ Heads h) {
  constexpr int D = PER * 32, HALF = D / 2, PAIRS = PER / 2;
  const int lane = threadIdx.x % 32, head = blockIdx.x * HEAD_WARPS + threadIdx.x / 32, row = blockIdx.y;
  launch_dependents();
  // Where lanes stand was written before this step began.
  const uint2 place = h.rows[row];
  wait_for_dependency();
  if (head >= h.heads + 2 * h.kv_heads) return;
  const bool is_query = head < h.heads, is_value = head >= h.heads + h.kv_heads;
  T *x = static_cast<T *>(h.qkv.data) + row * h.qkv.stride + static_cast<int64_t>(head) * D + lane;
  float v[PER];
#pragma unroll
  for (int i = 0; i < PER; i++) v[i] = to_float(x[i * 32]);
  const float *weight = is_value ? nullptr : is_query ? h.q_norm : h.k_norm;
  if (weight) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < PER; i++) sum += v[i] * v[i];
    const float r = 1.0f / sqrtf(warp_sum(sum) / static_cast<float>(D) + h.eps);
#pragma unroll
    for (int i = 0; i < PER; i++) v[i] = to_float(from_float<T>(v[i] * r * weight[i * 32 + lane]));
  }
  if (!is_value) {
    const float2 *table = h.table + static_cast<int64_t>(row) * HALF + lane;
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
      const float2 turn = table[i * 32];
      const float a = v[i], b = v[i + PAIRS];
      v[i] = a * turn.x - b * turn.y;
      v[i + PAIRS] = b * turn.x + a * turn.y;
    }
  }
  T *to = x;
  if (!is_query) {
    if (place.y == 0) return;
    const uint32_t position = place.y - 1;
    const int64_t slot =
        static_cast<int64_t>(h.tables[place.x + position / h.page_tokens]) * h.page_tokens + position % h.page_tokens;
    const int kv_head = head - h.heads - (is_value ? h.kv_heads : 0);
    to = static_cast<T *>(is_value ? h.values : h.keys) + (slot * h.kv_heads + kv_head) * D + lane;
  }
#pragma unroll
  for (int i = 0; i < PER; i++) to[i * 32] = from_float<T>(v[i]);
}

template <typename R, typename T> int norm(const Matrix &y, const Matrix &x, const float *weight, float eps, cudaStream_t stream) {
  const unsigned threads = x.cols <= ROW_THREADS * N ? ROW_THREADS : MOST_ROW_THREADS;
  auto kernel = x.cols <= MOST_ROW_THREADS * N ? norm_kernel<R, T, 1> : norm_kernel<R, T, 2>;
  return launch_after(kernel, dim3(x.rows), threads, 0, stream, y, x, weight, eps);
}

template <typename T, typename O, int NT> int low_rows(const Matrix &x, const LowRank &low, cudaStream_t stream) {
  const dim3 grid((x.rows + 8 * NT - 1) / (8 * NT), (low.ranks + LOW_RANKS - 1) / LOW_RANKS, low.parts);
  const unsigned threads = x.cols <= ROW_THREADS * N ? ROW_THREADS : MOST_ROW_THREADS;
  return launch_after(low_kernel<T, O, NT>, grid, threads, sizeof(float) * (threads / 32) * LOW_RANKS * 8 * NT, stream, x, low);
}
template <typename T, typename O> int low(const Matrix &x, const LowRank &low, cudaStream_t stream) {
  return x.rows <= 8 ? low_rows<T, O, 1>(x, low, stream) : low_rows<T, O, 2>(x, low, stream);
}

template <typename T> int combine(const Combine &c, cudaStream_t stream) {
  const dim3 grid((c.heads + HEAD_WARPS - 1) / HEAD_WARPS, c.out.rows);
  auto kernel = c.d == 64 ? combine_kernel<T, 2> : c.d == 128 ? combine_kernel<T, 4> : c.d == 192 ? combine_kernel<T, 6> : combine_kernel<T, 8>;
  return launch_after(kernel, grid, HEAD_WARPS * 32, 0, stream, c);
}

template <typename T> int heads(const Heads &h, cudaStream_t stream) {
  const dim3 grid((h.heads + 2 * h.kv_heads + HEAD_WARPS - 1) / HEAD_WARPS, h.qkv.rows);
  auto kernel = h.d == 64 ? heads_kernel<T, 2> : h.d == 128 ? heads_kernel<T, 4> : h.d == 192 ? heads_kernel<T, 6> : heads_kernel<T, 8>;
  return launch_after(kernel, grid, HEAD_WARPS * 32, 0, stream, h);
}

bool has_head_size(int d) { return d == 64 || d == 128 || d == 192 || d == 256; }

} // namespace

extern "C" int trainer_decode_norm(Matrix y, Matrix x, const float *weight, float eps, cudaStream_t stream) {
  if (x.rows == 0) return 0;
  const int type = activation_type(y);
  if (type == BF16 && x.dtype == BF16) return norm<__nv_bfloat16, __nv_bfloat16>(y, x, weight, eps, stream);
  if (type == F16 && x.dtype == F32) return norm<float, __half>(y, x, weight, eps, stream);
  if (type == BF16 && x.dtype == F32) return norm<float, __nv_bfloat16>(y, x, weight, eps, stream);
  if (type == F16 && x.dtype == F16) return norm<__half, __half>(y, x, weight, eps, stream);
  return static_cast<int>(cudaErrorInvalidValue);
}

extern "C" int trainer_decode_low(Matrix x, const LowRank *products, cudaStream_t stream) {
  if (x.rows == 0 || products->ranks == 0) return 0;
  if (x.dtype == BF16) return low<__nv_bfloat16, __nv_bfloat16>(x, *products, stream);
  if (x.dtype == F16 || x.dtype == SCALED_F16) return low<__half, __half>(x, *products, stream);
  if (x.dtype == SCALED_BF16) return low<__half, __nv_bfloat16>(x, *products, stream);
  return static_cast<int>(cudaErrorInvalidValue);
}

extern "C" int trainer_decode_combine(const Combine *of, cudaStream_t stream) {
  const Combine &c = *of;
  if (c.out.rows == 0) return 0;
  if (!has_head_size(c.d)) return static_cast<int>(cudaErrorInvalidValue);
  if (activation_type(c.out) == BF16) return combine<__nv_bfloat16>(c, stream);
  if (activation_type(c.out) == F16) return combine<__half>(c, stream);
  return static_cast<int>(cudaErrorInvalidValue);
}

extern "C" int trainer_decode_heads(const Heads *of, cudaStream_t stream) {
  const Heads &h = *of;
  if (h.qkv.rows == 0) return 0;
  if (!has_head_size(h.d)) return static_cast<int>(cudaErrorInvalidValue);
  if (h.qkv.dtype == BF16) return heads<__nv_bfloat16>(h, stream);
  if (h.qkv.dtype == F16) return heads<__half>(h, stream);
  return static_cast<int>(cudaErrorInvalidValue);
}
