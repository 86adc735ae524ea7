//! Input that cannot be used: each gives one message (what, where, what to do), an exit code, and starts nothing.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::test_run::{TestRun, copy_files, end, generate, names, start, trainer};

/// Asserts that the run ends with `code` and one message of `parts`, and that no run was begun.
#[track_caller]
fn refused(run: &TestRun, code: i32, parts: &[&str]) {
    let ended = run.run(&[]).expect_error(code, parts);
    assert_eq!(ended.out, "");
    assert!(!run.has("metrics.jsonl"), "a run was begun");
}

#[test]
fn every_mistake_of_a_config_is_shown_with_its_line_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let (config, output) = (folder.path().join("wrong.yaml"), folder.path().join("out"));
    let text = format!(
        "model_name_or_path: data/tiny-qwen\ndataset_name: data/arithmetic/sft.jsonl\nlearning_rte: 1e-3\n\
         max_steps: many\nper_device_train_batch_size: 0\nload_in_4bit: true\nnum_generations: 4\noutput_dir: {}\n",
        output.display()
    );
    fs::write(&config, text).unwrap();
    let result = trainer().arg("sft").arg(&config).output().unwrap();
    let message = String::from_utf8(result.stderr).unwrap();
    assert_eq!((result.status.code(), result.stdout.len()), (Some(2), 0), "{message}");
    let parts = [
        "5 problems",
        "wrong.yaml:3:1",
        "`learning_rte` is no key of `trainer sft`",
        "did you mean `learning_rate`?",
        "wrong.yaml:4:12",
        "`max_steps` expects an integer",
        "got `many`",
        "wrong.yaml:5:30",
        "must be at least 1",
        "wrong.yaml:6:",
        "`load_in_4bit: true` needs `use_peft: true`",
        "wrong.yaml:7:1",
        "a key of `trainer grpo`, not of `trainer sft`",
    ];
    for part in parts {
        assert!(message.contains(part), "`{part}` is missing in\n{message}");
    }
    assert!(!message.contains('\u{1b}') && !output.exists());
}

#[test]
fn wrong_keys_and_values_are_exit_code_2() {
    refused(&TestRun::sft().set("learning_rte", 3), 2, &["`learning_rte` is no key", "--set:1:1", "`learning_rate`"]);
    refused(
        &TestRun::sft().set("max_steps", "many"),
        2,
        &["`max_steps` expects an integer", "got `many`", "--set:1:11"],
    );
    refused(&TestRun::sft().set("learning_rate", -1), 2, &["`learning_rate`", "at least 0", "-1"]);
    refused(&TestRun::grpo().set("reward_funcs", "[acuracy]"), 2, &["no reward `acuracy`", "did you mean `accuracy`?"]);
    let wrong = TestRun::grpo().set("num_generations", 3);
    refused(&wrong, 2, &["8 completions", "`num_generations` 3", "help:"]);
    let missing = TestRun::of("sft", "configs/missing.yaml");
    refused(&missing, 2, &["`configs/missing.yaml` cannot be read", "check the path"]);
}

#[test]
fn missing_files_are_named() {
    let run = TestRun::sft();
    let nowhere = run.beside("nowhere");
    let place = nowhere.to_str().unwrap();
    refused(&TestRun::sft().model(&nowhere), 1, &["no model at", place, "config.json and model.safetensors", ".gguf"]);
    refused(&TestRun::sft().model(&run.beside("m.gguf")), 1, &["no model at", "m.gguf", "give a"]);
    refused(&TestRun::sft().set("dataset_name", place), 1, &[place, "no such file or folder", "check `dataset_name`"]);
    let adapter = TestRun::grpo().set("adapter_name_or_path", place);
    refused(&adapter, 1, &["no adapter at", place, "adapter_config.json and adapter_model.safetensors"]);
    let template = TestRun::sft().set("chat_template_path", place);
    refused(&template, 1, &[place, "No such file"]);

    // An empty folder, a folder without weights, one without a tokenizer.
    fs::create_dir(&nowhere).unwrap();
    refused(&TestRun::sft().model(&nowhere), 1, &["no model at", place, "without config.json"]);
    refused(&TestRun::sft().set("dataset_name", place), 1, &[place, "no data file", ".jsonl"]);
    fs::copy("data/tiny-qwen/config.json", nowhere.join("config.json")).unwrap();
    refused(&TestRun::sft().model(&nowhere), 1, &["no model at", place, "config.json without weights"]);
    refused(
        &TestRun::sft().set("model_name_or_path", place),
        1,
        &["tokenizer.json`: no such file", "tokenizer_name_or_path"],
    );
}

