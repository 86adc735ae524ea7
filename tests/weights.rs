//! Configurations and weights of the reference models: read, quantised, drawn, saved and read again.
//!
//! Walks `TRAINER_GOLDEN_DIR` (default `tests/golden`) as the golden harness does; no model is named here.

#[path = "support/gguf.rs"]
mod gguf;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::Value;
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use gguf::write_gguf;
use serde_json::json;
use trainer::config::settings::{QuantType, Quantization, WeightDtype};
use trainer::model::config::RopeScaling;
use trainer::model::save::{SHARD_BYTES, save_model};
use trainer::model::source::{Kept, LinearStorage, StoredSizes, WeightSource};
use trainer::model::{Error, ModelConfig};
use trainer::quant::Weight;

const AS_STORED: LinearStorage = LinearStorage { quantization: None, dtype: WeightDtype::Auto };

fn golden(group: &str) -> Vec<PathBuf> {
    let root = std::env::var_os("TRAINER_GOLDEN_DIR")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden"), PathBuf::from);
    let mut folders: Vec<_> = std::fs::read_dir(root.join(group))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_dir())
        .collect();
    folders.sort();
    assert!(!folders.is_empty(), "no cases in {group}");
    folders
}

fn json_of(path: &Path) -> serde_json::Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn floats(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn bits(tensor: &Tensor) -> Vec<u32> {
    floats(tensor).iter().map(|v| v.to_bits()).collect()
}

/// A two-layer model of `architecture` with drawn weights.
fn tiny_config(model_type: &str, tied: bool) -> serde_json::Value {
    json!({
        "architectures": [if model_type == "qwen2" { "Qwen2ForCausalLM" } else { "Qwen3ForCausalLM" }],
        "model_type": model_type,
        "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "hidden_act": "silu",
        "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": tied,
        "bos_token_id": 1, "eos_token_id": [2, 3], "torch_dtype": "float32",
    })
}

fn open_random(folder: &Path, config: &serde_json::Value, seed: u64) -> (ModelConfig, WeightSource) {
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    WeightSource::open(folder, Some(seed)).unwrap()
}

#[test]
fn rotary_frequencies_are_those_of_the_reference() {
    for folder in golden("tiny") {
        let config = ModelConfig::from_hf(&folder.join("config.json"), &json_of(&folder.join("config.json"))).unwrap();
        let meta = json_of(&folder.join("meta.json"));
        let wanted: Vec<f32> =
            meta["rope_inv_freq"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect();
        let (found, scaling) = config.inv_freq();
        assert_eq!(found.len(), wanted.len(), "{}", folder.display());
        for (found, wanted) in found.iter().zip(&wanted) {
            // Two f32 roundings apart at most.
            assert!((found - wanted).abs() <= wanted * 2.4e-7, "{}: {found} {wanted}", folder.display());
        }
        let wanted = meta["rope_attention_scaling"].as_f64().unwrap();
        assert!((f64::from(scaling) - wanted).abs() < 1e-6, "{}: {scaling} {wanted}", folder.display());
    }
}

#[test]
fn both_spellings_of_a_configuration_say_the_same_and_survive_a_save() {
    for folder in golden("tiny") {
        let (published, recent) = (folder.join("config.json"), folder.join("config_as_transformers5_writes_it.json"));
        let config = ModelConfig::from_hf(&published, &json_of(&published)).unwrap();
        assert_eq!(config, ModelConfig::from_hf(&recent, &json_of(&recent)).unwrap(), "{}", folder.display());
        let again = ModelConfig::from_hf(&published, &config.to_hf(DType::F32)).unwrap();
        assert_eq!(config, again, "{}", folder.display());
    }
}

#[test]
fn every_weight_of_the_reference_models_is_read_as_stored() {
    for folder in golden("tiny") {
        let (config, source) = WeightSource::open(&folder, None).unwrap();
        let stored = candle_core::safetensors::load(folder.join("model.safetensors"), &Device::Cpu).unwrap();
        assert_eq!(source.names().count(), stored.len(), "{}", folder.display());
        assert_eq!(config.num_parameters(), stored.values().map(Tensor::elem_count).sum::<usize>());
        assert!(source.unused().is_empty());
        for (name, tensor) in &stored {
            assert_eq!(bits(&source.tensor_f32(name).unwrap()), bits(tensor), "{name}");
            if let &[rows, cols] = tensor.dims() {
                let Weight::Dense(dense) = source.linear(name, (rows, cols), AS_STORED).unwrap() else {
                    panic!("{name} is not dense")
                };
                assert_eq!(bits(&dense), bits(tensor), "{name}");
            } else {
                assert_eq!(bits(&source.vector(name).unwrap()), bits(tensor), "{name}");
            }
        }
    }
}

#[test]
fn a_4_bit_checkpoint_holds_what_quantising_on_load_makes() {
    for folder in golden("qlora_step") {
        let (config, base) = WeightSource::open(&folder.join("base"), None).unwrap();
        let (other, packed) = WeightSource::open(&folder.join("base_bnb4bit"), None).unwrap();
        assert_eq!(config, other);
        let stored = json_of(&folder.join("base_bnb4bit/config.json"))["quantization_config"].clone();
        let quantization = Quantization {
            quant_type: stored["bnb_4bit_quant_type"].as_str().unwrap().parse().unwrap(),
            double_quant: stored["bnb_4bit_use_double_quant"].as_bool().unwrap(),
        };
        let mut compared = 0;
        for tensor in config.tensors() {
            let name = &tensor.name;
            let &[rows, cols] = tensor.shape.as_slice() else {
                assert_eq!(bits(&base.vector(name).unwrap()), bits(&packed.vector(name).unwrap()), "{name}");
                continue;
            };
            let Weight::Nf4(stored) = packed.linear(name, (rows, cols), AS_STORED).unwrap() else { continue };
            let storage = LinearStorage { quantization: Some(quantization), dtype: WeightDtype::Auto };
            let Weight::Nf4(made) = base.linear(name, (rows, cols), storage).unwrap() else {
                panic!("{name} is not quantised")
            };
            assert!(stored.packed()[..] == made.packed()[..], "{name}: other codes");
            // With double quantisation bitsandbytes finds the 8-bit code of a block maximum through a table of 65536
            // entries, so that a value within 1.6e-5 of the border of two codes may get the other one: one step of
            // the map, in few blocks.
            let (theirs, ours) = (stored.absmax(), made.absmax());
            let step = 0.015 * theirs.iter().fold(0f32, |m, v| m.max(*v));
            let others = theirs.iter().zip(ours.iter()).filter(|(t, o)| (*t - *o).abs() > 1e-6 * t.abs());
            let others: Vec<_> = others.collect();
            assert!(others.iter().all(|(t, o)| (*t - *o).abs() <= step), "{name}: {others:?}");
            assert!(others.len() * 40 <= theirs.len(), "{name}: {} of {}", others.len(), theirs.len());
            assert!(quantization.double_quant || others.is_empty(), "{name}: {others:?}");
            let (stored, read) = (floats(&Weight::Nf4(stored).dequantize().unwrap()), packed.tensor_f32(name).unwrap());
            assert_eq!(stored, floats(&read), "{name}");
            compared += 1;
        }
        assert_eq!(compared, 7 * config.num_hidden_layers);
    }
}

#[test]
fn drawn_weights_depend_on_seed_and_name_only() {
    let folder = tempfile::tempdir().unwrap();
    let (config, one) = open_random(folder.path(), &tiny_config("qwen2", false), 1);
    let (_, same) = open_random(folder.path(), &tiny_config("qwen2", false), 1);
    let (_, other) = open_random(folder.path(), &tiny_config("qwen2", false), 2);
    let mut wider = tiny_config("qwen2", false);
    wider["num_hidden_layers"] = json!(3);
    let (_, deeper) = open_random(folder.path(), &wider, 1);
    for tensor in config.tensors() {
        let values = bits(&one.tensor_f32(&tensor.name).unwrap());
        assert_eq!(values, bits(&same.tensor_f32(&tensor.name).unwrap()), "{}", tensor.name);
        assert_eq!(values, bits(&deeper.tensor_f32(&tensor.name).unwrap()), "{}", tensor.name);
        let is_drawn = tensor.shape.len() == 2;
        assert_eq!(values != bits(&other.tensor_f32(&tensor.name).unwrap()), is_drawn, "{}", tensor.name);
    }
    let values = floats(&one.tensor_f32("lm_head.weight").unwrap());
    let mean = values.iter().sum::<f32>() / values.len() as f32;
    let deviation = (values.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / values.len() as f32).sqrt();
    assert!(mean.abs() < 1e-3 && (deviation - 0.02).abs() < 1e-3, "mean {mean}, deviation {deviation}");
    assert!(floats(&one.vector("model.norm.weight").unwrap()).iter().all(|v| v.to_bits() == 1f32.to_bits()));
    assert!(floats(&one.vector("model.layers.0.self_attn.q_proj.bias").unwrap()).iter().all(|v| v.to_bits() == 0));
}

#[test]
fn a_saved_model_reads_back_whole_in_every_type_and_sharded() {
    let folder = tempfile::tempdir().unwrap();
    for (model_type, tied) in [("qwen2", true), ("qwen3", false)] {
        let (config, source) = open_random(folder.path(), &tiny_config(model_type, tied), 5);
        // From many shards to one: the later save must remove what the earlier one left.
        for (dtype, shard_bytes) in [(DType::F32, 20_000), (DType::BF16, 30_000), (DType::F16, SHARD_BYTES)] {
            let target = folder.path().join("out");
            let mut asked = vec![];
            let saved = save_model::<Error>(&target, &config, dtype, shard_bytes, |name| {
                asked.push(name.to_string());
                source.tensor_f32(name)
            })
            .unwrap();
            assert_eq!(asked, config.tensors().into_iter().map(|t| t.name).collect::<Vec<_>>());
            assert_eq!(saved.files.len() > 1, shard_bytes != SHARD_BYTES);
            assert_eq!(saved.weight_bytes, config.num_parameters() * dtype.size_in_bytes());
            let mut files: Vec<_> = std::fs::read_dir(&target).unwrap().map(|e| e.unwrap().path()).collect();
            files.retain(|f| f.extension().is_some_and(|e| e == "safetensors"));
            files.sort();
            assert_eq!(files, saved.files);
            let (read_config, read) = WeightSource::open(&target, None).unwrap();
            assert_eq!(read_config, ModelConfig { torch_dtype: Some(dtype), ..config.clone() });
            for name in source.names() {
                let wanted = source.tensor_f32(name).unwrap().to_dtype(dtype).unwrap();
                assert_eq!(bits(&read.tensor_f32(name).unwrap()), bits(&wanted), "{name}");
                if let &[rows, cols] = read.shape(name).unwrap() {
                    let Weight::Dense(dense) = read.embedding(name, (rows, cols), WeightDtype::Auto).unwrap() else {
                        panic!("{name} is not dense")
                    };
                    assert_eq!(dense.dtype(), dtype, "{name}");
                }
            }
        }
    }
}

#[test]
fn a_failed_fetch_leaves_the_earlier_model() {
    let folder = tempfile::tempdir().unwrap();
    let (config, source) = open_random(folder.path(), &tiny_config("qwen2", true), 5);
    let target = folder.path().join("out");
    let save = |fail: &str| {
        save_model::<Error>(&target, &config, DType::F32, SHARD_BYTES, |name| {
            source.tensor_f32(if name == fail { "model.layers.0.self_attn.q_prj.weight" } else { name })
        })
    };
    save("").unwrap();
    let error = save("model.layers.1.mlp.up_proj.weight").unwrap_err();
    assert!(error.to_string().contains("nearest name is `model.layers.0.self_attn.q_proj.weight`"), "{error}");
    assert!(WeightSource::open(&target, None).is_ok());
    let error = save_model::<Error>(&target, &config, DType::F32, SHARD_BYTES, |_| {
        Ok(Tensor::zeros(3, DType::F32, &Device::Cpu).unwrap())
    });
    assert!(matches!(error, Err(Error::Shape { .. })));
    assert_eq!(std::fs::read_dir(&target).unwrap().count(), 2, "no temporary files stay");
}

#[test]
fn a_gguf_file_gives_the_weights_under_their_hub_names() {
    let folder = tempfile::tempdir().unwrap();
    for (model_type, tied) in [("qwen2", true), ("qwen2", false), ("qwen3", true), ("qwen3", false)] {
        let (config, drawn) = open_random(folder.path(), &tiny_config(model_type, tied), 9);
        for kind in [GgmlDType::F32, GgmlDType::F16, GgmlDType::BF16, GgmlDType::Q8_0, GgmlDType::Q4_0] {
            let path = folder.path().join("model.gguf");
            write_gguf(&path, &config, &drawn, kind, &[]);
            let (read, source) = WeightSource::open(&path, None).unwrap();
            let eps = f64::from(1e-6f32);
            let wanted = ModelConfig { rms_norm_eps: eps, eos_token_ids: vec![2], torch_dtype: None, ..config.clone() };
            assert_eq!(read, wanted);
            for tensor in config.tensors() {
                let name = &tensor.name;
                let wanted = drawn.tensor_f32(name).unwrap();
                let &[rows, cols] = tensor.shape.as_slice() else {
                    assert_eq!(bits(&source.vector(name).unwrap()), bits(&wanted), "{name}");
                    continue;
                };
                let quantised = QTensor::quantize(&wanted, kind).unwrap().dequantize(&Device::Cpu).unwrap();
                assert_eq!(bits(&source.tensor_f32(name).unwrap()), bits(&quantised), "{name} as {kind:?}");
                let quantization = Some(Quantization { quant_type: QuantType::Nf4, double_quant: true });
                let storage = LinearStorage { quantization, dtype: WeightDtype::Auto };
                let weight = source.linear(name, (rows, cols), storage).unwrap();
                let is_packed = matches!(kind, GgmlDType::Q8_0 | GgmlDType::Q4_0);
                assert!(if is_packed { matches!(weight, Weight::Gguf(_)) } else { matches!(weight, Weight::Nf4(_)) });
            }
        }
    }
}

/// A file that changes under a run: what was read stays, what was not read yet is an error that names the file.
#[test]
fn a_file_that_is_cut_or_written_to_after_it_was_opened_changes_no_weight_and_ends_no_process() {
    let folder = tempfile::tempdir().unwrap();
    let (config, drawn) = open_random(folder.path(), &tiny_config("qwen3", false), 9);
    let gguf = folder.path().join("model.gguf");
    let saved = folder.path().join("saved");
    std::fs::create_dir(&saved).unwrap();
    save_model(&saved, &config, DType::BF16, SHARD_BYTES, |name| drawn.tensor_f32(name)).unwrap();
    write_gguf(&gguf, &config, &drawn, GgmlDType::Q8_0, &[]);
    let (name, shape) = ("model.layers.0.mlp.up_proj.weight", (96, 64));
    let nf4 = Some(Quantization { quant_type: QuantType::Nf4, double_quant: true });
    for (place, file) in [(&gguf, gguf.clone()), (&saved, saved.join("model.safetensors"))] {
        let whole = std::fs::read(&file).unwrap();
        for damage in ["cut", "emptied", "overwritten"] {
            for quantization in [None, nf4] {
                let (_, source) = WeightSource::open(place, None).unwrap();
                let storage = LinearStorage { quantization, dtype: WeightDtype::Auto };
                let weight = source.linear(name, shape, storage).unwrap();
                let before = bits(&weight.dequantize().unwrap());
                match damage {
                    "cut" => std::fs::OpenOptions::new().write(true).open(&file).unwrap().set_len(4096).unwrap(),
                    "emptied" => std::fs::write(&file, "").unwrap(),
                    _ => std::fs::write(&file, vec![0xff; whole.len()]).unwrap(),
                }
                // Clocks of file systems are coarse; a real change is not made in the same tick.
                if damage == "overwritten" {
                    let time = std::time::SystemTime::now() + std::time::Duration::from_secs(2);
                    std::fs::OpenOptions::new().write(true).open(&file).unwrap().set_modified(time).unwrap();
                }
                assert_eq!(bits(&weight.dequantize().unwrap()), before, "{damage}");
                let error = source.linear("model.layers.1.mlp.up_proj.weight", shape, storage).unwrap_err().to_string();
                let part = format!("`{}` was changed while it was read", file.display());
                assert!(error.contains(&part), "{damage}: {error}");
                assert!(source.vector("model.norm.weight").is_err() && source.tensor_f32(name).is_err());
                std::fs::write(&file, &whole).unwrap();
                let (_, again) = WeightSource::open(place, None).unwrap();
                assert_eq!(bits(&again.linear(name, shape, storage).unwrap().dequantize().unwrap()), before);
            }
        }
    }
}

#[test]
fn gguf_metadata_is_read_in_all_its_forms_and_refused_where_it_cannot_be() {
    let folder = tempfile::tempdir().unwrap();
    let (config, drawn) = open_random(folder.path(), &tiny_config("qwen2", false), 9);
    let path = folder.path().join("only.gguf");
    let open = |more: &[(&str, Value)]| {
        write_gguf(&path, &config, &drawn, GgmlDType::F16, more);
        WeightSource::open(&path, None).map(|(config, _)| config).map_err(|error| error.to_string())
    };
    let text = |text: &str| Value::String(text.into());
    let linear = open(&[("qwen2.rope.scaling.type", text("linear")), ("qwen2.rope.scaling.factor", Value::F32(2.0))]);
    assert_eq!(linear.unwrap().rope.scaling, RopeScaling::Linear { factor: 2.0 });
    let yarn = open(&[
        ("qwen2.rope.scaling.type", text("yarn")),
        ("qwen2.rope.scaling.factor", Value::F32(4.0)),
        ("qwen2.rope.scaling.original_context_length", Value::U32(32)),
    ]);
    let hub = json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32});
    let mut hub_config = tiny_config("qwen2", false);
    hub_config["rope_scaling"] = hub;
    let hub_config = ModelConfig::from_hf(Path::new("config.json"), &hub_config).unwrap();
    assert_eq!(yarn.unwrap().rope, hub_config.rope);
    let ends = open(&[("tokenizer.ggml.eot_token_id", Value::U32(7)), ("qwen2.block_count", Value::I32(2))]).unwrap();
    assert_eq!((ends.stop_token_ids(), ends.num_hidden_layers), (vec![2, 7], 2));
    for (key, value, part) in [
        ("general.architecture", text("llama"), "`llama` is not supported"),
        ("general.architecture", Value::U32(1), "`general.architecture` is 1"),
        ("split.count", Value::U16(2), "llama-gguf-split"),
        ("qwen2.rope.scaling.type", text("longrope"), "longrope"),
        ("qwen2.rope.scaling.type", text("linear"), "`qwen2.rope.scaling.factor` is absent"),
        ("qwen2.rope.dimension_count", Value::U32(16), "the width of a head, 32"),
        ("qwen2.embedding_length", text("wide"), "`qwen2.embedding_length` is \"wide\""),
        ("qwen2.embedding_length", Value::U32(32), "`output.weight`"),
        ("qwen2.block_count", Value::U32(3), "no tensor `model.layers.2."),
        ("qwen2.attention.layer_norm_rms_epsilon", Value::U32(0), "layer_norm_rms_epsilon"),
        ("tokenizer.ggml.eos_token_id", text("</s>"), "a token id"),
    ] {
        let error = open(&[(key, value)]).unwrap_err();
        assert!(error.contains(part) && error.contains("only.gguf"), "{key}: {error}");
    }
    // A folder of one GGUF file opens as that file, also beside the original's config.json; of two it does not.
    open(&[]).unwrap();
    assert!(WeightSource::open(folder.path(), None).is_ok());
    std::fs::remove_file(folder.path().join("config.json")).unwrap();
    assert!(WeightSource::open(folder.path(), None).is_ok());
    std::fs::copy(&path, folder.path().join("other.gguf")).unwrap();
    let error = WeightSource::open(folder.path(), None).unwrap_err().to_string();
    assert!(error.contains("only.gguf, other.gguf"), "{error}");
}

