// Rotary position embedding in the half-split layout of Hugging Face's Qwen.
//
//   angle = position * frequency,  (c, s) = scale * (cos angle, sin angle)
//   forward: (a, b) -> (a c - b s, b c + a s), a in the first and b in the second half of a head; backward: s negated
//
// Layout: `x` [N, H d] in place, table [N, d / 2, 2] f32 with cosine and sine side by side.
//
// Launch: a thread holds 8 pairs of the table in registers and turns up to 4 heads of its token with them, all loads
// before the first store; as many threads as a half has groups of 8 stand side by side, 256 in a block. Value by value
// where 8 do not divide the half or the rows are not aligned. The table: one thread for each angle, with the exact
// reduction of large arguments.
//
// Bound: bytes. N H d 2 T + 4 N d ceil(H / 4) (the table, mostly from the cache), where T is the size of the type; the
// table itself 4 N d written once a batch.
#include "elementwise.cuh"

namespace {

constexpr int THREADS = 256;
constexpr int HEADS = 4;

__global__ void table_kernel(float2 *table, const uint32_t *positions, const float *frequencies, int64_t count,
                             int half, float scale) {
  int64_t index = blockIdx.x * static_cast<int64_t>(THREADS) + threadIdx.x;
  if (index >= count) return;
  float angle = __fmul_rn(__uint2float_rn(positions[index / half]), frequencies[index % half]);
  float sine, cosine;
  sincosf(angle, &sine, &cosine);
  table[index] = make_float2(cosine * scale, sine * scale);
}

template <int N>
__device__ __forceinline__ void load_turn(float (&c)[N], float (&s)[N], const float2 *table, float sign) {
  if constexpr (N == 1) {
    c[0] = table->x;
    s[0] = table->y * sign;
  } else {
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      float4 two = *reinterpret_cast<const float4 *>(table + i);
      c[i] = two.x;
      s[i] = two.y * sign;
      c[i + 1] = two.z;
      s[i + 1] = two.w * sign;
    }
  }
}

template <typename T, int N>
__global__ void __launch_bounds__(THREADS) turn_kernel(T *x, int64_t stride, const float2 *table, int64_t rows,
                                                       int heads, int half, uint32_t groups, float sign) {
  uint32_t item = blockIdx.x * blockDim.y + threadIdx.y;
  int64_t row = item / groups, group = item % groups;
  if (row >= rows) return;
  for (int col = threadIdx.x * N; col < half; col += blockDim.x * N) {
    float c[N], s[N];
    load_turn(c, s, table + row * half + col, sign);
    T *first = x + row * stride + col;
    Raw<T, N> a[HEADS], b[HEADS];
#pragma unroll
    for (int i = 0; i < HEADS; i++) {
      int64_t head = group + i * groups;
      if (head < heads) {
        a[i] = load_raw<N>(first + head * 2 * half);
        b[i] = load_raw<N>(first + head * 2 * half + half);
      }
    }
#pragma unroll
    for (int i = 0; i < HEADS; i++) {
      int64_t head = group + i * groups;
      if (head < heads) {
        float p[N], q[N], one[N], two[N];
        unpack(p, a[i]);
        unpack(q, b[i]);
#pragma unroll
        for (int j = 0; j < N; j++) {
          one[j] = p[j] * c[j] - q[j] * s[j];
          two[j] = q[j] * c[j] + p[j] * s[j];
        }
        store_values(first + head * 2 * half, one);
        store_values(first + head * 2 * half + half, two);
      }
    }
  }
}

template <typename T, int N>
void turn(const Matrix &x, const float2 *table, int heads, int half, float sign, cudaStream_t stream) {
  int across = 1;
  while (across < THREADS && across * N < half) across *= 2;
  int beside = THREADS / across, groups = (heads + HEADS - 1) / HEADS;
  int64_t blocks = (static_cast<int64_t>(x.rows) * groups + beside - 1) / beside;
  turn_kernel<T, N><<<static_cast<unsigned>(blocks), dim3(across, beside), 0, stream>>>(
      static_cast<T *>(x.data), x.stride, table, x.rows, heads, half, groups, sign);
}

} // namespace

extern "C" int trainer_rope_table(float2 *table, const uint32_t *positions, const float *frequencies, int64_t rows,
                                  int half, float scale, cudaStream_t stream) {
  int64_t count = rows * half;
  if (count == 0) return 0;
  unsigned blocks = static_cast<unsigned>((count + THREADS - 1) / THREADS);
  table_kernel<<<blocks, THREADS, 0, stream>>>(table, positions, frequencies, count, half, scale);
  return LAUNCHED();
}

extern "C" int trainer_rope(Matrix x, const float2 *table, int heads, int d, int is_backward, cudaStream_t stream) {
  if (x.rows == 0 || x.cols == 0) return 0;
  int half = d / 2;
  float sign = is_backward ? -1.0f : 1.0f;
  bool is_fast = half % 8 == 0 && is_aligned(x, 8) && reinterpret_cast<uintptr_t>(table) % 16 == 0;
  WITH_TYPE(x.dtype, T, if (is_fast) turn<T, 8>(x, table, heads, half, sign, stream);
            else turn<T, 1>(x, table, heads, half, sign, stream));
  return LAUNCHED();
}