#[test]
fn damaged_safetensors_are_named_and_explained() {
    let good = TestRun::full().set("max_steps", 1).done();
    let folder = good.beside("model");
    copy_files(&good.output(), &folder);
    let file = folder.join("model.safetensors");
    let bytes = fs::read(&file).unwrap();
    let noise: Vec<u8> = (0..100_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let cases: [(&[u8], &str); 6] = [
        (&[], "it has only 0 bytes"),
        (&bytes[..4], "it has only 4 bytes"),
        (&bytes[..1000], "the length of a header that fits into its 1000 bytes"),
        (&bytes[..bytes.len() / 2], "not as many as its header lists"),
        (&bytes[..bytes.len() - 1], "not as many as its header lists"),
        (&noise, "first eight bytes"),
    ];
    let place = format!("`{}` is damaged or incomplete", file.display());
    for (content, part) in cases {
        fs::write(&file, content).unwrap();
        refused(&TestRun::sft().model(&folder), 1, &[&place, part, "copy or download it again"]);
    }
    generate(&folder, &["--prompt", "1"]).expect_error(1, &[&place, "copy or download it again"]);

    // Whole weights under a configuration of another shape, and a configuration that is cut.
    fs::write(&file, &bytes).unwrap();
    let config = fs::read_to_string(folder.join("config.json")).unwrap();
    fs::write(folder.join("config.json"), config.replace("\"hidden_size\": 128", "\"hidden_size\": 256")).unwrap();
    refused(&TestRun::sft().model(&folder), 1, &["embed_tokens.weight", "[64, 128]", "[64, 256]"]);
    fs::write(folder.join("config.json"), &config[..config.len() / 2]).unwrap();
    refused(&TestRun::sft().model(&folder), 1, &["config.json` is not valid JSON", "copy or download it again"]);
    fs::write(folder.join("config.json"), config.replace("qwen2", "llama").replace("Qwen2", "Llama")).unwrap();
    refused(
        &TestRun::sft().model(&folder),
        1,
        &["architecture `LlamaForCausalLM` is not supported", "Qwen3ForCausalLM"],
    );
    fs::write(folder.join("config.json"), &config).unwrap();
    fs::write(folder.join("tokenizer.json"), "{\"version\":").unwrap();
    refused(&TestRun::sft().model(&folder), 1, &["tokenizer.json"]);
}

#[test]
fn a_damaged_adapter_is_named() {
    let good = TestRun::sft().set("max_steps", 1).set("eval_strategy", "no").done();
    let folder = good.beside("adapter");
    copy_files(&good.output(), &folder);
    let file = folder.join("adapter_model.safetensors");
    let bytes = fs::read(&file).unwrap();
    fs::write(&file, &bytes[..bytes.len() / 3]).unwrap();
    let place = format!("`{}` is damaged or incomplete", file.display());
    refused(&TestRun::grpo().set("adapter_name_or_path", folder.display()), 1, &[&place, "copy or download it again"]);
}

/// A GGUF text: its length, then its bytes.
fn gguf_text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

/// A GGUF header of one architecture key and one f32 tensor of 64 rows of 128, padded to where data begin.
fn gguf_header() -> Vec<u8> {
    let mut bytes = b"GGUF".to_vec();
    bytes.extend(3u32.to_le_bytes());
    bytes.extend([1u64.to_le_bytes(), 1u64.to_le_bytes()].concat());
    bytes.extend([gguf_text("general.architecture"), 8u32.to_le_bytes().to_vec(), gguf_text("qwen2")].concat());
    bytes.extend([gguf_text("token_embd.weight"), 2u32.to_le_bytes().to_vec()].concat());
    bytes.extend([128u64.to_le_bytes(), 64u64.to_le_bytes()].concat());
    bytes.extend([0u32.to_le_bytes().to_vec(), 0u64.to_le_bytes().to_vec()].concat());
    bytes.resize(bytes.len().next_multiple_of(32), 0);
    bytes
}

#[test]
fn damaged_gguf_files_are_named_and_explained() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.gguf");
    let header = gguf_header();
    let cut = [&header[..], &[0; 1000]].concat();
    let mut absurd = header.clone();
    absurd[8..16].copy_from_slice(&u64::MAX.to_le_bytes());
    let cases: [(&[u8], &str); 5] = [
        (b"", "0 left"),
        (b"this is no model at all", "does not begin with `GGUF`"),
        (&header[..60], "at byte"),
        (&absurd, "the number of tensors"),
        (&cut, "`token_embd.weight` (F32 [64, 128], offset 0) reaches beyond the file's"),
    ];
    let place = format!("`{}` is damaged or incomplete", file.display());
    for (content, part) in cases {
        fs::write(&file, content).unwrap();
        refused(&TestRun::sft().model(&file), 1, &[&place, part, "copy or download it again"]);
        generate(&file, &["--prompt", "1"]).expect_error(1, &[&place, part, "copy or download it again"]);
    }
}

