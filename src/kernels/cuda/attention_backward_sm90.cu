// Causal grouped-query attention over a ragged batch, backward, by Hopper's warp groups; math and layout as
// `attention_backward.cu`.
//
// Launch: blocks of two groups of 4 warps. dq: a block for each tile of 128 queries of one head, 64 rows a group, key
// tiles of 128 in two buffers. dk, dv: a block for each tile of 128 keys and key-value head, 64 keys a group, tiles of
// 64 queries in two buffers. A group's products are asynchronous: probabilities are made while do v^T is computed, ds
// while p^T do is, and the other group's products fill the gaps.
// Only sm_90a has these instructions; elsewhere the kernels are empty.
// Bound: tensor cores, 6 d flops (dq) and 8 d flops (dk, dv) for each query, key and head.
#include "attention_sm90.cuh"

namespace attention {
namespace {

constexpr int GROUP_QUERIES_KEYS = 128;
constexpr int group_queries_shared_bytes(int d) { return (2 * QUERY_TILE + 4 * GROUP_QUERIES_KEYS) * d * 2; }

template <typename T, int D>
__global__ void __launch_bounds__(GROUP_THREADS, 1)
    group_queries_kernel(Matrix dq, Matrix d_out, Matrix q, Matrix k, Matrix v, const float *lse, const float *delta,
                         const QueryTile *tiles, Sizes sizes) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  constexpr int KEYS = GROUP_QUERIES_KEYS, TILE = KEYS * D * 2; // bytes
  static_assert(QUERY_TILE == 2 * 64, "64 rows a group");
  extern __shared__ __align__(1024) uint8_t attention_shared[];
  const uint32_t q_tile = shared_address(attention_shared), d_out_tile = q_tile + QUERY_TILE * D * 2;
  const uint32_t stages = d_out_tile + QUERY_TILE * D * 2; // keys, then values
  const int head = blockIdx.x % sizes.heads, d = sizes.d, column = head / sizes.group * d;
  const QueryTile tile = tiles[blockIdx.x / sizes.heads];
  const int prefix_count = ceil_div(tile.prefix_end - tile.prefix_start, KEYS);
  const int count = prefix_count + ceil_div(tile.end - tile.own_start, KEYS);

  auto first_key = [&](int j) {
    return j < prefix_count ? tile.prefix_start + j * KEYS : tile.own_start + (j - prefix_count) * KEYS;
  };
  auto load = [&](int j) {
    int64_t first = first_key(j);
    int rows = (j < prefix_count ? tile.prefix_end : tile.end) - static_cast<int>(first);
    uint32_t stage = stages + (j & 1) * (2 * TILE);
    load_blocks<T, KEYS, D>(stage, static_cast<const T *>(k.data) + first * k.stride + column, k.stride, rows, d);
    load_blocks<T, KEYS, D>(stage + TILE, static_cast<const T *>(v.data) + first * v.stride + column, v.stride, rows,
                            d);
  };
  const int64_t start = tile.start;
  const T *queries = static_cast<const T *>(q.data) + start * q.stride + head * d;
  const T *d_outs = static_cast<const T *>(d_out.data) + start * d_out.stride + head * d;
  load_blocks<T, QUERY_TILE, D>(q_tile, queries, q.stride, tile.end - tile.start, d);
  load_blocks<T, QUERY_TILE, D>(d_out_tile, d_outs, d_out.stride, tile.end - tile.start, d);
  load(0);

