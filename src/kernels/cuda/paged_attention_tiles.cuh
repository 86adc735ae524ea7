// Attention over pages of 16-bit caches on tensor cores: see paged_attention.cu.
#pragma once

#include "paged_attention.cuh"

#ifdef __CUDACC__
namespace {

#if __CUDA_ARCH__ >= 800

__device__ __forceinline__ void copy_async(uint32_t to, const void *from, bool is_there) {
  int bytes = is_there ? 16 : 0; // the rest is filled with zeros
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
}

#endif

constexpr int TILE_KEYS = 64, TILE_ROWS = 64;

// Bytes of dynamic shared memory: two stages of keys and values, then their slots.
template <int D> constexpr int tile_bytes() { return 2 * 2 * TILE_KEYS * D * 2 + 2 * TILE_KEYS * 4; }

// A warp's 16 (token, head) pairs. A thread has two of them, `lane / 4` and that plus 8.
template <int D> struct Accumulator {
  float o[D / 8][4];
  float maximum[2], sum[2];
};

#if __CUDA_ARCH__ >= 800

// Takes in `16 * BLOCKS` keys that lie in shared memory from row `row0` on; the first is key `key0` of the sequence.
template <typename T, int D, int BLOCKS>
__device__ __forceinline__ void take_keys(Accumulator<D> &acc, const uint32_t (&q)[D / 16][4], uint32_t keys,
                                          uint32_t values, int row0, int key0, const int (&limit)[2], bool is_masked,
                                          float scale_log2) {
  int lane = threadIdx.x % 32, matrix = lane / 8, line = lane % 8;
  float s[BLOCKS * 2][4];
#pragma unroll
  for (int i = 0; i < BLOCKS * 2; i++) s[i][0] = s[i][1] = s[i][2] = s[i][3] = 0.0f;
#pragma unroll
  for (int step = 0; step < D / 16; step++) {
#pragma unroll
    for (int block = 0; block < BLOCKS; block++) {
      // 8 keys x 8 dims each: (keys 0-7, dims 0-7), (0-7, 8-15), (8-15, 0-7), (8-15, 8-15)
      int row = row0 + block * 16 + matrix / 2 * 8 + line, chunk = step * 2 + matrix % 2;
      uint32_t b[4];
      load_matrices(b, keys + row * (D * 2) + ((chunk ^ (row & 7)) * 16));
      multiply<T>(s[block * 2], q[step], b[0], b[1]);
      multiply<T>(s[block * 2 + 1], q[step], b[2], b[3]);
    }
  }
  float top[2] = {acc.maximum[0], acc.maximum[1]};
#pragma unroll
  for (int i = 0; i < BLOCKS * 2; i++) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      s[i][j] *= scale_log2;
      if (is_masked && key0 + i * 8 + lane % 4 * 2 + j % 2 >= limit[j / 2]) s[i][j] = -INFINITY;
      top[j / 2] = fmaxf(top[j / 2], s[i][j]);
    }
  }
  float base[2];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    top[r] = fmaxf(top[r], __shfl_xor_sync(0xffffffffu, top[r], 1));
    top[r] = fmaxf(top[r], __shfl_xor_sync(0xffffffffu, top[r], 2));
    base[r] = top[r] == -INFINITY ? 0.0f : top[r];
    float shrink = exp2_fast(acc.maximum[r] - base[r]);
    acc.maximum[r] = top[r];
    acc.sum[r] *= shrink;
#pragma unroll
    for (int i = 0; i < D / 8; i++) {
      acc.o[i][r * 2] *= shrink;
      acc.o[i][r * 2 + 1] *= shrink;
    }
  }
#pragma unroll
  for (int i = 0; i < BLOCKS * 2; i++) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      s[i][j] = exp2_fast(s[i][j] - base[j / 2]);
      acc.sum[j / 2] += s[i][j];
    }
  }
#pragma unroll
  for (int block = 0; block < BLOCKS; block++) {
    const float(&left)[4] = s[block * 2], (&right)[4] = s[block * 2 + 1];
    uint32_t p[4] = {pack_pair<T>(left[0], left[1]), pack_pair<T>(left[2], left[3]), pack_pair<T>(right[0], right[1]),
                     pack_pair<T>(right[2], right[3])};
#pragma unroll
    for (int step = 0; step < D / 16; step++) {
      // 8 keys x 8 dims each, transposed: (keys 0-7, dims 0-7), (8-15, 0-7), (0-7, 8-15), (8-15, 8-15)
      int row = row0 + block * 16 + matrix % 2 * 8 + line, chunk = step * 2 + matrix / 2;
      uint32_t b[4];
      load_matrices_transposed(b, values + row * (D * 2) + ((chunk ^ (row & 7)) * 16));
      multiply<T>(acc.o[step * 2], p, b[0], b[1]);
      multiply<T>(acc.o[step * 2 + 1], p, b[2], b[3]);
    }
  }
}

