// Products of few rows with packed weights on any card with tensor cores: see packed_product.cuh.
//
// Layout: columns of x in the order FRAGMENTS.
//
// Launch: blocks of WR x WK warps; a warp has 16 MT rows and every WK-th chunk of its part of K; the warps' sums are added in
// their order, then those of the K parts (blockIdx.y), by the block of a tile that comes last. NT: groups of 8 rows of x;
// blockIdx.z: 8 NT rows of x each. With programmatic launches a block reads its first weights before the kernel
// before it is done.
//
// Bound: bytes of the weights, and of GGUF blocks the instructions of a value (packed_gguf.cuh). Sums are f32; the order depends on
// the shape and the form, not on M, as long as the form is the same.
#include "packed_product.cuh"

namespace {

template <typename T, int FORMAT, int MT, int NT, int WR, int WK, bool IS_SWIGLU>
__global__ void __launch_bounds__(32 * WR * WK, FORMAT >= GGUF && NT == 1 ? 2 : 1) product(const __grid_constant__ Product p) {
  constexpr int THREADS = 32 * WR * WK, ROWS = 16 * MT * WR, COLS = 8 * NT, PAD = COLS + 1;
  static_assert(!IS_SWIGLU || MT == 2, "a warp has the same rows of gate and up");
  extern __shared__ float shared[]; // sums [WK, ROWS, PAD]
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

  int64_t from[MT][2];
#pragma unroll
  for (int mt = 0; mt < MT; mt++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const Packed *matrix;
      from[mt][half] = static_cast<int64_t>(row_of(own_of(mt, half), matrix)) * K + t * 32;
    }
  constexpr bool IS_AHEAD = is_fetched_ahead<Piece<T, FORMAT>>(FORMAT);
  // Of the largest pieces a warp has those of 16 rows at a time, where so many warps are to share a multiprocessor.
  constexpr bool IS_BY_ROWS = NT == 1 && FORMAT >= GGUF && sizeof(Piece<T, FORMAT>) > 80;
  Piece<T, FORMAT> now[IS_BY_ROWS ? 1 : MT][2], next[IS_AHEAD ? MT : 1][2];
  auto fetch_rows = [&](Piece<T, FORMAT>(&to)[2], int mt, int chunk) {
#pragma unroll
    for (int half = 0; half < 2; half++) to[half].fetch(matrix_of(mt), from[mt][half] + chunk * CHUNK);
  };
  auto fetch = [&](auto &to, int chunk) {
#pragma unroll
    for (int mt = 0; mt < (IS_BY_ROWS ? 1 : MT); mt++) fetch_rows(to[mt], mt, chunk);
  };
  if (chunks.x + wk < chunks.y) fetch(now, chunks.x + wk);
  if (blockIdx.y == 0 && t == 0) {
#pragma unroll
    for (int mt = 0; mt < MT; mt++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const Packed &own = matrix_of(mt);
        if (own.b) prefetch(static_cast<const T *>(own.b) + from[mt][half] / K * own.rank);
      }
  }
  launch_dependents();
  if (!p.waits_late) wait_for_dependency();
  __syncthreads();

  float acc[MT][NT][4] = {};
  const T *x = static_cast<const T *>(p.x.data);
  const T *x_row[NT];
#pragma unroll
  for (int j = 0; j < NT; j++) x_row[j] = x + min(col0 + j * 8 + g, p.x.rows - 1) * p.x.stride + t * 8;

  for (int chunk = chunks.x + wk; chunk < chunks.y; chunk += WK) {
    const bool has_next = chunk + WK < chunks.y;
    if constexpr (IS_AHEAD)
      if (has_next) fetch(next, chunk + WK);
    auto multiply_part = [&](const Piece<T, FORMAT>(&pieces)[2], int mt, int part, const uint4(&right)[NT]) {
      uint32_t top[4], low[4];
      pieces[0].values(top, part);
      pieces[1].values(low, part);
      const uint32_t one[4] = {top[0], low[0], top[1], low[1]}, two[4] = {top[2], low[2], top[3], low[3]};
#pragma unroll
      for (int j = 0; j < NT; j++) {
        multiply<T>(acc[mt][j], one, right[j].x, right[j].y);
        multiply<T>(acc[mt][j], two, right[j].z, right[j].w);
      }
    };
    uint4 right[NT];
    auto load_right = [&](int part) {
#pragma unroll
      for (int j = 0; j < NT; j++)
        right[j] = *reinterpret_cast<const uint4 *>(x_row[j] + chunk * CHUNK + part * 32);
    };
    if constexpr (IS_BY_ROWS) {
#pragma unroll
      for (int mt = 0; mt < MT; mt++) {
        now[0][0].open(), now[0][1].open();
#pragma unroll
        for (int part = 0; part < 4; part++) {
          load_right(part);
          multiply_part(now[0], mt, part, right);
        }
        if (mt + 1 < MT) fetch_rows(now[0], mt + 1, chunk);
      }
    } else {
#pragma unroll
      for (int mt = 0; mt < MT; mt++) now[mt][0].open(), now[mt][1].open();
#pragma unroll
      for (int part = 0; part < 4; part++) {
        load_right(part);
#pragma unroll
        for (int mt = 0; mt < MT; mt++) multiply_part(now[mt], mt, part, right);
      }
    }
    if constexpr (IS_AHEAD) {
#pragma unroll
      for (int mt = 0; mt < MT; mt++)
#pragma unroll
        for (int half = 0; half < 2; half++) now[mt][half] = next[mt][half];
    } else if (has_next) {
      fetch(now, chunk + WK);
    }
  }

  if (p.waits_late) wait_for_dependency();
  if (blockIdx.y == 0) {
#pragma unroll
    for (int mt = 0; mt < MT; mt++) {
      auto row = [&](int half) { return (from[mt][half] - t * 32) / K; };
      add_adapter<T>(acc[mt], p, matrix_of(mt), row, col0, wk * 16, WK * 16);
    }
  }

#pragma unroll
  for (int mt = 0; mt < MT; mt++)
#pragma unroll
    for (int j = 0; j < NT; j++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        shared[(wk * ROWS + own_of(mt, i / 2)) * PAD + j * 8 + t * 2 + i % 2] = acc[mt][j][i];
  __syncthreads();
  auto sum_of = [&](int row, int col) {
    float sum = shared[row * PAD + col];
#pragma unroll
    for (int k = 1; k < WK; k++) sum += shared[(k * ROWS + row) * PAD + col];
    return sum;
  };
  auto gate_of = [](int own) { return own / 16 * 32 + own % 16; };
  auto up_of = [](int own) { return own / 16 * 32 + own % 16 + 16; };
  finish<T, IS_SWIGLU, ROWS, COLS, THREADS>(p, at, share_of(p), col0, shared, sum_of, gate_of, up_of);
}

template <typename T, int FORMAT, int MT, int NT, int WR, int WK, bool IS_SWIGLU>
int launch(const Product &p, int tiles, cudaStream_t stream) {
  constexpr int ROWS = 16 * MT * WR, COLS = 8 * NT;
  const size_t bytes = sizeof(float) * WK * ROWS * (COLS + 1);
  auto kernel = product<T, FORMAT, MT, NT, WR, WK, IS_SWIGLU>;
  if (bytes > 48 * 1024) {
    const cudaError_t code = allow_shared_memory(kernel);
    if (code != cudaSuccess) return static_cast<int>(code);
  }
  const dim3 grid(tiles, p.splits, (p.x.rows + COLS - 1) / COLS);
  return launch_after(kernel, grid, 32 * WR * WK, bytes, stream, p);
}

#ifndef PACKED_GGUF // whose files include this one for the kernel

// Rows of W that a block has in each form; the launcher in Rust computes the grid and the workspace with the same numbers.
// Forms: 0: up to 8 rows of x, small matrices; 1: up to 8, large ones; 2: up to 16; 3: up to 32; 4: 64 at a time.
template <typename T, int FORMAT> int launch_form(const Product &p, int form, bool is_swiglu, int tiles, cudaStream_t s) {
  if (is_swiglu) {
    switch (form) {
    case 0:
    case 1: return launch<T, FORMAT, 2, 1, 1, 8, true>(p, tiles, s);
    case 2: return launch<T, FORMAT, 2, 2, 2, 4, true>(p, tiles, s);
    case 3: return launch<T, FORMAT, 2, 4, 4, 2, true>(p, tiles, s);
    case 4: return launch<T, FORMAT, 2, 8, 4, 2, true>(p, tiles, s);
    }
  } else {
    switch (form) {
    case 0: return launch<T, FORMAT, 1, 1, 1, 8, false>(p, tiles, s);
    case 1: return launch<T, FORMAT, 2, 1, 1, 8, false>(p, tiles, s);
    case 2: return launch<T, FORMAT, 2, 2, 2, 4, false>(p, tiles, s);
    case 3: return launch<T, FORMAT, 2, 4, 4, 2, false>(p, tiles, s);
    case 4: return launch<T, FORMAT, 2, 8, 4, 2, false>(p, tiles, s);
    }
  }
  return static_cast<int>(cudaErrorInvalidValue);
}

template <typename T>
int launch_format(const Product &p, int format, int form, bool is_swiglu, int tiles, cudaStream_t stream) {
  switch (format) {
  case DENSE: return launch_form<T, DENSE>(p, form, is_swiglu, tiles, stream);
  case DENSE_OTHER: return launch_form<T, DENSE_OTHER>(p, form, is_swiglu, tiles, stream);
  }
  return static_cast<int>(cudaErrorInvalidValue);
}

#endif

} // namespace

#ifndef PACKED_GGUF
extern "C" int trainer_packed_product(const Product *product, int32_t format, int32_t form, int32_t is_swiglu,
                                      int32_t tiles, cudaStream_t stream) {
  const Product &p = *product;
  if (p.x.rows == 0 || tiles == 0) return 0;
  if (p.x.dtype == F16) return launch_format<__half>(p, format, form, is_swiglu != 0, tiles, stream);
  if (p.x.dtype == BF16) return launch_format<__nv_bfloat16>(p, format, form, is_swiglu != 0, tiles, stream);
  return static_cast<int>(cudaErrorInvalidValue);
}
#endif
