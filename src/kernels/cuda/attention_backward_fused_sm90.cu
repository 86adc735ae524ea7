// Causal grouped-query attention over a ragged batch, backward, all of dq, dk and dv in one kernel by Hopper's warp
// groups; math and layout as `attention_backward.cu`.
//
// The probabilities and ds are made once, so that there are 5 products instead of 7. dk and dv have one owner, a tile
// of keys; dq gets a part from every tile of keys, added in f32 in an order that varies: the last bits vary too.
// Launch: a block of three groups of 4 warps for each tile of 128 keys and key-value head, tiles of 64 queries in three
// buffers, which the third group fills. The other two own 64 keys each. They leave the transposed ds, A operands in
// registers for dk, in shared memory too: each group makes half of the columns of dq from all keys of the tile. They
// wait for each other only there (and at the start and the end), and ds have two buffers, so that one's arithmetic runs
// beside the other's products.
// A second kernel turns the sums of dq into 16-bit rows.
// Only sm_90a has these instructions; elsewhere the kernel is empty.
// Bound: shared memory, 384 KB for each tile of queries and keys, a fifth more than the tensor cores take for their
// 10 d flops for each query, key and head.
#include "attention_sm90.cuh"

namespace attention {
namespace {

constexpr int FUSED_QUERIES = 64, FUSED_STAGES = 3, FUSED_D = 128;
constexpr int FUSED_THREADS = GROUP_THREADS + 128; // the last group loads

// Tiles of queries that are remembered: those in the buffers and the one whose dq is added.
constexpr int FUSED_FOUND = 4;

// A tile of queries as the loop needs it.
struct alignas(16) FusedTile {
  int32_t row, rows, head;
  int32_t visible; // keys of the tile that its queries see; less than 0: causal, -1 - (row - the tile's first key)
};

constexpr int FUSED_TILE_BYTES = FUSED_QUERIES * FUSED_D * 2;
constexpr int FUSED_KEYS_BYTES = KEY_TILE * FUSED_D * 2;
constexpr int FUSED_DS_BYTES = KEY_TILE * FUSED_QUERIES * 2;
constexpr int FUSED_STAGING_BYTES = FUSED_QUERIES * FUSED_D * 4;
constexpr int FUSED_VALUES_BYTES = 2 * FUSED_QUERIES * 4;
constexpr int FUSED_BARRIERS = 2 * FUSED_STAGES + 2;
constexpr int FUSED_STATE_BYTES = (FUSED_FOUND + 2) * 16 + 4 * sizeof(QueryWalk<FUSED_QUERIES>) + FUSED_BARRIERS * 8;
constexpr int FUSED_SHARED_BYTES = 2 * FUSED_KEYS_BYTES + 2 * FUSED_STAGES * FUSED_TILE_BYTES + 2 * FUSED_DS_BYTES +
                                   FUSED_STAGING_BYTES + FUSED_STAGES * FUSED_VALUES_BYTES + FUSED_STATE_BYTES;
static_assert(FUSED_SHARED_BYTES <= 227 * 1024, "what a block can have");

// The sums of dq: f32 [H, 2, N, 64], the halves of a head's columns apart, so that a warp's rows are contiguous.
//
// The 8 neighbouring columns `c` of row `r` lie at `c ^ (r & 3)`: sixteen lanes, which write four rows to shared memory
// at once, then use all banks.
constexpr int SUM_COLUMNS = FUSED_D / 2;

__device__ __forceinline__ int64_t sum_row(int head, int half, int row, int tokens) {
  return ((head * int64_t{2} + half) * tokens + row) * SUM_COLUMNS;
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// One product of 64 x 64 x 16; what c was before is not read if `mode` is "=f", so that its registers are free until
// then.
#define GROUP_PRODUCT(type, is_added, is_transposed, mode)                                                             \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, " is_added ", 0; "                                                      \
               "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" GROUP_NAMES_8                          \
               "}, %32, %33, p, 1, 1, " is_transposed ", " is_transposed "; }"                                         \
               : GROUP_OPERANDS_8(mode, c)                                                                             \
               : "l"(a), "l"(b))

// c (+)= A B^T (rows) or c (+)= A^T B (columns), 64 x 64 x 16.
template <typename T, bool IS_ADDED, bool IS_BY_COLUMNS>
__device__ __forceinline__ void group_multiply(float (&c)[8][4], uint64_t a, uint64_t b) {
  constexpr bool IS_HALF = std::is_same<T, __half>::value;
  if constexpr (IS_HALF && IS_ADDED && IS_BY_COLUMNS) GROUP_PRODUCT("f16", "1", "1", "+f");
  if constexpr (IS_HALF && IS_ADDED && !IS_BY_COLUMNS) GROUP_PRODUCT("f16", "1", "0", "+f");
  if constexpr (IS_HALF && !IS_ADDED && IS_BY_COLUMNS) GROUP_PRODUCT("f16", "0", "1", "=f");
  if constexpr (IS_HALF && !IS_ADDED && !IS_BY_COLUMNS) GROUP_PRODUCT("f16", "0", "0", "=f");
  if constexpr (!IS_HALF && IS_ADDED && IS_BY_COLUMNS) GROUP_PRODUCT("bf16", "1", "1", "+f");
  if constexpr (!IS_HALF && IS_ADDED && !IS_BY_COLUMNS) GROUP_PRODUCT("bf16", "1", "0", "+f");
  if constexpr (!IS_HALF && !IS_ADDED && IS_BY_COLUMNS) GROUP_PRODUCT("bf16", "0", "1", "=f");
  if constexpr (!IS_HALF && !IS_ADDED && !IS_BY_COLUMNS) GROUP_PRODUCT("bf16", "0", "0", "=f");
}
#undef GROUP_PRODUCT

// The lower half of a descriptor, in which addresses lie. All lanes of a warp are told the same, so that the hardware's
// uniform registers can compute what follows from it.
__device__ __forceinline__ uint32_t lower_descriptor(uint32_t address, int block_bytes) {
  return __shfl_sync(0xffffffffu, static_cast<uint32_t>(group_descriptor(address, block_bytes)), 0);
}
// The descriptor `n` times 16 bytes further.
__device__ __forceinline__ uint64_t descriptor_at(uint32_t lower, int n) {
  return group_descriptor(0, 0) | static_cast<uint64_t>(lower + n);
}

// Starts c = A B^T: 64 rows at `a` of a tile of `A_ROWS` rows, and the tile of 64 rows at `b`; `D` columns.
template <typename T, int D, int A_ROWS>
__device__ __forceinline__ void start_scores(float (&c)[8][4], uint32_t a, uint32_t b) {
  const uint32_t left = lower_descriptor(a, 16), right = lower_descriptor(b, 16);
  group_multiply<T, false, false>(c, descriptor_at(left, 0), descriptor_at(right, 0));
#pragma unroll
  for (int step = 1; step < D / 16; step++) {
    const int block = step / 4, within = step % 4 * (32 >> 4); // 16 columns are 32 bytes
    group_multiply<T, true, false>(c, descriptor_at(left, block * (A_ROWS * 128 >> 4) + within),
                                   descriptor_at(right, block * (64 * 128 >> 4) + within));
  }
  group_commit();
}

// Starts c = A^T B of tiles of `ROWS` rows and 64 columns.
template <typename T, int ROWS>
__device__ __forceinline__ void start_transposed(float (&c)[8][4], uint32_t a, uint32_t b) {
  const uint32_t left = lower_descriptor(a, ROWS * 128), right = lower_descriptor(b, ROWS * 128);
  group_multiply<T, false, true>(c, descriptor_at(left, 0), descriptor_at(right, 0));
#pragma unroll
  for (int step = 1; step < ROWS / 16; step++) {
    group_multiply<T, true, true>(c, descriptor_at(left, step * (16 * 128 >> 4)),
                                  descriptor_at(right, step * (16 * 128 >> 4)));
  }
  group_commit();
}

// Starts c += A B: A tiles in registers, and the tile of `16 K` rows at `b`.
template <typename T, int K, int N>
__device__ __forceinline__ void start_added(float (&c)[N][4], const uint32_t (&a)[K][4], uint32_t b) {
  const uint32_t right = lower_descriptor(b, 16 * K * 128);
#pragma unroll
  for (int step = 0; step < K; step++) {
    group_multiply_columns<T>(c, a[step], descriptor_at(right, step * (16 * 128 >> 4)));
  }
  group_commit();
}

__device__ __forceinline__ void store_matrices(uint32_t address, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r[0]), "r"(r[1]),
               "r"(r[2]), "r"(r[3])
               : "memory");
}

