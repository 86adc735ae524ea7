// Causal grouped-query attention over a ragged batch, forward, by Hopper's warp groups; math and layout as
// `attention_forward.cu`.
//
// Launch: a block of two groups of 4 warps for each tile of 128 queries of one head, 64 rows a group; key tiles of 128
// in two buffers, values alike. While a group's probabilities of tile j are multiplied with the values, its scores of
// tile j + 1 become probabilities: both products are asynchronous, and the other group's fill the gaps.
// Only sm_90a has these instructions; elsewhere the kernel is empty.
// Bound: tensor cores, 4 d flops for each query, key and head.
#include "attention_sm90.cuh"

namespace attention {
namespace {

constexpr int GROUP_KEYS = 128;
constexpr int group_shared_bytes(int d) { return (QUERY_TILE + 4 * GROUP_KEYS) * d * 2; }

template <typename T, int D>
__global__ void __launch_bounds__(GROUP_THREADS, 1)
    group_forward_kernel(Matrix o, float *lse, Matrix q, Matrix k, Matrix v, const QueryTile *tiles, Sizes sizes) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  constexpr int KEYS = GROUP_KEYS, TILE = KEYS * D * 2; // bytes
  static_assert(QUERY_TILE == 2 * 64, "64 rows a group");
  extern __shared__ __align__(1024) uint8_t attention_shared[];
  const uint32_t q_tile = shared_address(attention_shared), k_tiles = q_tile + QUERY_TILE * D * 2;
  const uint32_t v_tiles = k_tiles + 2 * TILE;
  const int head = blockIdx.x % sizes.heads, d = sizes.d, column = head / sizes.group * d;
  const QueryTile tile = tiles[blockIdx.x / sizes.heads];
  const int prefix_count = ceil_div(tile.prefix_end - tile.prefix_start, KEYS);
  const int count = prefix_count + ceil_div(tile.end - tile.own_start, KEYS);

  auto first_key = [&](int j) {
    return j < prefix_count ? tile.prefix_start + j * KEYS : tile.own_start + (j - prefix_count) * KEYS;
  };
  auto load = [&](uint32_t buffers, const Matrix &m, int j) {
    int64_t first = first_key(j);
    int rows = (j < prefix_count ? tile.prefix_end : tile.end) - static_cast<int>(first);
    load_blocks<T, KEYS, D>(buffers + (j & 1) * TILE, static_cast<const T *>(m.data) + first * m.stride + column,
                            m.stride, rows, d);
  };
  const T *queries = static_cast<const T *>(q.data) + tile.start * q.stride + head * d;
  load_blocks<T, QUERY_TILE, D>(q_tile, queries, q.stride, tile.end - tile.start, d);
  load(k_tiles, k, 0);

  const float log2_scale = sizes.scale * LOG2_E, slack = 8.0f / log2_scale;
  const int warp_row = tile.start + threadIdx.x / 32 * 16, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const bool is_used = tile.start + threadIdx.x / 128 * 64 < tile.end; // the group has rows
  const uint32_t q_rows = q_tile + threadIdx.x / 128 * (64 * 128);     // the group's
  float out[D / 8][4] = {}, s[KEYS / 8][4];
  uint32_t p[KEYS / 16][4];
  float shift[2] = {-INFINITY, -INFINITY}, sum[2] = {}; // of rows g and g + 8 of the warp

  auto start_scores = [&](int j) { start_rows<T, D, QUERY_TILE>(s, q_rows, k_tiles + (j & 1) * TILE); };
  auto start_values = [&](int j) { start_columns<T>(out, p, v_tiles + (j & 1) * TILE); };
  auto mask = [&](int j) {
    const bool is_own = j >= prefix_count;
    const int first = first_key(j), end = is_own ? tile.end : tile.prefix_end;
    if (first + KEYS <= end && (!is_own || first + KEYS - 1 <= warp_row)) return;
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
  };
  // Turns scores into probabilities; `factor` is what older sums are to be multiplied with. Returns whether any is
  // not 1.
  auto soften = [&](float (&factor)[2]) {
    float top[2];
    bool has_grown = false;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      top[i] = fmaxf(s[0][2 * i], s[0][2 * i + 1]);
#pragma unroll
      for (int n = 1; n < KEYS / 8; n++) top[i] = fmaxf(top[i], fmaxf(s[n][2 * i], s[n][2 * i + 1]));
      top[i] = fmaxf(top[i], __shfl_xor_sync(0xffffffffu, top[i], 1));
      top[i] = fmaxf(top[i], __shfl_xor_sync(0xffffffffu, top[i], 2));
      has_grown |= top[i] > shift[i] + slack;
      factor[i] = 1.0f;
    }
    has_grown = __any_sync(0xffffffffu, has_grown) != 0;
    if (has_grown) {
      // The first tile holds a key for every row, so that no shift stays infinite.
#pragma unroll
      for (int i = 0; i < 2; i++) {
        float larger = fmaxf(shift[i], top[i]);
        factor[i] = exp2_fast((shift[i] - larger) * log2_scale);
        shift[i] = larger;
        sum[i] *= factor[i];
      }
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float shift2 = shift[i] * log2_scale;
#pragma unroll
      for (int n = 0; n < KEYS / 8; n++) {
        s[n][2 * i] = exp2_fast(fmaf(s[n][2 * i], log2_scale, -shift2));
        s[n][2 * i + 1] = exp2_fast(fmaf(s[n][2 * i + 1], log2_scale, -shift2));
        sum[i] += s[n][2 * i] + s[n][2 * i + 1];
      }
    }
    return has_grown;
  };

