//! (arithmetic data)