__device__ __forceinline__ void store_two(uint32_t address, float x, float y) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(x), "f"(y) : "memory");
}

// Adds floats from shared memory to global memory, without waiting.
__device__ __forceinline__ void add_bulk(float *to, uint32_t from, int bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to), "r"(from),
               "r"(bytes)
               : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// Waits until the memory that this thread's additions read may be written again.
__device__ __forceinline__ void wait_for_bulk_reads() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
__device__ __forceinline__ void wait_for_bulk() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// The groups that own keys wait for each other.
__device__ __forceinline__ void owners_wait() { asm volatile("bar.sync 1, %0;" ::"n"(GROUP_THREADS) : "memory"); }

// Starts to copy 16 rows, the first of which is a multiple of 8, to a tile of `ROWS` rows and 128 columns in blocks of
// 64; one warp. Rows from `rows` on and columns from `d` on are set to 0.
template <typename T, int ROWS>
__device__ __forceinline__ void load_warp_rows(uint32_t to, const T *from, int64_t stride, int rows, int d) {
  const int lane = thread_anew() % 32, row = lane / 16, chunk = lane % 16;
  to += chunk / 8 * (ROWS * 128) + row * 128 + (((chunk & 7) ^ row) << 4);
  const T *source = from + row * stride + chunk * 8;
  if (rows >= 16 && d == 128) {
#pragma unroll
    for (int i = 0; i < 16; i += 2) {
      copy_16_bytes((to ^ ((i & 7) << 4)) + i * 128, source, true);
      source += 2 * stride;
    }
    return;
  }
  const int left = chunk * 8 < d ? rows - row : 0;
#pragma unroll 1
  for (int i = 0; i < 16; i += 2) {
    copy_16_bytes((to ^ ((i & 7) << 4)) + i * 128, i < left ? source : from, i < left);
    source += 2 * stride;
  }
}

