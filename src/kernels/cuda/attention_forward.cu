// Causal grouped-query attention over a ragged batch, forward: o = softmax(q k^T / sqrt(d)) v, and the log-sum-exp.
//
// Math: FlashAttention-2 (2307.08691), algorithm 1: one pass over the keys with a running maximum and sum. The maximum
// that is subtracted lags behind the true one by at most 2^8 in the probabilities: o is rescaled only when a row's
// maximum grows by more than that, which changes nothing after the division by the sum. f32 sums, 16-bit probabilities.
// Layout: q, o [N, H d], k, v [N, K d] with any row stride; lse f32 [H, N].
// Launch: a block of 4 warps for each tile of 128 queries of one head, 32 rows a warp (so that each key or value
// fragment read from shared memory serves two products), heaviest tiles first; key tiles of 64 (32 where a
// multiprocessor has less than 200 KB of shared memory) in two buffers, the next filled while one is used.
// Bound: tensor cores, 4 d flops for each query, key and head.
#include "attention.cuh"

namespace attention {
namespace {

// What is faster on compute capability 9.0.
constexpr int HOPPER_FORWARD = WARP_GROUPS;

constexpr int FORWARD_THREADS = 128;

constexpr int forward_keys(int d, int capability) { return d == 64 || capability >= 90 ? 64 : 32; }
constexpr int forward_shared_bytes(int d, int keys) { return (QUERY_TILE + 4 * keys) * d * 2; }

// Whether this pass of the compiler builds the kernel for its architecture.
template <typename T, int D, int KEYS> __device__ constexpr bool is_forward_built() {
#ifdef __CUDA_ARCH__
  return KEYS == forward_keys(D, __CUDA_ARCH__ / 10) && is_multiplied<T>();
#else
  return false;
#endif
}

template <typename T, int D, int KEYS>
__global__ void __launch_bounds__(FORWARD_THREADS, 2)
    forward_kernel(Matrix o, float *lse, Matrix q, Matrix k, Matrix v, const QueryTile *tiles, Sizes sizes) {
  if constexpr (is_forward_built<T, D, KEYS>()) {
    constexpr int ROW = D * 2, STAGE = 2 * KEYS * ROW; // bytes
    extern __shared__ __align__(1024) uint8_t attention_shared[];
    const uint32_t q_tile = shared_address(attention_shared), stages = q_tile + QUERY_TILE * ROW;
    const int head = blockIdx.x % sizes.heads, d = sizes.d;
    const QueryTile tile = tiles[blockIdx.x / sizes.heads];
    const int column = head / sizes.group * d;
    const int prefix_count = ceil_div(tile.prefix_end - tile.prefix_start, KEYS);
    const int count = prefix_count + ceil_div(tile.end - tile.own_start, KEYS);

    // The key tiles: first those of the prefix, then those of the own segment up to the last query.
    auto first_key = [&](int j) {
      return j < prefix_count ? tile.prefix_start + j * KEYS : tile.own_start + (j - prefix_count) * KEYS;
    };
    auto load = [&](int j) {
      int thread = thread_anew();
      int64_t first = first_key(j);
      int rows = (j < prefix_count ? tile.prefix_end : tile.end) - static_cast<int>(first);
      uint32_t stage = stages + (j & 1) * STAGE;
      load_tile<T, KEYS, D, FORWARD_THREADS>(stage, static_cast<const T *>(k.data) + first * k.stride + column,
                                             k.stride, rows, d, thread);
      load_tile<T, KEYS, D, FORWARD_THREADS>(
          stage + KEYS * ROW, static_cast<const T *>(v.data) + first * v.stride + column, v.stride, rows, d, thread);
    };
    const T *queries = static_cast<const T *>(q.data) + tile.start * q.stride + head * d;
    load_tile<T, QUERY_TILE, D, FORWARD_THREADS>(q_tile, queries, q.stride, tile.end - tile.start, d, threadIdx.x);
    load(0);

    const float log2_scale = sizes.scale * LOG2_E, slack = 8.0f / log2_scale;
    const int warp_row = tile.start + threadIdx.x / 32 * 32;
    float out[2][D / 8][4] = {};
    // Row `8 i + g` of the warp: what is subtracted from its scores, and this lane's part of its sum.
    float shift[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY}, sum[4] = {};

#pragma unroll 1
    for (int j = 0; j < count; j++) {
      wait_for_copies();
      __syncthreads(); // tile j is there, and nobody reads tile j - 1 any more
      if (j + 1 < count) load(j + 1);
      const bool is_own = j >= prefix_count;
      const int first = first_key(j);
      if (warp_row >= tile.end || (is_own && first > warp_row + 31)) continue;
      const int lane = thread_anew() % 32, g = lane / 4, t = lane % 4;
      const uint32_t q_lane = q_tile + (warp_row - tile.start) * ROW + lane_by_rows<D>(lane);
      const uint32_t k_tile = stages + (j & 1) * STAGE, v_tile = k_tile + KEYS * ROW;

      float s[2][KEYS / 8][4] = {};
      multiply_rows<T, D>(s, q_lane, k_tile + lane_by_columns<D>(lane));

      const int end = is_own ? tile.end : tile.prefix_end;
      if (first + KEYS > end || (is_own && first + KEYS - 1 > warp_row)) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
          // The last key, counted from this lane's first, that the row sees.
          int last = (is_own ? min(end - 1, warp_row + 8 * i + g) : end - 1) - first - 2 * t;
#pragma unroll
          for (int n = 0; n < KEYS / 8; n++) {
            float *pair = &s[i / 2][n][i % 2 * 2];
            if (8 * n > last) pair[0] = -INFINITY;
            if (8 * n + 1 > last) pair[1] = -INFINITY;
          }
        }
      }

      float top[4];
      bool has_grown = false;
#pragma unroll
      for (int i = 0; i < 4; i++) {
        top[i] = -INFINITY;
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) {
          top[i] = fmaxf(top[i], fmaxf(s[i / 2][n][i % 2 * 2], s[i / 2][n][i % 2 * 2 + 1]));
        }
        top[i] = fmaxf(top[i], __shfl_xor_sync(0xffffffffu, top[i], 1));
        top[i] = fmaxf(top[i], __shfl_xor_sync(0xffffffffu, top[i], 2));
        has_grown |= top[i] > shift[i] + slack;
      }
      if (__any_sync(0xffffffffu, has_grown)) {
        // The first tile holds a key for every row, so that no shift stays infinite.
#pragma unroll
        for (int i = 0; i < 4; i++) {
          float larger = fmaxf(shift[i], top[i]), factor = exp2_fast((shift[i] - larger) * log2_scale);
          shift[i] = larger;
          sum[i] *= factor;
#pragma unroll
          for (int n = 0; n < D / 8; n++) {
            out[i / 2][n][i % 2 * 2] *= factor;
            out[i / 2][n][i % 2 * 2 + 1] *= factor;
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float shift2 = shift[i] * log2_scale;
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) {
          float *pair = &s[i / 2][n][i % 2 * 2];
          pair[0] = exp2_fast(fmaf(pair[0], log2_scale, -shift2));
          pair[1] = exp2_fast(fmaf(pair[1], log2_scale, -shift2));
          sum[i] += pair[0] + pair[1];
        }
      }
      uint32_t p[2][KEYS / 16][4];
      as_left<T>(p[0], s[0]);
      as_left<T>(p[1], s[1]);
      multiply_columns<T, D>(out, p, v_tile + lane_by_rows<D>(lane));
    }

    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    float factor[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], 1);
      sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], 2);
      factor[i] = 1.0f / sum[i];
      int row = warp_row + 8 * i + g;
      if (t == 0 && row < tile.end)
        lse[static_cast<int64_t>(head) * sizes.tokens + row] = shift[i] * sizes.scale + logf(sum[i]);
    }
    T *to = static_cast<T *>(o.data) + warp_row * o.stride + head * d;
    // Only this warp read these rows of the tile of queries.
    store_rows<T, D>(to, o.stride, tile.end - warp_row, d, out, factor, q_tile + (warp_row - tile.start) * ROW);
  }
}

