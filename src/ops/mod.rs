//! (room)

pub mod paged_attention;
