// GGUF blocks as the weights of packed products: what a lane reads of them, and the values that it makes of it.
//
// A lane has 32 neighbouring columns of a row: a block of the formats of 32 values; of those of 256 a quarter of one of the two
// halves, whose codes it shares with other quarters (bytes come once from memory, and to each lane from the first-level cache).
// Blocks lie at multiples of 2, 4, 8 or 16 bytes, so a run of bytes is read as the aligned words that hold it, 8 or 16 bytes at
// a time, and its own words are cut out of them in registers.
//
// The values have the bits of gguf.cu (a zero may have the other sign, which no sum shows), with fewer operations: a code of up
// to 7 bits is set into the mantissa of 128, one of 8 bits into that of 2^15, and where no offset follows, one fused operation
// multiplies and subtracts what the mantissa and the format's bias add. With f16 scales of 11 bits, group scales of up to 8, and
// biases of few bits all of these products are exact in f32. Where a minimum follows, code times scale is exact, and so the
// fused operation rounds once, as the subtraction in gguf.cu does.
//
// Instructions of a value: 2.9 (Q4_0) to 4.6 (Q3_K, Q6_K), half of them on the pipe of integers.
#pragma once

#include "packed_product.cuh"

// In the order of gguf.cu.
enum GgufFormat { Q4_0 = GGUF, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K };

// Lists of types: each has files of its own, for they take long to compile.
template <int... TYPES> struct GgufTypes {};
using SmallBlocks = GgufTypes<Q4_0, Q4_1, Q5_0, Q5_1, Q8_0>; // of 32 values
using LargeBlocks = GgufTypes<Q2_K, Q3_K, Q4_K, Q5_K, Q6_K>; // of 256

#ifdef __CUDACC__
namespace {

// `BYTES` bytes at an address that `ALIGN` divides.
template <int BYTES, int ALIGN> struct Run {
  static constexpr bool IS_SHIFTED = ALIGN < 8;
  // Units of 8 bytes that hold them wherever they begin. Nothing may be needed of the last, which may lie behind the matrix.
  static constexpr int UNITS = (BYTES + (IS_SHIFTED ? 8 - ALIGN : 0) + 7) / 8;
  static constexpr bool IS_LAST_FREE = BYTES <= 8 * (UNITS - 1);
  uint32_t raw[2 * UNITS];
  uint32_t shift; // bytes of the first unit before the run

  __device__ __forceinline__ void fetch(const uint8_t *p) {
    if (ALIGN == 16) {
#pragma unroll
      for (int i = 0; i < UNITS / 2; i++) {
        const uint4 v = __ldg(reinterpret_cast<const uint4 *>(p) + i);
        raw[4 * i] = v.x, raw[4 * i + 1] = v.y, raw[4 * i + 2] = v.z, raw[4 * i + 3] = v.w;
      }
      return;
    }
    shift = IS_SHIFTED ? static_cast<uint32_t>(reinterpret_cast<uintptr_t>(p)) & 7 : 0;
    const uint2 *units = reinterpret_cast<const uint2 *>(p - shift);
#pragma unroll
    for (int i = 0; i < UNITS; i++) {
      const bool is_free = IS_LAST_FREE && i == UNITS - 1 && shift + BYTES <= 8 * (UNITS - 1);
      const uint2 v = __ldg(units + (is_free ? i - 1 : i));
      raw[2 * i] = v.x, raw[2 * i + 1] = v.y;
    }
  }

  // Bytes 4 i .. 4 i + 3; those behind the run are anything.
  __device__ __forceinline__ uint32_t word(int i) const {
    if (!IS_SHIFTED) return raw[i];
    constexpr int LAST = 2 * UNITS - 1;
    const bool is_odd = shift & 4;
    const uint32_t low = is_odd ? raw[i + 1] : raw[i];
    if (ALIGN == 4) return low;
    const uint32_t high = is_odd ? raw[i + 2 < LAST ? i + 2 : LAST] : raw[i + 1];
    return __byte_perm(low, high, shift & 2 ? 0x5432 : 0x3210);
  }
};

__device__ __forceinline__ uint32_t short_at(const uint8_t *p) { return __ldg(reinterpret_cast<const uint16_t *>(p)); }
__device__ __forceinline__ uint32_t word_at(const uint8_t *p) { return __ldg(reinterpret_cast<const uint32_t *>(p)); }

// The f16 in the low half of a word.
__device__ __forceinline__ float half_of(uint32_t bits) {
  return __half2float(__ushort_as_half(static_cast<uint16_t>(bits)));
}

// Byte `at` of a word, below 128, plus 128.
__device__ __forceinline__ float above_128(uint32_t word, int at) {
  return __uint_as_float(__byte_perm(word, 0x43000000u, 0x7044 | at << 8));
}

// Byte `at` of a word plus 2^15.
__device__ __forceinline__ float above_32768(uint32_t word, int at) {
  return __uint_as_float(__byte_perm(word, 0x47000000u, 0x7404 | at << 4));
}

// The lowest 4 bits as the bits 4 of 4 bytes.
__device__ __forceinline__ uint32_t fifth_bits(uint32_t bits) { return (bits & 15) * 0x02040810u & 0x10101010u; }

// Rotated to the left by -31 .. 31.
__device__ __forceinline__ uint32_t rotated(uint32_t word, int by) { return __funnelshift_l(word, word, by & 31); }

// (128 + code) scale + offset of 8 codes below 128.
template <typename T>
__device__ __forceinline__ void scaled(uint32_t (&out)[4], const uint32_t (&codes)[2], float scale, float offset) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const uint32_t word = codes[i / 2];
    out[i] = pack_pair<T>(__fmaf_rn(above_128(word, i % 2 * 2), scale, offset),
                          __fmaf_rn(above_128(word, i % 2 * 2 + 1), scale, offset));
  }
}

