// Products of few rows with 4-bit codes on any card with tensor cores: see packed_codes.cuh and packed_product.cuh.
//
// Layout: columns of x in the order FRAGMENTS, scaled.
//
// Launch: blocks of WR x WK warps; a warp has 16 MT rows and every WK-th chunk of its part of K; the warps' sums are added in
// their order, then those of the K parts (blockIdx.y), by the block of a tile that comes last. NT: groups of 8 rows of x;
// blockIdx.z: 8 NT rows of x each. With programmatic launches a block makes its table and reads its first codes before the
// kernel before it is done.
//
// Bound: bytes of the weights (0.52 per value), and what a multiprocessor's shared-memory pipe moves: for 4,096 values 64
// accesses of the table and 32 NT / MT of x. Sums are f32; the order depends on the shape and the form, not on M, as long as
// the form is the same.
#include "packed_codes.cuh"

namespace {

template <typename T, bool IS_NESTED, int MT, int NT, int WR, int WK, bool IS_SWIGLU>
__global__ void __launch_bounds__(32 * WR * WK, NT <= 2 ? 2 : 1) codes(const __grid_constant__ Product p) {
  constexpr int THREADS = 32 * WR * WK, ROWS = 16 * MT * WR, COLS = 8 * NT, PAD = COLS + 1;
  static_assert(!IS_SWIGLU || MT == 2, "a warp has the same rows of gate and up");
  extern __shared__ __align__(128) float sums[]; // [WK, ROWS, PAD], when the table behind its first bytes is done with
  constexpr uint32_t TABLE = table_address(0);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, wr = warp % WR, wk = warp / WR, g = lane / 4, t = lane % 4;
  const int K = p.x.cols, col0 = blockIdx.z * COLS;
  const int2 chunks = chunks_of(p);

  // The matrix and its rows: with SwiGLU the same 16 rows of two, one after the other.
  const Tile at = IS_SWIGLU ? Tile{0, static_cast<int>(blockIdx.x), 0} : find_tile<ROWS>(p, blockIdx.x);
  const Packed &w = p.w[at.which];
  auto row_of = [&](int own, const Packed *&matrix) {
    if (IS_SWIGLU) {
      matrix = &p.w[own / 16 % 2];
      return min(at.tile * (ROWS / 2) + own / 32 * 16 + own % 16, w.rows - 1);
    }
    matrix = &w;
    return min(at.tile * ROWS + own, w.rows - 1);
  };
  auto own_of = [&](int mt, int half) { return (wr * MT + mt) * 16 + g + half * 8; };
  auto matrix_of = [&](int mt) -> const Packed & { return IS_SWIGLU ? p.w[mt] : w; };

  // Of each of its rows, where this lane's first codes are, and which block of 64 values they are in.
  int rows[MT][2];
  const uint8_t *from[MT][2];
  uint32_t block[MT][2];
#pragma unroll
  for (int mt = 0; mt < MT; mt++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const Packed *matrix;
      rows[mt][half] = row_of(own_of(mt, half), matrix);
      const int first = (chunks.x + wk) * CHUNK + t * 32;
      from[mt][half] = matrix_of(mt).data + (static_cast<int64_t>(rows[mt][half]) * K + first) / 2;
      block[mt][half] = static_cast<uint32_t>(rows[mt][half]) * (K / 64) + first / 64;
    }
  // A chunk's codes and maxima, of it and of the two that come after it.
  struct Chunk {
    Codes codes[MT][2];
    Maximum<IS_NESTED> maxima[MT][2];
  } now, next, later;
  auto fetch = [&](Chunk &to, int chunk) {
    if (chunk >= chunks.y) return;
#pragma unroll
    for (int mt = 0; mt < MT; mt++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        to.codes[mt][half].fetch(from[mt][half]);
        to.maxima[mt][half].fetch(matrix_of(mt), block[mt][half]);
        from[mt][half] += WK * CHUNK / 2;
        block[mt][half] += WK * CHUNK / 64;
      }
  };
  fetch(now, chunks.x + wk);
  fetch(next, chunks.x + wk + WK);
  fill_table<THREADS>(TABLE, sums, w.values);
  if (blockIdx.y == 0 && t == 0) {
#pragma unroll
    for (int mt = 0; mt < MT; mt++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const Packed &own = matrix_of(mt);
        if (own.b) prefetch(static_cast<const T *>(own.b) + static_cast<int64_t>(rows[mt][half]) * own.rank);
      }
  }
  launch_dependents();
  if (!p.waits_late) wait_for_dependency();
  __syncthreads();

  float acc[MT][NT][4] = {};
  const __half *x = static_cast<const __half *>(p.x.data);
  const __half *x_row[NT];
#pragma unroll
  for (int j = 0; j < NT; j++) x_row[j] = x + min(col0 + j * 8 + g, p.x.rows - 1) * p.x.stride + t * 8;
  const uint32_t place = own_place(TABLE);

  for (int chunk = chunks.x + wk; chunk < chunks.y; chunk += WK) {
    fetch(later, chunk + 2 * WK);
    __half2 scale[MT][2];
#pragma unroll
    for (int mt = 0; mt < MT; mt++)
#pragma unroll
      for (int half = 0; half < 2; half++)
        scale[mt][half] = now.maxima[mt][half].scale(matrix_of(mt));
#pragma unroll
    for (int part = 0; part < 4; part++) {
      uint4 right[NT];
#pragma unroll
      for (int j = 0; j < NT; j++)
        right[j] = *reinterpret_cast<const uint4 *>(x_row[j] + chunk * CHUNK + part * 32);
#pragma unroll
      for (int mt = 0; mt < MT; mt++) {
        uint32_t top[4], low[4];
        now.codes[mt][0].values(top, part, place, scale[mt][0]);
        now.codes[mt][1].values(low, part, place, scale[mt][1]);
        const uint32_t one[4] = {top[0], low[0], top[1], low[1]}, two[4] = {top[2], low[2], top[3], low[3]};
#pragma unroll
        for (int j = 0; j < NT; j++) {
          multiply<__half>(acc[mt][j], one, right[j].x, right[j].y);
          multiply<__half>(acc[mt][j], two, right[j].z, right[j].w);
        }
      }
    }
    now = next;
    next = later;
  }

  if (p.waits_late) wait_for_dependency();
  if (blockIdx.y == 0) {
#pragma unroll
    for (int mt = 0; mt < MT; mt++) {
      auto row = [&](int half) { return rows[mt][half]; };
      add_adapter<T>(acc[mt], p, matrix_of(mt), row, col0, wk * 16, WK * 16);
    }
  }

  __syncthreads(); // the table is done with
#pragma unroll
  for (int mt = 0; mt < MT; mt++)
#pragma unroll
    for (int j = 0; j < NT; j++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        sums[(wk * ROWS + own_of(mt, i / 2)) * PAD + j * 8 + t * 2 + i % 2] = acc[mt][j][i];
  __syncthreads();
  auto sum_of = [&](int row, int col) {
    float sum = sums[row * PAD + col];
#pragma unroll
    for (int k = 1; k < WK; k++) sum += sums[(k * ROWS + row) * PAD + col];
    return sum;
  };
  auto gate_of = [](int own) { return own / 16 * 32 + own % 16; };
  auto up_of = [](int own) { return own / 16 * 32 + own % 16 + 16; };
  finish<T, IS_SWIGLU, ROWS, COLS, THREADS>(p, at, share_of(p), col0, sums, sum_of, gate_of, up_of);
}

template <typename T, bool IS_NESTED, int MT, int NT, int WR, int WK, bool IS_SWIGLU>
int launch(const Product &p, int tiles, cudaStream_t stream) {
  constexpr int ROWS = 16 * MT * WR, COLS = 8 * NT;
  auto kernel = codes<T, IS_NESTED, MT, NT, WR, WK, IS_SWIGLU>;
  int table = 0;
  const cudaError_t code = shared_with_table(kernel, 0, table);
  if (code != cudaSuccess) return static_cast<int>(code);
  const size_t sums = sizeof(float) * WK * ROWS * (COLS + 1), before = static_cast<size_t>(table);
  const size_t bytes = before > sums ? before : sums;
  const dim3 grid(tiles, p.splits, (p.x.rows + COLS - 1) / COLS);
  return launch_after(kernel, grid, 32 * WR * WK, bytes, stream, p);
}

// Rows of W that a block has in each form; the launcher in Rust computes the grid and the workspace with the same numbers.
// Forms: 0: up to 8 rows of x, small matrices; 1: up to 8, large ones; 2: up to 16; 3: up to 32; 4: 64 at a time; 5: as 0, long
// sums.
template <typename T, bool IS_NESTED>
int launch_form(const Product &p, int form, bool is_swiglu, int tiles, cudaStream_t stream) {
  if (is_swiglu) {
    switch (form) {
    case 1: return launch<T, IS_NESTED, 2, 1, 2, 4, true>(p, tiles, stream);
    case 2: return launch<T, IS_NESTED, 2, 2, 2, 4, true>(p, tiles, stream);
    case 3: return launch<T, IS_NESTED, 2, 4, 4, 2, true>(p, tiles, stream);
    case 4: return launch<T, IS_NESTED, 2, 8, 4, 2, true>(p, tiles, stream);
    }
  } else {
    switch (form) {
    case 0: return launch<T, IS_NESTED, 1, 1, 1, 8, false>(p, tiles, stream);
    case 1: return launch<T, IS_NESTED, 2, 1, 2, 4, false>(p, tiles, stream);
    case 2: return launch<T, IS_NESTED, 2, 2, 2, 4, false>(p, tiles, stream);
    case 3: return launch<T, IS_NESTED, 2, 4, 4, 2, false>(p, tiles, stream);
    case 4: return launch<T, IS_NESTED, 2, 8, 4, 2, false>(p, tiles, stream);
    case 5: return launch<T, IS_NESTED, 2, 1, 1, 8, false>(p, tiles, stream);
    }
  }
  return static_cast<int>(cudaErrorInvalidValue);
}

template <typename T> int launch_kind(const Product &p, int form, bool is_swiglu, int tiles, cudaStream_t stream) {
  return p.w[0].absmax ? launch_form<T, false>(p, form, is_swiglu, tiles, stream)
                       : launch_form<T, true>(p, form, is_swiglu, tiles, stream);
}

} // namespace

extern "C" int trainer_packed_codes(const Product *product, int32_t form, int32_t is_swiglu, int32_t tiles,
                                    cudaStream_t stream) {
  const Product &p = *product;
  if (p.x.rows == 0 || tiles == 0) return 0;
  if (p.x.dtype == SCALED_F16) return launch_kind<__half>(p, form, is_swiglu != 0, tiles, stream);
  if (p.x.dtype == SCALED_BF16) return launch_kind<__nv_bfloat16>(p, form, is_swiglu != 0, tiles, stream);
  return static_cast<int>(cudaErrorInvalidValue);
}
