// 4-bit codes with one f32 maximum for each block of 64 (NF4, FP4): to floats and back, bit for bit as the CPU.
//
// Layout: two codes a byte, the first in the high nibble; blocks run over the flattened row-major matrix. A value is
// values[code] * maximum, one f32 multiplication that is then rounded to the result's type. A maximum is stored as f32,
// or as an 8-bit code: map[code] * absmax[block / 256] + offset, a multiplication and an addition (never fused).
//
// dequantize_wide: rows of whole blocks. A warp makes 4 runs of 32 * N values of one row, N = 16 bytes of the result:
// in each run a lane reads N codes (4 or 2 bytes, the warp 128 or 64 in a row), looks their values up in the other
// lanes' registers (lane i holds values[i % 16]; a shuffle has no bank conflicts), and writes 16 bytes, the warp 512 in
// a row. The map of the maxima (1 KB) is read through the first-level cache, where it stays.
// Bound: bytes, 0.52 read and 2 written per 16-bit value; about 10 instructions per value, one of them a shuffle: two
// fifths of what an H100 issues in the time that its memory takes.
// dequantize_any: any columns, start and stride; a thread makes one value.
// quantize_blocks: 8 lanes take a block of 64, 8 values each; a last block that is shorter belongs to one thread.
// Bound: bytes (2.5 or 4.5 per value) where the 15 comparisons per value allow it; it runs once, at a model's
// loading.
// quantize_maxima_blocks: 256 threads take 256 maxima; 0.4 % of the work above.

#include "common.cuh"

namespace {

constexpr int BLOCK = 64, NESTED = 256, THREADS = 256, RUNS = 4;

struct Absmax {
  const float *plain;
  const uint8_t *codes;
  const float *nested, *map;
  float offset;
};

__device__ __forceinline__ float maximum_of(const Absmax &a, int64_t block) {
  if (a.plain) return __ldg(a.plain + block);
  float unit = __ldg(a.map + __ldg(a.codes + block));
  return __fadd_rn(__fmul_rn(unit, __ldg(a.nested + block / NESTED)), a.offset);
}

// 16 bytes in one access, whatever control flow surrounds it.
template <typename T> __device__ __forceinline__ void store16(T *p, const float (&in)[16 / sizeof(T)]) {
  Pack<T, 16 / sizeof(T)> pack;
#pragma unroll
  for (int i = 0; i < 16 / sizeof(T); i++) pack.v[i] = from_float<T>(in[i]);
  const uint4 v = *reinterpret_cast<const uint4 *>(&pack);
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// `N` codes of a lane: one access. The compiler may not move it down to its use.
template <int N> __device__ __forceinline__ uint32_t codes_at(const uint8_t *p) {
  if (N == 8) {
    uint32_t codes;
    asm volatile("ld.global.nc.b32 %0, [%1];" : "=r"(codes) : "l"(p));
    return codes;
  }
  uint16_t codes;
  asm volatile("ld.global.nc.b16 %0, [%1];" : "=h"(codes) : "l"(p));
  return codes;
}

template <typename T, bool IS_NESTED>
__global__ void __launch_bounds__(THREADS, 4)
    dequantize_wide(T *out, int64_t stride, int64_t cols, uint32_t tiles_per_row, uint32_t tiles,
                    const uint8_t *__restrict__ packed, Absmax absmax, const float *__restrict__ values,
                    int64_t first) {
  constexpr int N = 16 / sizeof(T), RUN = 32 * N;
  const int lane = threadIdx.x % 32;
  const uint32_t tile = blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
  if (tile >= tiles) return;
  const uint32_t row = tile / tiles_per_row;
  const int64_t column = static_cast<int64_t>(tile - row * tiles_per_row) * (RUNS * RUN) + lane * N;
  const int64_t flat = first + row * cols + column;
  const float value = __ldg(values + lane % 16);
  out += row * stride + column;
  packed += flat / 2;

  // All loads of a kind before the first use of one; lanes beyond the row repeat its last codes.
  const int64_t last = cols - N - column;
  const int reach = last < RUNS * RUN ? static_cast<int>(last) : RUNS * RUN;
  const int in_block = flat % BLOCK, in_nested = flat % (BLOCK * NESTED);
  uint32_t codes[RUNS];
  float maximum[RUNS];
  uint8_t unit[RUNS];
  if (IS_NESTED) {
    const uint8_t *from = absmax.codes + flat / BLOCK;
    const float *nested = absmax.nested + flat / (BLOCK * NESTED);
#pragma unroll
    for (int run = 0; run < RUNS; run++) {
      const int ahead = min(run * RUN, reach);
      unit[run] = __ldg(from + ((in_block + ahead) >> 6));
      maximum[run] = __ldg(nested + ((in_nested + ahead) >> 14));
    }
  } else {
    const float *from = absmax.plain + flat / BLOCK;
#pragma unroll
    for (int run = 0; run < RUNS; run++) maximum[run] = __ldg(from + ((in_block + min(run * RUN, reach)) >> 6));
  }
#pragma unroll
  for (int run = 0; run < RUNS; run++) codes[run] = codes_at<N>(packed + (min(run * RUN, reach) >> 1));
  if (IS_NESTED) {
    float units[RUNS];
#pragma unroll
    for (int run = 0; run < RUNS; run++) units[run] = __ldg(absmax.map + unit[run]);
#pragma unroll
    for (int run = 0; run < RUNS; run++)
      maximum[run] = __fadd_rn(__fmul_rn(units[run], maximum[run]), absmax.offset);
  }
#pragma unroll
  for (int run = 0; run < RUNS; run++) {
    float v[N];
#pragma unroll
    for (int i = 0; i < N; i++) {
      // The shuffle takes the low 4 bits. Within a byte the high nibble is first.
      float looked_up = __shfl_sync(0xffffffffu, value, codes[run] >> (4 * (i ^ 1)), 16);
      v[i] = __fmul_rn(looked_up, maximum[run]);
    }
    if (run * RUN <= reach) store16(out + run * RUN, v);
  }
}

template <typename T>
__global__ void __launch_bounds__(THREADS)
    dequantize_any(T *out, int64_t stride, int64_t rows, int64_t cols, const uint8_t *__restrict__ packed,
                   Absmax absmax, const float *__restrict__ values, int64_t first) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * THREADS;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x; i < rows * cols; i += step) {
    const int64_t row = i / cols, flat = first + i;
    const int code = packed[flat / 2] >> (flat % 2 == 0 ? 4 : 0) & 15;
    out[row * stride + (i - row * cols)] = from_float<T>(__fmul_rn(values[code], maximum_of(absmax, flat / BLOCK)));
  }
}

