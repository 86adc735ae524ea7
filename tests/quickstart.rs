//! A newcomer's first commands, through the real binary: does it learn, and does it leave what the README says?
//!
//! Minutes long, so ignored by default: `cargo test --release --test quickstart -- --ignored --nocapture`.

#![expect(clippy::print_stderr, reason = "the measured ends belong into the log of CI")]

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use trainer::telemetry::{Row, read_rows};

/// What the README promises after the build, on 2 cores.
const LONGEST: Duration = Duration::from_mins(4);

fn run(subcommand: &str, output_dir: &Path) -> Vec<Row> {
    let started = Instant::now();
    let status = Command::new(env!("CARGO_BIN_EXE_trainer"))
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .args([subcommand, &format!("configs/quickstart/{subcommand}.yaml"), "--set"])
        .arg(format!("output_dir={}", output_dir.display()))
        .status()
        .unwrap();
    assert_eq!(status.code(), Some(0));
    assert!(started.elapsed() < LONGEST, "took {:?}", started.elapsed());
    for file in ["metrics.jsonl", "config.resolved.yaml", "curves.svg", "adapter_model.safetensors"] {
        let path = output_dir.join(file);
        assert!(path.metadata().is_ok_and(|metadata| metadata.len() > 0), "`{file}` is missing or empty");
    }
    read_rows(&output_dir.join("metrics.jsonl")).unwrap()
}

/// The means of a metric over the first and the last tenth of its rows.
fn ends(rows: &[Row], key: &str) -> (f64, f64) {
    let values: Vec<f64> = rows.iter().filter_map(|row| row.get(key)?.as_f64()).collect();
    assert!(values.len() >= 10, "only {} rows have `{key}`", values.len());
    let tenth = values.len() / 10;
    let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
    (mean(&values[..tenth]), mean(&values[values.len() - tenth..]))
}

#[test]
#[ignore = "minutes long; .ci/run runs it"]
fn grpo_raises_the_reward() {
    let folder = tempfile::tempdir().unwrap();
    let (first, last) = ends(&run("grpo", folder.path()), "reward");
    eprintln!("reward {first:.3} -> {last:.3}");
    assert!(first < 0.5 && last > 0.8, "reward went from {first:.3} to {last:.3}, expected from under 0.5 to over 0.8");
    assert!(folder.path().join("completions.jsonl").metadata().is_ok_and(|metadata| metadata.len() > 0));
}

#[test]
#[ignore = "minutes long; .ci/run runs it"]
fn sft_lowers_the_loss() {
    let folder = tempfile::tempdir().unwrap();
    let (first, last) = ends(&run("sft", folder.path()), "loss");
    eprintln!("loss {first:.3} -> {last:.3} nats per token");
    assert!(last < 0.7 * first, "the loss went from {first:.3} to {last:.3}, expected at most 70 % of its start");
}
