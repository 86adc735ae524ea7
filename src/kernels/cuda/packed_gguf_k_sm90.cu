// Products of 17 to 256 rows with GGUF blocks of 256 values on Hopper's warp groups: the kernel of packed_product_sm90.cu, what a
// lane reads is in packed_gguf.cuh.
#define PACKED_GGUF
#include "packed_gguf.cuh"
#include "packed_gguf_forms_sm90.cuh"

// The stride of x is its rows with what is missing to 32, 64, 128 or 256.
extern "C" int trainer_packed_gguf_k_sm90(const Product *product, int32_t format, int32_t is_swiglu, int32_t tiles,
                                cudaStream_t stream) {
  return launch_types<LargeBlocks>(*product, format, is_swiglu != 0, tiles, stream);
}