template <typename T>
int dequantize(const Matrix &out, const uint8_t *packed, const Absmax &absmax, const float *values, int64_t first,
               cudaStream_t stream) {
  constexpr int N = 16 / sizeof(T), TILE = RUNS * 32 * N;
  T *data = static_cast<T *>(out.data);
  int64_t rows = out.rows, cols = out.cols;
  const bool is_wide = cols % BLOCK == 0 && is_aligned(out, N) && reinterpret_cast<uintptr_t>(packed) % 4 == 0;
  if (!is_wide) {
    int64_t blocks = (rows * cols + THREADS - 1) / THREADS;
    dequantize_any<T><<<blocks < 65536 ? blocks : 65536, THREADS, 0, stream>>>(data, out.stride, rows, cols, packed,
                                                                               absmax, values, first);
    return LAUNCHED();
  }
  if (out.stride == cols) {
    cols *= rows;
    rows = 1;
  }
  const int64_t tiles_per_row = (cols + TILE - 1) / TILE, tiles = tiles_per_row * rows;
  if (tiles > INT32_MAX) return static_cast<int>(cudaErrorInvalidValue);
  const int64_t grid = (tiles + THREADS / 32 - 1) / (THREADS / 32);
  if (absmax.plain)
    dequantize_wide<T, false><<<grid, THREADS, 0, stream>>>(data, out.stride, cols, tiles_per_row, tiles, packed,
                                                            absmax, values, first);
  else
    dequantize_wide<T, true><<<grid, THREADS, 0, stream>>>(data, out.stride, cols, tiles_per_row, tiles, packed, absmax,
                                                           values, first);
  return LAUNCHED();
}

// The values of a type in ascending order (equal ones in the order of their codes), and what follows from them.
struct Book {
  uint8_t ascending[16];
  float midpoints[15];
};

constexpr float NF4[16] = {-1.0f,
                           -0.6961928009986877f,
                           -0.5250730514526367f,
                           -0.39491748809814453f,
                           -0.28444138169288635f,
                           -0.18477343022823334f,
                           -0.09105003625154495f,
                           0.0f,
                           0.07958029955625534f,
                           0.16093020141124725f,
                           0.24611230194568634f,
                           0.33791524171829224f,
                           0.44070982933044434f,
                           0.5626170039176941f,
                           0.7229568362236023f,
                           1.0f};
