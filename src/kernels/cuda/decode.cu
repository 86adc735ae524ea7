// What a decoding step does beside its products and attention: norms, the heads of queries and keys and where keys and values
// go. All of it reads where lanes stand from device memory, so that a recorded step can be repeated.
//
// Lanes: {first, context} of each, as in paged_attention.cu: its pages begin at tables[first], and it has `context` tokens,
// the one of this step included. A lane with a context of 0 is empty: it computes, and stores and draws nothing.
//
// norm_kernel: a block for each row and 16 ranks, y = x / sqrt(mean(x^2) + eps) w in registers, then a warp for each of the
//   ranks. combine_kernel: likewise for the parts of attention. low_kernel: blocks for each row and part of the columns, a warp
//   for some ranks. Bound: launch; R K values of A for each row, mostly from the second-level cache.
// heads_kernel: a warp for each head: queries and keys are normed (Qwen3) and turned, then keys and values go to their page.
//   Bound: launch; M (H + 2 K) D values.
#include "mma.cuh"

namespace {

constexpr int THREADS = 256, HEAD_WARPS = 4, MOST_HEAD = 256;

constexpr int ROW_THREADS = 512, ROW_WARPS = ROW_THREADS / 32, MOST_COLUMNS = 16384;

// Low-rank products of rows: A [R, K] of type T, f32 [M, R] (or [S, M, R], S parts of the sum).
struct LowRank {
  const void *a;
  float *low;
  int32_t ranks, cols;
};

// Asks for the `A` that a warp multiplies with: no other kernel writes it.
template <typename T> __device__ __forceinline__ void prefetch_rank(const LowRank &l, int rank) {
  if (!l.a || rank >= l.ranks) return;
  const T *a = static_cast<const T *>(l.a) + static_cast<int64_t>(rank) * l.cols;
  for (int col = threadIdx.x % 32 * 64; col < l.cols; col += 32 * 64) prefetch(a + col);
}

// The products of a row in shared memory with 16 of the `A`s, a warp for each.
template <typename T>
__device__ __forceinline__ void multiply_row(const LowRank &l, const T *row, int index, int first) {
  const int lane = threadIdx.x % 32, rank = first + threadIdx.x / 32;
  if (rank >= l.ranks) return;
  const T *a = static_cast<const T *>(l.a) + static_cast<int64_t>(rank) * l.cols;
  float sum = 0.0f;
#pragma unroll 4
  for (int col = lane * 8; col < l.cols; col += 256) {
    float v[8], w[8];
    load_pack<T, 8>(v, row + col);
    load_pack<T, 8>(w, a + col);
#pragma unroll
    for (int i = 0; i < 8; i++) sum += v[i] * w[i];
  }
  sum = warp_sum(sum);
  if (lane == 0) l.low[static_cast<int64_t>(index) * l.ranks + rank] = sum;
}

template <typename R, typename T>
__global__ void __launch_bounds__(ROW_THREADS)
    norm_kernel(Matrix y, Matrix x, const float *weight, float eps, LowRank low) {
  constexpr int N = 8, MOST = MOST_COLUMNS / ROW_THREADS / N;
  __shared__ float scratch[ROW_WARPS + 1];
  extern __shared__ __align__(16) unsigned char memory[]; // the row, where there are low-rank products
  T *row = reinterpret_cast<T *>(memory);
  prefetch_rank<T>(low, blockIdx.y * ROW_WARPS + threadIdx.x / 32);
  for (int col = threadIdx.x * 32; col < x.cols; col += ROW_THREADS * 32) prefetch(weight + col);
  launch_dependents();
  wait_for_dependency();
  const R *from = static_cast<const R *>(x.data) + blockIdx.x * x.stride;
  float v[MOST][N], sum = 0.0f;
#pragma unroll
  for (int i = 0; i < MOST; i++) {
    const int col = (i * ROW_THREADS + threadIdx.x) * N;
    if (col >= x.cols) break;
    load_pack<R, N>(v[i], from + col);
#pragma unroll
    for (int j = 0; j < N; j++) sum += v[i][j] * v[i][j];
  }
  sum = block_sum(sum, scratch);
  const float r = 1.0f / sqrtf(sum / static_cast<float>(x.cols) + eps);
#pragma unroll
  for (int i = 0; i < MOST; i++) {
    const int col = (i * ROW_THREADS + threadIdx.x) * N;
    if (col >= x.cols) break;
    float w[N];
    load_pack<float, N>(w, weight + col);
#pragma unroll
    for (int j = 0; j < N; j++) w[j] *= v[i][j] * r;
    if (blockIdx.y == 0) store_columns<T>(y, blockIdx.x, col, w);
    if (low.a) store_pack<T, N>(row + col, w);
  }
  if (!low.a) return;
  __syncthreads();
  multiply_row<T>(low, row, blockIdx.x, blockIdx.y * ROW_WARPS);
}

// Low-rank products of `LINES` rows in another order of columns than plain, with `A`s in that order: blockIdx.y is a part of the
// sum, a warp has one of the ranks.
template <typename T, int LINES> __global__ void __launch_bounds__(THREADS) low_kernel(Matrix x, LowRank low) {
  const int lane = threadIdx.x % 32, first_line = blockIdx.x * LINES, units = low.cols / 8;
  const int rank = blockIdx.z * (THREADS / 32) + threadIdx.x / 32;
  const int first = units * blockIdx.y / gridDim.y, end = units * (blockIdx.y + 1) / gridDim.y;
  const T *data = static_cast<const T *>(x.data);
  const T *a = static_cast<const T *>(low.a) + static_cast<int64_t>(rank) * low.cols;
  if (rank < low.ranks)
    for (int unit = first + lane * 8; unit < end; unit += 256) prefetch(a + unit * 8);
  // A product that follows finds the rows complete when it begins, and waits for what this kernel makes of them.
  wait_for_dependency();
  launch_dependents();
  if (rank >= low.ranks) return;
  float sum[LINES] = {};
#pragma unroll 4
  for (int unit = first + lane; unit < end; unit += 32) {
    float w[8];
    load_pack<T, 8>(w, a + unit * 8);
#pragma unroll
    for (int i = 0; i < LINES; i++) {
      const int line = min(first_line + i, x.rows - 1);
      const int64_t place = x.layout == TILES ? static_cast<int64_t>(unit / 8) * x.stride * 64 + line * 64 +
                                                    ((unit % 8 ^ (line & 7)) << 3)
                                              : line * x.stride + unit * 8;
      float v[8];
      if (is_scaled(x)) load_pack<__half, 8>(v, static_cast<const __half *>(x.data) + place);
      else load_pack<T, 8>(v, data + place);
#pragma unroll
      for (int j = 0; j < 8; j++) sum[i] += v[j] * w[j];
    }
  }
  const float scale = is_scaled(x) ? X_SCALE : 1.0f;
#pragma unroll
  for (int i = 0; i < LINES; i++) {
    const float all = warp_sum(sum[i]) * scale;
    if (lane == 0 && first_line + i < x.rows)
      low.low[(static_cast<int64_t>(blockIdx.y) * x.rows + first_line + i) * low.ranks + rank] = all;
  }
}

// The end of attention: the parts of a row's context in the order of the parts, then its low-rank products.
struct Combine {
  Matrix out; // [M, H D]
  const float *partial;
  const uint2 *rows;
  LowRank low;
  int32_t heads, d, splits, split_keys;
};

template <typename T> __global__ void __launch_bounds__(ROW_THREADS) combine_kernel(const __grid_constant__ Combine c) {
  extern __shared__ __align__(16) unsigned char memory[];
  T *all = reinterpret_cast<T *>(memory);
  prefetch_rank<T>(c.low, blockIdx.y * ROW_WARPS + threadIdx.x / 32);
  launch_dependents();
  wait_for_dependency();
  const int lane = threadIdx.x % 32, row = blockIdx.x;
  const int64_t floats = static_cast<int64_t>(c.out.rows) * c.heads * c.splits * c.d;
  const float2 *sums = reinterpret_cast<const float2 *>(c.partial + (floats + 1) / 2 * 2);
  const int context = static_cast<int>(c.rows[row].y);
  const int splits = min(c.splits, (context + c.split_keys - 1) / c.split_keys);
  for (int head = threadIdx.x / 32; head < c.heads; head += ROW_WARPS) {
    const int64_t first = (static_cast<int64_t>(row) * c.heads + head) * c.splits;
    float top = -INFINITY;
    for (int s = lane; s < splits; s += 32) top = fmaxf(top, sums[first + s].x);
    top = warp_max(top);
    float sum = 0.0f, x[MOST_HEAD / 32] = {};
#pragma unroll 4
    for (int s = 0; s < splits; s++) {
      const float2 part = sums[first + s];
      const float weight = exp2f(part.x - top);
      sum += weight * part.y;
#pragma unroll
      for (int i = 0; i < MOST_HEAD / 32; i++)
        if (i * 32 < c.d) x[i] += weight * c.partial[(first + s) * c.d + i * 32 + lane];
    }
#pragma unroll
    for (int i = 0; i < MOST_HEAD / 32; i++) {
      if (i * 32 >= c.d) break;
      const int col = head * c.d + i * 32 + lane;
      const float exact = splits > 0 ? x[i] / sum : 0.0f;
      const T value = from_float<T>(exact);
      if (blockIdx.y == 0) {
        const int64_t place = place_of(c.out, row, col);
        if (is_scaled(c.out)) static_cast<__half *>(c.out.data)[place] = from_float<__half>(to_scaled(exact));
        else static_cast<T *>(c.out.data)[place] = value;
      }
      all[col] = value;
    }
  }
  if (!c.low.a) return;
  __syncthreads();
  multiply_row<T>(c.low, all, row, blockIdx.y * ROW_WARPS);
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

template <typename T> __global__ void __launch_bounds__(HEAD_WARPS * 32) heads_kernel(const __grid_constant__ Heads h) {
  constexpr int MOST = MOST_HEAD / 32;
  const int lane = threadIdx.x % 32, head = blockIdx.x * HEAD_WARPS + threadIdx.x / 32, row = blockIdx.y;
  launch_dependents();
  wait_for_dependency();
  if (head >= h.heads + 2 * h.kv_heads) return;
  const bool is_query = head < h.heads, is_value = head >= h.heads + h.kv_heads;
  T *x = static_cast<T *>(h.qkv.data) + row * h.qkv.stride + static_cast<int64_t>(head) * h.d;
  float v[MOST];
#pragma unroll
  for (int i = 0; i < MOST; i++) v[i] = i * 32 < h.d ? to_float(x[i * 32 + lane]) : 0.0f;
  const float *weight = is_value ? nullptr : is_query ? h.q_norm : h.k_norm;
  if (weight) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < MOST; i++) sum += v[i] * v[i];
    const float r = 1.0f / sqrtf(warp_sum(sum) / static_cast<float>(h.d) + h.eps);
#pragma unroll
    for (int i = 0; i < MOST; i++)
      if (i * 32 < h.d) v[i] = to_float(from_float<T>(v[i] * r * weight[i * 32 + lane]));
  }
  if (!is_value) {
    const int half = h.d / 2, pairs = half / 32; // d is a multiple of 64
    const float2 *table = h.table + static_cast<int64_t>(row) * half;
#pragma unroll
    for (int i = 0; i < MOST / 2; i++) {
      if (i >= pairs) break;
      const float2 turn = table[i * 32 + lane];
      float a = v[i], b = 0.0f;
#pragma unroll
      for (int j = 0; j < MOST; j++)
        if (j == i + pairs) b = v[j];
      const float one = a * turn.x - b * turn.y, two = b * turn.x + a * turn.y;
      v[i] = one;
#pragma unroll
      for (int j = 0; j < MOST; j++)
        if (j == i + pairs) v[j] = two;
    }
  }
  if (is_query) {
#pragma unroll
    for (int i = 0; i < MOST; i++)
      if (i * 32 < h.d) x[i * 32 + lane] = from_float<T>(v[i]);
    return;
  }
  const uint2 place = h.rows[row];
  if (place.y == 0) return;
  const uint32_t position = place.y - 1;
  const int64_t slot =
      static_cast<int64_t>(h.tables[place.x + position / h.page_tokens]) * h.page_tokens + position % h.page_tokens;
  const int kv_head = head - h.heads - (is_value ? h.kv_heads : 0);
  T *to = static_cast<T *>(is_value ? h.values : h.keys) + (slot * h.kv_heads + kv_head) * h.d;
#pragma unroll
  for (int i = 0; i < MOST; i++)
    if (i * 32 < h.d) to[i * 32 + lane] = from_float<T>(v[i]);
}