#[test]
fn wrong_models_are_refused_with_what_was_found_and_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let message = |path: &Path| WeightSource::open(path, None).map(|_| ()).unwrap_err().to_string();
    let expect = |found: String, parts: &[&str]| {
        for part in parts {
            assert!(found.contains(part), "`{part}` is not in: {found}");
        }
    };
    expect(message(&path.join("absent")), &["no model at", "nothing", "config.json"]);
    expect(message(path), &["a folder without config.json"]);
    let refused = |change: &[(&str, serde_json::Value)], parts: &[&str]| {
        let mut config = tiny_config("qwen2", true);
        for (key, value) in change {
            config[*key] = value.clone();
        }
        std::fs::write(path.join("config.json"), config.to_string()).unwrap();
        expect(WeightSource::open(path, Some(1)).map(|_| ()).unwrap_err().to_string(), parts);
    };
    refused(&[("architectures", json!(["LlamaForCausalLM"]))], &["`LlamaForCausalLM`", "Qwen2ForCausalLM"]);
    refused(&[("model_type", json!("qwen3"))], &["`model_type` is \"qwen3\"", "qwen2"]);
    refused(&[("use_sliding_window", json!(true))], &["use_sliding_window", "full attention"]);
    refused(&[("layer_types", json!(["full_attention", "sliding_attention"]))], &["sliding_attention"]);
    refused(&[("rope_scaling", json!({"rope_type": "longrope", "factor": 2.0}))], &["longrope", "yarn"]);
    refused(&[("rope_scaling", json!({"type": "linear"}))], &["`rope_scaling.factor` is absent"]);
    refused(&[("hidden_act", json!("gelu"))], &["gelu", "silu"]);
    refused(&[("hidden_size", json!("many"))], &["`hidden_size` is \"many\"", "whole number"]);
    refused(&[("hidden_size", json!(0))], &["`hidden_size` is 0"]);
    refused(&[("num_hidden_layers", json!(1u64 << 60))], &["num_hidden_layers", "4096"]);
    refused(&[("num_key_value_heads", json!(3))], &["num_key_value_heads", "divisor"]);
    refused(&[("head_dim", json!(33))], &["head_dim", "even"]);
    refused(&[("torch_dtype", json!("int8"))], &["torch_dtype", "bfloat16"]);
    refused(&[("quantization_config", json!({"quant_method": "gptq"}))], &["gptq", "bitsandbytes"]);
    std::fs::write(path.join("config.json"), "{").unwrap();
    expect(message(path), &["config.json", "not valid JSON"]);

    // Weights of another shape, and one that is missing.
    let (config, source) = open_random(path, &tiny_config("qwen2", true), 1);
    expect(message(path), &["config.json without weights", "init_random"]);
    save_model::<Error>(path, &config, DType::F32, SHARD_BYTES, |name| source.tensor_f32(name)).unwrap();
    let mut other = config.to_hf(DType::F32);
    other["intermediate_size"] = json!(80);
    std::fs::write(path.join("config.json"), other.to_string()).unwrap();
    expect(message(path), &["mlp.down_proj.weight", "[64, 96]", "[64, 80]", "model.safetensors"]);
    other["intermediate_size"] = json!(96);
    other["num_hidden_layers"] = json!(3);
    std::fs::write(path.join("config.json"), other.to_string()).unwrap();
    expect(message(path), &["no tensor `model.layers.2.", "nearest name is `model.layers."]);
    other["num_hidden_layers"] = json!(2);
    other["tie_word_embeddings"] = json!(false);
    std::fs::write(path.join("config.json"), other.to_string()).unwrap();
    expect(message(path), &["no tensor `lm_head.weight`"]);
}

