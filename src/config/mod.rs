//! YAML to typed, validated settings. The only room that knows key names.

pub mod settings;
