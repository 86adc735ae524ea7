//! The command line through the real binary: help, exit codes, closed pipes.

use std::io::Read;
use std::process::{Command, Stdio};

fn trainer(arguments: &[&str]) -> (Option<i32>, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_trainer")).args(arguments).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[test]
fn help_has_examples_and_exit_codes_and_goes_to_standard_output() {
    let (code, out, err) = trainer(&["--help"]);
    assert_eq!((code, err.as_str()), (Some(0), ""));
    for expected in
        ["sft", "grpo", "evaluate", "generate", "config", "preprocess", "Examples:", "Exit codes:", "TRAINER_LOG"]
    {
        assert!(out.contains(expected), "{expected} is missing in\n{out}");
    }
    for subcommand in ["sft", "grpo", "evaluate", "preprocess", "generate", "config", "bench"] {
        let (code, out, _) = trainer(&[subcommand, "--help"]);
        assert_eq!(code, Some(0), "{subcommand}");
        assert!(out.contains("Examples:") && out.contains(&format!("trainer {subcommand}")), "{out}");
        assert!(out.lines().all(|line| line.chars().count() <= 120), "{subcommand} has a line too long:\n{out}");
    }
}

#[test]
fn bad_usage_is_exit_code_2_and_names_the_mistake() {
    let cases: [(&[&str], &str); 8] = [
        (&["bench", "data/tiny-qwen", "--order", "groups-of-0"], "groups-of-N"),
        (&["evaluate", "c.yaml", "--k", "1,0"], "0 is not in"),
        (&["bench", "data/tiny-qwen", "--work", "4y2"], "SEQUENCESxTOKENS"),
        (&[], "Usage:"),
        (&["grop", "c.yaml"], "grpo"),
        (&["grpo"], "<CONFIG>"),
        (&["sft", "c.yaml", "--set", "learning_rate"], "expected KEY=VALUE"),
        (&["config"], "--explain"),
    ];
    for (arguments, expected) in cases {
        let (code, out, err) = trainer(arguments);
        assert_eq!(code, Some(2), "{arguments:?}");
        assert!(err.contains(expected) && out.is_empty(), "{arguments:?}: {out}{err}");
    }
}

#[test]
fn a_launcher_that_says_half_is_refused_before_anything_is_read() {
    let cases: [(&[(&str, &str)], &str); 2] = [
        (
            &[("RANK", "1"), ("LOCAL_RANK", "1")],
            "error: torchrun (RANK, WORLD_SIZE) environment: RANK is set but WORLD_SIZE is not",
        ),
        (&[("TRAINER_RANK", "3"), ("TRAINER_WORLD_SIZE", "2")], "error: TRAINER_RANK=`3`: TRAINER_WORLD_SIZE is 2"),
    ];
    for subcommand in ["sft", "grpo"] {
        for (variables, expected) in cases {
            let mut command = Command::new(env!("CARGO_BIN_EXE_trainer"));
            let output =
                command.args([subcommand, "no-such-file.yaml"]).envs(variables.iter().copied()).output().unwrap();
            let message = String::from_utf8(output.stderr).unwrap();
            assert_eq!(output.status.code(), Some(2), "{message}");
            assert!(message.starts_with(expected), "{message}");
        }
    }
}

#[test]
fn a_wrong_log_filter_is_bad_usage() {
    let output = Command::new(env!("CARGO_BIN_EXE_trainer"))
        .args(["config", "--reference"])
        .env("TRAINER_LOG", "trainer=loud")
        .output()
        .unwrap();
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert!(message.starts_with("error: `TRAINER_LOG=trainer=loud` is not a log filter"), "{message}");
}

#[test]
fn a_bench_measures_steps_of_both_kinds_and_writes_what_it_read() {
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("bench.jsonl");
    let (code, out, err) = trainer(&[
        "bench",
        "data/tiny-qwen",
        "--work=2x16",
        "--work=2x2x5+4",
        "--steps=2",
        "--warmup=0",
        "--lora-r=4",
        "--device=cpu",
        "--activations=keep",
        "--activations=recompute",
        &format!("--json={}", json.display()),
    ]);
    assert_eq!(code, Some(0), "{err}");
    assert_eq!(out.matches("tokens/s").count(), 4, "{out}");
    let rows: Vec<serde_json::Value> =
        std::fs::read_to_string(&json).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let told: Vec<_> = rows.iter().map(|r| (r["work"].as_str().unwrap(), r["activations"].as_str().unwrap())).collect();
    assert_eq!(told, [("2x16", "keep"), ("2x2x5+4", "keep"), ("2x16", "recompute"), ("2x2x5+4", "recompute")]);
    for row in &rows {
        assert_eq!(row["step_secs"].as_array().unwrap().len(), 2, "{row}");
        assert!(row["tokens_per_second"].as_f64().unwrap() > 0.0 && row["floor_secs"].as_f64().unwrap() > 0.0, "{row}");
    }
}

#[test]
fn a_bench_of_rollouts_counts_their_tokens_and_knows_their_floor() {
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("bench.jsonl");
    let json_option = format!("--json={}", json.display());
    let options = ["--steps=2", "--lora-r=4", "--device=cpu", &json_option];
    let run = |work: &str| trainer(&[&["bench", "data/tiny-qwen", work][..], &options].concat());
    let (code, out, err) = run("--rollout=2x3x5+7");
    assert_eq!(code, Some(0), "{err}");
    assert!(out.contains("(10 tokens)") && out.contains("(36 tokens, 7 steps)"), "{out}");
    let row: serde_json::Value = serde_json::from_str(std::fs::read_to_string(&json).unwrap().trim()).unwrap();
    assert_eq!((row["rollout"].as_str(), row["rollout_secs"].as_array().unwrap().len()), (Some("2x3x5+7"), 2), "{row}");
    assert!(row["decode_bytes"].as_f64().unwrap() > 0.0 && row["floor_secs"].as_f64().unwrap() > 0.0, "{row}");
    for (work, problem) in [("4x16", "PROMPTSxSAMPLESxPROMPT+COMPLETION"), ("1x1x4+1", "decoding begins with two")] {
        let (code, _, err) = run(&format!("--rollout={work}"));
        assert!(code != Some(0) && err.contains(problem), "{err}");
    }
}

#[test]
fn a_bench_of_gguf_types_reads_the_bytes_of_their_blocks() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = |weights: &str| {
        let json = folder.path().join(weights);
        let options = ["--rollout=1x2x5+4", "--steps=1", "--lora-r=4", "--device=cpu"];
        let own = [format!("--weights={weights}"), format!("--json={}", json.display())];
        let (code, out, err) =
            trainer(&[&["bench", "data/tiny-qwen"][..], &options, &own.each_ref().map(|o| o.as_str())].concat());
        assert_eq!(code, Some(0), "{err}");
        assert!(out.contains(&format!("parameters in {weights} made")), "{out}");
        let row: serde_json::Value = serde_json::from_str(std::fs::read_to_string(&json).unwrap().trim()).unwrap();
        assert_eq!(row["weights"].as_str(), Some(weights), "{row}");
        row["decode_bytes"].as_f64().unwrap()
    };
    let (small, large, mixed) = (bytes("q4_0"), bytes("q8_0"), bytes("unlike"));
    assert!(small < mixed && mixed < large, "{small}, {mixed}, {large}");
    let (code, _, err) = trainer(&["bench", "data/tiny-qwen", "--rollout=1x2x5+4", "--weights=q9"]);
    assert!(code != Some(0) && err.contains("q4_k_m"), "{err}");
}

