//! Readers of models: configuration, safetensors, their index, GGUF, and adapters on them.

use std::path::{Path, PathBuf};

use candle_core::DType;
use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::Value;
use serde_json::json;
use trainer::config::settings::{LoraSettings, ModelSettings, Projection, WeightDtype};
use trainer::config::{Context, Source, load_sft};
use trainer::engine::Activations;
use trainer::model::load::Purpose;
use trainer::model::peft::{AdapterConfig, AdapterSpec, ModuleSet};
use trainer::model::save::save_model;
use trainer::model::source::{self, LinearStorage, WeightSource};
use trainer::model::{Error, ModelConfig};
use trainer::train::{Backend, session};

use super::gguf::write_gguf;
use super::mutate::{Reader, Seeds};

pub(crate) const MODEL_CONFIG: Reader =
    Reader { name: "model_config", prepare, seeds: configs, read: read_model, cost: 1 };
pub(crate) const SAFETENSORS: Reader =
    Reader { name: "safetensors", prepare, seeds: weights, read: read_model, cost: 1 };
pub(crate) const INDEX: Reader = Reader { name: "index", prepare, seeds: indices, read: read_model, cost: 1 };
pub(crate) const GGUF: Reader = Reader { name: "gguf", prepare, seeds: ggufs, read: read_gguf, cost: 1 };
pub(crate) const ADAPTER: Reader = Reader { name: "adapter", prepare, seeds: adapters, read: read_adapter, cost: 1 };

/// Tokens of `data/tiny-qwen`, whose tokenizer the models have.
const VOCAB: usize = 64;

/// A model of one layer with drawn weights.
fn tiny(model_type: &str, hidden: usize, is_tied: bool) -> serde_json::Value {
    json!({
        "architectures": [if model_type == "qwen2" { "Qwen2ForCausalLM" } else { "Qwen3ForCausalLM" }],
        "model_type": model_type,
        "vocab_size": VOCAB, "hidden_size": hidden, "intermediate_size": hidden, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": hidden / 2, "hidden_act": "silu",
        "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": is_tied,
        "bos_token_id": 1, "eos_token_id": [1, 3], "torch_dtype": "float32",
    })
}

