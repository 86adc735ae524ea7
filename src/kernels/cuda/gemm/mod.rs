//! Matrix products through cuBLASLt.
//!
//! [`product`] checks what is asked for and says how it is made; [`lt`] is the library with its handle and workspace, one for
//! each compute stream; [`plain`] is the way around it, for what it has no kernel for. Which of the library's algorithms makes
//! a product is looked up in [`choose`]: the one that a trial chose for its kind, else the library's own first choice that
//! leaves no summand out. [`trial`] times algorithms, and only when it is asked to: no product ever does. [`kept`] writes the
//! choices down, so that another run makes the same.
//!
//! For one choice of algorithm the result has the same bits every time: sums that are split over blocks go through the
//! workspace in f32 and are added in a fixed order.

mod choose;
mod descriptors;
mod kept;
mod lt;
mod plain;
mod product;
mod trial;

pub use kept::{choices_text, origin_name, take_choices};
pub use lt::{is_deterministic, set_deterministic};
pub use product::gemm;
pub use trial::{begin_step, num_noted, start_choices, try_noted};
