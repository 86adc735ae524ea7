// The numbers of rows for which GGUF blocks are multiplied by packed_product_sm90.cu: for fewer, warps by themselves are faster.
#pragma once

#include "packed_product_sm90.cu"

namespace {

template <typename T, int FORMAT> int launch_rows(const Product &p, bool is_swiglu, int tiles, cudaStream_t stream) {
  switch (p.x.stride) {
  case 32: return is_swiglu ? launch<T, FORMAT, 4, true>(p, tiles, stream) : launch<T, FORMAT, 4, false>(p, tiles, stream);
  case 64: return is_swiglu ? launch<T, FORMAT, 8, true>(p, tiles, stream) : launch<T, FORMAT, 8, false>(p, tiles, stream);
  case 128:
    return is_swiglu ? launch<T, FORMAT, 16, true>(p, tiles, stream) : launch<T, FORMAT, 16, false>(p, tiles, stream);
  case 256:
    return is_swiglu ? launch<T, FORMAT, 32, true>(p, tiles, stream) : launch<T, FORMAT, 32, false>(p, tiles, stream);
  }
  return static_cast<int>(cudaErrorInvalidValue);
}

// The kernel of the type of a list that `format` is, with activations of type T.
template <typename T, int... TYPES>
int launch_type(GgufTypes<TYPES...>, const Product &p, int format, bool is_swiglu, int tiles, cudaStream_t stream) {
  int code = static_cast<int>(cudaErrorInvalidValue);
  ((format == TYPES && (code = launch_rows<T, TYPES>(p, is_swiglu, tiles, stream), true)) || ...);
  return code;
}
template <typename Types> int launch_types(const Product &p, int format, bool is_swiglu, int tiles, cudaStream_t stream) {
  if (p.x.rows == 0 || tiles == 0) return 0;
  if (p.x.dtype == F16) return launch_type<__half>(Types{}, p, format, is_swiglu, tiles, stream);
  if (p.x.dtype == BF16) return launch_type<__nv_bfloat16>(Types{}, p, format, is_swiglu, tiles, stream);
  return static_cast<int>(cudaErrorInvalidValue);
}

} // namespace