  wait_for_copies();
  group_publish();
  __syncthreads();
  if (count > 1) load(k_tiles, k, 1);
  load(v_tiles, v, 0);
  float factor[2];
  if (is_used) {
    group_pin(s);
    group_fence();
    start_scores(0);
    group_wait<0>();
    group_pin(s);
    mask(0);
    soften(factor); // nothing is summed yet
    as_left<T>(p, s);
  }

#pragma unroll 1
  for (int j = 0; j + 1 < count; j++) {
    wait_for_copies();
    group_publish();
    __syncthreads(); // keys j + 1 and values j are there; nobody reads keys j and values j - 1 any more
    if (j + 2 < count) load(k_tiles, k, j + 2);
    load(v_tiles, v, j + 1);
    if (!is_used) continue;
    group_pin(s);
    group_pin(out);
    group_fence();
    start_scores(j + 1);
    start_values(j);
    group_wait<1>();
    group_pin(s);
    mask(j + 1);
    const bool is_rescaled = soften(factor);
    group_wait<0>();
    group_pin(out);
    if (is_rescaled) {
#pragma unroll
      for (int n = 0; n < D / 8; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) out[n][i] *= factor[i / 2];
      }
    }
    as_left<T>(p, s);
  }
  wait_for_copies();
  group_publish();
  __syncthreads();
  if (!is_used) return;
  group_pin(out);
  group_fence();
  start_values(count - 1);
  group_wait<0>();
  group_pin(out);

#pragma unroll
  for (int i = 0; i < 2; i++) {
    sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], 1);
    sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], 2);
    factor[i] = 1.0f / sum[i];
    int row = warp_row + 8 * i + g;
    if (t == 0 && row < tile.end) {
      lse[static_cast<int64_t>(head) * sizes.tokens + row] = shift[i] * sizes.scale + logf(sum[i]);
    }
  }
  T *to = static_cast<T *>(o.data) + warp_row * o.stride + head * d;
  // The last scores are older than the last barrier: nobody reads the queries any more.
  store_rows<T, D, 1>(to, o.stride, tile.end - warp_row, d, reinterpret_cast<float (&)[1][D / 8][4]>(out), factor,
                      q_tile + (warp_row - tile.start) * (D * 2));
#endif
}

template <typename T, int D>
int group_forward(Matrix o, float *lse, Matrix q, Matrix k, Matrix v, const QueryTile *tiles, int num_tiles,
                  Sizes sizes, cudaStream_t stream) {
  if (!is_built(group_forward_kernel<T, D>)) return static_cast<int>(cudaErrorNotSupported);
  int64_t blocks = static_cast<int64_t>(num_tiles) * sizes.heads;
  return launch(group_forward_kernel<T, D>, blocks, GROUP_THREADS, group_shared_bytes(D), stream, o, lse, q, k, v,
                tiles, sizes);
}

} // namespace

int warp_group_forward(Matrix o, float *lse, Matrix q, Matrix k, Matrix v, const QueryTile *tiles, int num_tiles,
                       Sizes sizes, cudaStream_t stream) {
  auto run = q.dtype == F16 ? (sizes.d <= 64 ? group_forward<__half, 64> : group_forward<__half, 128>)
                            : (sizes.d <= 64 ? group_forward<__nv_bfloat16, 64> : group_forward<__nv_bfloat16, 128>);
  return run(o, lse, q, k, v, tiles, num_tiles, sizes, stream);
}

} // namespace attention
