//! Data: rows, chat templates, tokens, masks, packing, order.
//!
//! From a data set's name to ragged batches: [`load`] finds and reads files ([`Dataset`]), [`prepare_sft`] and
//! [`prepare_prompts`] turn rows into tokens by way of [`ChatTemplate`] and [`Tokenizer`], [`pack`] and [`collate`] make
//! [`Batch`]es, [`Sampler`] says in which order; [`prepared`] keeps what was made for later runs. The training loops, evaluation and `generate` call it; [`hub`] serves
//! the model room too. Invariants: nothing here depends on the number of ranks or threads; nothing prints; every
//! complaint about a row names its file and line.

mod arrow;
mod batch;
mod bytes;
mod card;
mod claims;
mod conversation;
mod csv;
mod encoder;
mod epoch;
mod error;
mod files;
mod findings;
mod fingerprint;
mod formats;
mod gguf_tokenizer;
mod guard;
mod http;
pub mod hub;
mod jinja;
mod json;
mod lenient_json;
mod message_text;
mod messages;
mod mixture;
mod packing;
mod parquet;
pub mod prepared;
mod probe;
mod prompts;
mod rendering;
mod rows;
mod sampler;
mod sft;
mod source;
mod split;
mod split_names;
mod split_spec;
mod statistics;
mod stream;
mod template;
pub mod tokenizer;
mod tokenizer_guard;
mod training_template;

pub use batch::{Batch, IGNORE, collate};
pub use conversation::{Layout, Shape};
pub use encoder::Encoder;
pub use epoch::{Epoch, Place, PromptBatches, RowBatches, Slice};
pub use error::Error;
pub use files::{Splits, load, load_all};
pub use findings::{Findings, Note};
pub use fingerprint::{Rows, RowsFingerprint};
pub use gguf_tokenizer::GgufTokenizer;
pub use mixture::Part;
pub use packing::{Bin, Piece, pack, whole};
pub use prepared::{Prompts, Sequences};
pub use prompts::{PromptData, PromptExample, PromptOptions, prepare_prompts};
pub use rows::{Dataset, Row};
pub use sampler::{Sampler, SamplerState};
pub use sft::{SftData, SftExample, SftOptions, prepare_sft};
pub use statistics::{Bucket, TokenStatistics};
pub use stream::StreamDecoder;
pub use template::{ChatTemplate, RenderOptions, Rendered, assistant_mask};
pub use tokenizer::{OffsetEncoding, SpecialTokens, Tokenizer};