constexpr float FP4_TWELFTHS[8] = {0.0f, 0.0625f, 8.0f, 12.0f, 4.0f, 6.0f, 2.0f, 3.0f};

constexpr float value_of(bool is_fp4, int code) {
  if (!is_fp4) return NF4[code];
  float value = FP4_TWELFTHS[code % 8] / 12.0f;
  return code > 8 ? -value : value;
}

constexpr Book book_of(bool is_fp4) {
  Book book{};
  for (int code = 0; code < 16; code++) {
    int at = code;
    for (; at > 0 && value_of(is_fp4, book.ascending[at - 1]) > value_of(is_fp4, code); at--)
      book.ascending[at] = book.ascending[at - 1];
    book.ascending[at] = static_cast<uint8_t>(code);
  }
  for (int i = 0; i < 15; i++) {
    double low = value_of(is_fp4, book.ascending[i]), high = value_of(is_fp4, book.ascending[i + 1]);
    book.midpoints[i] = static_cast<float>((low + high) * 0.5);
  }
  return book;
}

// What a maximum is divided by at least.
constexpr float TINY = 1e-38f;

// The code nearest to a value, the lower one at a midpoint.
template <bool IS_FP4> __device__ __forceinline__ uint32_t nearest_code(float value) {
  constexpr Book book = book_of(IS_FP4);
  int rank = 0;
#pragma unroll
  for (int i = 0; i < 15; i++) rank += value > book.midpoints[i];
  if (!IS_FP4) return rank;
  uint64_t codes = 0;
#pragma unroll
  for (int i = 0; i < 16; i++) codes |= static_cast<uint64_t>(book.ascending[i]) << (4 * i);
  return codes >> (4 * rank) & 15;
}

template <typename T, bool IS_FP4>
__device__ void quantize_short(uint8_t *packed, float *absmax, const T *x, int count) {
  float largest = 0.0f;
  for (int i = 0; i < count; i++) largest = fmaxf(largest, fabsf(to_float(x[i])));
  const float maximum = largest > TINY ? largest : TINY;
  *absmax = maximum;
  for (int i = 0; i < count; i += 2) {
    uint32_t first = nearest_code<IS_FP4>(__fdiv_rn(to_float(x[i]), maximum));
    uint32_t second = nearest_code<IS_FP4>(i + 1 < count ? __fdiv_rn(to_float(x[i + 1]), maximum) : 0.0f);
    packed[i / 2] = static_cast<uint8_t>(first << 4 | second);
  }
}

