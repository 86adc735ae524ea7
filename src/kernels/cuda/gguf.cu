// ggml's block formats to floats, bit for bit as the CPU: the same f32 operations in the same order, none fused.
//
// Layout: a row is a whole number of blocks of 32 or 256 values (ggml-common.h); blocks lie one after the other without
// padding, so that only 2-byte alignment is sure for most of them. A lane makes 8 neighbouring values of one block and
// writes them with one 16-byte access (two for f32); neighbouring lanes take neighbouring values, so that a warp reads
// one block of 256 or 8 of 32, each of its bytes by few lanes at a time and out of the first-level cache, in the widest
// accesses that the format's alignment allows (8 bytes: Q5_1, Q4_K, Q5_K; 4: Q4_1, Q2_K; 2: the rest).
// A code becomes a float without a conversion instruction: its byte is set under the exponent of 2^23, which (with what
// is to be subtracted from the code) is subtracted again; both are exact.
// Launch: one lane for every 8 values, blocks of 256 lanes. Bound: bytes, block_bytes / block_len read and 2 or 4
// written per value; for 8 values a lane has 4 to 11 small loads and, with the addresses, 60 to 110 instructions.

#include "common.cuh"

namespace {

constexpr int THREADS = 256;

enum Kind { Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2K, Q3K, Q4K, Q5K, Q6K };

// Bytes and values of a block.
template <Kind KIND> struct Format;
template <> struct Format<Q4_0> { static constexpr int BYTES = 18, LEN = 32; };
template <> struct Format<Q4_1> { static constexpr int BYTES = 20, LEN = 32; };
template <> struct Format<Q5_0> { static constexpr int BYTES = 22, LEN = 32; };
template <> struct Format<Q5_1> { static constexpr int BYTES = 24, LEN = 32; };
template <> struct Format<Q8_0> { static constexpr int BYTES = 34, LEN = 32; };
template <> struct Format<Q2K> { static constexpr int BYTES = 84, LEN = 256; };
template <> struct Format<Q3K> { static constexpr int BYTES = 110, LEN = 256; };
template <> struct Format<Q4K> { static constexpr int BYTES = 144, LEN = 256; };
template <> struct Format<Q5K> { static constexpr int BYTES = 176, LEN = 256; };
template <> struct Format<Q6K> { static constexpr int BYTES = 210, LEN = 256; };

// 8 bytes at an address that `ALIGN` divides.
template <int ALIGN> __device__ __forceinline__ uint2 bytes8(const uint8_t *p) {
  if (ALIGN == 8) return __ldg(reinterpret_cast<const uint2 *>(p));
  if (ALIGN == 4) {
    const uint32_t *words = reinterpret_cast<const uint32_t *>(p);
    return make_uint2(__ldg(words), __ldg(words + 1));
  }
  const uint16_t *halves = reinterpret_cast<const uint16_t *>(p);
  const uint32_t a = __ldg(halves), b = __ldg(halves + 1), c = __ldg(halves + 2), d = __ldg(halves + 3);
  return make_uint2(a | b << 16, c | d << 16);
}

__device__ __forceinline__ float half_at(const uint8_t *p) {
  return __half2float(__ushort_as_half(__ldg(reinterpret_cast<const uint16_t *>(p))));
}

// The 32 bits at an even address.
__device__ __forceinline__ uint32_t word_at(const uint8_t *p) {
  const uint16_t *halves = reinterpret_cast<const uint16_t *>(p);
  return __ldg(halves) | static_cast<uint32_t>(__ldg(halves + 1)) << 16;
}

// Byte `at` of `bytes` minus `bias`, exact.
__device__ __forceinline__ float byte_to_float(uint2 bytes, int at, float bias) {
  const uint32_t word = at < 4 ? bytes.x : bytes.y;
  return __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7440 + at % 4)) - (8388608.0f + bias);
}

__device__ __forceinline__ uint2 masked(uint2 bytes, int shift, uint32_t mask) {
  return make_uint2(bytes.x >> shift & mask, bytes.y >> shift & mask);
}

// Spreads 4 bits to the bit 4 of 4 bytes.
__device__ __forceinline__ uint32_t fifth_bits(uint32_t bits) {
  return (bits & 1) << 4 | (bits & 2) << 11 | (bits & 4) << 18 | (bits & 8) << 25;
}

__device__ __forceinline__ void scaled(float (&v)[8], uint2 codes, float bias, float scale) {
#pragma unroll
  for (int i = 0; i < 8; i++) v[i] = __fmul_rn(byte_to_float(codes, i, bias), scale);
}

__device__ __forceinline__ void scaled_plus(float (&v)[8], uint2 codes, float scale, float offset) {
#pragma unroll
  for (int i = 0; i < 8; i++) v[i] = __fadd_rn(__fmul_rn(byte_to_float(codes, i, 0.0f), scale), offset);
}

__device__ __forceinline__ void scaled_minus(float (&v)[8], uint2 codes, float scale, float minimum) {
#pragma unroll
  for (int i = 0; i < 8; i++) v[i] = __fsub_rn(__fmul_rn(byte_to_float(codes, i, 0.0f), scale), minimum);
}