// The offset with which `scaled` makes (code - BIAS) scale.
template <int BIAS> __device__ __forceinline__ float offset_of(float scale) { return -static_cast<float>(128 + BIAS) * scale; }

// code scale + offset.
template <typename T>
__device__ __forceinline__ void scaled_plus(uint32_t (&out)[4], const uint32_t (&codes)[2], float scale, float offset) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const uint32_t word = codes[i / 2];
    out[i] = pack_pair<T>(__fmaf_rn(above_128(word, i % 2 * 2) - 128.0f, scale, offset),
                          __fmaf_rn(above_128(word, i % 2 * 2 + 1) - 128.0f, scale, offset));
  }
}

// Formats of 32 values: of 16 bytes the low nibbles are the first half.
template <int FIRST, typename Bytes>
__device__ __forceinline__ void nibbles(uint32_t (&codes)[2], const Bytes &run, int part) {
#pragma unroll
  for (int i = 0; i < 2; i++) codes[i] = run.word(FIRST + part % 2 * 2 + i) >> (part / 2 * 4) & 0x0f0f0f0fu;
}
__device__ __forceinline__ void add_fifth_bits(uint32_t (&codes)[2], uint32_t high, int part) {
#pragma unroll
  for (int i = 0; i < 2; i++) codes[i] |= fifth_bits(high >> (part * 8 + i * 4));
}

template <typename T> struct Piece<T, Q4_0> {
  Run<16, 2> run;
  uint32_t of_block;
  float scale;

  __device__ __forceinline__ void fetch(const Packed &w, int64_t flat) {
    const uint8_t *block = w.data + (flat >> 5) * 18;
    of_block = short_at(block);
    run.fetch(block + 2);
  }
  __device__ __forceinline__ void open() { scale = half_of(of_block); }
  __device__ __forceinline__ void values(uint32_t (&out)[4], int part) const {
    uint32_t codes[2];
    nibbles<0>(codes, run, part);
    scaled<T>(out, codes, scale, offset_of<8>(scale));
  }
};

template <typename T> struct Piece<T, Q4_1> {
  Run<20, 4> run; // scale and minimum, codes
  float scale, minimum;

  __device__ __forceinline__ void fetch(const Packed &w, int64_t flat) { run.fetch(w.data + (flat >> 5) * 20); }
  __device__ __forceinline__ void open() { scale = half_of(run.word(0)), minimum = half_of(run.word(0) >> 16); }
  __device__ __forceinline__ void values(uint32_t (&out)[4], int part) const {
    uint32_t codes[2];
    nibbles<1>(codes, run, part);
    scaled_plus<T>(out, codes, scale, minimum);
  }
};

template <typename T> struct Piece<T, Q5_0> {
  Run<20, 2> run; // fifth bits, codes
  uint32_t of_block;
  float scale;

  __device__ __forceinline__ void fetch(const Packed &w, int64_t flat) {
    const uint8_t *block = w.data + (flat >> 5) * 22;
    of_block = short_at(block);
    run.fetch(block + 2);
  }
  __device__ __forceinline__ void open() { scale = half_of(of_block); }
  __device__ __forceinline__ void values(uint32_t (&out)[4], int part) const {
    uint32_t codes[2];
    nibbles<1>(codes, run, part);
    add_fifth_bits(codes, run.word(0), part);
    scaled<T>(out, codes, scale, offset_of<16>(scale));
  }
};