#[test]
fn an_index_that_does_not_fit_its_shards_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (config, source) = open_random(folder.path(), &tiny_config("qwen2", true), 5);
    let target = folder.path().join("out");
    save_model::<Error>(&target, &config, DType::F32, 20_000, |name| source.tensor_f32(name)).unwrap();
    let index_path = target.join("model.safetensors.index.json");
    let index = json_of(&index_path);
    let message = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut index = index.clone();
        change(&mut index);
        std::fs::write(&index_path, index.to_string()).unwrap();
        WeightSource::open(&target, None).map(|_| ()).unwrap_err().to_string()
    };
    let shard = index["weight_map"]["model.norm.weight"].clone();
    let found = message(&|index| index["weight_map"]["model.norm.wight"] = shard.clone());
    assert!(found.contains("places tensor `model.norm.wight`"), "{found}");
    let found = message(&|index| index["weight_map"]["model.norm.weight"] = json!("model-00099-of-00002.safetensors"));
    assert!(found.contains("model-00099-of-00002.safetensors"), "{found}");
    for outside in
        ["../model.safetensors", "/etc/passwd", "", "..", ".", "./model.safetensors", "sub/model.safetensors", "a\\b"]
    {
        let found = message(&|index| index["weight_map"]["model.norm.weight"] = json!(outside));
        assert!(found.contains("same folder"), "{outside}: {found}");
    }
    let found = message(&|index| *index = json!([]));
    assert!(found.contains("weight_map"), "{found}");
}