#endif

#if __CUDA_ARCH__ >= 800

// Rows of a tile: neighbours, each of which sees a key more, or those of a piece, which see all keys of its part.
struct Neighbours {
  int64_t row0;
  int context0;

  __device__ __forceinline__ int64_t row(const Attention &, int token) const { return row0 + token; }
  __device__ __forceinline__ int context(int token, int) const { return context0 + token; }
};
struct Members {
  Piece piece;

  __device__ __forceinline__ int64_t row(const Attention &a, int token) const { return piece.member(a, token); }
  __device__ __forceinline__ int context(int, int end) const { return end; } // of it no more is asked
};

struct TileWork {
  uint32_t table;
  int split, start, end, tokens;
  int unmasked; // keys below this are seen by all rows
  int kv_head, head0, heads;
};

// Attention of a tile over keys `start` to `end`. `ready` is called when nothing but keys before `old` was read.
template <typename T, int D, bool IS_LISTED, typename Rows, typename Ready>
__device__ __forceinline__ void attend_tile(const Attention &a, unsigned char *shared, const TileWork &work, Rows rows,
                                            int old, Ready ready) {
  constexpr int STAGE = TILE_KEYS * D * 2; // bytes of a stage's keys, and of its values
  uint32_t *slots = reinterpret_cast<uint32_t *>(shared + 4 * STAGE);
  uint32_t shared_at = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int start = work.start, end = work.end, heads = work.heads, head0 = work.head0, kv_head = work.kv_head;
  const int num_tiles = max(0, (end - start + TILE_KEYS - 1) / TILE_KEYS), pairs = work.tokens * heads;
  const bool is_narrow = pairs <= 16;
  const int pair0 = is_narrow ? 0 : warp * 16;

  // The slot of key `threadIdx.x` of a tile; fewer threads have one than there are.
  auto slot_of = [&](int index) -> uint32_t {
    int key = start + index * TILE_KEYS + threadIdx.x;
    if (threadIdx.x >= TILE_KEYS || key >= end) return NO_SLOT;
    return a.tables[work.table + key / a.page_tokens] * a.page_tokens + key % a.page_tokens;
  };
  auto load_tile = [&](int stage) {
    constexpr int CHUNKS = D / 8;
#pragma unroll
    for (int i = 0; i < TILE_KEYS * CHUNKS / THREADS; i++) {
      int key = (i * THREADS + threadIdx.x) / CHUNKS, chunk = threadIdx.x % CHUNKS;
      uint32_t slot = slots[stage * TILE_KEYS + key];
      bool is_there = slot != NO_SLOT;
      int64_t from = ((is_there ? slot : 0) * static_cast<int64_t>(a.kv_heads) + kv_head) * D + chunk * 8;
      uint32_t to = shared_at + stage * 2 * STAGE + key * (D * 2) + ((chunk ^ (key & 7)) * 16);
      copy_async(to, static_cast<const T *>(a.keys) + from, is_there);
      copy_async(to + STAGE, static_cast<const T *>(a.values) + from, is_there);
    }
    copy_commit();
  };

  if (threadIdx.x < TILE_KEYS) {
    slots[threadIdx.x] = slot_of(0);
    slots[TILE_KEYS + threadIdx.x] = slot_of(1);
  }
  __syncthreads();
  const bool is_early = min(end, start + TILE_KEYS) <= old;
  if (!is_early) ready();
  if (num_tiles > 0) load_tile(0);
  if (is_early) ready();

  // Queries as the left operand: rows `lane / 4` and that plus 8, dims in pairs.
  uint32_t q[D / 16][4];
  int limit[2];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    int pair = pair0 + lane / 4 + r * 8;
    bool is_there = pair < pairs;
    int token = is_there ? pair / heads : 0, head = is_there ? pair % heads : 0;
    limit[r] = is_there ? min(end, rows.context(token, end)) : 0;
    int64_t at = rows.row(a, token) * a.q.stride + static_cast<int64_t>(head0 + head) * D + lane % 4 * 2;
    if (IS_LISTED || a.q_is_direct) {
      const T *two = static_cast<const T *>(a.q.data) + at;
#pragma unroll
      for (int i = 0; i < D / 8; i++) q[i / 2][i % 2 * 2 + r] = is_there ? *reinterpret_cast<const uint32_t *>(two + i * 8) : 0;
    } else {
#pragma unroll
      for (int i = 0; i < D / 8; i++) {
        float x = is_there ? load_any(a.q.data, a.q.dtype, at + i * 8) : 0.0f;
        float y = is_there ? load_any(a.q.data, a.q.dtype, at + i * 8 + 1) : 0.0f;
        q[i / 2][i % 2 * 2 + r] = pack_pair<T>(x, y);
      }
    }
  }

  Accumulator<D> acc;
