// A paged key-value cache: writing tokens and copying pages; see paged_attention.cu for its layout.
//
// Launch: a thread for each 8 neighbouring values of a token, or for each; for copies a block for each array and pair of pages.
// Bound: bytes.
#include "common.cuh"

namespace {

constexpr uint32_t NO_SLOT = 0xffffffffu;

// `VECTOR` elements of a token's keys and values for each thread.
template <typename T, int VECTOR>
__global__ void write_tokens(T *keys, T *values, Matrix k, Matrix v, const uint32_t *slots) {
  int64_t width = k.cols / VECTOR, count = width * k.rows;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    int64_t row = i / width, col = i % width * VECTOR;
    uint32_t slot = slots[row];
    if (slot == NO_SLOT) continue;
    int64_t to = static_cast<int64_t>(slot) * k.cols + col;
    float x[VECTOR];
    auto copy = [&](T *store, const Matrix &m) {
      int64_t from = row * m.stride + col;
      if (m.dtype == F32) load_pack<float, VECTOR>(x, static_cast<const float *>(m.data) + from);
      else if (m.dtype == F16) load_pack<__half, VECTOR>(x, static_cast<const __half *>(m.data) + from);
      else load_pack<__nv_bfloat16, VECTOR>(x, static_cast<const __nv_bfloat16 *>(m.data) + from);
      store_pack<T, VECTOR>(store + to, x);
    };
    copy(keys, k);
    copy(values, v);
  }
}

// A block for each store and pair of pages. `U`: what moves at a time.
template <typename U> __global__ void copy_stores(const uint64_t *stores, const uint2 *pairs, int64_t page_units) {
  U *store = reinterpret_cast<U *>(stores[blockIdx.x]);
  uint2 pair = pairs[blockIdx.y];
  const U *from = store + static_cast<int64_t>(pair.x) * page_units;
  U *to = store + static_cast<int64_t>(pair.y) * page_units;
  for (int64_t i = threadIdx.x; i < page_units; i += blockDim.x) to[i] = from[i];
}

bool is_aligned_to(const void *p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

} // namespace

extern "C" int paged_write(void *keys, void *values, int dtype, Matrix k, Matrix v, const uint32_t *slots,
                           cudaStream_t stream) {
  int64_t count = static_cast<int64_t>(k.rows) * k.cols;
  if (count == 0) return 0;
  bool is_fast = is_aligned(k, 8) && is_aligned(v, 8) && is_aligned_to(keys, 32) && is_aligned_to(values, 32);
  int64_t blocks = (count / (is_fast ? 8 : 1) + 255) / 256;
  if (blocks > 65536) blocks = 65536;
  WITH_TYPE(dtype, T, {
    T *to_keys = static_cast<T *>(keys), *to_values = static_cast<T *>(values);
    if (is_fast) write_tokens<T, 8><<<static_cast<uint32_t>(blocks), 256, 0, stream>>>(to_keys, to_values, k, v, slots);
    else write_tokens<T, 1><<<static_cast<uint32_t>(blocks), 256, 0, stream>>>(to_keys, to_values, k, v, slots);
  });
  return LAUNCHED();
}

extern "C" int paged_copy(const uint64_t *stores, int num_stores, const uint32_t *pairs, int num_pairs,
                          int64_t page_bytes, cudaStream_t stream) {
  if (num_stores == 0 || num_pairs == 0 || page_bytes == 0) return 0;
  dim3 grid(num_stores, num_pairs);
  const uint2 *two = reinterpret_cast<const uint2 *>(pairs);
  if (page_bytes % 16 == 0) copy_stores<uint4><<<grid, 256, 0, stream>>>(stores, two, page_bytes / 16);
  else copy_stores<uint16_t><<<grid, 256, 0, stream>>>(stores, two, page_bytes / 2);
  return LAUNCHED();
}