#endif

template <typename T>
__global__ void __launch_bounds__(FUSED_THREADS, 1)
    group_fused_kernel(float *sums, Matrix dk, Matrix dv, Matrix d_out, Matrix q, Matrix k, Matrix v, const float *lse,
                       const float *delta, const KeyTile *tiles, const View *views, KeySplit split, Sizes sizes) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  constexpr int D = FUSED_D, QUERIES = FUSED_QUERIES, KEYS = KEY_TILE, TILE = FUSED_TILE_BYTES;
  static_assert(KEY_TILE == 2 * 64 && D == 2 * 64, "64 keys a group, and dq in two halves");
  extern __shared__ __align__(1024) uint8_t attention_shared[];
  const uint32_t k_tile = shared_address(attention_shared), v_tile = k_tile + FUSED_KEYS_BYTES;
  const uint32_t stages = v_tile + FUSED_KEYS_BYTES; // queries, then gradients
  const uint32_t ds_tiles = stages + 2 * FUSED_STAGES * TILE, staging = ds_tiles + 2 * FUSED_DS_BYTES;
  // For each stage: the log-sum-exps times log2 e, then the deltas.
  float *const row_values = reinterpret_cast<float *>(attention_shared + FUSED_SHARED_BYTES - FUSED_STATE_BYTES -
                                                      FUSED_STAGES * FUSED_VALUES_BYTES);
  FusedTile *const found = reinterpret_cast<FusedTile *>(attention_shared + FUSED_SHARED_BYTES - FUSED_STATE_BYTES);
  KeyPart *const kept_part = reinterpret_cast<KeyPart *>(found + FUSED_FOUND);
  using Walk = QueryWalk<QUERIES>;
  int *const kept_count = reinterpret_cast<int *>(kept_part + 1);   // tiles of queries
  Walk *const kept_walks = reinterpret_cast<Walk *>(kept_part + 2); // a loading warp's each
  // Whether a stage is filled, whether it may be filled again, and whether a tile of ds is filled.
  const uint32_t full = k_tile + FUSED_SHARED_BYTES - FUSED_BARRIERS * 8, empty = full + FUSED_STAGES * 8;
  const uint32_t ds_full = empty + FUSED_STAGES * 8;
  const int kv_heads = sizes.heads / sizes.group, kv_head = blockIdx.x % kv_heads, d = sizes.d;
  const KeyPart part = find_part(split, blockIdx.x / kv_heads, sizes.group);
  if (part.index >= part.count) return;
  const KeyTile tile = tiles[part.tile];
  const Walk start(views, tiles + part.tile, part, tile.start, kv_head * sizes.group, sizes.group);
  const bool is_owner = threadIdx.x < GROUP_THREADS;
  if (start.left == 0) { // a tile of fewer steps than parts
    if (!is_owner) return;
    const float zeros[D / 8][4] = {};
    float *to = part_sums(split, part, kv_heads, kv_head, d) + threadIdx.x / 32 * 16 * d;
    store_sums<D>(to, 16, d, zeros);
    store_sums<D>(to + KEY_TILE * d, 16, d, zeros);
    return;
  }
  if (is_owner) {
    const int64_t first_key = tile.start;
    load_blocks<T, KEYS, D>(k_tile, static_cast<const T *>(k.data) + first_key * k.stride + kv_head * d, k.stride,
                            tile.end - tile.start, d);
    load_blocks<T, KEYS, D>(v_tile, static_cast<const T *>(v.data) + first_key * v.stride + kv_head * d, v.stride,
                            tile.end - tile.start, d);
  }
  if (!is_owner && threadIdx.x % 32 == 0) kept_walks[(threadIdx.x - GROUP_THREADS) / 32] = start;
  if (threadIdx.x == 0) {
    *kept_part = part;
    *kept_count = start.left;
    for (int i = 0; i < FUSED_STAGES; i++) {
      phase_init(full + 8 * i, 4);  // loading warps
      phase_init(empty + 8 * i, 8); // owning warps
    }
    phase_init(ds_full, 8);
    phase_init(ds_full + 8, 8);
  }
  __syncthreads();
  const int count = __shfl_sync(0xffffffffu, *kept_count, 0); // one for a warp

  if (!is_owner) {
    group_keep_registers<24>();
    const int thread = threadIdx.x - GROUP_THREADS, lane = thread % 32;
    const int warp_row = __shfl_sync(0xffffffffu, thread / 32 * 16, 0); // of a tile of queries, the first of 16
    Walk *const kept_walk = kept_walks + warp_row / 16;
    int stage = 0, phase = 1;
#pragma unroll 1
    for (int j = 0; j < count; j++) {
      __syncwarp();
      const int first = kept_walk->row, rows = min(QUERIES, kept_walk->view.end - first), head = kept_walk->head;
      phase_wait(empty + 8 * stage, phase);
      const int64_t row = first + warp_row;
      const uint32_t to = stages + stage * (2 * TILE) + warp_row * 128;
      load_warp_rows<T, QUERIES>(to, static_cast<const T *>(q.data) + row * q.stride + head * d, q.stride,
                                 rows - warp_row, d);
      load_warp_rows<T, QUERIES>(to + TILE, static_cast<const T *>(d_out.data) + row * d_out.stride + head * d,
                                 d_out.stride, rows - warp_row, d);
      // The log-sum-exps and deltas. An infinite lse makes the probabilities of rows that are not there 0.
      const int value_row = thread % QUERIES;
      const int64_t offset = static_cast<int64_t>(head) * sizes.tokens + first + value_row;
      float value;
      if (thread < QUERIES) {
        value = value_row < rows ? lse[offset] * LOG2_E : INFINITY;
      } else {
        value = value_row < rows ? delta[offset] : 0.0f;
      }
      row_values[stage * 2 * QUERIES + thread] = value;
      if (thread == 0) {
        const int first_key = kept_walk->first_key;
        found[j % FUSED_FOUND] = {
            first, rows, head, kept_walk->view.is_causal ? first_key - first - 1 : kept_walk->view.key_end - first_key};
      }
      __syncwarp(); // all lanes have read the walk
      if (lane == 0) kept_walk->advance();
      wait_for_copies();
      group_publish();
      __syncwarp();
      if (lane == 0) phase_arrive(full + 8 * stage);
      if (++stage == FUSED_STAGES) stage = 0, phase ^= 1;
    }
    return;
  }

  group_take_registers<240>();
  const int group = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0); // one for a warp
  const float log2_scale = sizes.scale * LOG2_E;
  float out_k[D / 8][4] = {}, out_v[D / 8][4] = {};
  float s[QUERIES / 8][4], x[QUERIES / 8][4]; // scores, then probabilities, then ds; dp, then dq
  uint32_t left[QUERIES / 16][4];             // probabilities, then ds
  wait_for_copies();
  group_publish();
  owners_wait();

  auto start_s = [&](int stage) {
    start_scores<T, D, KEYS>(s, k_tile + group * (64 * 128), stages + stage * (2 * TILE));
  };
  auto start_dp = [&](int stage) {
    start_scores<T, D, KEYS>(x, v_tile + group * (64 * 128), stages + stage * (2 * TILE) + TILE);
  };
  auto start_dk = [&](int stage) { start_added<T>(out_k, left, stages + stage * (2 * TILE)); };
  // The group's half of the columns, when the ds of both groups are there.
  auto start_dq = [&](int j) {
    phase_wait(ds_full + (j & 1) * 8, j / 2 & 1);
    group_fence();
    start_transposed<T, KEYS>(x, ds_tiles + (j & 1) * FUSED_DS_BYTES, k_tile + group * (KEYS * 128));
  };
  auto release = [&](int stage) {
    if ((thread_anew() & 31) == 0) phase_arrive(empty + 8 * stage);
  };
  // Makes probabilities of the scores.
  auto soften = [&](int j, int stage) {
    const int thread = thread_anew(), lane = thread & 31, g = lane / 4, t = lane & 3;
    const int warp_key = thread / 32 * 16; // counted from the tile's first
    const float *values = row_values + stage * 2 * QUERIES + 2 * t;
    const int visible = found[j % FUSED_FOUND].visible;
    const bool is_causal = visible < 0;
    const int first_row = -1 - visible;
    if (is_causal ? warp_key + 15 > first_row : warp_key + 16 > visible) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        int key = warp_key + 8 * i + g;
        // The first query, counted from this lane's first, that sees the key.
        int from = (is_causal ? key - first_row : key < visible ? 0 : QUERIES) - 2 * t;
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
  };
  // Adds to dv, makes ds when dp is there and leaves it in shared memory. Nothing is under way at the end.
  auto differentiate = [&](int j, int stage) {
    as_left<T>(left, s);
    group_pin(out_v);
    group_fence();
    start_added<T>(out_v, left, stages + stage * (2 * TILE) + TILE);
    const int thread = thread_anew(), lane = thread & 31, t = lane & 3;
    const float *values = row_values + stage * 2 * QUERIES + QUERIES + 2 * t;
    group_wait<1>();
    group_pin(x);
#pragma unroll
    for (int n = 0; n < QUERIES / 8; n++) {
      float2 two = *reinterpret_cast<const float2 *>(values + 8 * n);
#pragma unroll
      for (int i = 0; i < 4; i++) s[n][i] *= x[n][i] - (i % 2 ? two.y : two.x);
    }
    // ds take the registers of the probabilities.
    group_wait<0>();
    group_pin(out_v);
    as_left<T>(left, s);
    const uint32_t ds_rows = ds_tiles + (j & 1) * FUSED_DS_BYTES + thread / 32 * (16 * 128) + lane_by_rows<64>(lane);
#pragma unroll
    for (int n = 0; n < QUERIES / 16; n++) store_matrices(ds_rows ^ (n << 5), left[n]);
    group_publish();
    __syncwarp();
    if (lane == 0) phase_arrive(ds_full + (j & 1) * 8);
  };
  // Adds this warp's part of dq, 16 rows, to the sums.
  auto add_dq = [&](int j) {
    const int thread = thread_anew(), lane = thread & 31, g = lane / 4, t = lane & 3, first = (thread / 32 & 3) * 16;
    const FusedTile here = found[j % FUSED_FOUND];
    const uint32_t own = staging + thread / 32 * (16 * SUM_COLUMNS * 4);
    if (lane == 0) wait_for_bulk_reads();
    __syncwarp();
    const uint32_t row = own + g * (SUM_COLUMNS * 4) + ((here.row + g & 3) << 5) + t * 8;
#pragma unroll
    for (int n = 0; n < SUM_COLUMNS / 8; n++) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        store_two((row ^ ((n & 3) << 5)) + n / 4 * 128 + i * (8 * SUM_COLUMNS * 4), x[n][2 * i], x[n][2 * i + 1]);
      }
    }
    group_publish();
    __syncwarp();
    const int rows = min(16, here.rows - first);
    if (lane == 0 && rows > 0) {
      add_bulk(sums + sum_row(here.head, thread / 128, here.row + first, sizes.tokens), own, rows * (SUM_COLUMNS * 4));
    }
  };

  int stage = 0, phase = 0, j = 0;
  phase_wait(full, 0);
  group_fence();
  start_s(0);
  start_dp(0);
  group_wait<1>();
  group_pin(s);
  soften(0, 0);
  differentiate(0, 0);