/// Opens a file, loads everything, and returns whether that succeeded; a panic fails the test by itself.
fn load_all(path: &Path) -> bool {
    let Ok((_, source)) = WeightSource::open(path, None) else { return false };
    let names: Vec<String> = source.names().map(Into::into).collect();
    names.iter().all(|name| {
        let matrix = match *source.shape(name).unwrap() {
            [rows, cols] => source.linear(name, (rows, cols), AS_STORED).is_ok(),
            _ => true,
        };
        matrix && source.tensor_f32(name).is_ok()
    })
}

/// Every cut and many single-byte changes of `file`, whose first `header` bytes describe the rest.
fn damage(file: &Path, model: &Path, header: usize) {
    let whole = std::fs::read(file).unwrap();
    assert!(load_all(model), "the undamaged file loads");
    let cuts = (0..64).chain((64..whole.len()).step_by(whole.len() / 41));
    for cut in cuts.chain([whole.len() - 1]) {
        std::fs::write(file, &whole[..cut]).unwrap();
        assert!(!load_all(model), "cut to {cut} of {} bytes and still loads", whole.len());
    }
    let step = (header / 250).max(1);
    for at in (0..64).chain((64..header).step_by(step)) {
        for value in [whole[at] ^ 1, whole[at] ^ 0x80, 0xff] {
            let mut damaged = whole.clone();
            damaged[at] = value;
            std::fs::write(file, &damaged).unwrap();
            // A changed scale or a changed comment can still be a model; what counts is that nothing panics.
            load_all(model);
        }
    }
    for at in 0..8 {
        let mut damaged = whole.clone();
        damaged[at] ^= 0x55;
        std::fs::write(file, &damaged).unwrap();
        assert!(!load_all(model), "byte {at} of the magic number or header length changed and still loads");
    }
}