// Formats of 32 values: the first 16 in the low nibbles of 16 bytes, the others in the high ones.
template <int ALIGN> __device__ __forceinline__ uint2 nibbles(const uint8_t *codes, int part) {
  return masked(bytes8<ALIGN>(codes + 8 * (part % 2)), 4 * (part / 2), 0x0f0f0f0fu);
}

__device__ __forceinline__ uint2 with_fifth_bits(uint2 codes, uint32_t high, int part) {
  const uint32_t bits = high >> (8 * part);
  return make_uint2(codes.x | fifth_bits(bits), codes.y | fifth_bits(bits >> 4));
}

// Scale and minimum of one of the 8 groups of Q4_K and Q5_K, 6 bits each out of 12 bytes.
__device__ __forceinline__ void scale_and_minimum(const uint8_t *packed, int group, float &scale, float &minimum) {
  // The 3 words of the block are the same for its 32 lanes.
  const uint32_t *words = reinterpret_cast<const uint32_t *>(packed);
  const uint32_t first = __ldg(words), second = __ldg(words + 1), third = __ldg(words + 2);
  const int shift = 8 * (group % 4);
  const uint32_t a = first >> shift, b = second >> shift, c = third >> shift;
  const uint32_t s = group < 4 ? a & 63 : (c & 15) | (a >> 6 & 3) << 4;
  const uint32_t m = group < 4 ? b & 63 : (c >> 4 & 15) | (b >> 6 & 3) << 4;
  scale = static_cast<float>(s);
  minimum = static_cast<float>(m);
}

// Values 8 * part .. 8 * part + 8 of a block.
template <Kind KIND> __device__ __forceinline__ void values_of(float (&v)[8], const uint8_t *block, int part) {
  if (KIND == Q4_0) {
    scaled(v, nibbles<2>(block + 2, part), 8.0f, half_at(block));
  } else if (KIND == Q4_1) {
    scaled_plus(v, nibbles<4>(block + 4, part), half_at(block), half_at(block + 2));
  } else if (KIND == Q5_0) {
    const uint2 codes = with_fifth_bits(nibbles<2>(block + 6, part), word_at(block + 2), part);
    scaled(v, codes, 16.0f, half_at(block));
  } else if (KIND == Q5_1) {
    const uint2 codes = with_fifth_bits(nibbles<8>(block + 8, part), word_at(block + 4), part);
    scaled_plus(v, codes, half_at(block), half_at(block + 2));
  } else if (KIND == Q8_0) {
    const uint2 codes = bytes8<2>(block + 2 + 8 * part);
    scaled(v, make_uint2(codes.x ^ 0x80808080u, codes.y ^ 0x80808080u), 128.0f, half_at(block));
  } else if (KIND == Q2K) {
    // 2 halves of 128 values; in a half, 32 bytes hold 4 runs of 32 values, 2 bits each.
    const int half = part / 16, run = part % 16 / 4;
    const uint2 codes = masked(bytes8<4>(block + 16 + 32 * half + 8 * (part % 4)), 2 * run, 0x03030303u);
    const uint32_t packed = __ldg(block + part / 2);
    const float scale = __fmul_rn(half_at(block + 80), static_cast<float>(packed & 15));
    scaled_minus(v, codes, scale, __fmul_rn(half_at(block + 82), static_cast<float>(packed >> 4)));
  } else if (KIND == Q3K) {
    const int half = part / 16, run = part % 16 / 4, group = part / 2;
    const uint2 low = masked(bytes8<2>(block + 32 + 32 * half + 8 * (part % 4)), 2 * run, 0x03030303u);
    const uint2 high = masked(bytes8<2>(block + 8 * (part % 4)), 4 * half + run, 0x01010101u);
    const uint32_t low_scale = __ldg(block + 96 + group % 8) >> (4 * (group / 8)) & 15;
    const uint32_t high_scale = __ldg(block + 104 + group % 4) >> (2 * (group / 4)) & 3;
    const float scale = static_cast<float>(static_cast<int>(low_scale | high_scale << 4) - 32);
    scaled(v, make_uint2(low.x | high.x << 2, low.y | high.y << 2), 4.0f, __fmul_rn(half_at(block + 108), scale));
  } else if (KIND == Q4K || KIND == Q5K) {
    const int group = part / 4, at = 8 * (part % 4);
    float scale, minimum;
    scale_and_minimum(block + 4, group, scale, minimum);
    scale = __fmul_rn(half_at(block), scale);
    minimum = __fmul_rn(half_at(block + 2), minimum);
    const uint8_t *low = block + (KIND == Q4K ? 16 : 48);
    uint2 codes = masked(bytes8<8>(low + 32 * (group / 2) + at), 4 * (group % 2), 0x0f0f0f0fu);
    if (KIND == Q5K) {
      const uint2 high = masked(bytes8<8>(block + 16 + at), group, 0x01010101u);
      codes = make_uint2(codes.x | high.x << 4, codes.y | high.y << 4);
    }
    scaled_minus(v, codes, scale, minimum);
  } else {
    // Q6_K: 2 halves of 4 quarters of 32 values.
    const int half = part / 16, quarter = part % 16 / 4, at = 8 * (part % 4);
    const uint2 low =
        masked(bytes8<2>(block + 64 * half + 32 * (quarter % 2) + at), 4 * (quarter / 2), 0x0f0f0f0fu);
    const uint2 high = masked(bytes8<2>(block + 128 + 32 * half + at), 2 * quarter, 0x03030303u);
    const int scale = static_cast<int8_t>(__ldg(block + 192 + part / 2));
    scaled(v, make_uint2(low.x | high.x << 4, low.y | high.y << 4), 32.0f,
           __fmul_rn(half_at(block + 208), static_cast<float>(scale)));
  }
}

