// Products of few rows with GGUF blocks of 32 values on any card with tensor cores: the kernel of packed_product.cu, what a lane
// reads is in packed_gguf.cuh.
#define PACKED_GGUF
#include "packed_gguf.cuh"
#include "packed_gguf_forms.cuh"

extern "C" int trainer_packed_gguf(const Product *product, int32_t format, int32_t form, int32_t is_swiglu, int32_t tiles,
                           cudaStream_t stream) {
  return launch_types<SmallBlocks>(*product, format, form, is_swiglu != 0, tiles, stream);
}
