// The forms of packed_product.cu in which GGUF blocks are multiplied: fewer than for 4-bit codes, since each is compiled for every
// format. Form 3 has 9 to 32 rows of x.
#pragma once

#include "packed_product.cu"

namespace {

template <typename T, int FORMAT> int launch_form(const Product &p, int form, bool is_swiglu, int tiles, cudaStream_t s) {
  switch (form) {
  case 1: return is_swiglu ? launch<T, FORMAT, 2, 1, 1, 8, true>(p, tiles, s) : launch<T, FORMAT, 2, 1, 1, 8, false>(p, tiles, s);
  case 3: return is_swiglu ? launch<T, FORMAT, 2, 4, 4, 2, true>(p, tiles, s) : launch<T, FORMAT, 2, 4, 4, 2, false>(p, tiles, s);
  case 4: return is_swiglu ? launch<T, FORMAT, 2, 8, 4, 2, true>(p, tiles, s) : launch<T, FORMAT, 2, 8, 4, 2, false>(p, tiles, s);
  }
  return static_cast<int>(cudaErrorInvalidValue);
}

// The kernel of the type of a list that `format` is, with activations of type T.
template <typename T, int... TYPES>
int launch_type(GgufTypes<TYPES...>, const Product &p, int format, int form, bool is_swiglu, int tiles, cudaStream_t stream) {
  int code = static_cast<int>(cudaErrorInvalidValue);
  ((format == TYPES && (code = launch_form<T, TYPES>(p, form, is_swiglu, tiles, stream), true)) || ...);
  return code;
}
template <typename Types> int launch_types(const Product &p, int format, int form, bool is_swiglu, int tiles, cudaStream_t stream) {
  if (p.x.rows == 0 || tiles == 0) return 0;
  if (p.x.dtype == F16) return launch_type<__half>(Types{}, p, format, form, is_swiglu, tiles, stream);
  if (p.x.dtype == BF16) return launch_type<__nv_bfloat16>(Types{}, p, format, form, is_swiglu, tiles, stream);
  return static_cast<int>(cudaErrorInvalidValue);
}

} // namespace
