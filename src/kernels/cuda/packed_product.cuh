// Products of few rows with packed weights, straight from their bytes: y = x Wᵀ (+ low sBᵀ) (+ bias) (+ residual), or the
// SwiGLU of two such products. What the kernels of packed_product.cu and packed_product_sm90.cu share.
//
// x [M, K] of type T; W of up to 3 matrices that share x, each [O, K]: dense values of type T, GGUF blocks (packed_gguf.cuh), or 4-bit
// codes with block maxima as in nf4.cu (packed_codes.cuh), row after row as training has them. sB [O, r] of type T, r a multiple of
// 16; the low-rank products x Aᵀ [M, R] of type T. y [M, O1 + O2 + O3], or [M, O] with SwiGLU; O is a multiple of 8.
//
// Tensor cores take the weights as their left operand (16 rows) and x as their right one (8 columns, rows of x). Which of a
// chunk's 128 columns stands in which place of the operands is free as long as both agree: lane t of the four that share a
// row has columns 32 t .. 32 t + 31, so that packed bytes are read 16 at a time as they lie, and no weight is repacked; what
// makes x writes its columns in the order in which they are read (`place_of` in mma.cuh).
#pragma once

#include "mma.cuh"

constexpr int CHUNK = 128, MOST_MATRICES = 3;

// As the host describes a matrix.
struct Packed {
  const uint8_t *data;
  const float *absmax;
  const uint8_t *codes;
  const float *nested, *map, *values;
  const void *b;
  const float *bias;
  float offset;
  int32_t rows, rank, first_low;
};

struct Product {
  Packed w[MOST_MATRICES];
  Matrix x, residual, out;
  const void *low;  // [M, low_cols] of T
  float *partial;   // of the K parts of each tile
  uint32_t *arrived;
  int32_t count, low_cols, splits;
  int32_t whole;      // of packed_codes_sm90.cu: tiles whose sums are not cut into parts
  int32_t waits_late; // x is there when the kernel begins, the low-rank products when the one before it is done
};

// DENSE_OTHER: of the other 16-bit type, rounded to T. GGUF: the first of its formats, see packed_gguf.cuh.
enum Format { DENSE = 2, DENSE_OTHER, GGUF };
// Whether a block's registers hold the next piece beside this one; what GGUF blocks have for 32 columns takes up to 24 of them.
template <typename Piece> constexpr bool is_fetched_ahead(int format) { return format < GGUF || sizeof(Piece) <= 44; }

#ifdef __CUDACC__
namespace {

// 32 columns of a row, as they lie. `open` makes of what has come what all of its values need.
template <typename T, int FORMAT> struct Piece;

template <typename T> struct Piece<T, DENSE> {
  uint4 v[4];

  __device__ __forceinline__ void open() {}
  __device__ __forceinline__ void fetch(const Packed &w, int64_t flat) {
#pragma unroll
    for (int i = 0; i < 4; i++) v[i] = load_streaming(w.data + flat * 2 + i * 16);
  }
  // Columns 8 part .. 8 part + 7 as four registers.
  __device__ __forceinline__ void values(uint32_t (&out)[4], int part) const {
    out[0] = v[part].x, out[1] = v[part].y, out[2] = v[part].z, out[3] = v[part].w;
  }
};

template <typename T> struct Other { using Type = __half; };
template <> struct Other<__half> { using Type = __nv_bfloat16; };

template <typename T> struct Piece<T, DENSE_OTHER> : Piece<T, DENSE> {
  __device__ __forceinline__ void values(uint32_t (&out)[4], int part) const {
    const uint4 v = this->v[part];
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const Pack<typename Other<T>::Type, 2> pair = *reinterpret_cast<const Pack<typename Other<T>::Type, 2> *>(&words[i]);
      out[i] = pack_pair<T>(to_float(pair.v[0]), to_float(pair.v[1]));
    }
  }
};