fn repository(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

fn copy(names: &[&str], from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for name in names {
        std::fs::copy(from.join(name), to.join(name)).unwrap();
    }
}

/// The models `qwen2`, `qwen3`, `sharded`, `bnb-double_quant`, `bnb-plain_absmax`;
/// GGUF files; adapters of `qwen2`.
pub(crate) fn prepare(good: &Path) {
    let drawn = good.join("drawn");
    std::fs::create_dir(&drawn).unwrap();
    let open = |config: &serde_json::Value| {
        std::fs::write(drawn.join("config.json"), config.to_string()).unwrap();
        WeightSource::open(&drawn, Some(7)).unwrap()
    };
    for (name, model_type, is_tied, shard_bytes) in
        [("qwen2", "qwen2", true, 1 << 20), ("qwen3", "qwen3", false, 1 << 20), ("sharded", "qwen2", false, 3000)]
    {
        let (config, source) = open(&tiny(model_type, 8, is_tied));
        let folder = good.join(name);
        save_model::<Error>(&folder, &config, DType::F32, shard_bytes, |name| source.tensor_f32(name)).unwrap();
        let tokenizer = ["tokenizer.json", "tokenizer_config.json", "generation_config.json"];
        copy(&tokenizer, &repository("data/tiny-qwen"), &folder);
    }
    for case in ["double_quant", "plain_absmax"] {
        let from = repository("tests/golden/qlora_step").join(case).join("base_bnb4bit");
        copy(&["config.json", "model.safetensors"], &from, &good.join(format!("bnb-{case}")));
    }
    for (name, model_type, hidden, kind) in [
        ("f32", "qwen2", 8, GgmlDType::F32),
        ("f16", "qwen3", 8, GgmlDType::F16),
        ("q8_0", "qwen2", 32, GgmlDType::Q8_0),
    ] {
        let (config, source) = open(&tiny(model_type, hidden, model_type == "qwen2"));
        write_gguf(&good.join(format!("{name}.gguf")), &config, &source, kind, &tokenizer_values());
    }
    let (model, _) = open(&tiny("qwen2", 8, true));
    let all = ModuleSet::Names(Projection::ALL.map(|p| p.name().into()).to_vec());
    for (name, saved, use_dora) in
        [("plain", vec![], false), ("dora", vec![], true), ("saved", vec!["lm_head".into()], false)]
    {
        let lora = LoraSettings {
            r: 2,
            alpha: 4.0,
            dropout: 0.0,
            target_modules: all.clone(),
            modules_to_save: saved,
            use_rslora: use_dora,
            use_dora,
        };
        let mut adapter = AdapterSpec::init(AdapterConfig::new(&lora, Some("base")), &model, 3).unwrap();
        for module in adapter.modules.values_mut().filter(|_| use_dora) {
            module.magnitude = Some(vec![1.0; module.out_features]);
        }
        if name == "saved" {
            adapter.set("lm_head.weight", &[VOCAB, 8], &[0.5; VOCAB * 8]).unwrap();
        }
        let folder = good.join("adapters").join(name);
        std::fs::create_dir_all(&folder).unwrap();
        adapter.save(&folder).unwrap();
    }
}

/// Metadata of a small tokenizer.
fn tokenizer_values() -> Vec<(&'static str, Value)> {
    let texts = |texts: &[&str]| Value::Array(texts.iter().map(|text| Value::String((*text).into())).collect());
    let vocabulary = ["a", "b", "c", "ab", "abc", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "Ġ", "x"];
    let kinds = [1, 1, 1, 1, 1, 3, 3, 3, 1, 4].map(Value::I32);
    let template = "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}";
    vec![
        ("tokenizer.ggml.model", Value::String("gpt2".into())),
        ("tokenizer.ggml.pre", Value::String("qwen2".into())),
        ("tokenizer.ggml.tokens", texts(&vocabulary)),
        ("tokenizer.ggml.token_type", Value::Array(kinds.to_vec())),
        ("tokenizer.ggml.merges", texts(&["a b", "ab c"])),
        ("tokenizer.ggml.eos_token_id", Value::U32(5)),
        ("tokenizer.chat_template", Value::String(template.into())),
    ]
}

fn seed(path: PathBuf) -> (String, Vec<u8>) {
    let name = path.file_name().unwrap().to_str().unwrap().to_string();
    (name, std::fs::read(path).unwrap())
}

/// Of each kind of model; with rotary scaling, in transformers' two spellings, too.
fn configs(good: &Path) -> Seeds {
    let mut seeds: Seeds = ["qwen2", "qwen3"].map(|name| seed(good.join(name).join("config.json"))).to_vec();
    let mut older = tiny("qwen2", 8, true);
    older["rope_scaling"] = json!({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32});
    older["sliding_window"] = json!(16);
    older["use_sliding_window"] = json!(false);
    let mut newer = tiny("qwen2", 8, true);
    newer.as_object_mut().unwrap().remove("rope_theta");
    newer["rope_parameters"] = json!({
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64,
        "beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": 1.1,
    });
    newer["layer_types"] = json!(["full_attention"]);
    seeds.extend([older, newer].map(|config| ("config.json".to_string(), config.to_string().into_bytes())));
    seeds.push(seed(good.join("qwen2/generation_config.json")));
    seeds
}

fn weights(good: &Path) -> Seeds {
    ["qwen2", "qwen3", "bnb-double_quant", "bnb-plain_absmax"]
        .map(|name| seed(good.join(name).join("model.safetensors")))
        .to_vec()
}

fn indices(good: &Path) -> Seeds {
    vec![seed(good.join("sharded/model.safetensors.index.json"))]
}

fn ggufs(good: &Path) -> Seeds {
    ["f32", "f16", "q8_0"].map(|name| seed(good.join(name).with_extension("gguf"))).to_vec()
}

fn adapters(good: &Path) -> Seeds {
    let folders = ["plain", "dora", "saved"].map(|name| good.join("adapters").join(name));
    let files = ["adapter_config.json", "adapter_model.safetensors"];
    folders.iter().flat_map(|folder| files.map(|file| seed(folder.join(file)))).collect()
}

/// The number of the seed that a mutant comes from.
fn number(path: &Path) -> usize {
    path.parent().unwrap().file_name().unwrap().to_str().unwrap().parse().unwrap()
}

/// Puts the other files of a folder beside a mutant.
pub(crate) fn complete(path: &Path, from: &Path) {
    let folder = path.parent().unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = folder.join(entry.file_name());
        if !to.exists() {
            std::fs::copy(entry.path(), to).unwrap();
        }
    }
}