// Blocks for 16 of the ranks each.
unsigned rank_blocks(const LowRank &low) { return low.a ? (low.ranks + ROW_WARPS - 1) / ROW_WARPS : 1; }

template <typename R, typename T>
int norm(const Matrix &y, const Matrix &x, const float *weight, float eps, const LowRank &low, cudaStream_t stream) {
  const size_t bytes = low.a ? sizeof(T) * x.cols : 0;
  return launch_after(norm_kernel<R, T>, dim3(x.rows, rank_blocks(low)), ROW_THREADS, bytes, stream, y, x, weight, eps, low);
}

// Many rows share what is read of the `A`s.
template <typename T> int low(const Matrix &x, const LowRank &products, int parts, cudaStream_t stream) {
  const unsigned ranks = (products.ranks + THREADS / 32 - 1) / (THREADS / 32);
  if (x.rows < 16) return launch_after(low_kernel<T, 1>, dim3(x.rows, parts, ranks), THREADS, 0, stream, x, products);
  return launch_after(low_kernel<T, 4>, dim3((x.rows + 3) / 4, parts, ranks), THREADS, 0, stream, x, products);
}

} // namespace

extern "C" int trainer_decode_norm(Matrix y, Matrix x, const float *weight, float eps, const LowRank *products,
                                   cudaStream_t stream) {
  if (x.rows == 0) return 0;
  const LowRank &low = *products;
  const int type = activation_type(y);
  if (type == BF16 && x.dtype == BF16) return norm<__nv_bfloat16, __nv_bfloat16>(y, x, weight, eps, low, stream);
  if (type == F16 && x.dtype == F32) return norm<float, __half>(y, x, weight, eps, low, stream);
  if (type == BF16 && x.dtype == F32) return norm<float, __nv_bfloat16>(y, x, weight, eps, low, stream);
  if (type == F16 && x.dtype == F16) return norm<__half, __half>(y, x, weight, eps, low, stream);
  return static_cast<int>(cudaErrorInvalidValue);
}