// The matrix to which a tile of rows belongs, the tile's number there, and where the matrix's outputs begin.
struct Tile {
  int which, tile, first_out;
};
template <int ROWS> __device__ __forceinline__ Tile find_tile(const Product &p, int tile) {
  Tile found{0, tile, 0};
  for (; found.which + 1 < p.count; found.which++) {
    const int tiles = (p.w[found.which].rows + ROWS - 1) / ROWS;
    if (found.tile < tiles) break;
    found.tile -= tiles;
    found.first_out += p.w[found.which].rows;
  }
  return found;
}

// A barrier of the first `THREADS` threads of a block.
template <int THREADS> __device__ __forceinline__ void block_barrier() {
  asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory");
}

// What a block has of the sums of its tile: one of `parts`; the parts' sums lie `step` tiles apart, from `place` on.
struct Share {
  int part, parts;
  int64_t place, step;
};
__device__ __forceinline__ Share share_of(const Product &p) {
  const int64_t tiles = gridDim.x;
  return {static_cast<int>(blockIdx.y), p.splits, blockIdx.z * tiles + blockIdx.x, gridDim.z * tiles};
}

// The part of the chunks that belongs to a block.
__device__ __forceinline__ int2 chunks_of(const Product &p, const Share &share) {
  const int64_t chunks = p.x.cols / CHUNK;
  return make_int2(static_cast<int>(chunks * share.part / share.parts),
                   static_cast<int>(chunks * (share.part + 1) / share.parts));
}
__device__ __forceinline__ int2 chunks_of(const Product &p) { return chunks_of(p, share_of(p)); }

__device__ __forceinline__ float with_bias(const Packed &w, int row, float sum) {
  return w.bias ? sum + __ldg(w.bias + row) : sum;
}

// Ranks `at` .. `at + 3` of the low-rank products of a row.
template <typename T> __device__ __forceinline__ uint2 low_ranks(const Product &p, int row, int at) {
  return *reinterpret_cast<const uint2 *>(static_cast<const T *>(p.low) + static_cast<int64_t>(row) * p.low_cols + at);
}

// The adapters of a warp's 16 rows, of which a lane has `row_of(0)` and `row_of(1)`: 16 ranks at a time from `first` on, every `step`; lane t has
// ranks 4 t .. 4 t + 3 of them.
template <typename T, int NT, typename RowOf>
__device__ __forceinline__ void add_adapter(float (&acc)[NT][4], const Product &p, const Packed &own, RowOf row_of, int col0,
                                            int first, int step) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const T *b = static_cast<const T *>(own.b);
  for (int rank = first; b && rank < own.rank; rank += step) {
    uint2 half[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int64_t row = row_of(i);
      half[i] = *reinterpret_cast<const uint2 *>(b + row * own.rank + rank + t * 4);
    }
    const uint32_t left[4] = {half[0].x, half[1].x, half[0].y, half[1].y};
#pragma unroll
    for (int j = 0; j < NT; j++) {
      const int row = min(col0 + j * 8 + g, p.x.rows - 1);
      const uint2 ranks = low_ranks<T>(p, row, own.first_low + rank + t * 4);
      multiply<T>(acc[j], left, ranks.x, ranks.y);
    }
  }
}