  const float log2_scale = sizes.scale * LOG2_E;
  const int warp_row = tile.start + threadIdx.x / 32 * 16, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const uint32_t group_rows = threadIdx.x / 128 * (64 * 128);
  const bool is_used = tile.start + threadIdx.x / 128 * 64 < tile.end; // the group has rows
  float row_lse[2], row_delta[2]; // rows g and g + 8 of the warp; the first times log2 e
#pragma unroll
  for (int i = 0; i < 2; i++) {
    int row = warp_row + 8 * i + g;
    int64_t at = static_cast<int64_t>(head) * sizes.tokens + row;
    row_lse[i] = row < tile.end ? lse[at] * LOG2_E : 0.0f;
    row_delta[i] = row < tile.end ? delta[at] : 0.0f;
  }
  float out[D / 8][4] = {}, s[KEYS / 8][4], dp[KEYS / 8][4];
  uint32_t ds[KEYS / 16][4];

#pragma unroll 1
  for (int j = 0; j < count; j++) {
    wait_for_copies();
    group_publish();
    __syncthreads(); // tile j is there, and nobody reads tile j - 1 any more
    if (j + 1 < count) load(j + 1);
    if (!is_used) continue;
    const uint32_t k_tile = stages + (j & 1) * (2 * TILE), v_tile = k_tile + TILE;
    group_pin(s);
    group_pin(dp);
    group_fence();
    start_rows<T, D, QUERY_TILE>(s, q_tile + group_rows, k_tile);
    start_rows<T, D, QUERY_TILE>(dp, d_out_tile + group_rows, v_tile);
    group_wait<1>();
    group_pin(s);

    const bool is_own = j >= prefix_count;
    const int first = first_key(j), end = is_own ? tile.end : tile.prefix_end;
    if (first + KEYS > end || (is_own && first + KEYS - 1 > warp_row)) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        // The last key, counted from this lane's first, that the row sees.
        int last = (is_own ? min(end - 1, warp_row + 8 * i + g) : end - 1) - first - 2 * t;
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) {
          if (8 * n > last) s[n][2 * i] = -INFINITY;
          if (8 * n + 1 > last) s[n][2 * i + 1] = -INFINITY;
        }
      }
    }
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) s[n][i] = exp2_fast(fmaf(s[n][i], log2_scale, -row_lse[i / 2]));
    }
    group_wait<0>();
    group_pin(dp);
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) s[n][i] *= dp[n][i] - row_delta[i / 2];
    }
    as_left<T>(ds, s);
    group_pin(out);
    group_fence();
    start_columns<T>(out, ds, k_tile);
    group_wait<0>();
    group_pin(out);
  }

  const float factor[2] = {sizes.scale, sizes.scale};
  __syncthreads(); // the tile of queries holds the results now
  T *to = static_cast<T *>(dq.data) + warp_row * dq.stride + head * d;
  store_rows<T, D, 1>(to, dq.stride, tile.end - warp_row, d, reinterpret_cast<float (&)[1][D / 8][4]>(out), factor,
                      q_tile + (warp_row - tile.start) * (D * 2));
#endif
}

constexpr int GROUP_KEYS_QUERIES = 64;
constexpr int group_keys_shared_bytes(int d) {
  return 2 * KEY_TILE * d * 2 + 2 * (2 * GROUP_KEYS_QUERIES * d * 2 + 2 * GROUP_KEYS_QUERIES * 4);
}

template <typename T, int D>
__global__ void __launch_bounds__(GROUP_THREADS, 1)
    group_keys_kernel(Matrix dk, Matrix dv, Matrix d_out, Matrix q, Matrix k, Matrix v, const float *lse,
                      const float *delta, const KeyTile *tiles, const View *views, KeySplit split, Sizes sizes) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  constexpr int QUERIES = GROUP_KEYS_QUERIES, KEYS = KEY_TILE, TILE = QUERIES * D * 2; // bytes
  static_assert(KEY_TILE == 2 * 64, "64 keys a group");
  extern __shared__ __align__(1024) uint8_t attention_shared[];
  const uint32_t k_tile = shared_address(attention_shared), v_tile = k_tile + KEYS * D * 2;
  const uint32_t stages = v_tile + KEYS * D * 2; // queries, then gradients
  // For each stage: the log-sum-exps times log2 e, then the deltas.
  float *const row_values = reinterpret_cast<float *>(attention_shared + 2 * KEYS * D * 2 + 4 * TILE);
  const int kv_heads = sizes.heads / sizes.group, kv_head = blockIdx.x % kv_heads, d = sizes.d;
  const KeyPart part = find_part(split, blockIdx.x / kv_heads, sizes.group);
  if (part.index >= part.count) return;
  const KeyTile tile = tiles[part.tile];
  QueryWalk<QUERIES> walk(views, tiles + part.tile, part, tile.start, kv_head * sizes.group, sizes.group);

  auto load = [&](int stage) {
    const int64_t first = walk.row;
    const int rows = walk.view.end - walk.row, at = walk.head * d;
    uint32_t to = stages + stage * (2 * TILE);
    load_blocks<T, QUERIES, D>(to, static_cast<const T *>(q.data) + first * q.stride + at, q.stride, rows, d);
    load_blocks<T, QUERIES, D>(to + TILE, static_cast<const T *>(d_out.data) + first * d_out.stride + at, d_out.stride,
                               rows, d);
  };
  // This thread's lse or delta. An infinite lse makes the probabilities of rows that are not there 0.
  auto load_row_value = [&]() {
    int thread = thread_anew(), at = walk.row + thread % QUERIES;
    bool is_lse = thread < QUERIES, is_there = at < walk.view.end && thread < 2 * QUERIES;
    if (!is_there) return is_lse ? INFINITY : 0.0f;
    int64_t offset = static_cast<int64_t>(walk.head) * sizes.tokens + at;
    return is_lse ? lse[offset] * LOG2_E : delta[offset];
  };

  const int64_t first_key = tile.start;
  load_blocks<T, KEYS, D>(k_tile, static_cast<const T *>(k.data) + first_key * k.stride + kv_head * d, k.stride,
                          tile.end - tile.start, d);
  load_blocks<T, KEYS, D>(v_tile, static_cast<const T *>(v.data) + first_key * v.stride + kv_head * d, v.stride,
                          tile.end - tile.start, d);
  int stage = 0;
  float row_value = 0.0f;
  if (walk.left > 0) {
    load(0);
    row_value = load_row_value();
  }
  const float log2_scale = sizes.scale * LOG2_E;
  const int warp_key = tile.start + threadIdx.x / 32 * 16, group_key = tile.start + threadIdx.x / 128 * 64;
  const uint32_t group_rows = threadIdx.x / 128 * (64 * 128);
  float out_k[D / 8][4] = {}, out_v[D / 8][4] = {}, s[QUERIES / 8][4], dp[QUERIES / 8][4];
  uint32_t left[QUERIES / 16][4], d_left[QUERIES / 16][4];

