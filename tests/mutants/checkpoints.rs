//! Checkpoints: the manifest, the journal of what is moved aside, the state that a run goes on from.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use trainer::checkpoint::{self, FileEntry, Manifest, Part, PartsWriter, Writer};
use trainer::config::{Context, Source, load_grpo, load_sft};
use trainer::ranks::Alone;
use trainer::reward;
use trainer::telemetry::Terminal;
use trainer::train::{self, Outcome};

use super::models;
use super::mutate::{Reader, Seeds, copy_all};

pub(crate) const MANIFEST: Reader =
    Reader { name: "manifest", prepare: prepare_checkpoint, seeds: manifests, read: read_manifest, cost: 1 };
pub(crate) const STATE: Reader =
    Reader { name: "state", prepare: prepare_runs, seeds: states, read: read_state, cost: 5 };

const JOURNAL: &str = ".moving-aside.json";

/// `run/checkpoint-3` with a file of each kind.
fn prepare_checkpoint(good: &Path) {
    let mut writer = Writer::begin(&good.join("run"), 3, 1).unwrap();
    writer.add_json("trainer_state.json", &serde_json::json!({"step": 3})).unwrap();
    writer.add_json("folder/x.json", &[1, 2]).unwrap();
    let values = [1.0, 2.0, 3.0, 4.0];
    let tensors = [("a".to_string(), &values[..], vec![2, 2]), ("b".to_string(), &values[1..], vec![3])];
    writer.add_tensors("tensors.safetensors", tensors).unwrap();
    // What two ranks have of two tensors.
    let part = |name: &str, range| Part { name: name.into(), shape: vec![2, 4], range };
    for (name, parts, count) in
        [("parts-1", vec![part("c", 0..3), part("d", 0..8)], 11), ("parts-2", vec![part("c", 3..8)], 5)]
    {
        let mut file = PartsWriter::create(&writer.place(), &format!("{name}.safetensors"), &parts).unwrap();
        file.write(&vec![0.5; count]).unwrap();
        writer.take(file.finish().unwrap()).unwrap();
    }
    writer.commit(None).unwrap();
}

fn file(path: &Path, name: &str) -> (String, Vec<u8>) {
    (name.into(), std::fs::read(path.join(name)).unwrap())
}

fn manifests(good: &Path) -> Seeds {
    let journal =
        r#"{"fate": "kept", "place": "abandoned-course-1", "moved": ["checkpoint-3", "x.txt"], "copied": ["y.txt"]}"#;
    vec![
        file(&good.join("run"), "checkpoint-3/manifest.json"),
        (JOURNAL.into(), journal.into()),
        file(&good.join("run"), "checkpoint-3/tensors.safetensors"),
        file(&good.join("run"), "checkpoint-3/parts-1.safetensors"),
        file(&good.join("run"), "checkpoint-3/parts-2.safetensors"),
    ]
}

/// A fresh copy of a run with a mutant in the place of one of its files.
fn with_mutant(path: &Path, name: &str, run: &Path) -> PathBuf {
    let mut folder = path.to_path_buf();
    for _ in Path::new(name).components() {
        folder.pop();
    }
    let copy = folder.join("run");
    let _ = std::fs::remove_dir_all(&copy);
    copy_all(run, &copy);
    std::fs::copy(path, copy.join(name)).unwrap();
    copy
}

/// Writes the length and the checksum of a changed file into the manifest.
fn seal(checkpoint: &Path, name: &str) {
    let path = checkpoint.join("manifest.json");
    let mut manifest: Manifest = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let (blake3, bytes) = trainer::fs::checksum(&checkpoint.join(name)).unwrap();
    manifest.files.insert(name.into(), FileEntry { bytes, blake3 });
    std::fs::write(path, serde_json::to_vec(&manifest).unwrap()).unwrap();
}

fn read_manifest(path: &Path, good: &Path) -> Result<(), String> {
    let name = if path.ends_with(JOURNAL) {
        JOURNAL.to_string()
    } else {
        format!("checkpoint-3/{}", path.file_name().unwrap().to_str().unwrap())
    };
    let run = with_mutant(path, &name, &good.join("run"));
    let outside = run.parent().unwrap().join("outside.txt");
    std::fs::write(&outside, "kept").unwrap();
    for name in ["x.txt", "y.txt"] {
        std::fs::write(run.join(name), "text").unwrap();
    }
    let checkpoint = run.join("checkpoint-3");
    if let Some(name) = name.strip_prefix("checkpoint-3/").filter(|name| name.ends_with(".safetensors")) {
        seal(&checkpoint, name);
    }
    let settled = checkpoint::settle_earlier(&run).map_err(|e| e.to_string());
    let opened = checkpoint::open(&checkpoint).map_err(|e| e.to_string()).and_then(|opened| {
        for name in opened.manifest().files.keys() {
            assert!(opened.file(name).unwrap().starts_with(&checkpoint), "{name} leads outside");
            let _ = opened.json::<serde_json::Value>(name);
        }
        let names = opened.manifest().files.keys().filter(|name| name.ends_with(".safetensors"));
        read_all(&opened, &names.cloned().collect::<Vec<_>>()).map_err(|e| e.to_string())
    });
    let _ = checkpoint::find_latest(&run);
    let _ = checkpoint::clean_up(&run);
    assert_eq!(std::fs::read_to_string(&outside).unwrap(), "kept", "something outside was touched");
    settled?;
    if name == JOURNAL { Ok(()) } else { opened }
}