template <typename T, int D, int KEYS>
int forward_tiles(Matrix o, float *lse, Matrix q, Matrix k, Matrix v, const QueryTile *tiles, int num_tiles,
                  Sizes sizes, cudaStream_t stream) {
  int64_t blocks = static_cast<int64_t>(num_tiles) * sizes.heads;
  return launch(forward_kernel<T, D, KEYS>, blocks, FORWARD_THREADS, forward_shared_bytes(D, KEYS), stream, o, lse, q,
                k, v, tiles, sizes);
}

template <typename T>
int forward(int capability, Matrix o, float *lse, Matrix q, Matrix k, Matrix v, const QueryTile *tiles, int num_tiles,
            Sizes sizes, cudaStream_t stream) {
  auto run = sizes.d <= 64                         ? forward_tiles<T, 64, 64>
             : forward_keys(128, capability) == 64 ? forward_tiles<T, 128, 64>
                                                   : forward_tiles<T, 128, 32>;
  return run(o, lse, q, k, v, tiles, num_tiles, sizes, stream);
}

} // namespace
} // namespace attention

extern "C" int trainer_attention_forward(Matrix o, float *lse, Matrix q, Matrix k, Matrix v,
                                         const attention::QueryTile *tiles, int32_t num_tiles, int32_t heads,
                                         int32_t kv_heads, int32_t variant, cudaStream_t stream) {
  using namespace attention;
  if (num_tiles == 0) return 0;
  Sizes sizes = sizes_of(q, heads, kv_heads);
  int capability = compute_capability();
  if (q.dtype == BF16 && capability < 80) return static_cast<int>(cudaErrorNotSupported);
  bool is_fast = fits_tiles(q, sizes.d) && fits_tiles(k, sizes.d) && fits_tiles(v, sizes.d) && fits_tiles(o, sizes.d);
  if (!is_fast || variant == PLAIN) return plain_forward(o, lse, q, k, v, tiles, num_tiles, sizes, stream);
  if (is_by_warp_groups(variant, HOPPER_FORWARD, capability)) {
    int code = warp_group_forward(o, lse, q, k, v, tiles, num_tiles, sizes, stream);
    if (code != static_cast<int>(cudaErrorNotSupported)) return code;
  }
  if (q.dtype == F16) return forward<__half>(capability, o, lse, q, k, v, tiles, num_tiles, sizes, stream);
  return forward<__nv_bfloat16>(capability, o, lse, q, k, v, tiles, num_tiles, sizes, stream);
}