#pragma unroll 1
  while (walk.left > 0) {
    if (threadIdx.x < 2 * QUERIES) row_values[stage * 2 * QUERIES + threadIdx.x] = row_value;
    wait_for_copies();
    group_publish();
    __syncthreads(); // this tile is there, and nobody reads the last one any more
    const int first_row = walk.row, key_end = walk.view.key_end;
    const bool is_causal = walk.view.is_causal != 0;
    walk.advance();
    if (walk.left > 0) {
      load(stage ^ 1);
      row_value = load_row_value();
    }
    const uint32_t q_tile = stages + stage * (2 * TILE), d_out_tile = q_tile + TILE;
    const int lane = thread_anew() % 32, g = lane / 4, t = lane % 4;
    const float *values = row_values + stage * 2 * QUERIES + 2 * t;
    stage ^= 1;
    if (group_key >= key_end || (is_causal && group_key > first_row + QUERIES - 1)) continue;

    group_pin(s);
    group_pin(dp);
    group_fence();
    start_rows<T, D, KEYS>(s, k_tile + group_rows, q_tile);
    start_rows<T, D, KEYS>(dp, v_tile + group_rows, d_out_tile);
    group_wait<1>();
    group_pin(s);
    if (is_causal ? warp_key + 15 > first_row : warp_key + 16 > key_end) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        int key = warp_key + 8 * i + g;
        // The first query, counted from this lane's first, that sees the key.
        int from = (is_causal ? key - first_row : key < key_end ? 0 : QUERIES) - 2 * t;
#pragma unroll
        for (int n = 0; n < QUERIES / 8; n++) {
          if (8 * n < from) s[n][2 * i] = -INFINITY;
          if (8 * n + 1 < from) s[n][2 * i + 1] = -INFINITY;
        }
      }
    }
#pragma unroll
    for (int n = 0; n < QUERIES / 8; n++) {
      float2 two = *reinterpret_cast<const float2 *>(values + 8 * n);
#pragma unroll
      for (int i = 0; i < 4; i++) s[n][i] = exp2_fast(fmaf(s[n][i], log2_scale, -(i % 2 ? two.y : two.x)));
    }
    as_left<T>(left, s);
    group_pin(out_v);
    group_fence();
    start_columns<T>(out_v, left, d_out_tile);
    group_wait<1>();
    group_pin(dp);