#pragma unroll 1
  for (; j + 1 < count; j++) {
    const int before = stage;
    if (++stage == FUSED_STAGES) stage = 0, phase ^= 1;
    group_pin(out_k);
    group_fence();
    start_dk(before);
    phase_wait(full + 8 * stage, phase);
    group_fence();
    start_s(stage);
    start_dq(j);
    group_wait<1>();
    group_pin(s);
    group_pin(out_k);
    release(before);
    soften(j + 1, stage);
    group_wait<0>();
    group_pin(x);
    add_dq(j);
    group_fence();
    start_dp(stage);
    differentiate(j + 1, stage);
  }
  group_pin(out_k);
  group_fence();
  start_dk(stage);
  start_dq(j);
  group_wait<0>();
  group_pin(x);
  group_pin(out_k);
  add_dq(j);
  if ((thread_anew() & 31) == 0) wait_for_bulk();

  // Read anew, as the loop leaves no registers for it.
  const KeyPart own = *kept_part;
  const KeyTile own_tile = tiles[own.tile];
  const int warp_key = own_tile.start + threadIdx.x / 32 * 16;
  if (own.place >= 0) {
    float *to = part_sums(split, own, kv_heads, kv_head, d) + (warp_key - own_tile.start) * d;
    store_sums<D>(to, own_tile.end - warp_key, d, out_k);
    store_sums<D>(to + KEY_TILE * d, own_tile.end - warp_key, d, out_v);
    return;
  }
  // The tiles of keys and values hold the results when nobody reads them any more.
  owners_wait();
  const uint32_t own_rows = (warp_key - own_tile.start) * (D * 2);
  const float scales[2] = {sizes.scale, sizes.scale}, ones[2] = {1.0f, 1.0f};
  T *to_k = static_cast<T *>(dk.data) + warp_key * dk.stride + kv_head * d;
  T *to_v = static_cast<T *>(dv.data) + warp_key * dv.stride + kv_head * d;
  store_rows<T, D, 1>(to_k, dk.stride, own_tile.end - warp_key, d, reinterpret_cast<float (&)[1][D / 8][4]>(out_k),
                      scales, k_tile + own_rows);
  store_rows<T, D, 1>(to_v, dv.stride, own_tile.end - warp_key, d, reinterpret_cast<float (&)[1][D / 8][4]>(out_v),
                      ones, v_tile + own_rows);
