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

} // namespace