/// That the headers alone say what each matrix takes when it is read, with and without quantisation on the way.
fn check_sizes(path: &Path, projections: Option<Kept>) {
    let (config, sizes) = StoredSizes::read(path, false).unwrap();
    let (read, source) = WeightSource::open(path, None).unwrap();
    assert_eq!((config, sizes.projections()), (read.clone(), projections), "{}", path.display());
    for tensor in read.tensors().iter().filter(|tensor| tensor.shape.len() == 2) {
        let (name, shape) = (&tensor.name, (tensor.shape[0], tensor.shape[1]));
        let bytes = source.linear(name, shape, AS_STORED).unwrap().size_bytes() as u64;
        let values = (shape.0 * shape.1) as u64;
        let said = sizes.packed(name).or_else(|| sizes.dense(name, WeightDtype::Auto).map(|each| each * values));
        // What describes 4-bit codes is counted as its file has it, with a table and a text for each matrix.
        let slack = if projections == Some(Kept::Codes) { 4096 } else { 0 };
        assert!(said.unwrap().abs_diff(bytes) <= slack, "{name} of {}: {said:?}, {bytes}", path.display());
        // A type that is asked for is not what is stored.
        assert_eq!(sizes.dense(name, WeightDtype::Float32), None);
        let quantization = Quantization { quant_type: QuantType::Nf4, double_quant: true };
        let packed = LinearStorage { quantization: Some(quantization), dtype: WeightDtype::Auto };
        let is_packed = sizes.packed(name).is_some();
        assert_eq!(source.linear(name, shape, packed).unwrap().size_bytes() as u64 == bytes, is_packed, "{name}");
    }
}