#pragma unroll
  for (int i = 0; i < D / 8; i++) acc.o[i][0] = acc.o[i][1] = acc.o[i][2] = acc.o[i][3] = 0.0f;
  acc.maximum[0] = acc.maximum[1] = -INFINITY;
  acc.sum[0] = acc.sum[1] = 0.0f;

  for (int i = 0; i < num_tiles; i++) {
    uint32_t next = slot_of(i + 2);
    if (i + 1 < num_tiles) {
      load_tile((i + 1) % 2);
      copy_wait<1>();
    } else {
      copy_wait<0>();
    }
    __syncthreads();
    uint32_t keys = shared_at + i % 2 * 2 * STAGE, values = keys + STAGE;
    int key0 = start + i * TILE_KEYS;
    bool is_masked = key0 + TILE_KEYS > work.unmasked;
    if (is_narrow) {
      take_keys<T, D, 1>(acc, q, keys, values, warp * 16, key0 + warp * 16, limit, is_masked, a.scale_log2);
    } else if (pair0 < pairs) {
#pragma unroll 1
      for (int at = 0; at < TILE_KEYS; at += 32)
        take_keys<T, D, 2>(acc, q, keys, values, at, key0 + at, limit, is_masked, a.scale_log2);
    }
    if (threadIdx.x < TILE_KEYS) slots[i % 2 * TILE_KEYS + threadIdx.x] = next;
    __syncthreads();
  }

#pragma unroll
  for (int r = 0; r < 2; r++) {
    acc.sum[r] += __shfl_xor_sync(0xffffffffu, acc.sum[r], 1);
    acc.sum[r] += __shfl_xor_sync(0xffffffffu, acc.sum[r], 2);
  }
  // The warps' 16 rows of sums each, in the place of the stages, which are free. Loops that are short as code: a block goes through
  // them once, and instructions come from memory too.
  constexpr int STEP = D + 8;
  float *parts = reinterpret_cast<float *>(shared);
  float2 *sums = reinterpret_cast<float2 *>(parts + WARPS * 16 * STEP);
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int own = warp * 16 + lane / 4 + r * 8;
#pragma unroll
    for (int i = 0; i < D / 8; i++) {
      float2 two = make_float2(acc.o[i][r * 2], acc.o[i][r * 2 + 1]);
      *reinterpret_cast<float2 *>(parts + own * STEP + i * 8 + lane % 4 * 2) = two;
    }
    if (lane % 4 == 0) sums[own] = make_float2(acc.maximum[r], acc.sum[r]);
  }
  __syncthreads();
  constexpr int N = 4;
#pragma unroll 1
  for (int i = threadIdx.x; i < pairs * (D / N); i += THREADS) {
    const int pair = i / (D / N), col = i % (D / N) * N, token = pair / heads;
    const int context = rows.context(token, end);
    if (!has_part(a, context, work.split)) continue;
    float2 all = sums[pair];
    float x[N];
    load_pack<float, N>(x, parts + pair * STEP + col);
    if (is_narrow) {
      // Each warp has some of the keys: added in the order of the warps.
      float top = -INFINITY;
#pragma unroll
      for (int w = 0; w < WARPS; w++) top = fmaxf(top, sums[w * 16 + pair].x);
      const float base = top == -INFINITY ? 0.0f : top;
      all = make_float2(top, 0.0f);
#pragma unroll
      for (int j = 0; j < N; j++) x[j] = 0.0f;
#pragma unroll
      for (int w = 0; w < WARPS; w++) {
        const float2 part = sums[w * 16 + pair];
        const float weight = exp2_fast(part.x - base);
        float more[N];
        load_pack<float, N>(more, parts + (w * 16 + pair) * STEP + col);
        all.y += weight * part.y;
#pragma unroll
        for (int j = 0; j < N; j++) x[j] += weight * more[j];
      }
    }
    const int64_t row = rows.row(a, token);
    const int head = head0 + pair % heads;
    put(a, row, head, context, work.split, col, all.y, x);
    if (col == 0 && has_parts(a, context)) split_sums(a)[split_index(a, row, head, work.split)] = all;
  }
}

