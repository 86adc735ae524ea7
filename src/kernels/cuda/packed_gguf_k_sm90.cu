// Products of 17 to 256 rows with GGUF blocks of 256 values on Hopper's warp groups: the kernel of packed_product_sm90.cu, what a
// lane reads is in packed_gguf.cuh.
#define PACKED_GGUF
#include "packed_gguf.cuh"
#include "packed_gguf_forms_sm90.cuh"

namespace {

template <typename T> int launch_format(const Product &p, int format, bool is_swiglu, int tiles, cudaStream_t stream) {
  switch (format) {
  case Q2_K: return launch_rows<T, Q2_K>(p, is_swiglu, tiles, stream);
  case Q3_K: return launch_rows<T, Q3_K>(p, is_swiglu, tiles, stream);
  case Q4_K: return launch_rows<T, Q4_K>(p, is_swiglu, tiles, stream);
  case Q5_K: return launch_rows<T, Q5_K>(p, is_swiglu, tiles, stream);
  case Q6_K: return launch_rows<T, Q6_K>(p, is_swiglu, tiles, stream);
  }
  return static_cast<int>(cudaErrorInvalidValue);
}

} // namespace

// The stride of x is its rows with what is missing to 32, 64, 128 or 256.
extern "C" int trainer_packed_gguf_k_sm90(const Product *product, int32_t format, int32_t is_swiglu, int32_t tiles,
                                   cudaStream_t stream) {
  const Product &p = *product;
  if (p.x.rows == 0 || tiles == 0) return 0;
  if (p.x.dtype == F16) return launch_format<__half>(p, format, is_swiglu != 0, tiles, stream);
  if (p.x.dtype == BF16) return launch_format<__nv_bfloat16>(p, format, is_swiglu != 0, tiles, stream);
  return static_cast<int>(cudaErrorInvalidValue);
}
