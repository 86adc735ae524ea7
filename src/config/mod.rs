//! YAML to typed, validated settings. The only room that knows key names.
//!
//! `cli/` calls [`load_sft`] or [`load_grpo`] with the file and the `--set` texts; everybody else reads
//! [`settings`]. A file goes through two steps: `RawConfig` mirrors it key by key, each value with its place in the
//! text; resolving checks across keys and yields settings that cannot be wrong. Nothing stops at the first mistake:
//! [`ConfigError`] reports all of them with file, line and caret. The table in `keys` is the single source of names,
//! types, defaults, ranges and documentation: it makes the reader, the "did you mean" and `docs/config.md`.
//!
//! | file | what it owns |
//! | --- | --- |
//! | `yaml` | text to a tree with places; the only user of the YAML library |
//! | `value`, `special`, `rewards`, `mixture`, `home` | one YAML value to one typed value |
//! | `field`, `keys` | what a key is; the table of all keys |
//! | `arguments` | keys as options of a command line |
//! | `foreign`, `nested` | keys of other programs: without effect, without support, other names, maps of arguments |
//! | `entries` | file and `--set` to entries of keys, each once |
//! | `launcher` | files of accelerate and DeepSpeed |
//! | `world` | how many ranks there are, and what they share |
//! | `load` | the way from these to settings |
//! | `resolve`, `resolve_grpo`, `resolve_rewards`, `services`, `schedule` | checks across keys, and the settings |
//! | `write`, `emit`, `reference`, `hub` | settings back to YAML; the reference page; the command that uploads a result |
//! | `diagnose` | problems and their report |

mod arguments;
mod best;
mod builtin_rewards;
mod choices;
mod diagnose;
mod emit;
mod entries;
mod field;
mod foreign;
mod home;
mod hub;
mod keys;
mod launcher;
mod load;
mod mixture;
mod nested;
mod ranges;
mod reference;
mod resolve;
mod resolve_grpo;
mod resolve_rewards;
mod rewards;
mod schedule;
mod services;
pub mod settings;
mod special;
mod value;
mod world;
mod write;
mod yaml;

pub use arguments::{Words, as_override, truth, words_of};
pub use diagnose::{ConfigError, Source};
pub use field::{Bounds, Command, Commands, DefaultValue, Key};
pub use foreign::{FOREIGN_KEYS, ForeignKey, Rule};
pub use home::expand as expand_home;
pub use load::{Loaded, command_of, load_grpo, load_sft};
pub use reference::{explain, keys, reference};
pub use resolve::{Context, RewardCheck};
pub use special::parse_bytes;
pub use write::{grpo_texts, grpo_yaml, sft_texts, sft_yaml};