#endif
}

// dq from its sums: a thread for each 8 columns of a row of one head, blocks of `FUSED_ROWS` rows of a tile of queries.
// Bound: bytes of the sums and of dq.
constexpr int FUSED_ROWS = 16;

template <typename T>
__global__ void __launch_bounds__(256)
    round_sums_kernel(Matrix dq, const float *sums, const QueryTile *tiles, Sizes sizes) {
  constexpr int CHUNKS = FUSED_D / 8, BLOCKS = QUERY_TILE / FUSED_ROWS;
  static_assert(FUSED_ROWS * CHUNKS == 256, "a thread for each chunk");
  const int head = blockIdx.x % sizes.heads, rest = blockIdx.x / sizes.heads;
  const QueryTile tile = tiles[rest / BLOCKS];
  const int row = tile.start + rest % BLOCKS * FUSED_ROWS + threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
  if (row >= tile.end || chunk * 8 >= sizes.d) return;
  const float *from = sums + sum_row(head, chunk / (CHUNKS / 2), row, sizes.tokens);
  float values[8];
  load_pack<float, 8>(values, from + (chunk % (CHUNKS / 2) ^ row % 4) * 8);
#pragma unroll
  for (int i = 0; i < 8; i++) values[i] *= sizes.scale;
  store_pack<T, 8>(static_cast<T *>(dq.data) + row * dq.stride + head * sizes.d + chunk * 8, values);
}