extern "C" int trainer_decode_low(Matrix x, const LowRank *products, int32_t parts, cudaStream_t stream) {
  if (x.rows == 0 || products->ranks == 0) return 0;
  if (activation_type(x) == BF16) return low<__nv_bfloat16>(x, *products, parts, stream);
  if (activation_type(x) == F16) return low<__half>(x, *products, parts, stream);
  return static_cast<int>(cudaErrorInvalidValue);
}

extern "C" int trainer_decode_combine(const Combine *combine, cudaStream_t stream) {
  const Combine &c = *combine;
  if (c.out.rows == 0) return 0;
  const dim3 grid(c.out.rows, rank_blocks(c.low));
  const size_t bytes = static_cast<size_t>(c.out.cols) * 2;
  if (activation_type(c.out) == BF16) return launch_after(combine_kernel<__nv_bfloat16>, grid, ROW_THREADS, bytes, stream, c);
  if (activation_type(c.out) == F16) return launch_after(combine_kernel<__half>, grid, ROW_THREADS, bytes, stream, c);
  return static_cast<int>(cudaErrorInvalidValue);
}

extern "C" int trainer_decode_heads(const Heads *heads, cudaStream_t stream) {
  const Heads &h = *heads;
  if (h.qkv.rows == 0) return 0;
  const dim3 grid((h.heads + 2 * h.kv_heads + HEAD_WARPS - 1) / HEAD_WARPS, h.qkv.rows);
  if (h.qkv.dtype == BF16) return launch_after(heads_kernel<__nv_bfloat16>, grid, HEAD_WARPS * 32, 0, stream, h);
  if (h.qkv.dtype == F16) return launch_after(heads_kernel<__half>, grid, HEAD_WARPS * 32, 0, stream, h);
  return static_cast<int>(cudaErrorInvalidValue);
}