// The end of a block: sums of the K parts of its tile, bias, SwiGLU, residual stream. `sum_of(row, col)` is the block's own sum
// of a row of the tile and a row of x; `sums` [ROWS, COLS + 1] is free for those of all parts. With SwiGLU row `gate_of(i)` of the
// tile is gate i and `up_of(i)` up i. Eight outputs of a row of x at a time: their loads are in flight together.
template <typename T, bool IS_SWIGLU, int ROWS, int COLS, int THREADS, typename SumOf, typename GateOf, typename UpOf>
__device__ __forceinline__ void finish(const Product &p, const Tile &at, const Share &share, int col0, float *sums,
                                       SumOf sum_of, GateOf gate_of, UpOf up_of) {
  constexpr int PAD = COLS + 1, N = 8;
  __shared__ uint32_t last;
  const Packed &w = p.w[at.which];
  const bool is_split = share.parts > 1;
  if (is_split) {
    const int64_t place = share.place, step = share.step * (ROWS * COLS);
    float *mine = p.partial + place * (ROWS * COLS);
    // Rows of x that there are not are left out.
    const int all = ROWS * min(COLS, p.x.rows - col0);
    for (int i = threadIdx.x * 4; i < all; i += THREADS * 4) {
      const int row = i % ROWS, col = i / ROWS;
      const float4 four = {sum_of(row, col), sum_of(row + 1, col), sum_of(row + 2, col), sum_of(row + 3, col)};
      __stcg(reinterpret_cast<float4 *>(mine + share.part * step + i), four);
    }
    __threadfence();
    block_barrier<THREADS>();
    if (threadIdx.x == 0) last = atomicAdd(p.arrived + place, 1);
    block_barrier<THREADS>();
    if (last != share.parts - 1) return;
    __threadfence();
#pragma unroll 2
    for (int i = threadIdx.x * 4; i < all; i += THREADS * 4) {
      float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 4
      for (int part = 0; part < share.parts; part++) {
        const float4 more = __ldcg(reinterpret_cast<const float4 *>(mine + part * step + i));
        sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
      }
      const int row = i % ROWS, col = i / ROWS;
      sums[row * PAD + col] = sum.x, sums[(row + 1) * PAD + col] = sum.y;
      sums[(row + 2) * PAD + col] = sum.z, sums[(row + 3) * PAD + col] = sum.w;
    }
    if (threadIdx.x == 0) p.arrived[place] = 0;
    block_barrier<THREADS>();
  }
  auto result = [&](int row, int col) { return is_split ? sums[row * PAD + col] : sum_of(row, col); };
  constexpr int OUTPUTS = IS_SWIGLU ? ROWS / 2 : ROWS, GROUPS = OUTPUTS / N;
  // A loop that is gone through once is not to be long: its instructions come from memory too.
  constexpr int TIMES = (GROUPS * COLS + THREADS - 1) / THREADS, AT_ONCE = IS_SWIGLU ? (TIMES < 2 ? 1 : 2) : TIMES < 4 ? TIMES : 4;
  if constexpr (IS_SWIGLU) {
#pragma unroll AT_ONCE
    for (int i = threadIdx.x; i < GROUPS * COLS; i += THREADS) {
      const int own = i % GROUPS * N, col = i / GROUPS, row = at.tile * OUTPUTS + own, line = col0 + col;
      if (row >= w.rows || line >= p.x.rows) continue;
      float activated[N];
#pragma unroll
      for (int j = 0; j < N; j++) {
        const float gate = to_float(from_float<T>(with_bias(p.w[0], row + j, result(gate_of(own + j), col))));
        const float up = to_float(from_float<T>(with_bias(p.w[1], row + j, result(up_of(own + j), col))));
        const float sigmoid = __fdividef(1.0f, 1.0f + __expf(-gate)); // as swiglu.cu
        activated[j] = up * (gate * sigmoid);
      }
      store_columns<T>(p.out, line, row, activated);
    }
  } else {
#pragma unroll AT_ONCE
    for (int i = threadIdx.x; i < GROUPS * COLS; i += THREADS) {
      const int own = i % GROUPS * N, col = i / GROUPS, row = at.tile * OUTPUTS + own, line = col0 + col;
      if (row >= w.rows || line >= p.x.rows) continue;
      const int to = at.first_out + row;
      float sum[N] = {};
      if (p.residual.data) load_eight(sum, p.residual.data, p.residual.dtype, line * p.residual.stride + to);
#pragma unroll
      for (int j = 0; j < N; j++) sum[j] += with_bias(w, row + j, result(own + j, col));
      store_eight(p.out.data, p.out.dtype, line * p.out.stride + to, sum);
    }
  }
}

} // namespace
#endif
