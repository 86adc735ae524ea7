// Products of few rows with GGUF blocks of 32 values on any card with tensor cores: the kernel of packed_product.cu, what a lane
// reads is in packed_gguf.cuh.
#define PACKED_GGUF
#include "packed_gguf.cuh"
#include "packed_gguf_forms.cuh"

namespace {

template <typename T>
int launch_format(const Product &p, int format, int form, bool is_swiglu, int tiles, cudaStream_t stream) {
  switch (format) {
  case Q4_0: return launch_form<T, Q4_0>(p, form, is_swiglu, tiles, stream);
  case Q4_1: return launch_form<T, Q4_1>(p, form, is_swiglu, tiles, stream);
  case Q5_0: return launch_form<T, Q5_0>(p, form, is_swiglu, tiles, stream);
  case Q5_1: return launch_form<T, Q5_1>(p, form, is_swiglu, tiles, stream);
  case Q8_0: return launch_form<T, Q8_0>(p, form, is_swiglu, tiles, stream);
  }
  return static_cast<int>(cudaErrorInvalidValue);
}

} // namespace

extern "C" int trainer_packed_gguf(const Product *product, int32_t format, int32_t form, int32_t is_swiglu,
                              int32_t tiles, cudaStream_t stream) {
  const Product &p = *product;
  if (p.x.rows == 0 || tiles == 0) return 0;
  if (p.x.dtype == F16) return launch_format<__half>(p, format, form, is_swiglu != 0, tiles, stream);
  if (p.x.dtype == BF16) return launch_format<__nv_bfloat16>(p, format, form, is_swiglu != 0, tiles, stream);
  return static_cast<int>(cudaErrorInvalidValue);
}