#[test]
fn a_bench_of_ranks_takes_the_order_that_it_is_told_and_else_that_of_a_run() {
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("bench.jsonl");
    let (code, _, err) = trainer(&[
        "bench",
        "data/tiny-qwen",
        "--work=2x16",
        "--steps=1",
        "--warmup=0",
        "--lora-r=4",
        "--device=cpu",
        "--activations=recompute",
        "--num-processes=2",
        "--zero-stage=3",
        "--micro-batches=5",
        "--order=auto",
        "--order=groups-of-2",
        "--order=depth-first",
        &format!("--json={}", json.display()),
    ]);
    assert_eq!(code, Some(0), "{err}");
    let text = std::fs::read_to_string(&json).unwrap();
    let rows = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let told: Vec<_> = rows.map(|r| (r["order"].as_str().unwrap().to_string(), r["at_a_time"].as_u64())).collect();
    let expected = [("breadth first", 5), ("in groups", 2), ("depth first", 1)];
    assert_eq!(told, expected.map(|(order, count)| (order.to_string(), Some(count))));
}

#[test]
fn a_closed_pipe_is_no_failure() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_trainer"))
        .args(["grpo", "--help"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let mut message = String::new();
    child.stderr.take().unwrap().read_to_string(&mut message).unwrap();
    assert_eq!((child.wait().unwrap().code(), message.as_str()), (Some(0), ""));
}