// 16 bytes in one access, whatever control flow surrounds it.
template <typename T> __device__ __forceinline__ void store16(T *p, const float (&in)[16 / sizeof(T)]) {
  Pack<T, 16 / sizeof(T)> pack;
#pragma unroll
  for (int i = 0; i < 16 / sizeof(T); i++) pack.v[i] = from_float<T>(in[i]);
  const uint4 v = *reinterpret_cast<const uint4 *>(&pack);
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

template <Kind KIND, typename T>
__global__ void __launch_bounds__(THREADS)
    dequantize(T *out, int64_t stride, uint32_t parts_per_row, int64_t parts, const uint8_t *__restrict__ blocks,
               bool is_flat, bool is_wide) {
  constexpr int PARTS = Format<KIND>::LEN / 8;
  const int64_t part = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (part >= parts) return;
  float v[8];
  values_of<KIND>(v, blocks + part / PARTS * Format<KIND>::BYTES, static_cast<int>(part % PARTS));
  if (is_flat) {
    out += 8 * part;
  } else {
    // Not flat: the host made sure that 32 bits count the parts.
    const uint32_t row = static_cast<uint32_t>(part) / parts_per_row;
    out += row * stride + 8 * (static_cast<uint32_t>(part) - row * parts_per_row);
  }
  if (is_wide) {
    constexpr int N = 16 / sizeof(T);
#pragma unroll
    for (int at = 0; at < 8; at += N) {
      float piece[N];
#pragma unroll
      for (int i = 0; i < N; i++) piece[i] = v[at + i];
      store16(out + at, piece);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++) out[i] = from_float<T>(v[i]);
  }
}

template <Kind KIND> int launch(const Matrix &out, const uint8_t *blocks, int64_t first_row, cudaStream_t stream) {
  const int64_t cols = out.cols, parts = cols / 8 * out.rows, grid = (parts + THREADS - 1) / THREADS;
  const bool is_flat = out.stride == cols || out.rows == 1;
  if (cols % Format<KIND>::LEN != 0 || grid > INT32_MAX || (!is_flat && parts > UINT32_MAX))
    return static_cast<int>(cudaErrorInvalidValue);
  blocks += first_row * (cols / Format<KIND>::LEN) * Format<KIND>::BYTES;
  const bool is_wide = is_aligned(out, out.dtype == F32 ? 4 : 8);
  WITH_TYPE(out.dtype, T,
            dequantize<KIND, T><<<grid, THREADS, 0, stream>>>(static_cast<T *>(out.data), out.stride, cols / 8, parts,
                                                              blocks, is_flat, is_wide))
  return LAUNCHED();
}

} // namespace

// `kind` counts the formats in the order of `Kind`; `blocks` is aligned to 16 bytes.
extern "C" int trainer_dequantize_gguf(Matrix out, int32_t kind, const void *blocks, int64_t first_row,
                                       cudaStream_t stream) {
  if (out.rows == 0 || out.cols == 0) return 0;
  const uint8_t *bytes = static_cast<const uint8_t *>(blocks);
  if (reinterpret_cast<uintptr_t>(bytes) % 16 != 0) return static_cast<int>(cudaErrorMisalignedAddress);
  switch (kind) {
  case Q4_0: return launch<Q4_0>(out, bytes, first_row, stream);
  case Q4_1: return launch<Q4_1>(out, bytes, first_row, stream);
  case Q5_0: return launch<Q5_0>(out, bytes, first_row, stream);
  case Q5_1: return launch<Q5_1>(out, bytes, first_row, stream);
  case Q8_0: return launch<Q8_0>(out, bytes, first_row, stream);
  case Q2K: return launch<Q2K>(out, bytes, first_row, stream);
  case Q3K: return launch<Q3K>(out, bytes, first_row, stream);
  case Q4K: return launch<Q4K>(out, bytes, first_row, stream);
  case Q5K: return launch<Q5K>(out, bytes, first_row, stream);
  case Q6K: return launch<Q6K>(out, bytes, first_row, stream);
  default: return static_cast<int>(cudaErrorInvalidValue);
  }
}
