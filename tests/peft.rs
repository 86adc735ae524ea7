//! Adapters: PEFT's files read, merged and written back.
//!
//! Walks `TRAINER_GOLDEN_DIR` (default `tests/golden`); no adapter is named here.

use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use serde_json::{Value, json};
use trainer::config::settings::{LoraSettings, Projection};
use trainer::model::ModelConfig;
use trainer::model::peft::{AdapterConfig, AdapterSpec, ModuleSet};
use trainer::model::source::WeightSource;

/// What the makers of the reference values advise for merged weights.
const MERGED: f32 = 1e-6;

fn golden() -> PathBuf {
    std::env::var_os("TRAINER_GOLDEN_DIR")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden"), PathBuf::from)
}

fn json_of(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn floats(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// Folder of each variant, and the folder of its base model.
fn variants() -> Vec<(PathBuf, PathBuf)> {
    let root = golden().join("lora");
    let meta = json_of(&root.join("meta.json"));
    let variants = meta["variants"].as_object().unwrap();
    assert!(!variants.is_empty());
    variants.iter().map(|(name, v)| (root.join(name), root.join(v["base"].as_str().unwrap()))).collect()
}

fn assert_same(one: &AdapterSpec, other: &AdapterSpec) {
    assert_eq!(one.config, other.config);
    assert_eq!(one.modules, other.modules);
    assert!(one.base_replacements.keys().eq(other.base_replacements.keys()));
    assert!(one.full_replacements.keys().eq(other.full_replacements.keys()));
    for (name, tensor) in &one.full_replacements {
        assert_eq!(tensor.dtype(), other.full_replacements[name].dtype());
        assert_eq!(floats(tensor), floats(&other.full_replacements[name]), "{name}");
    }
}

#[test]
fn every_reference_adapter_loads_with_its_scaling_and_merges_into_the_reference_weights() {
    let meta = json_of(&golden().join("lora/meta.json"));
    for (folder, base) in variants() {
        let (model, source) = WeightSource::open(&base, None).unwrap();
        let adapter = AdapterSpec::load(&folder, &model).unwrap();
        let scaling = &meta["variants"][folder.file_name().unwrap().to_str().unwrap()]["scaling"];
        assert_eq!(scaling.as_object().unwrap().len(), adapter.modules.len(), "{}", folder.display());
        let io = candle_core::safetensors::load(folder.join("io.safetensors"), &Device::Cpu).unwrap();
        let mut merged: Vec<String> = vec![];
        for (module, factors) in &adapter.modules {
            assert!((factors.scaling - scaling[module].as_f64().unwrap()).abs() < 1e-12, "{module}");
            let name = format!("{module}.weight");
            let mut weight = floats(&source.tensor_f32(&name).unwrap());
            factors.merge(&mut weight);
            let wanted = floats(&io[&format!("merged.{name}")]);
            let worst = weight.iter().zip(&wanted).map(|(w, m)| (w - m).abs()).fold(0.0, f32::max);
            assert!(worst <= MERGED, "{} {name}: {worst}", folder.display());
            merged.push(name);
        }
        for (name, tensor) in &adapter.full_replacements {
            assert_eq!(floats(tensor), floats(&io[&format!("merged.{name}")]), "{name}");
            merged.push(name.clone());
        }
        merged.sort();
        let mut wanted: Vec<_> = io.keys().filter_map(|k| Some(k.strip_prefix("merged.")?.to_string())).collect();
        wanted.sort();
        assert_eq!(merged, wanted, "{}", folder.display());
    }
}

#[test]
fn an_adapter_is_written_as_peft_writes_it() {
    let out = tempfile::tempdir().unwrap();
    for (folder, base) in variants() {
        let (model, _) = WeightSource::open(&base, None).unwrap();
        let adapter = AdapterSpec::load(&folder, &model).unwrap();
        adapter.save(out.path()).unwrap();
        assert_same(&adapter, &AdapterSpec::load(out.path(), &model).unwrap());
        // The same names, and the same value under every key that is written.
        let load = |folder: &Path| {
            candle_core::safetensors::load(folder.join("adapter_model.safetensors"), &Device::Cpu).unwrap()
        };
        let (theirs, ours) = (load(&folder), load(out.path()));
        assert_eq!(theirs.len(), ours.len());
        for (name, tensor) in &theirs {
            assert_eq!(floats(tensor), floats(&ours[name]), "{name}");
        }
        let (theirs, ours) =
            (json_of(&folder.join("adapter_config.json")), json_of(&out.path().join("adapter_config.json")));
        for (key, value) in ours.as_object().unwrap() {
            assert_eq!(Some(value), theirs.get(key), "{key} of {}", folder.display());
        }
        for (key, value) in theirs.as_object().unwrap() {
            assert!(ours.get(key).is_some() || value.is_null(), "{key} is {value} there and absent here");
        }
    }
}

/// A model of two layers and the settings of a plain adapter for it.
fn small() -> (ModelConfig, AdapterConfig) {
    let config = json!({
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 48, "hidden_size": 32,
        "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "tie_word_embeddings": true,
    });
    let model = ModelConfig::from_hf(Path::new("config.json"), &config).unwrap();
    let lora = LoraSettings {
        r: 4,
        alpha: 8.0,
        dropout: 0.05,
        target_modules: ModuleSet::Names(Projection::ALL.map(|p| p.name().into()).to_vec()),
        modules_to_save: vec![],
        use_rslora: false,
        use_dora: false,
    };
    (model, AdapterConfig::new(&lora, Some("base")))
}

#[test]
fn a_fresh_adapter_changes_nothing_and_reads_back() {
    let (model, config) = small();
    let folder = tempfile::tempdir().unwrap();
    let adapter = AdapterSpec::init(config.clone(), &model, 1).unwrap();
    assert_eq!(adapter.modules.len(), 14);
    for (module, factors) in &adapter.modules {
        let bound = 1.0 / (factors.in_features as f32).sqrt();
        assert!(factors.a.iter().all(|a| a.abs() <= bound), "{module}");
        let largest = factors.a.iter().fold(0f32, |m, a| m.max(a.abs()));
        assert!(largest > 0.9 * bound, "{module}: {largest} of {bound}");
        let mut weight: Vec<f32> = (0..factors.in_features * factors.out_features).map(|i| i as f32).collect();
        let before = weight.clone();
        factors.merge(&mut weight);
        assert_eq!(weight, before, "{module}");
    }
    adapter.save(folder.path()).unwrap();
    assert_same(&adapter, &AdapterSpec::load(folder.path(), &model).unwrap());
    let other = AdapterSpec::init(config, &model, 2).unwrap();
    assert_ne!(adapter.modules, other.modules);
}

#[test]
fn patterns_give_each_module_its_own_rank_and_scaling() {
    let (model, mut config) = small();
    config.rank_pattern =
        vec![(r"layers\.1\..*_proj".into(), 2), ("self_attn.q_proj".into(), 6), ("up_proj".into(), 3)];
    config.alpha_pattern = vec![("^model.layers.0.mlp.up_proj".into(), 27.0), ("v_proj".into(), 5.0)];
    config.use_rslora = true;
    let adapter = AdapterSpec::init(config, &model, 1).unwrap();
    let folder = tempfile::tempdir().unwrap();
    adapter.save(folder.path()).unwrap();
    let read = AdapterSpec::load(folder.path(), &model).unwrap();
    assert_same(&adapter, &read);
    for (module, r, alpha) in [
        ("model.layers.0.self_attn.q_proj", 6, 8.0),
        ("model.layers.1.self_attn.q_proj", 2, 8.0),
        ("model.layers.0.mlp.up_proj", 3, 27.0),
        ("model.layers.1.mlp.up_proj", 2, 8.0),
        ("model.layers.0.self_attn.v_proj", 4, 5.0),
        ("model.layers.0.mlp.down_proj", 4, 8.0),
    ] {
        let factors = &read.modules[module];
        assert_eq!(factors.r, r, "{module}");
        assert!((factors.scaling - alpha / f64::from(r as u32).sqrt()).abs() < 1e-12, "{module}: {}", factors.scaling);
        assert_eq!(factors.a.len(), r * factors.in_features);
    }
}

#[test]
fn modules_are_targeted_by_name_pattern_and_layer() {
    let (model, config) = small();
    let targeted = |change: &dyn Fn(&mut AdapterConfig)| {
        let mut config = config.clone();
        change(&mut config);
        AdapterSpec::init(config, &model, 1).unwrap().modules.into_keys().collect::<Vec<_>>()
    };
    let all = targeted(&|c| c.target_modules = ModuleSet::AllLinear);
    assert_eq!(all.len(), 14);
    assert!(!all.contains(&"lm_head".to_string()));
    let some = targeted(&|c| c.target_modules = ModuleSet::Pattern(r".*\.0\.self_attn\.[qv]_proj".into()));
    assert_eq!(some, ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"]);
    let one = targeted(&|c| c.target_modules = ModuleSet::Names(vec!["1.mlp.up_proj".into(), "proj".into()]));
    assert_eq!(one, ["model.layers.1.mlp.up_proj"]);
    let upper = targeted(&|c| c.layers_to_transform = Some(vec![1]));
    assert_eq!(upper.len(), 7);
    assert!(upper.iter().all(|m| m.starts_with("model.layers.1.")));
    let fewer = targeted(&|c| c.exclude_modules = Some(ModuleSet::Names(vec!["o_proj".into()])));
    assert_eq!(fewer.len(), 12);
    let mut none = config.clone();
    none.target_modules = ModuleSet::Names(vec!["c_attn".into()]);
    let error = AdapterSpec::init(none, &model, 1).unwrap_err().to_string();
    assert!(error.contains("c_attn") && error.contains("q_proj"), "{error}");
}

#[test]
fn trained_biases_and_whole_modules_come_back_under_the_base_model_s_names() {
    let (model, config) = small();
    let folder = tempfile::tempdir().unwrap();
    let mut adapter = AdapterSpec::init(config, &model, 1).unwrap();
    adapter.config.modules_to_save = vec!["embed_tokens".into(), "input_layernorm".into()];
    adapter.config.bias = trainer::model::peft::AdapterBias::LoraOnly;
    let values = |shape: &[usize]| {
        Tensor::arange(0f32, shape.iter().product::<usize>() as f32, &Device::Cpu).unwrap().reshape(shape).unwrap()
    };
    for (name, shape) in [
        ("model.embed_tokens.weight", vec![48, 32]),
        ("model.layers.0.input_layernorm.weight", vec![32]),
        ("model.layers.1.input_layernorm.weight", vec![32]),
        ("model.layers.0.self_attn.q_proj.bias", vec![32]),
    ] {
        adapter.full_replacements.insert(name.into(), values(&shape));
    }
    // What nobody trains is another base weight, and stays in the file.
    adapter.base_replacements.insert("lm_head.weight".into(), values(&[48, 32]));
    adapter.save(folder.path()).unwrap();
    assert_same(&adapter, &AdapterSpec::load(folder.path(), &model).unwrap());
    let stored = candle_core::safetensors::load(folder.path().join("adapter_model.safetensors"), &Device::Cpu).unwrap();
    assert!(stored.contains_key("base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias"));
}

#[test]
fn adapters_that_do_not_fit_are_refused() {
    let (model, config) = small();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let adapter = AdapterSpec::init(config, &model, 1).unwrap();
    let good = adapter.config.to_json();
    let message = || AdapterSpec::load(path, &model).map(|_| ()).unwrap_err().to_string();
    assert!(message().contains("a folder without adapter_config.json"), "{}", message());
    adapter.save(path).unwrap();
    let refused = |key: &str, value: Value, parts: &[&str]| {
        let mut config = good.clone();
        config[key] = value;
        std::fs::write(path.join("adapter_config.json"), config.to_string()).unwrap();
        let found = message();
        for part in parts {
            assert!(found.contains(part), "`{part}` is not in: {found}");
        }
    };
    refused("peft_type", json!("IA3"), &["IA3", "LORA"]);
    refused("r", json!(8), &["lora_A.weight", "[4, 40]", "[8, 40]"]);
    refused("r", json!(0), &["`r` is 0"]);
    refused("rank_pattern", json!({"q_proj": 2}), &["q_proj.lora_A.weight", "[2, 32]"]);
    refused("rank_pattern", json!({"(": 2}), &["rank_pattern", "regular expressions"]);
    refused("target_modules", json!(["q_proj"]), &["does not target"]);
    refused("target_modules", json!("(q_proj"), &["target_modules"]);
    refused("layers_to_transform", json!([1, "x"]), &["layers_to_transform"]);
    refused("layers_pattern", json!(["(layers"]), &["layers_pattern"]);
    refused("r", json!(1_000_000), &["`r` is 1000000", "16384"]);
    refused("modules_to_save", json!(["score"]), &["`score` is no module of this model", "q_proj"]);
    refused("modules_to_save", json!(["lm_head"]), &["base_model.model.lm_head.weight"]);
    refused("modules_to_save", json!(["lm_head"]), &["lm_head.weight"]);
    refused("use_dora", json!(true), &["lora_magnitude_vector"]);
    refused("lora_bias", json!(true), &["lora_bias"]);
    refused("init_lora_weights", json!("pissa"), &["pissa", "base weights"]);
    refused("layer_replication", json!([[0, 2]]), &["layer_replication"]);
    refused("lora_alpha", json!("big"), &["lora_alpha"]);
    refused("lora_dropout", json!(1.0), &["lora_dropout"]);
    refused(
        "target_modules",
        json!(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]),
        &["lm_head.lora_A.weight"],
    );

    // A module missing from the file, one that the model does not have, and damaged bytes.
    let mut fewer = adapter.clone();
    fewer.modules.remove("model.layers.1.mlp.up_proj");
    fewer.save(path).unwrap();
    assert!(message().contains("layers.1.mlp.up_proj.lora_A.weight"), "{}", message());
    let mut more = adapter.clone();
    let factors = more.modules["model.layers.1.mlp.up_proj"].clone();
    more.modules.insert("model.layers.2.mlp.up_proj".into(), factors);
    more.save(path).unwrap();
    assert!(message().contains("layers.2.mlp.up_proj.lora_A.weight` is an adapter weight"), "{}", message());
    adapter.save(path).unwrap();
    let file = path.join("adapter_model.safetensors");
    let whole = std::fs::read(&file).unwrap();
    for cut in (0..whole.len()).step_by(whole.len() / 61) {
        std::fs::write(&file, &whole[..cut]).unwrap();
        assert!(AdapterSpec::load(path, &model).is_err(), "cut to {cut}");
    }
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let tensors = whole.windows(2).position(|w| w == b"},").unwrap();
    for at in (0..8).chain((tensors..header).step_by(3)) {
        let mut damaged = whole.clone();
        damaged[at] ^= 0x11;
        std::fs::write(&file, &damaged).unwrap();
        assert!(AdapterSpec::load(path, &model).is_err(), "byte {at} of the header changed");
    }
}

/// Which modules PEFT 0.21's `check_target_module_exists` takes for each of these settings.
#[test]
fn modules_are_found_as_peft_finds_them() {
    let (model, plain) = small();
    let targets = |settings: Value| {
        let mut json = plain.to_json();
        json.as_object_mut().unwrap().extend(settings.as_object().unwrap().clone());
        let config = AdapterConfig::from_json(Path::new("adapter_config.json"), &json).unwrap();
        let found = AdapterSpec::init(config, &model, 1).unwrap().modules.into_keys();
        let short = |name: String| name.replace("model.layers.", "").replace("self_attn.", "").replace("mlp.", "");
        found.map(short).collect::<Vec<_>>()
    };
    for (settings, expected) in [
        (json!({"target_modules": null}), &["0.q_proj", "0.v_proj", "1.q_proj", "1.v_proj"][..]),
        (json!({"target_modules": ["q_proj"], "layers_to_transform": [1]}), &["1.q_proj"]),
        (json!({"target_modules": ["q_proj"], "layers_to_transform": 0}), &["0.q_proj"]),
        (json!({"target_modules": ["q_proj"], "layers_to_transform": []}), &["0.q_proj", "1.q_proj"]),
        (json!({"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}), &["1.q_proj"]),
        (
            json!({"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ["h", "l.*s"]}),
            &["0.q_proj"],
        ),
        // A whole path is taken whatever the layers are.
        (
            json!({"target_modules": ["v_proj", "model.layers.0.mlp.up_proj"], "layers_to_transform": [1]}),
            &["0.up_proj", "1.v_proj"],
        ),
        (json!({"target_modules": ["layers.1.mlp.up_proj", "0.self_attn.k_proj"]}), &["0.k_proj", "1.up_proj"]),
        (
            json!({"target_modules": ["q_proj", "lm_head"], "exclude_modules": ["0.self_attn.q_proj"]}),
            &["lm_head", "1.q_proj"],
        ),
        (json!({"target_modules": ["q_proj"], "exclude_modules": r"model\.layers\.0.*"}), &["1.q_proj"]),
        // The whole path of a module is meant whatever its layer.
        (json!({"target_modules": ["lm_head", "q_proj"], "layers_to_transform": [1]}), &["lm_head", "1.q_proj"]),
        (
            json!({"target_modules": "all-linear", "exclude_modules": ".*_proj(?<!up_proj)"}),
            &["0.up_proj", "1.up_proj"],
        ),
        (json!({"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["mlp"]}), &["0.q_proj", "1.q_proj"]),
        (json!({"target_modules": ".*(q_proj|lm_head)", "modules_to_save": ["lm_head"]}), &["0.q_proj", "1.q_proj"]),
        (
            json!({"target_modules": r"model\.layers\.(\d)\.self_attn\.[qk]_proj"}),
            &["0.k_proj", "0.q_proj", "1.k_proj", "1.q_proj"],
        ),
        (json!({"target_modules": r"(?P<a>model)\.embed_tokens|lm_head"}), &["lm_head", "model.embed_tokens"]),
    ] {
        assert_eq!(targets(settings.clone()), expected, "{settings}");
    }
    for refused in [
        json!({"target_modules": ["c_attn"]}),
        json!({"target_modules": "q_proj"}),
        json!({"target_modules": []}),
        json!({"target_modules": ["q_proj"], "layers_to_transform": [7]}),
        json!({"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "h"}),
        json!({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}),
        json!({"target_modules": ".*", "layers_to_transform": [1]}),
    ] {
        let mut json = plain.to_json();
        json.as_object_mut().unwrap().extend(refused.as_object().unwrap().clone());
        let config = AdapterConfig::from_json(Path::new("adapter_config.json"), &json);
        let spec = config.and_then(|config| AdapterSpec::init(config, &model, 1));
        let message = spec.map(|_| ()).expect_err(&refused.to_string()).to_string();
        assert!(message.contains("target_modules") || message.contains("layers_to_transform"), "{message}");
    }
}

/// `modules_to_save` takes every module whose path ends so, without a dot before it, as PEFT's `_set_trainable`.
#[test]
fn weights_trained_whole_are_found_as_peft_finds_them() {
    let (model, plain) = small();
    let saved = |names: &[&str]| {
        let modules_to_save = names.iter().map(|name| (*name).into()).collect();
        let config = AdapterConfig { modules_to_save, ..plain.clone() };
        config.saved_whole(&model).unwrap().into_iter().map(|tensor| tensor.name).collect::<Vec<_>>()
    };
    assert_eq!(saved(&[]), Vec::<String>::new());
    assert_eq!(saved(&["embed_tokens", "lm_head"]), ["model.embed_tokens.weight", "lm_head.weight"]);
    assert_eq!(saved(&["1.input_layernorm"]), ["model.layers.1.input_layernorm.weight"]);
    // `norm` is the end of `input_layernorm` as well.
    assert_eq!(saved(&["norm"]).len(), 5);
    assert_eq!(saved(&["model.norm"]), ["model.norm.weight"]);
    assert_eq!(saved(&["0.mlp"]).len(), 3);
    assert_eq!(saved(&["0.self_attn"]).len(), 7, "weights and biases");
}

#[test]
fn the_first_pattern_of_the_file_counts() {
    let (model, plain) = small();
    let mut json = plain.to_json();
    json["rank_pattern"] = json!({"v_proj": 2, "layers.1.self_attn.v_proj": 3, "q_proj": 5, "(k)_proj": 6});
    json["alpha_pattern"] = json!({"layers.0.*q_proj": 100, ".*": 7, "^v_proj": 1});
    let config = AdapterConfig::from_json(Path::new("adapter_config.json"), &json).unwrap();
    let spec = AdapterSpec::init(config, &model, 1).unwrap();
    let rank_and_alpha = |module: &str| {
        let adapter = &spec.modules[module];
        (adapter.r, (adapter.scaling * adapter.r as f64).round() as u32)
    };
    assert_eq!(rank_and_alpha("model.layers.1.self_attn.v_proj"), (2, 7));
    assert_eq!(rank_and_alpha("model.layers.0.self_attn.q_proj"), (5, 100));
    assert_eq!(rank_and_alpha("model.layers.1.self_attn.q_proj"), (5, 7));
    assert_eq!(rank_and_alpha("model.layers.1.self_attn.k_proj"), (6, 7));
    assert_eq!(rank_and_alpha("model.layers.1.mlp.up_proj"), (4, 7));
}

#[test]
fn weights_that_are_not_numbers_are_refused_with_their_count() {
    let (model, config) = small();
    let mut adapter = AdapterSpec::init(config, &model, 1).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let factors = adapter.modules.get_mut("model.layers.1.mlp.up_proj").unwrap();
    (factors.a[3], factors.a[4]) = (f32::NAN, f32::INFINITY);
    adapter.save(folder.path()).unwrap();
    let message = AdapterSpec::load(folder.path(), &model).map(|_| ()).unwrap_err().to_string();
    assert!(message.contains("layers.1.mlp.up_proj.lora_A.weight") && message.contains("2 values"), "{message}");
}