#[test]
fn headers_alone_say_what_weights_take() {
    let folder = tempfile::tempdir().unwrap();
    let (config, drawn) = open_random(folder.path(), &tiny_config("qwen2", false), 9);
    for (kind, kept) in [
        (GgmlDType::F32, Kept::Dense(DType::F32)),
        (GgmlDType::F16, Kept::Dense(DType::F16)),
        (GgmlDType::BF16, Kept::Dense(DType::BF16)),
        (GgmlDType::Q8_0, Kept::Blocks),
        (GgmlDType::Q4_0, Kept::Blocks),
    ] {
        let path = folder.path().join("model.gguf");
        write_gguf(&path, &config, &drawn, kind, &[]);
        check_sizes(&path, Some(kept));
    }
    for case in golden("qlora_step") {
        check_sizes(&case.join("base_bnb4bit"), Some(Kept::Codes));
    }
    check_sizes(Path::new("data/tiny-qwen"), Some(Kept::Dense(DType::F32)));
    // The index of a hub's model comes with its configuration, its shards do not; also of one that is stored in 4 bits.
    let index = json!({"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}});
    std::fs::remove_file(folder.path().join("model.gguf")).unwrap();
    std::fs::write(folder.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
    let read = || StoredSizes::read(folder.path(), false).unwrap().1;
    assert_eq!((read().projections(), read().quantization()), (None, None));
    let mut four_bits = tiny_config("qwen2", false);
    four_bits["quantization_config"] = json!({"load_in_4bit": true, "bnb_4bit_use_double_quant": true});
    std::fs::write(folder.path().join("config.json"), four_bits.to_string()).unwrap();
    assert_eq!(read().projections(), Some(Kept::Codes));
    assert!(read().quantization().unwrap().double_quant);
    // A configuration alone, of a model that no machine holds.
    let (_, sizes) = StoredSizes::read(Path::new("configs/bench/qwen25-72b"), false).unwrap();
    assert_eq!((sizes.projections(), sizes.packed("lm_head.weight")), (None, None));
}

#[test]
fn a_damaged_gguf_file_is_an_error_and_never_a_panic() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = tiny_config("qwen2", false);
    config["num_hidden_layers"] = json!(1);
    let (config, source) = open_random(folder.path(), &config, 9);
    let path = folder.path().join("model.gguf");
    write_gguf(&path, &config, &source, GgmlDType::Q8_0, &[]);
    damage(&path, &path, 2048);
    // Numbers that claim far more than the file holds: tensors, metadata values, the first key's length.
    let (config, source) = open_random(folder.path(), &tiny_config("qwen2", false), 9);
    write_gguf(&path, &config, &source, GgmlDType::Q8_0, &[]);
    let whole = std::fs::read(&path).unwrap();
    for at in [8, 16, 24] {
        for claim in [u64::MAX, u64::MAX / 2, 1 << 40, whole.len() as u64] {
            let mut damaged = whole.clone();
            damaged[at..at + 8].copy_from_slice(&claim.to_le_bytes());
            std::fs::write(&path, &damaged).unwrap();
            let error = WeightSource::open(&path, None).unwrap_err().to_string();
            assert!(error.contains("model.gguf") && error.contains("damaged"), "{error}");
        }
    }
    // An alignment that no reader can divide by.
    let mut damaged = whole[..24].to_vec();
    damaged[16..24].copy_from_slice(&14u64.to_le_bytes());
    let key = b"general.alignment";
    damaged.extend((key.len() as u64).to_le_bytes());
    damaged.extend(key);
    damaged.extend(4u32.to_le_bytes());
    damaged.extend(0u32.to_le_bytes());
    damaged.extend(&whole[24..]);
    std::fs::write(&path, &damaged).unwrap();
    let error = WeightSource::open(&path, None).unwrap_err().to_string();
    assert!(error.contains("general.alignment"), "{error}");
}

#[test]
fn a_damaged_safetensors_file_is_an_error_and_never_a_panic() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = tiny_config("qwen2", true);
    config["num_hidden_layers"] = json!(1);
    let (config, source) = open_random(folder.path(), &config, 9);
    let target = folder.path().join("out");
    save_model::<Error>(&target, &config, DType::BF16, SHARD_BYTES, |name| source.tensor_f32(name)).unwrap();
    let file = target.join("model.safetensors");
    let header = u64::from_le_bytes(std::fs::read(&file).unwrap()[..8].try_into().unwrap()) as usize;
    damage(&file, &target, 8 + header);
    // A header whose offsets add up to the file's length only when they wrap around.
    let json = format!(r#"{{"x":{{"dtype":"U8","shape":[{0}],"data_offsets":[0,{0}]}}}}"#, usize::MAX - 79);
    let mut wrapped = (json.len() as u64).to_le_bytes().to_vec();
    wrapped.extend(json.as_bytes());
    std::fs::write(&file, &wrapped).unwrap();
    assert!(WeightSource::open(&target, None).is_err());
}

#[test]
fn a_damaged_4_bit_checkpoint_is_an_error_and_never_a_panic() {
    let folder = tempfile::tempdir().unwrap();
    for case in golden("qlora_step") {
        let model = folder.path().join(case.file_name().unwrap());
        std::fs::create_dir(&model).unwrap();
        for name in ["config.json", "model.safetensors"] {
            std::fs::copy(case.join("base_bnb4bit").join(name), model.join(name)).unwrap();
        }
        let file = model.join("model.safetensors");
        let stored = candle_core::safetensors::load(&file, &Device::Cpu).unwrap();
        let parts: Vec<String> =
            stored.keys().filter(|name| name.contains("layers.0.self_attn.q_proj.weight")).cloned().collect();
        for part in &parts {
            // Without one part, and with one part too short.
            let mut without: BTreeMap<_, _> = stored.iter().map(|(k, v)| (k.clone(), v.clone())).collect();
            let removed = without.remove(part).unwrap();
            let short = removed.flatten_all().unwrap();
            let short = short.narrow(0, 0, short.elem_count() - 1).unwrap();
            candle_core::safetensors::save(&without.clone().into_iter().collect(), &file).unwrap();
            assert!(!load_all(&model), "loads without {part}");
            without.insert(part.clone(), short);
            candle_core::safetensors::save(&without.into_iter().collect(), &file).unwrap();
            assert!(!load_all(&model), "loads with a short {part}");
        }
    }
}

/// With the GGUF file named in `TRAINER_QWEN05B_GGUF`, the values of some of its tensors as the reference dequantised them.
#[test]
#[ignore = "needs the Qwen2.5-Coder-0.5B GGUF file"]
fn the_real_model_s_tensors_are_those_of_the_reference() {
    let path =
        PathBuf::from(std::env::var_os("TRAINER_QWEN05B_GGUF").expect("TRAINER_QWEN05B_GGUF names the GGUF file"));
    let root = std::env::var_os("TRAINER_GOLDEN_DIR")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden"), PathBuf::from);
    let reference = json_of(&root.join("real05b/real05b.json"));
    let (config, source) = WeightSource::open(&path, None).unwrap();
    for (key, found) in [
        ("hidden_size", config.hidden_size),
        ("num_hidden_layers", config.num_hidden_layers),
        ("num_attention_heads", config.num_attention_heads),
        ("num_key_value_heads", config.num_key_value_heads),
        ("intermediate_size", config.intermediate_size),
        ("vocab_size", config.vocab_size),
    ] {
        assert_eq!(Some(found as u64), reference["config"][key].as_u64(), "{key}");
    }
    assert_eq!(Some(config.tie_word_embeddings), reference["config"]["tie_word_embeddings"].as_bool());
    let tensors = reference["dequantised_tensors"].as_object().unwrap();
    assert!(!tensors.is_empty());
    for (name, wanted) in tensors {
        let values = floats(&source.tensor_f32(name).unwrap());
        let number = |key: &str| wanted[key].as_f64().unwrap();
        let sums = values.iter().map(|v| f64::from(*v)).fold((0.0, 0.0), |(s, a), v| (s + v, a + v.abs()));
        assert!((sums.0 - number("sum")).abs() <= 1e-5 * number("abs_sum"), "{name}: {}", sums.0);
        assert!((sums.1 - number("abs_sum")).abs() <= 1e-5 * number("abs_sum"), "{name}: {}", sums.1);
        let first: Vec<f32> = wanted["first8"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect();
        for (found, wanted) in values.iter().zip(&first) {
            assert!((found - wanted).abs() <= 1e-6 * wanted.abs(), "{name}: {found} {wanted}");
        }
    }
}