template <typename T> struct Piece<T, Q5_1> {
  Run<24, 8> run; // scale and minimum, fifth bits, codes
  float scale, minimum;

  __device__ __forceinline__ void fetch(const Packed &w, int64_t flat) { run.fetch(w.data + (flat >> 5) * 24); }
  __device__ __forceinline__ void open() { scale = half_of(run.word(0)), minimum = half_of(run.word(0) >> 16); }
  __device__ __forceinline__ void values(uint32_t (&out)[4], int part) const {
    uint32_t codes[2];
    nibbles<2>(codes, run, part);
    add_fifth_bits(codes, run.word(1), part);
    scaled_plus<T>(out, codes, scale, minimum);
  }
};

template <typename T> struct Piece<T, Q8_0> {
  Run<32, 2> run;
  uint32_t of_block;
  float scale;

  __device__ __forceinline__ void fetch(const Packed &w, int64_t flat) {
    const uint8_t *block = w.data + (flat >> 5) * 34;
    of_block = short_at(block);
    run.fetch(block + 2);
  }
  __device__ __forceinline__ void open() { scale = half_of(of_block); }
  __device__ __forceinline__ void values(uint32_t (&out)[4], int part) const {
    const float offset = -32896.0f * scale; // 2^15 + 128: the highest bit is a sign
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const uint32_t word = run.word(part * 2 + i / 2) ^ 0x80808080u;
      out[i] = pack_pair<T>(__fmaf_rn(above_32768(word, i % 2 * 2), scale, offset),
                            __fmaf_rn(above_32768(word, i % 2 * 2 + 1), scale, offset));
    }
  }
};

// Where 32 columns lie in blocks of 256 values: the block, its half and the quarter there.
struct Quarter {
  const uint8_t *block;
  int half, quarter;

  __device__ __forceinline__ Quarter(const Packed &w, int64_t flat, int bytes)
      : block(w.data + (flat >> 8) * bytes), half(static_cast<int>(flat) >> 7 & 1), quarter(static_cast<int>(flat) >> 5 & 3) {}
};

// Two groups of 16 values.
template <typename T> struct Piece<T, Q2_K> {
  Run<32, 4> run;
  uint32_t scales, of_block; // two bytes of a scale and a minimum each; the f16 scale and minimum of these
  float scale[2], offset[2];
  int shift;

  __device__ __forceinline__ void fetch(const Packed &w, int64_t flat) {
    const Quarter at(w, flat, 84);
    scales = short_at(at.block + 8 * at.half + 2 * at.quarter);
    of_block = word_at(at.block + 80);
    run.fetch(at.block + 16 + 32 * at.half);
    shift = 2 * at.quarter;
  }
  __device__ __forceinline__ void open() {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      scale[i] = __fmul_rn(half_of(of_block), static_cast<float>(scales >> (8 * i) & 15));
      offset[i] = -__fmul_rn(half_of(of_block >> 16), static_cast<float>(scales >> (8 * i + 4) & 15));
    }
  }
  __device__ __forceinline__ void values(uint32_t (&out)[4], int part) const {
    uint32_t codes[2];
#pragma unroll
    for (int i = 0; i < 2; i++) codes[i] = run.word(part * 2 + i) >> shift & 0x03030303u;
    scaled_plus<T>(out, codes, scale[part / 2], offset[part / 2]);
  }
};

template <typename T> struct Piece<T, Q3_K> {
  Run<32, 2> run, mask;
  uint32_t low_scales, high_scales, of_block;
  float scale[2];
  int half, quarter;

  __device__ __forceinline__ void fetch(const Packed &w, int64_t flat) {
    const Quarter at(w, flat, 110);
    half = at.half, quarter = at.quarter;
    low_scales = short_at(at.block + 96 + 2 * quarter);
    high_scales = short_at(at.block + 104 + 2 * (quarter % 2));
    of_block = short_at(at.block + 108);
    mask.fetch(at.block);
    run.fetch(at.block + 32 + 32 * half);
  }
  __device__ __forceinline__ void open() {
    // Groups 8 half + 2 quarter and the next, 6 bits with an offset of 32.
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const uint32_t low = low_scales >> (8 * i + 4 * half) & 15;
      const uint32_t high = high_scales >> (8 * i + 4 * half + quarter / 2 * 2) & 3;
      scale[i] = __fmul_rn(half_of(of_block), static_cast<float>(static_cast<int>(low | high << 4) - 32));
    }
  }
  __device__ __forceinline__ void values(uint32_t (&out)[4], int part) const {
    uint32_t codes[2];
#pragma unroll
    for (int i = 0; i < 2; i++)
      codes[i] = run.word(part * 2 + i) >> (2 * quarter) & 0x03030303u |
                 rotated(mask.word(part * 2 + i), 2 - 4 * half - quarter) & 0x04040404u;
    scaled<T>(out, codes, scale[part / 2], offset_of<4>(scale[part / 2]));
  }
};