template <typename T, bool IS_FP4>
__global__ void __launch_bounds__(THREADS)
    quantize_blocks(uint8_t *packed, float *absmax, const T *__restrict__ x, int64_t count, bool is_wide) {
  constexpr int LANES = 8, N = BLOCK / LANES, STEP = 16 / sizeof(T);
  const int64_t block = (static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x) / LANES;
  const int part = threadIdx.x % LANES;
  const int64_t start = block * BLOCK;
  const bool is_full = start + BLOCK <= count;
  float v[N] = {};
  if (is_full) {
    const T *from = x + start + part * N;
    if (is_wide) {
#pragma unroll
      for (int at = 0; at < N; at += STEP) {
        const uint4 bytes = __ldg(reinterpret_cast<const uint4 *>(from + at));
        const Pack<T, STEP> pack = *reinterpret_cast<const Pack<T, STEP> *>(&bytes);
#pragma unroll
        for (int i = 0; i < STEP; i++) v[at + i] = to_float(pack.v[i]);
      }
    } else {
      for (int i = 0; i < N; i++) v[i] = to_float(from[i]);
    }
  }
  float largest = 0.0f;
#pragma unroll
  for (int i = 0; i < N; i++) largest = fmaxf(largest, fabsf(v[i]));
#pragma unroll
  for (int step = LANES / 2; step > 0; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
  if (!is_full) {
    if (part == 0 && start < count)
      quantize_short<T, IS_FP4>(packed + start / 2, absmax + block, x + start, static_cast<int>(count - start));
    return;
  }
  const float reciprocal = __fdiv_rn(1.0f, largest > TINY ? largest : TINY);
  uint32_t codes = 0;
#pragma unroll
  for (int i = 0; i < N; i++) {
    const float scaled = fminf(fmaxf(__fmul_rn(v[i], reciprocal), -1.0f), 1.0f);
    codes |= nearest_code<IS_FP4>(scaled) << (4 * (i ^ 1));
  }
  if (part == 0) absmax[block] = largest;
  *reinterpret_cast<uint32_t *>(packed + (start + part * N) / 2) = codes;
}

template <typename T>
int quantize(uint8_t *packed, float *absmax, const T *x, int64_t count, bool is_fp4, cudaStream_t stream) {
  const bool is_wide = reinterpret_cast<uintptr_t>(x) % 16 == 0;
  if (reinterpret_cast<uintptr_t>(packed) % 4 != 0) return static_cast<int>(cudaErrorInvalidValue);
  const int64_t blocks = (count + BLOCK - 1) / BLOCK, grid = (blocks * 8 + THREADS - 1) / THREADS;
  if (grid > INT32_MAX) return static_cast<int>(cudaErrorInvalidValue);
  if (is_fp4)
    quantize_blocks<T, true><<<grid, THREADS, 0, stream>>>(packed, absmax, x, count, is_wide);
  else
    quantize_blocks<T, false><<<grid, THREADS, 0, stream>>>(packed, absmax, x, count, is_wide);
  return LAUNCHED();
}

// The index of the nearest value of the ascending map, ties to the lower one, after the value was rounded to one of
// 65,536 even steps.
__device__ __forceinline__ uint8_t nearest_in_map(const float *map, float value) {
  constexpr float STEPS = 65535.0f;
  const float steps = roundf(__fmul_rn(__fmul_rn(__fadd_rn(value, 1.0f), 0.5f), STEPS));
  value = __fsub_rn(__fmul_rn(__fdiv_rn(steps, STEPS), 2.0f), 1.0f);
  int above = 0;
#pragma unroll
  for (int step = NESTED / 2; step > 0; step /= 2) above += map[above + step - 1] < value ? step : 0;
  above += map[above] < value;
  above = min(max(above, 1), NESTED - 1);
  const bool is_above = __fsub_rn(map[above], value) < __fsub_rn(value, map[above - 1]);
  return static_cast<uint8_t>(is_above ? above : above - 1);
}

__global__ void __launch_bounds__(NESTED)
    quantize_maxima_blocks(uint8_t *codes, float *nested_absmax, const float *__restrict__ maxima,
                           const float *__restrict__ map, float offset, int64_t count) {
  __shared__ float values[NESTED];
  __shared__ float scratch[NESTED / 32];
  const int64_t at = static_cast<int64_t>(blockIdx.x) * NESTED + threadIdx.x;
  values[threadIdx.x] = map[threadIdx.x];
  const float difference = at < count ? __fsub_rn(maxima[at], offset) : 0.0f;
  float largest = warp_max(fabsf(difference));
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = largest;
  __syncthreads();
  largest = 0.0f;
#pragma unroll
  for (int i = 0; i < NESTED / 32; i++) largest = fmaxf(largest, scratch[i]);
  if (threadIdx.x == 0) nested_absmax[blockIdx.x] = largest;
  if (at < count) codes[at] = nearest_in_map(values, __fdiv_rn(difference, largest > 0.0f ? largest : 1.0f));
}

} // namespace

extern "C" int trainer_dequantize_nf4(Matrix out, const void *packed, const float *absmax, const void *codes,
                                      const float *nested_absmax, const float *map, float offset, const float *values,
                                      int64_t first_row, cudaStream_t stream) {
  if (out.rows == 0 || out.cols == 0) return 0;
  const Absmax maxima{absmax, static_cast<const uint8_t *>(codes), nested_absmax, map, offset};
  WITH_TYPE(out.dtype, T, return dequantize<T>(out, static_cast<const uint8_t *>(packed), maxima, values,
                                               first_row * out.cols, stream))
}

extern "C" int trainer_quantize_nf4(void *packed, float *absmax, const void *x, int32_t dtype, int64_t count,
                                    int32_t is_fp4, cudaStream_t stream) {
  if (count == 0) return 0;
  WITH_TYPE(dtype, T, return quantize<T>(static_cast<uint8_t *>(packed), absmax, static_cast<const T *>(x), count,
                                         is_fp4 != 0, stream))
}

extern "C" int trainer_quantize_maxima(void *codes, float *nested_absmax, const float *maxima, const float *map,
                                       float offset, int64_t count, cudaStream_t stream) {
  if (count == 0) return 0;
  const int64_t grid = (count + NESTED - 1) / NESTED;
  if (grid > INT32_MAX) return static_cast<int>(cudaErrorInvalidValue);
  quantize_maxima_blocks<<<grid, NESTED, 0, stream>>>(static_cast<uint8_t *>(codes), nested_absmax, maxima, map, offset,
                                                      count);
  return LAUNCHED();
}