template <typename T>
int group_backward(Matrix dq, Matrix dk, Matrix dv, Matrix d_out, Matrix q, Matrix k, Matrix v, const float *lse,
                   const float *delta, float *sums, const QueryTile *query_tiles, int num_query_tiles,
                   const KeyTile *key_tiles, const View *views, KeySplit split, Sizes sizes, cudaStream_t stream) {
  cudaError_t cleared = cudaMemsetAsync(sums, 0, fused_sums(sizes) * sizeof(float), stream);
  if (cleared != cudaSuccess) return static_cast<int>(cleared);
  int64_t blocks = static_cast<int64_t>(split.num_parts) * (sizes.heads / sizes.group);
  int code = launch(group_fused_kernel<T>, blocks, FUSED_THREADS, FUSED_SHARED_BYTES, stream, sums, dk, dv, d_out, q, k,
                    v, lse, delta, key_tiles, views, split, sizes);
  if (code != 0) return code;
  blocks = static_cast<int64_t>(num_query_tiles) * (QUERY_TILE / FUSED_ROWS) * sizes.heads;
  return launch(round_sums_kernel<T>, blocks, 256, 0, stream, dq, sums, query_tiles, sizes);
}

} // namespace

int64_t fused_sums(Sizes sizes) { return static_cast<int64_t>(sizes.heads) * sizes.tokens * FUSED_D; }

bool has_fused_backward(Sizes sizes) {
  return sizes.d > 64 && sizes.d <= FUSED_D && is_built(group_fused_kernel<__nv_bfloat16>);
}

int warp_group_backward(Matrix dq, Matrix dk, Matrix dv, Matrix d_out, Matrix q, Matrix k, Matrix v, const float *lse,
                        const float *delta, float *sums, const QueryTile *query_tiles, int num_query_tiles,
                        const KeyTile *key_tiles, const View *views, KeySplit split, Sizes sizes, cudaStream_t stream) {
  auto run = q.dtype == F16 ? group_backward<__half> : group_backward<__nv_bfloat16>;
  return run(dq, dk, dv, d_out, q, k, v, lse, delta, sums, query_tiles, num_query_tiles, key_tiles, views, split, sizes,
             stream);
}

} // namespace attention