// The f16 scale and minimum of a block with 6 bits of each for its 8 groups; those of the group of a quarter.
struct GroupScale {
  uint4 header;
  float scale, offset;

  __device__ __forceinline__ void fetch(const Quarter &at) {
    header = __ldg(reinterpret_cast<const uint4 *>(at.block));
  }
  __device__ __forceinline__ void open(int half, int quarter) {
    // In the second half the lower 4 bits are in the third word, the others above the 6 bits of the first half.
    const uint32_t a = header.y >> (8 * quarter), b = header.z >> (8 * quarter), c = header.w >> (8 * quarter);
    const uint32_t mask = half ? 15 : 63, more = half ? 48 : 0;
    const uint32_t first = half ? c : a, second = half ? c >> 4 : b;
    scale = __fmul_rn(half_of(header.x), static_cast<float>(first & mask | a >> 2 & more));
    offset = -__fmul_rn(half_of(header.x >> 16), static_cast<float>(second & mask | b >> 2 & more));
  }
};

template <typename T> struct Piece<T, Q4_K> {
  Run<32, 16> run;
  GroupScale scales;
  int half, quarter;

  __device__ __forceinline__ void fetch(const Packed &w, int64_t flat) {
    const Quarter at(w, flat, 144);
    half = at.half, quarter = at.quarter;
    scales.fetch(at);
    run.fetch(at.block + 16 + 64 * half + 32 * (quarter / 2));
  }
  __device__ __forceinline__ void open() { scales.open(half, quarter); }
  __device__ __forceinline__ void values(uint32_t (&out)[4], int part) const {
    uint32_t codes[2];
#pragma unroll
    for (int i = 0; i < 2; i++) codes[i] = run.word(part * 2 + i) >> (quarter % 2 * 4) & 0x0f0f0f0fu;
    scaled_plus<T>(out, codes, scales.scale, scales.offset);
  }
};

template <typename T> struct Piece<T, Q5_K> {
  Run<32, 16> run, high;
  GroupScale scales;
  int half, quarter;

  __device__ __forceinline__ void fetch(const Packed &w, int64_t flat) {
    const Quarter at(w, flat, 176);
    half = at.half, quarter = at.quarter;
    scales.fetch(at);
    high.fetch(at.block + 16);
    run.fetch(at.block + 48 + 64 * half + 32 * (quarter / 2));
  }
  __device__ __forceinline__ void open() { scales.open(half, quarter); }
  __device__ __forceinline__ void values(uint32_t (&out)[4], int part) const {
    uint32_t codes[2];
#pragma unroll
    for (int i = 0; i < 2; i++)
      codes[i] = run.word(part * 2 + i) >> (quarter % 2 * 4) & 0x0f0f0f0fu |
                 rotated(high.word(part * 2 + i), 4 - 4 * half - quarter) & 0x10101010u;
    scaled_plus<T>(out, codes, scales.scale, scales.offset);
  }
};

// Two groups of 16 values.
template <typename T> struct Piece<T, Q6_K> {
  Run<32, 2> run, high;
  uint32_t scales, of_block;
  float scale[2];
  int quarter;

  __device__ __forceinline__ void fetch(const Packed &w, int64_t flat) {
    const Quarter at(w, flat, 210);
    quarter = at.quarter;
    scales = short_at(at.block + 192 + 8 * at.half + 2 * quarter);
    of_block = short_at(at.block + 208);
    run.fetch(at.block + 64 * at.half + 32 * (quarter % 2));
    high.fetch(at.block + 128 + 32 * at.half);
  }
  __device__ __forceinline__ void open() {
#pragma unroll
    for (int i = 0; i < 2; i++)
      scale[i] = __fmul_rn(half_of(of_block), static_cast<float>(static_cast<int8_t>(scales >> (8 * i))));
  }
  __device__ __forceinline__ void values(uint32_t (&out)[4], int part) const {
    uint32_t codes[2];
#pragma unroll
    for (int i = 0; i < 2; i++)
      codes[i] = run.word(part * 2 + i) >> (quarter / 2 * 4) & 0x0f0f0f0fu |
                 rotated(high.word(part * 2 + i), 4 - 2 * quarter) & 0x30303030u;
    scaled<T>(out, codes, scale[part / 2], offset_of<32>(scale[part / 2]));
  }
};

} // namespace
#endif