#[test]
fn data_that_cannot_be_used_are_named_with_their_line() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("data.jsonl");
    let place = file.to_str().unwrap();
    let with = |run: TestRun, text: &str| {
        fs::write(&file, text).unwrap();
        run.set("dataset_name", place)
    };
    let sft = || TestRun::sft().set("eval_strategy", "no").set("eval_fraction", "null");
    refused(&with(sft(), ""), 1, &[place, "has no rows", "check `dataset_name`"]);
    refused(&with(TestRun::grpo(), "\n"), 1, &[place, "has no rows", "check `dataset_name`"]);
    let torn = "{\"prompt\":\"1+1=\",\"completion\":\"2\"}\n{\"prompt\":\"1+1=\",\"compl\n";
    refused(&with(sft(), torn), 1, &[place, "line 2", "not valid JSON"]);
    let other = "{\"question\":\"1+1=\",\"result\":\"2\"}\n";
    refused(&with(sft(), other), 1, &[place, "`question`, `result`"]);
    refused(&with(TestRun::grpo(), other), 1, &[place, "line 1", "column `prompt` not found", "`question`, `result`"]);
    let number = "{\"prompt\":\"1+1=\",\"completion\":\"2\"}\n{\"prompt\":3,\"completion\":\"2\"}\n";
    refused(&with(sft(), number), 1, &[place, "line 2", "`prompt`"]);
}

/// Reading and packing a large model takes minutes.
#[test]
fn rows_are_looked_at_before_weights_are_read() {
    const READ: &str = "the model was read and packed";
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("data.jsonl");
    fs::write(&file, "{\"prompt\":\"1+1=\",\"completion\":\"2\"}\n{\"prompt\":3,\"completion\":\"2\"}\n").unwrap();
    for run in [TestRun::sft, TestRun::grpo] {
        let told = |run: TestRun, code| {
            end(start(run.set("max_steps", 1).command(&[]).env("TRAINER_LOG", "info"))).expect(code).err
        };
        assert!(told(run(), 0).contains(READ));
        let bad =
            run().set("eval_strategy", "no").set("eval_fraction", "null").set("dataset_name", file.to_str().unwrap());
        let message = told(bad, 1);
        assert!(message.contains("line 2") && !message.contains(READ), "{message}");
    }
}

#[test]
fn prompts_longer_than_the_limits_are_named() {
    let parts = ["train.jsonl`, line 1", "has 5 tokens", "(`max_prompt_length`) is 3", "`truncate_prompts: true`"];
    refused(&TestRun::grpo().set("max_prompt_length", 3), 1, &parts);
    TestRun::grpo().set("max_prompt_length", 3).set("truncate_prompts", "true").set("max_steps", 1).done();
    let run = TestRun::grpo().set("max_prompt_length", "null").set("max_completion_length", 255);
    refused(&run, 1, &["the longest prompt has 6 tokens", "255", "the 256 that the model holds", "lower"]);

    let run = TestRun::sft().set("packing", "false").set("max_length", "null").set("eval_strategy", "no");
    let data = run.beside("long.jsonl");
    let row = format!("{{\"prompt\":\"{}=\",\"completion\":\"150\"}}\n", "1+".repeat(150));
    fs::write(&data, [&row[..], "{\"prompt\":\"1=\",\"completion\":\"1\"}\n"].concat()).unwrap();
    let run = run.set("dataset_name", data.display()).set("eval_fraction", "null");
    refused(&run, 1, &["tokens, the model holds 256", "`max_length: 256`"]);
}

