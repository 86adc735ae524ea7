//! Damaged files end in one message: no panic, no abort, no hang over 10 s, no memory over 1 GiB.
//!
//! `cargo test --test mutants` takes some seconds per reader; `TRAINER_MUTANTS=20000 cargo test --test mutants` an hour.
//! `-- --nocapture` shows how many mutants of each reader there were.
#![expect(clippy::print_stdout, reason = "a child tells its parent what it does")]

#[path = "support/gguf.rs"]
mod gguf;
#[path = "support/mutate.rs"]
mod mutate;

#[path = "mutants/checkpoints.rs"]
mod checkpoints;
#[path = "mutants/config.rs"]
mod config;
#[path = "mutants/hub.rs"]
mod hub;
#[path = "mutants/models.rs"]
mod models;
#[path = "mutants/planted.rs"]
mod planted;
#[path = "mutants/prepared.rs"]
mod prepared;
#[path = "mutants/rows.rs"]
mod rows;
#[path = "mutants/texts.rs"]
mod texts;

use mutate::{Reader, survives};

/// Every reader that is tested.
const READERS: [Reader; 17] = [
    rows::JSON,
    rows::CSV,
    rows::PARQUET,
    rows::ARROW,
    rows::CARD,
    hub::ANSWERS,
    config::CONFIG,
    models::MODEL_CONFIG,
    models::SAFETENSORS,
    models::INDEX,
    models::GGUF,
    models::ADAPTER,
    texts::TOKENIZER,
    texts::TEMPLATE,
    checkpoints::MANIFEST,
    checkpoints::STATE,
    prepared::PREPARED,
];

#[test]
fn child() {
    mutate::child(READERS.iter().chain(planted::PLANTED.iter().map(|(reader, _)| reader)));
}

/// A test for each reader.
macro_rules! survive {
    ($($test:ident: $reader:expr),* $(,)?) => {
        $(#[test]
        fn $test() {
            survives(&$reader, "child", &[]);
        })*
    };
}

survive! {
    json_survives: rows::JSON,
    csv_survives: rows::CSV,
    parquet_survives: rows::PARQUET,
    arrow_survives: rows::ARROW,
    card_survives: rows::CARD,
    config_survives: config::CONFIG,
    model_config_survives: models::MODEL_CONFIG,
    safetensors_survive: models::SAFETENSORS,
    index_survives: models::INDEX,
    gguf_survives: models::GGUF,
    adapter_survives: models::ADAPTER,
    tokenizer_survives: texts::TOKENIZER,
    template_survives: texts::TEMPLATE,
    manifest_survives: checkpoints::MANIFEST,
    state_survives: checkpoints::STATE,
    prepared_survives: prepared::PREPARED,
}

#[test]
fn hub_answers_survive() {
    let folder = tempfile::tempdir().unwrap();
    let cache = folder.path().join("hub").display().to_string();
    survives(&hub::ANSWERS, "child", &[("HF_ENDPOINT", hub::serve()), ("HF_HUB_CACHE", cache)]);
}
