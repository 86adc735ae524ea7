//! Adapters on chosen modules, weights trained whole beside them, and what else changes a training pass.

use std::fs;
use std::path::Path;

use candle_core::{Device, Tensor};
use serde_json::{Value, json};

use crate::test_run::{TestRun, generate};

fn adapter(folder: &Path) -> std::collections::HashMap<String, Tensor> {
    candle_core::safetensors::load(folder.join("adapter_model.safetensors"), &Device::Cpu).unwrap()
}

fn adapter_config(folder: &Path) -> Value {
    serde_json::from_slice(&fs::read(folder.join("adapter_config.json")).unwrap()).unwrap()
}

fn floats(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// Stops a run by a signal, resumes it, and compares it with the one that was never stopped.
fn assert_resumes(run: impl Fn() -> TestRun) -> TestRun {
    let (straight, stopped) = (run().done(), run());
    stopped.run_until(3, "TERM").expect(130);
    stopped.run(&["--resume"]).expect(0);
    stopped.assert_same(&straight);
    straight
}

#[test]
fn weights_trained_whole_are_saved_under_pefts_names_resumed_and_loaded_again() {
    for is_4bit in ["true", "false"] {
        let run = assert_resumes(|| {
            TestRun::sft()
                .set("lora_modules_to_save", "[embed_tokens, lm_head, input_layernorm]")
                .set("load_in_4bit", is_4bit)
                .set("lora_dropout", 0.1)
                .set("max_steps", 40)
        });
        let saved = adapter(&run.output());
        for name in ["lm_head.weight", "model.embed_tokens.weight", "model.layers.1.input_layernorm.weight"] {
            assert!(saved.contains_key(&format!("base_model.model.{name}")), "{name}: {:?}", saved.keys());
        }
        assert_eq!(
            adapter_config(&run.output())["modules_to_save"],
            json!(["embed_tokens", "input_layernorm", "lm_head"])
        );
        // The ends are two matrices now, also of a tied model.
        assert_ne!(
            floats(&saved["base_model.model.lm_head.weight"]),
            floats(&saved["base_model.model.model.embed_tokens.weight"])
        );
        let still = TestRun::sft()
            .set("adapter_name_or_path", run.output().display())
            .set("load_in_4bit", is_4bit)
            .set("learning_rate", 0.0)
            .set("max_steps", 1)
            .done();
        for (name, tensor) in adapter(&still.output()) {
            assert_eq!(floats(&tensor), floats(&saved[&name]), "{name}");
        }
    }
}

#[test]
fn an_adapter_on_both_ends_and_on_a_pattern_learns_resumes_and_speaks() {
    let base = TestRun::full().set("max_steps", 1).done();
    let run = || {
        TestRun::sft()
            .model(&base.output())
            .set("load_in_4bit", "false")
            .set("lora_target_modules", r"'(.*\.1\.self_attn\.[qk]_proj|lm_head|.*embed_tokens)'")
            .set("lora_dropout", 0.2)
            .set("learning_rate", "2e-2")
            .set("max_steps", 40)
    };
    let run = assert_resumes(run);
    let losses = run.metric("loss");
    let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
    assert!(mean(&losses[losses.len() - 5..]) < mean(&losses[..5]), "{losses:?}");
    let saved = adapter(&run.output());
    let mut names: Vec<&str> =
        saved.keys().map(|name| name.strip_prefix("base_model.model.").unwrap_or(name)).collect();
    names.sort_unstable();
    assert_eq!(
        names,
        [
            "lm_head.lora_A.weight",
            "lm_head.lora_B.weight",
            "model.embed_tokens.lora_embedding_A",
            "model.embed_tokens.lora_embedding_B",
            "model.layers.1.self_attn.k_proj.lora_A.weight",
            "model.layers.1.self_attn.k_proj.lora_B.weight",
            "model.layers.1.self_attn.q_proj.lora_A.weight",
            "model.layers.1.self_attn.q_proj.lora_B.weight",
        ]
    );
    assert!(saved.iter().all(|(name, tensor)| floats(tensor).iter().any(|v| *v != 0.0) || !name.contains("_A")));
    let (base, folder) = (base.output(), run.output());
    let ask = |more: &[&str]| generate(&base, &[&["--prompt", "9+12=", "--max-new-tokens", "8"], more].concat());
    let with = ask(&["--adapter", folder.to_str().unwrap()]).expect(0);
    assert_ne!(with.out, ask(&[]).expect(0).out);
}

#[test]
fn targets_of_no_module_are_an_error_with_the_modules_there_are() {
    for (key, value) in [
        ("lora_target_modules", r"'model\.layers\.9\d\..*'"),
        ("lora_target_modules", "[layers.99.self_attn.q_proj]"),
        ("lora_modules_to_save", "[score]"),
    ] {
        let parts = ["is no module of this model", "self_attn.q_proj", "lm_head", "model.layers.0"];
        TestRun::sft().set(key, value).run(&[]).expect_error(1, &parts);
    }
    // Every target is inside of what is trained whole.
    let run = TestRun::sft().set("load_in_4bit", "false").set("lora_target_modules", "[up_proj]");
    run.set("lora_modules_to_save", "[mlp]").run(&[]).expect_error(1, &["without what `modules_to_save` trains whole"]);
    let run = TestRun::sft().set("load_in_4bit", "true").set("lora_target_modules", "[q_proj]");
    run.set("lora_modules_to_save", "[mlp]").run(&[]).expect_error(1, &["mlp.gate_proj.weight", "load_in_4bit"]);
}

#[test]
fn a_decomposed_adapter_is_trained_resumed_and_loaded_again() {
    let run = || TestRun::sft().set("use_dora", "true").set("lora_dropout", 0.1).set("learning_rate", "2e-2");
    let run = assert_resumes(|| run().set("max_steps", 40));
    assert_eq!(adapter_config(&run.output())["use_dora"], json!(true));
    let saved = adapter(&run.output());
    let magnitudes = saved.keys().filter(|name| name.ends_with(".lora_magnitude_vector")).count();
    assert_eq!(3 * magnitudes, saved.len());
    let losses = run.metric("loss");
    let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
    assert!(mean(&losses[losses.len() - 5..]) < mean(&losses[..5]), "{losses:?}");
    // A fresh one computes what the base does.
    let first = |more: &str| TestRun::sft().set("use_dora", more).set("max_steps", 1).set("lora_dropout", 0.0).done();
    let (decomposed, plain) = (first("true").metric("loss")[0], first("false").metric("loss")[0]);
    assert!((decomposed - plain).abs() < 1e-5 * plain, "{decomposed} {plain}");
}

#[test]
fn noise_and_smoothed_labels_change_training_and_are_resumed() {
    let plain = TestRun::sft().set("max_steps", 40).done();
    let noisy = assert_resumes(|| TestRun::sft().set("max_steps", 40).set("neftune_noise_alpha", 5));
    let smooth = assert_resumes(|| TestRun::sft().set("max_steps", 40).set("label_smoothing_factor", 0.1));
    assert_ne!(noisy.metric("loss"), plain.metric("loss"));
    assert_ne!(smooth.metric("loss"), plain.metric("loss"));
    // Evaluation has no noise, but smoothed labels: before anything was learnt it is that of the plain run, and not.
    let start = |key: &str, value: f64| {
        let run = TestRun::sft().set("max_steps", 1).set("learning_rate", 0.0).set("eval_steps", 1);
        run.set(key, value).done()
    };
    let (noisy, plain) = (start("neftune_noise_alpha", 5.0), start("neftune_noise_alpha", 0.0));
    assert_eq!(noisy.metric("eval_loss"), plain.metric("eval_loss"));
    assert_ne!(noisy.metric("loss"), plain.metric("loss"));
    assert_ne!(start("label_smoothing_factor", 0.1).metric("eval_loss"), plain.metric("eval_loss"));
}

#[test]
fn the_weight_of_the_entropy_bonus_adapts_and_is_resumed() {
    let run = assert_resumes(|| {
        TestRun::grpo()
            .set("max_steps", 40)
            .set("use_adaptive_entropy", "true")
            .set("entropy_target", 100)
            .set("entropy_coef", 0.01)
            .set("entropy_coef_delta", 0.005)
            .set("entropy_coef_max", 0.05)
            .set("logging_steps", 1)
    });
    let weights = run.metric("entropy_coef");
    assert!((weights[0] - 0.015).abs() < 1e-9 && (weights[19] - 0.05).abs() < 1e-9, "{weights:?}");
    let losses = (run.metric("loss")[5], run.metric("policy_loss")[5]);
    assert!(losses.0 < losses.1, "the bonus takes part: {losses:?}");
}

#[test]
fn a_policy_that_trains_whole_weights_keeps_its_start_as_the_reference() {
    let run = assert_resumes(|| {
        TestRun::grpo()
            .set("max_steps", 40)
            .set("beta", 0.04)
            .set("lora_modules_to_save", "[lm_head]")
            .set("learning_rate", "5e-3")
            .set("logging_steps", 1)
    });
    let kl = run.metric("kl");
    assert!(kl[0].abs() < 1e-6 && kl.iter().any(|kl| *kl > 1e-5), "{kl:?}");
}
