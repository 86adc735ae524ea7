// Causal grouped-query attention over a ragged batch in f32 arithmetic: for f32, and for head sizes or strides that the
// tensor core kernels do not take. Any type, any alignment, heads of up to 256.
//
// Math and layout: as `attention_forward.cu` and `attention_backward.cu`; products are f32 multiply-adds, o and the
// running sum are rescaled at every step.
// Launch: a block of 128 threads for 16 rows (queries; keys for dk and dv) of a tile and head; it meets 8 rows of the
// other side at a time. Thread 8 r + c computes the score of row r with the other side's row c, then columns c, c + 8,
// ... of the result's row r. Both sides lie in shared memory as f32 rows of d + 1 values, so that the 8 rows a warp
// reads at one column lie in different banks.
// Bound: shared memory, two reads for each multiply-add.
#include "attention.cuh"

namespace attention {
namespace {

constexpr int ROWS = 16, OTHERS = 8, PLAIN_THREADS = ROWS * OTHERS, MAX_D = 256;
constexpr uint32_t ALL = 0xffffffffu;

template <typename T> struct Rows {
  const T *data;
  int64_t stride;
  __device__ Rows(const Matrix &m, int64_t column) : data(static_cast<const T *>(m.data) + column), stride(m.stride) {}
};

// Rows `first .. first + count` as f32; 0 from row `end` on.
template <typename T> __device__ void load_rows(float *to, Rows<T> from, int first, int count, int end, int d) {
  for (int i = threadIdx.x; i < count * d; i += PLAIN_THREADS) {
    int row = i / d, column = i % d;
    to[row * (d + 1) + column] = first + row < end ? to_float(from.data[(first + row) * from.stride + column]) : 0.0f;
  }
}

__device__ float dot(const float *x, const float *y, int d) {
  float sum = 0.0f;
  for (int i = 0; i < d; i++) sum = fmaf(x[i], y[i], sum);
  return sum;
}

// acc[i] += sum over j of the weight of lane j of this row times column `c + 8 i` of row j.
__device__ void add_rows(float (&acc)[MAX_D / OTHERS], float weight, const float *rows, int d) {
  int c = threadIdx.x % OTHERS;
#pragma unroll
  for (int j = 0; j < OTHERS; j++) {
    float w = __shfl_sync(ALL, weight, j, OTHERS);
#pragma unroll
    for (int i = 0; i < MAX_D / OTHERS; i++) {
      if (c + OTHERS * i < d) acc[i] = fmaf(w, rows[j * (d + 1) + c + OTHERS * i], acc[i]);
    }
  }
}

template <typename T>
__device__ void store_row(const Matrix &to, int row, int64_t column, const float (&acc)[MAX_D / OTHERS], float factor,
                          int d) {
  T *out = static_cast<T *>(to.data) + row * to.stride + column;
  int c = threadIdx.x % OTHERS;
#pragma unroll
  for (int i = 0; i < MAX_D / OTHERS; i++) {
    if (c + OTHERS * i < d) out[c + OTHERS * i] = from_float<T>(acc[i] * factor);
  }
}

struct Place {
  int tile, head, first; // the first row counts from the tile's start
};

__device__ Place place(int heads, int tile_rows) {
  int parts = tile_rows / ROWS, part = blockIdx.x % parts, rest = blockIdx.x / parts;
  return {rest / heads, rest % heads, part * ROWS};
}

template <typename T>
__global__ void __launch_bounds__(PLAIN_THREADS)
    plain_forward_kernel(Matrix o, float *lse, Matrix q, Matrix k, Matrix v, const QueryTile *tiles, Sizes sizes) {
  extern __shared__ __align__(16) float plain_shared[];
  const int d = sizes.d, r = threadIdx.x / OTHERS, c = threadIdx.x % OTHERS;
  const auto [tile_index, head, offset] = place(sizes.heads, QUERY_TILE);
  const QueryTile tile = tiles[tile_index];
  const int first = tile.start + offset, end = min(tile.end, first + ROWS), row = first + r;
  if (first >= end) return;
  float *queries = plain_shared, *keys = queries + ROWS * (d + 1), *values = keys + OTHERS * (d + 1);
  const int64_t column = static_cast<int64_t>(head) * d, kv_column = static_cast<int64_t>(head / sizes.group) * d;
  load_rows(queries, Rows<T>(q, column), first, ROWS, end, d);
  float acc[MAX_D / OTHERS] = {}, top = -INFINITY, sum = 0.0f;
  for (int part = 0; part < 2; part++) {
    const bool is_own = part == 1;
    const int begin = is_own ? tile.own_start : tile.prefix_start, stop = is_own ? end : tile.prefix_end;
    for (int key = begin; key < stop; key += OTHERS) {
      __syncthreads();
      load_rows(keys, Rows<T>(k, kv_column), key, OTHERS, stop, d);
      load_rows(values, Rows<T>(v, kv_column), key, OTHERS, stop, d);
      __syncthreads();
      bool is_seen = key + c < stop && (!is_own || key + c <= row);
      float s = is_seen ? dot(queries + r * (d + 1), keys + c * (d + 1), d) * sizes.scale : -INFINITY;
      float larger = s;
#pragma unroll
      for (int step = OTHERS / 2; step > 0; step /= 2) larger = fmaxf(larger, __shfl_xor_sync(ALL, larger, step));
      larger = fmaxf(larger, top);
      float factor = top == -INFINITY ? 0.0f : expf(top - larger), p = is_seen ? expf(s - larger) : 0.0f;
      top = larger;
      float added = p;
#pragma unroll
      for (int step = OTHERS / 2; step > 0; step /= 2) added += __shfl_xor_sync(ALL, added, step);
      sum = sum * factor + added;
#pragma unroll
      for (int i = 0; i < MAX_D / OTHERS; i++) acc[i] *= factor;
      add_rows(acc, p, values, d);
    }
  }
  if (row >= end) return;
  if (c == 0) lse[static_cast<int64_t>(head) * sizes.tokens + row] = top + logf(sum);
  store_row<T>(o, row, column, acc, 1.0f / sum, d);
}

// A warp for each token and head.
template <typename T> __global__ void plain_delta_kernel(float *delta, Matrix d_out, Matrix o, Sizes sizes) {
  int64_t at = (blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x) / 32;
  if (at >= static_cast<int64_t>(sizes.heads) * sizes.tokens) return;
  int64_t head = at / sizes.tokens, row = at % sizes.tokens;
  Rows<T> x(d_out, head * sizes.d), y(o, head * sizes.d);
  float sum = 0.0f;
  for (int i = threadIdx.x % 32; i < sizes.d; i += 32) {
    sum = fmaf(to_float(x.data[row * x.stride + i]), to_float(y.data[row * y.stride + i]), sum);
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) delta[at] = sum;
}

template <typename T>
__global__ void __launch_bounds__(PLAIN_THREADS)
    plain_queries_kernel(Matrix dq, Matrix d_out, Matrix q, Matrix k, Matrix v, const float *lse, const float *delta,
                         const QueryTile *tiles, Sizes sizes) {
  extern __shared__ __align__(16) float plain_shared[];
  const int d = sizes.d, r = threadIdx.x / OTHERS, c = threadIdx.x % OTHERS;
  const auto [tile_index, head, offset] = place(sizes.heads, QUERY_TILE);
  const QueryTile tile = tiles[tile_index];
  const int first = tile.start + offset, end = min(tile.end, first + ROWS), row = first + r;
  if (first >= end) return;
  float *queries = plain_shared, *d_outs = queries + ROWS * (d + 1);
  float *keys = d_outs + ROWS * (d + 1), *values = keys + OTHERS * (d + 1);
  const int64_t column = static_cast<int64_t>(head) * d, kv_column = static_cast<int64_t>(head / sizes.group) * d;
  load_rows(queries, Rows<T>(q, column), first, ROWS, end, d);
  load_rows(d_outs, Rows<T>(d_out, column), first, ROWS, end, d);
  const int64_t at = static_cast<int64_t>(head) * sizes.tokens + min(row, end - 1);
  const float row_lse = lse[at], row_delta = delta[at];
  float acc[MAX_D / OTHERS] = {};
  for (int part = 0; part < 2; part++) {
    const bool is_own = part == 1;
    const int begin = is_own ? tile.own_start : tile.prefix_start, stop = is_own ? end : tile.prefix_end;
    for (int key = begin; key < stop; key += OTHERS) {
      __syncthreads();
      load_rows(keys, Rows<T>(k, kv_column), key, OTHERS, stop, d);
      load_rows(values, Rows<T>(v, kv_column), key, OTHERS, stop, d);
      __syncthreads();
      float ds = 0.0f;
      if (key + c < stop && (!is_own || key + c <= row)) {
        float p = expf(dot(queries + r * (d + 1), keys + c * (d + 1), d) * sizes.scale - row_lse);
        ds = p * (dot(d_outs + r * (d + 1), values + c * (d + 1), d) - row_delta);
      }
      add_rows(acc, ds, keys, d);
    }
  }
  if (row < end) store_row<T>(dq, row, column, acc, sizes.scale, d);
}

template <typename T>
__global__ void __launch_bounds__(PLAIN_THREADS)
    plain_keys_kernel(Matrix dk, Matrix dv, Matrix d_out, Matrix q, Matrix k, Matrix v, const float *lse,
                      const float *delta, const KeyTile *tiles, const View *views, Sizes sizes) {
  extern __shared__ __align__(16) float plain_shared[];
  const int d = sizes.d, r = threadIdx.x / OTHERS, c = threadIdx.x % OTHERS;
  const auto [tile_index, kv_head, offset] = place(sizes.heads / sizes.group, KEY_TILE);
  const KeyTile tile = tiles[tile_index];
  const int first = tile.start + offset, end = min(tile.end, first + ROWS), key = first + r;
  if (first >= end) return;
  float *keys = plain_shared, *values = keys + ROWS * (d + 1);
  float *queries = values + ROWS * (d + 1), *d_outs = queries + OTHERS * (d + 1);
  const int64_t kv_column = static_cast<int64_t>(kv_head) * d;
  load_rows(keys, Rows<T>(k, kv_column), first, ROWS, end, d);
  load_rows(values, Rows<T>(v, kv_column), first, ROWS, end, d);
  float acc_k[MAX_D / OTHERS] = {}, acc_v[MAX_D / OTHERS] = {};
  for (int head = kv_head * sizes.group; head < (kv_head + 1) * sizes.group; head++) {
    const int64_t column = static_cast<int64_t>(head) * d;
    for (int index = tile.first_view; index < tile.end_view; index++) {
      const View view = views[index];
      if (view.key_end <= first) continue;
      for (int query = view.is_causal ? max(view.start, first) : view.start; query < view.end; query += OTHERS) {
        __syncthreads();
        load_rows(queries, Rows<T>(q, column), query, OTHERS, view.end, d);
        load_rows(d_outs, Rows<T>(d_out, column), query, OTHERS, view.end, d);
        __syncthreads();
        float p = 0.0f, ds = 0.0f;
        if (query + c < view.end && key < view.key_end && (!view.is_causal || key <= query + c)) {
          const int64_t at = static_cast<int64_t>(head) * sizes.tokens + query + c;
          p = expf(dot(queries + c * (d + 1), keys + r * (d + 1), d) * sizes.scale - lse[at]);
          ds = p * (dot(d_outs + c * (d + 1), values + r * (d + 1), d) - delta[at]);
        }
        add_rows(acc_v, p, d_outs, d);
        add_rows(acc_k, ds, queries, d);
      }
    }
  }
  if (key >= end) return;
  store_row<T>(dk, key, kv_column, acc_k, sizes.scale, d);
  store_row<T>(dv, key, kv_column, acc_v, 1.0f, d);
}

int plain_shared_bytes(int rows, int d) { return rows * (d + 1) * 4; }

} // namespace

int plain_forward(Matrix o, float *lse, Matrix q, Matrix k, Matrix v, const QueryTile *tiles, int num_tiles,
                  Sizes sizes, cudaStream_t stream) {
  if (sizes.d > MAX_D) return static_cast<int>(cudaErrorInvalidValue);
  int64_t blocks = static_cast<int64_t>(num_tiles) * sizes.heads * (QUERY_TILE / ROWS);
  int shared_bytes = plain_shared_bytes(ROWS + 2 * OTHERS, sizes.d);
  WITH_TYPE(q.dtype, T,
            return launch(plain_forward_kernel<T>, blocks, PLAIN_THREADS, shared_bytes, stream, o, lse, q, k, v, tiles,
                          sizes));
  return 0;
}

int plain_delta(float *delta, Matrix d_out, Matrix o, Sizes sizes, cudaStream_t stream) {
  int64_t blocks = (static_cast<int64_t>(sizes.heads) * sizes.tokens + 7) / 8;
  WITH_TYPE(o.dtype, T, return launch(plain_delta_kernel<T>, blocks, 256, 0, stream, delta, d_out, o, sizes));
  return 0;
}

int plain_backward_queries(Matrix dq, Matrix d_out, Matrix q, Matrix k, Matrix v, const float *lse, const float *delta,
                           const QueryTile *tiles, int num_tiles, Sizes sizes, cudaStream_t stream) {
  if (sizes.d > MAX_D) return static_cast<int>(cudaErrorInvalidValue);
  int64_t blocks = static_cast<int64_t>(num_tiles) * sizes.heads * (QUERY_TILE / ROWS);
  int shared_bytes = plain_shared_bytes(2 * ROWS + 2 * OTHERS, sizes.d);
  WITH_TYPE(q.dtype, T,
            return launch(plain_queries_kernel<T>, blocks, PLAIN_THREADS, shared_bytes, stream, dq, d_out, q, k, v, lse,
                          delta, tiles, sizes));
  return 0;
}

int plain_backward_keys(Matrix dk, Matrix dv, Matrix d_out, Matrix q, Matrix k, Matrix v, const float *lse,
                        const float *delta, const KeyTile *tiles, int num_tiles, const View *views, Sizes sizes,
                        cudaStream_t stream) {
  if (sizes.d > MAX_D) return static_cast<int>(cudaErrorInvalidValue);
  int64_t blocks = static_cast<int64_t>(num_tiles) * (sizes.heads / sizes.group) * (KEY_TILE / ROWS);
  int shared_bytes = plain_shared_bytes(2 * ROWS + 2 * OTHERS, sizes.d);
  WITH_TYPE(q.dtype, T,
            return launch(plain_keys_kernel<T>, blocks, PLAIN_THREADS, shared_bytes, stream, dk, dv, d_out, q, k, v,
                          lse, delta, tiles, views, sizes));
  return 0;
}

} // namespace attention
