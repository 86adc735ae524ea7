//! Parity with the reference implementations, driven by data.
//!
//! Walks `TRAINER_GOLDEN_DIR` (default `tests/golden`): every folder in it is a group, and the group's module runs every
//! case that it finds in the folder's files. No case is named in code, so a folder of the same form with other shapes,
//! seeds or cases runs as well. Prints, per group, the cases passed and the worst error as a share of its tolerance.
//! `cargo test --release --test golden -- nf4 optim` runs some groups only.
#![expect(clippy::print_stdout, reason = "a test harness reports on standard output")]

#[path = "golden_cases/model_files.rs"]
mod model_files;
#[path = "golden_cases/report.rs"]
mod report;

#[path = "golden_cases/adaptive_entropy.rs"]
mod adaptive_entropy;
#[path = "golden_cases/chat.rs"]
mod chat;
#[path = "golden_cases/grpo.rs"]
mod grpo;
#[path = "golden_cases/grpo_run.rs"]
mod grpo_run;
#[path = "golden_cases/jinja.rs"]
mod jinja;
#[path = "golden_cases/lora.rs"]
mod lora;
#[path = "golden_cases/nf4.rs"]
mod nf4;
#[path = "golden_cases/optim.rs"]
mod optim;
#[path = "golden_cases/packing.rs"]
mod packing;
#[path = "golden_cases/qlora_step.rs"]
mod qlora_step;
#[path = "golden_cases/real05b.rs"]
mod real05b;
#[path = "golden_cases/sampling.rs"]
mod sampling;
#[path = "golden_cases/steps.rs"]
mod steps;
#[path = "golden_cases/tiny.rs"]
mod tiny;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use report::Report;

type Group = fn(&Path, &mut Report) -> anyhow::Result<()>;

/// The module of each group, by the name of its folder.
const GROUPS: &[(&str, Group)] = &[
    ("adaptive_entropy", adaptive_entropy::run),
    ("chat", chat::run),
    ("grpo", grpo::run),
    ("jinja", jinja::run),
    ("lora", lora::run),
    ("lora_targets", lora::run),
    ("nf4", nf4::run),
    ("optim", optim::run),
    ("packing", packing::run),
    ("qlora_step", qlora_step::run),
    ("real05b", real05b::run),
    ("sampling", sampling::run),
    ("steps", steps::run),
    ("tiny", tiny::run),
];

fn main() -> ExitCode {
    let root = std::env::var_os("TRAINER_GOLDEN_DIR")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden"), PathBuf::from);
    let wanted: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let mut folders: Vec<String> = match std::fs::read_dir(&root) {
        Ok(entries) => entries
            .flatten()
            .filter(|e| e.path().is_dir())
            .map(|e| e.file_name().to_string_lossy().into_owned())
            .collect(),
        Err(error) => {
            println!("cannot read `{}`: {error}", root.display());
            return ExitCode::FAILURE;
        }
    };
    folders.sort();
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    for name in folders.iter().filter(|f| wanted.is_empty() || wanted.contains(f)) {
        let mut report = Report::new(name);
        match GROUPS.iter().find(|(group, _)| group == name) {
            Some((_, run)) => {
                if let Err(error) = run(&root.join(name), &mut report) {
                    report.fail("(group)", &format!("{error:#}"));
                }
            }
            None => report.fail("(group)", "no module in tests/golden_cases checks a folder of this name"),
        }
        let counts = report.print();
        passed += counts.passed;
        failed += counts.failed;
        skipped += counts.skipped;
    }
    println!("\ngolden: {passed} passed, {failed} failed, {skipped} skipped");
    if failed == 0 && passed > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