/// Reads every value of files of tensors.
fn read_all(checkpoint: &checkpoint::Checkpoint, names: &[String]) -> Result<(), checkpoint::Error> {
    let tensors = checkpoint.tensors(names)?;
    for tensor in tensors.names() {
        let count = tensors.shape(tensor).unwrap().iter().product();
        assert!(tensors.read(tensor, 0, &mut vec![0.0; count])?, "{tensor} is not all there");
    }
    Ok(())
}

/// The tasks, and lines of their configuration.
const TASKS: [(&str, &str); 2] = [
    ("sft", "eval_fraction: 0.25\neval_strategy: steps\neval_steps: 1\nmax_length: 16\nlearning_rate: 1e-3\n"),
    (
        "grpo",
        "reward_funcs: [{kind: regex, pattern: '[0-9]'}]\nnum_generations: 2\nsteps_per_generation: 2\n\
         max_completion_length: 4\nbeta: 0.1\nlearning_rate: 1e-3\n",
    ),
];

/// Runs of two steps of which the first was saved: `sft/run` and `grpo/run`, and a model.
fn prepare_runs(good: &Path) {
    models::prepare(good);
    let row = |n: u32| format!("{{\"prompt\": \"{n}+1=\", \"completion\": \"{}\"}}\n", n + 1);
    std::fs::write(good.join("rows.jsonl"), (0..8).map(row).collect::<String>()).unwrap();
    for (task, _) in TASKS {
        let run = good.join(task).join("run");
        assert_eq!(go(task, good, &run, false), Ok(Outcome::Finished));
        std::fs::remove_dir_all(run.join("checkpoint-2")).unwrap();
    }
}

fn context<'a>(resolved_yaml: &'a str, warnings: &'a [String]) -> train::Context<'a> {
    const READY: fn() = || ();
    train::Context {
        terminal: Terminal::memory(100),
        ranks: Arc::new(Alone),
        local_rank: 0,
        visible_devices: None,
        ready: &READY,
        is_interrupted: Arc::new(|| false),
        resolved_yaml,
        warnings,
    }
}

/// Runs to the second step.
fn go(task: &str, good: &Path, output_dir: &Path, resumes: bool) -> Result<Outcome, String> {
    let lines = TASKS.iter().find(|(name, _)| *name == task).unwrap().1;
    let text = format!(
        "model_name_or_path: {}\ndataset_name: {}\noutput_dir: {}\nuse_peft: true\nlora_r: 2\nlora_alpha: 4\n\
         lora_dropout: 0.0\nlora_target_modules: [q_proj, down_proj]\nmax_steps: 2\nsave_strategy: steps\nsave_steps: 1\n\
         logging_steps: 2\nper_device_train_batch_size: 2\nbf16: false\ngradient_checkpointing: false\ndevice: cpu\n\
         report_to: none\ndisable_tqdm: true\nresume_from_checkpoint: {resumes}\n{lines}",
        good.join("qwen2").display(),
        good.join("rows.jsonl").display(),
        output_dir.display(),
    );
    let source = Source::new("a.yaml", text);
    let surroundings = Context { check_reward: Some(reward::check), ..Context::default() };
    let outcome = if task == "sft" {
        let loaded = load_sft(&source, &[], &surroundings).map_err(|e| e.to_string())?;
        train::sft::run(&loaded.settings, context(&loaded.resolved_yaml, &loaded.warnings))
    } else {
        let loaded = load_grpo(&source, &[], &surroundings).map_err(|e| e.to_string())?;
        train::grpo::run(&loaded.settings, context(&loaded.resolved_yaml, &loaded.warnings))
    };
    outcome.map_err(|e| format!("{e:#}"))
}

/// What a continuation reads: state, tensors, and the rows of metrics and completions that it goes on from.
fn states(good: &Path) -> Seeds {
    let names = ["checkpoint-1/trainer_state.json", "checkpoint-1/trainer_state.safetensors", "metrics.jsonl"];
    let of = |task: &str, names: &[&str]| -> Seeds {
        let seed = |name: &&str| {
            let (_, bytes) = file(&good.join(task).join("run"), name);
            (format!("{task}/{name}"), bytes)
        };
        names.iter().map(seed).collect()
    };
    [of("sft", &names), of("grpo", &names), of("grpo", &["completions.jsonl"])].concat()
}

fn read_state(path: &Path, good: &Path) -> Result<(), String> {
    let parts: Vec<&str> = path.iter().map(|part| part.to_str().unwrap()).collect();
    let at = parts.iter().rposition(|part| ["sft", "grpo"].contains(part)).unwrap();
    let (task, name) = (parts[at], parts[at + 1..].join("/"));
    let run = with_mutant(path, &name, &good.join(task).join("run"));
    if let Some(name) = name.strip_prefix("checkpoint-1/") {
        seal(&run.join("checkpoint-1"), name);
    }
    go(task, good, &run, true).map(|_| ())
}
