//! CUDA kernels: `.cu` files built by `build.rs`, one safe launcher for each, cuBLAS products.
//!
//! Launchers take [`Matrix`](crate::device::Matrix) and [`Pointer`](crate::device::Pointer) views of device tensors, check
//! shapes and types, and put the work on the device's one compute stream. Nothing here waits for the device unless its
//! name says so.
#![expect(unsafe_code, reason = "kernel launches")]

mod assemble;
mod attention;
mod checks;
mod decode;
mod draw;
#[cfg(feature = "cuda")]
mod gemm;
#[cfg(not(feature = "cuda"))]
#[path = "no_gemm.rs"]
mod gemm;
mod gguf;
mod head;
mod lane_pieces;
mod lanes;
mod launch;
mod nf4;
mod norm;
mod optimizer;
mod packed_gguf;
mod packed_product;
mod paged_attention;
mod paged_step;
mod pointwise;
mod product_form;
mod products;
mod rope;
mod row_layout;
mod rows;
mod swiglu;
mod swiglu_adapters;
mod swiglu_rows;

pub use assemble::{Part, assemble};
pub use attention::{
    AttentionPlan, AttentionVariant, SegmentRange, attention_backward, attention_backward_with, attention_forward,
    attention_forward_with,
};
pub use decode::{DecodeHeads, decode_combine, decode_heads, decode_low_rank, decode_low_workspace, decode_norm};
pub use draw::{DrawSettings, MOST_DRAW_VOCABULARY, decode_draw, decode_draw_workspace};
pub use gemm::{
    begin_step, choices_text, gemm, is_deterministic, num_noted, origin_name, set_deterministic, start_choices,
    take_choices, try_noted,
};
pub use gguf::{GgufKind, dequantize_gguf};
pub use head::{HeadState, head_backward_chunk, head_finish, head_forward_chunk, head_start};
pub use lanes::{Drawn, Lane, Lanes, LanesSize, LanesView, PageSharing};
pub use nf4::{Nf4Absmax, Nf4View, dequantize_nf4, quantize_maxima, quantize_nf4};
pub use norm::{rms_norm, rms_norm_backward, rms_norm_weight_gradient, rms_norm_workspace};
pub use optimizer::{adamw, sums_of_squares};
pub use packed_product::{
    LowRank, PackedOperand, PackedWeights, ProductOutput, ProductWorkspace, RANK_STEP, packed_product,
};
pub use paged_attention::{
    PagedCache, copy_pages, decode_attention, decode_attention_workspace, page_sharing, paged_attention,
    paged_attention_workspace, write_pages,
};
pub use paged_step::{NO_SLOT, PageStores, PagedLists, PagedSize, PagedStep};
pub use pointwise::{axpby, column_sums, column_sums_workspace, count_non_finite, dropout, fill};
pub use product_form::{ProductForm, ProductKind};
pub use products::{Accumulate, Side, Taken, Tried};
pub use rope::{rope, rope_table};
pub use row_layout::{ProductCard, RowLayout, Rows, WeightKind};
pub use rows::{RowGroups, gather_rows, group_rows, sum_rows};
pub use swiglu::{MOST_SHARE_RANKS, swiglu, swiglu_backward};
pub use swiglu_adapters::{
    DownAdapter, MOST_SWIGLU_RANKS, MlpAdapters, OutAdapter, swiglu_adapters_fit, swiglu_backward_adapters,
    swiglu_backward_adapters_workspace,
};
pub use swiglu_rows::swiglu_rows;
