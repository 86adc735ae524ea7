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

} // namespace