/// The weights in `folder` with the first value of one tensor replaced by NaN.
fn put_nan(folder: &Path, tensor: &str) {
    let file = folder.join("model.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    let header_end = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..header_end]).unwrap();
    let start = header_end + header[tensor]["data_offsets"][0].as_u64().unwrap() as usize;
    bytes[start..start + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(file, bytes).unwrap();
}

#[test]
fn a_model_with_a_nan_is_an_error_that_names_the_place() {
    let run = TestRun::full().set("max_steps", 1).done();
    let folder = run.beside("nan");
    copy_files(&run.output(), &folder);
    put_nan(&folder, "model.layers.1.mlp.up_proj.weight");
    TestRun::sft().model(&folder).set("load_in_4bit", "false").run(&[]).expect_error(1, &["layer", "1"]);
    TestRun::grpo().model(&folder).set("load_in_4bit", "false").run(&[]).expect_error(1, &["NaN"]);
    generate(&folder, &["--prompt", "1+1="]).expect_error(1, &["NaN"]);
}

#[test]
fn a_loss_that_is_no_number_points_to_no_checkpoint_where_none_is() {
    let run = TestRun::full().set("learning_rate", "1e38").set("max_grad_norm", 0);
    let ended = run.run(&[]).expect_error(1, &["of step 2", "Lower `learning_rate`"]);
    assert!(run.checkpoints().is_empty() && !ended.err.contains("newest checkpoint"), "{}", ended.err);
}

#[test]
fn a_nan_does_not_vanish_in_4_bits() {
    let run = TestRun::full().set("max_steps", 1).done();
    let folder = run.beside("nan");
    copy_files(&run.output(), &folder);
    put_nan(&folder, "model.layers.1.mlp.up_proj.weight");
    TestRun::sft().model(&folder).run(&[]).expect_error(1, &["layers.1.mlp.up_proj.weight"]);
}

#[test]
fn a_loss_that_is_no_number_ends_the_run_and_keeps_the_checkpoints() {
    let run = TestRun::sft()
        .set("learning_rate", "1e30")
        .set("lr_scheduler_type", "constant")
        .set("save_steps", 1)
        .set("max_steps", 10);
    let parts = ["the loss of step 2 is NaN", "decoder layer 0", "checkpoint", "Lower `learning_rate`"];
    let ended = run.run(&[]).expect_error(1, &parts);
    assert_eq!(ended.steps(), [1]);
    assert_eq!(run.checkpoints(), [1]);
    run.assert_checkpoint(1);
    assert!(!run.has("adapter_model.safetensors"));

    let grpo = TestRun::grpo().set("learning_rate", "1e30").set("save_steps", 1);
    let ended = grpo.run(&[]).expect_error(1, &["NaN", "learning rate"]);
    assert_eq!((ended.steps(), grpo.checkpoints()), (vec![1], vec![1]));
    grpo.assert_checkpoint(1);
}

/// All weights are written under the names that they were read from, under any way of writing the path.
#[test]
fn full_fine_tuning_does_not_write_over_its_own_model() {
    let run = TestRun::full().set("max_steps", 1).done();
    let folder = run.beside("model");
    copy_files(&run.output(), &folder);
    fs::remove_file(folder.join("metrics.jsonl")).unwrap();
    let before: Vec<_> = names(&folder).into_iter().map(|name| (fs::read(folder.join(&name)).unwrap(), name)).collect();
    let link = run.beside("link");
    std::os::unix::fs::symlink(&folder, &link).unwrap();
    for output in [folder.clone(), link, folder.join("../model")] {
        for more in ["overwrite_output_dir=false", "overwrite_output_dir=true", "init_random=true"] {
            let own = TestRun::full().model(&folder).set("output_dir", output.display());
            let place = format!("`output_dir: {}`", output.display());
            let parts = [&place, "`model_name_or_path`", "choose another `output_dir`", "`use_peft: true`"];
            let ended = own.run(&["--set", more]).expect_error(1, &parts);
            assert_eq!(ended.out, "");
        }
    }
    let grpo = TestRun::grpo().model(&folder).set("use_peft", "false").set("load_in_4bit", "false");
    grpo.set("output_dir", folder.display()).run(&[]).expect_error(1, &["full fine-tuning", "choose another"]);
    for (bytes, name) in &before {
        assert!(fs::read(folder.join(name)).unwrap() == *bytes, "`{name}` was changed");
    }
    assert_eq!(names(&folder).len(), before.len());
}

#[test]
fn an_output_folder_that_cannot_be_made_is_named() {
    let run = TestRun::sft();
    fs::write(run.beside("file"), "").unwrap();
    let inside = run.beside("file").join("out");
    let arguments = ["--set", &format!("output_dir={}", inside.display())];
    run.run(&arguments).expect_error(1, &["cannot create the folder", inside.to_str().unwrap()]);
}