/// The folder that a mutant of a model's file belongs to.
fn home(path: &Path) -> &'static str {
    match (path.file_name().unwrap().to_str().unwrap(), number(path)) {
        ("model.safetensors.index.json", _) => "sharded",
        ("model.safetensors", 2) => "bnb-double_quant",
        ("model.safetensors", 3) => "bnb-plain_absmax",
        (_, 1) => "qwen3",
        _ => "qwen2",
    }
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

fn read_model(path: &Path, good: &Path) -> Result<(), String> {
    complete(path, &good.join(home(path)));
    let folder = path.parent().unwrap();
    let _ = source::files_of(folder, false);
    load_all(folder)?;
    let (config, _) = WeightSource::open(folder, None).map_err(text)?;
    config.inv_freq();
    let saved = config.to_hf(DType::F32);
    ModelConfig::from_hf(Path::new("config.json"), &saved).expect("a configuration that is read is read again");
    Ok(())
}

/// Reads every weight in every way.
fn load_all(path: &Path) -> Result<(), String> {
    let (_, source) = WeightSource::open(path, None).map_err(text)?;
    let as_stored = LinearStorage { quantization: None, dtype: WeightDtype::Auto };
    let quantization = settings("use_peft: true\nload_in_4bit: true\n")?.quantization;
    let names: Vec<String> = source.names().map(Into::into).collect();
    for name in names {
        if let [rows, cols] = *source.shape(&name).map_err(text)? {
            source.linear(&name, (rows, cols), as_stored).map_err(text)?;
            source.linear(&name, (rows, cols), LinearStorage { quantization, ..as_stored }).map_err(text)?;
        } else {
            source.vector(&name).map_err(text)?;
        }
        source.tensor_f32(&name).map_err(text)?;
    }
    Ok(())
}

/// The settings of a model, from lines of YAML.
fn settings(lines: &str) -> Result<ModelSettings, String> {
    let has_model = lines.contains("model_name_or_path");
    let model = if has_model { "" } else { "model_name_or_path: m\n" };
    let source = Source::new("a.yaml", format!("output_dir: o\ndataset_name: d\n{model}{lines}"));
    load_sft(&source, &[], &Context::default()).map(|loaded| loaded.settings.model).map_err(text)
}

/// Opens a model as a run does: weights, adapter, tokenizer, chat template. `lines` of YAML say which.
pub(crate) fn open(lines: &str, purpose: Purpose) -> Result<session::Session, String> {
    let activations = (Activations::Keep, usize::MAX);
    let alone = trainer::zero::Sharing::alone();
    session::open(
        &settings(lines)?,
        1,
        purpose,
        activations,
        &Backend::cpu(),
        (alone, trainer::zero::Offload::default()),
        (&mut |_| {}, |_, _| Ok(())),
    )
    .map(|(session, ())| session)
    .map_err(|e| format!("{e:#}"))
}

fn read_gguf(path: &Path, good: &Path) -> Result<(), String> {
    let _ = load_all(path);
    // As a tokenizer alone it is read by another door.
    let other =
        format!("model_name_or_path: {}\ntokenizer_name_or_path: {}\n", good.join("qwen2").display(), path.display());
    let tokenizer = open(&other, Purpose::Inference).map(|_| ());
    open(&format!("model_name_or_path: {}\n", path.display()), Purpose::Inference)?;
    tokenizer
}

fn read_adapter(path: &Path, good: &Path) -> Result<(), String> {
    let name = ["plain", "dora", "saved"][number(path) / 2];
    complete(path, &good.join("adapters").join(name));
    let (folder, base) = (path.parent().unwrap(), good.join("qwen2"));
    let (model, _) = WeightSource::open(&base, None).map_err(text)?;
    let adapter = AdapterSpec::load(folder, &model).map_err(text)?;
    for module in adapter.modules.values() {
        module.merge(&mut vec![1.0; module.in_features * module.out_features]);
    }
    let again = folder.join("again");
    std::fs::create_dir_all(&again).unwrap();
    adapter.save(&again).map_err(text)?;
    let found = AdapterSpec::load(&again, &model).map(|_| ());
    assert!(found.is_ok(), "an adapter that is read is read again: {found:?}");
    let lines =
        format!("model_name_or_path: {}\nuse_peft: true\nadapter_name_or_path: {}\n", base.display(), folder.display());
    for purpose in [Purpose::Training, Purpose::Inference] {
        open(&lines, purpose)?;
    }
    Ok(())
}