#endif

template <typename T, int D> __global__ void __launch_bounds__(THREADS, RESIDENT) attend_tiles(Attention a) {
#if __CUDA_ARCH__ >= 800
  extern __shared__ __align__(128) unsigned char shared[];
  int lane = threadIdx.x % 32, split = blockIdx.y;
  launch_dependents();
  wait_for_dependency();
  int blocks_per_row = a.kv_heads * a.head_tiles;
  int64_t row0 = blockIdx.x / blocks_per_row;
  int kv_head = blockIdx.x % blocks_per_row / a.head_tiles, tile = blockIdx.x % a.head_tiles;
  int group = a.heads / a.kv_heads;

  // The tile's rows: neighbours in one sequence, up to a position that is a multiple of the tile's tokens.
  int max_tokens = TILE_ROWS / a.head_tile;
  uint2 first = a.rows[row0];
  auto continues = [&](uint2 row, int distance) {
    return row.x == first.x && row.y == first.y + distance && (row.y - 1) % max_tokens != 0;
  };
  if (row0 > 0 && first.y > 0 && (first.y - 1) % max_tokens != 0) {
    uint2 before = a.rows[row0 - 1];
    if (before.x == first.x && before.y + 1 == first.y) return;
  }
  int tokens = 0;
  for (int from = 0; from < max_tokens; from += 32) {
    int at = from + lane;
    bool is_in = at == 0 || (at < max_tokens && row0 + at < a.q.rows && continues(a.rows[row0 + at], at));
    uint32_t missing = ~__ballot_sync(0xffffffffu, is_in);
    if (missing != 0) {
      tokens = from + __ffs(missing) - 1;
      break;
    }
    tokens = from + 32;
  }
  int last = static_cast<int>(first.y) + tokens - 1; // keys that the last row sees
  int64_t start = static_cast<int64_t>(split) * a.split_keys;
  if (split > 0 && start >= last) return;
  int end = static_cast<int>(min(static_cast<int64_t>(last), start + a.split_keys));
  int head0 = kv_head * group + tile * a.head_tile, heads = min(a.head_tile, group - tile * a.head_tile);
  TileWork work{first.x, split, static_cast<int>(start), end, tokens, min(end, static_cast<int>(first.y)), kv_head, head0, heads};
  attend_tile<T, D, false>(a, shared, work, Neighbours{row0, static_cast<int>(first.y)}, 0, [] {});
#endif
}

// The pieces of a list. Which there are and how long contexts are was written before this step began, and keys before a context's
// last one were, too: all of that is read while the kernel before this one ends.
template <typename T, int D> __global__ void __launch_bounds__(THREADS, RESIDENT) attend_pieces(Attention a) {
#if __CUDA_ARCH__ >= 800
  extern __shared__ __align__(128) unsigned char shared[];
  launch_dependents();
  const int blocks_per_piece = a.kv_heads * a.head_tiles, group = a.heads / a.kv_heads;
  const int64_t all = static_cast<int64_t>(a.pieces[0]) * blocks_per_piece;
  bool has_waited = false;
  auto wait = [&] {
    if (!has_waited) wait_for_dependency();
    has_waited = true;
  };
  for (int64_t at = blockIdx.x; at < all; at += gridDim.x) {
    const Piece piece = piece_of(a, at / blocks_per_piece);
    const int kv_head = static_cast<int>(at % blocks_per_piece) / a.head_tiles, tile = static_cast<int>(at % a.head_tiles);
    const int head0 = kv_head * group + tile * a.head_tile, heads = min(a.head_tile, group - tile * a.head_tile);
    const int context = static_cast<int>(a.rows[piece.row].y), split = piece.split(), start = split * a.split_keys;
    if (start >= context || split >= a.splits) continue; // nothing yet, or longer than was asked for
    const int end = min(context, start + a.split_keys);
    const TileWork work{piece.table, split, start, end, piece.count(), end, kv_head, head0, heads};
    attend_tile<T, D, true>(a, shared, work, Members{piece}, context - 1, wait);
    __syncthreads(); // shared memory is free
  }
  wait();
#endif
}

} // namespace
#endif