#pragma unroll
    for (int n = 0; n < QUERIES / 8; n++) {
      float2 two = *reinterpret_cast<const float2 *>(values + QUERIES + 8 * n);
#pragma unroll
      for (int i = 0; i < 4; i++) s[n][i] *= dp[n][i] - (i % 2 ? two.y : two.x);
    }
    as_left<T>(d_left, s);
    group_pin(out_k);
    group_fence();
    start_columns<T>(out_k, d_left, q_tile);
    group_wait<0>();
    group_pin(out_v);
    group_pin(out_k);
  }

  wait_for_copies();
  if (part.place >= 0) {
    float *to = part_sums(split, part, kv_heads, kv_head, d) + (warp_key - tile.start) * d;
    store_sums<D>(to, tile.end - warp_key, d, out_k);
    store_sums<D>(to + KEY_TILE * d, tile.end - warp_key, d, out_v);
    return;
  }
  __syncthreads(); // the tiles of keys and values hold the results now
  const uint32_t own_rows = (warp_key - tile.start) * (D * 2);
  const float scales[2] = {sizes.scale, sizes.scale}, ones[2] = {1.0f, 1.0f};
  T *to_k = static_cast<T *>(dk.data) + warp_key * dk.stride + kv_head * d;
  T *to_v = static_cast<T *>(dv.data) + warp_key * dv.stride + kv_head * d;
  store_rows<T, D, 1>(to_k, dk.stride, tile.end - warp_key, d, reinterpret_cast<float (&)[1][D / 8][4]>(out_k), scales,
                      k_tile + own_rows);
  store_rows<T, D, 1>(to_v, dv.stride, tile.end - warp_key, d, reinterpret_cast<float (&)[1][D / 8][4]>(out_v), ones,
                      v_tile + own_rows);
#endif
}

template <typename T, int D>
int group_queries(Matrix dq, Matrix d_out, Matrix q, Matrix k, Matrix v, const float *lse, const float *delta,
                  const QueryTile *tiles, int num_tiles, Sizes sizes, cudaStream_t stream) {
  if (!is_built(group_queries_kernel<T, D>)) return static_cast<int>(cudaErrorNotSupported);
  int64_t blocks = static_cast<int64_t>(num_tiles) * sizes.heads;
  return launch(group_queries_kernel<T, D>, blocks, GROUP_THREADS, group_queries_shared_bytes(D), stream, dq, d_out, q,
                k, v, lse, delta, tiles, sizes);
}

template <typename T, int D>
int group_keys(Matrix dk, Matrix dv, Matrix d_out, Matrix q, Matrix k, Matrix v, const float *lse, const float *delta,
               const KeyTile *tiles, const View *views, KeySplit split, Sizes sizes, cudaStream_t stream) {
  if (!is_built(group_keys_kernel<T, D>)) return static_cast<int>(cudaErrorNotSupported);
  int64_t blocks = static_cast<int64_t>(split.num_parts) * (sizes.heads / sizes.group);
  return launch(group_keys_kernel<T, D>, blocks, GROUP_THREADS, group_keys_shared_bytes(D), stream, dk, dv, d_out, q, k,
                v, lse, delta, tiles, views, split, sizes);
}

} // namespace

int warp_group_backward_queries(Matrix dq, Matrix d_out, Matrix q, Matrix k, Matrix v, const float *lse,
                                const float *delta, const QueryTile *tiles, int num_tiles, Sizes sizes,
                                cudaStream_t stream) {
  auto run = q.dtype == F16 ? (sizes.d <= 64 ? group_queries<__half, 64> : group_queries<__half, 128>)
                            : (sizes.d <= 64 ? group_queries<__nv_bfloat16, 64> : group_queries<__nv_bfloat16, 128>);
  return run(dq, d_out, q, k, v, lse, delta, tiles, num_tiles, sizes, stream);
}

int warp_group_backward_keys(Matrix dk, Matrix dv, Matrix d_out, Matrix q, Matrix k, Matrix v, const float *lse,
                             const float *delta, const KeyTile *tiles, const View *views, KeySplit split, Sizes sizes,
                             cudaStream_t stream) {
  auto run = q.dtype == F16 ? (sizes.d <= 64 ? group_keys<__half, 64> : group_keys<__half, 128>)
                            : (sizes.d <= 64 ? group_keys<__nv_bfloat16, 64> : group_keys<__nv_bfloat16, 128>);
  return run(dk, dv, d_out, q, k, v, lse, delta, tiles, views, split, sizes, stream);
}

} // namespace attention
