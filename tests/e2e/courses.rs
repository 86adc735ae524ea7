//! One folder, one course: what a run does with another run, or another course of its own, that lies in its folder.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use crate::kill::kill_at;
use crate::test_run::{TestRun, copy_files, end, names, start};

/// A run that keeps all of its checkpoints, every 2 steps, and is not evaluated.
fn plain() -> TestRun {
    TestRun::sft().set("save_total_limit", "null").set("eval_strategy", "no")
}

fn copy_all(from: &Path, to: &Path) {
    copy_files(from, to);
    for name in names(from).iter().filter(|name| from.join(name).is_dir()) {
        copy_all(&from.join(name), &to.join(name));
    }
}

fn set(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(ToString::to_string).collect()
}

const LATER: [&str; 4] = ["--set", "learning_rate=5e-3", "--set", "report_to=tensorboard"];

/// The case of the report: back to an earlier checkpoint with another learning rate, stopped half way, and on again.
#[test]
fn a_course_that_is_left_is_kept_aside_and_never_taken_up_or_counted() {
    let plain = || plain().set("lr_scheduler_type", "constant");
    let run = plain().set("max_steps", 10).set("report_to", "tensorboard").done();
    let (rows, weights) = (run.rows_without_timings(), run.weights());
    let from = run.output().join("checkpoint-4");
    let again = |more: &[&str]| run.run(&[&LATER[..], more].concat()).expect(0);
    let limit = ["--set", "save_total_limit=2"];
    let ended = again(&[&["--resume", from.to_str().unwrap(), "--set", "max_steps=7"], &limit[..]].concat());
    assert_eq!(ended.steps(), [5, 6, 7]);
    let aside = run.output().join("abandoned-course-1");
    let note = format!("checkpoint-6 to checkpoint-10 of the course that is left are kept in {}", aside.display());
    assert!(ended.out.contains(&note), "{}", ended.out);
    // The limit of two counts this course alone, and what was left is whole, with its rows and its result.
    assert_eq!(run.checkpoints(), [6, 7]);
    for step in [6, 8, 10] {
        assert_eq!(trainer::checkpoint::open(&aside.join(format!("checkpoint-{step}"))).unwrap().step(), step);
    }
    let mut kept = trainer::telemetry::read_rows(&aside.join("metrics.jsonl")).unwrap();
    kept.iter_mut().for_each(|row| row.retain(|key, _| key != "step_time"));
    assert_eq!(kept, rows);
    assert!(fs::read(aside.join("adapter_model.safetensors")).unwrap() == weights);
    assert_eq!(names(&aside.join("runs")).len(), 1);
    assert!(aside.join("curves.svg").is_file() && aside.join("config.resolved.yaml").is_file());

    // The next one goes on with this course, and each step stands in its rows once.
    assert_eq!(again(&["--resume", "--set", "max_steps=9"]).steps(), [8, 9]);
    let steps: Vec<_> = run.rows().iter().map(|row| row["step"].as_u64().unwrap()).collect();
    assert_eq!(steps, (1..=9).collect::<Vec<_>>());
    // It is the course of a run that never saw the other one.
    let branch = plain();
    copy_all(&aside, &branch.beside("earlier"));
    let earlier = plain().set("max_steps", 4).done();
    copy_all(&earlier.output(), &branch.output());
    branch.run(&[&LATER[..], &["--resume", "--set", "max_steps=9"]].concat()).expect(0);
    assert!(branch.weights() == run.weights() && !branch.has("abandoned-course-1"));

    // What was left can be taken up again: then this course is left, and the rows are those of the first.
    let back = aside.join("checkpoint-10");
    let ended = run.run(&["--resume", back.to_str().unwrap(), "--set", "max_steps=11"]).expect(0);
    assert_eq!(ended.steps(), [11]);
    assert_eq!(run.checkpoints(), [11]);
    assert_eq!(run.rows_without_timings()[..10], rows);
    assert!(run.output().join("abandoned-course-2/checkpoint-9").is_dir() && back.is_dir());
}

/// A checkpoint that is given by a bare name, from inside of the folder, is one of the folder.
#[test]
fn a_checkpoint_is_known_as_the_runs_own_however_it_is_written() {
    let run = plain().set("max_steps", 6).done();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let absolute = |key: &str, place: &str| format!("{key}={}", root.join(place).display());
    let own = |inside: &str, name: &str| {
        let mut command = run.command(&["--set", "output_dir=OUT", "--resume", name, "--set", "max_steps=6"]);
        command.args(["--set", &absolute("model_name_or_path", "data/tiny-qwen")]);
        command.args(["--set", &absolute("dataset_name", "data/arithmetic/sft.jsonl")]);
        let arguments: Vec<_> = command.get_args().map(|argument| argument.to_string_lossy().into_owned()).collect();
        let mut again = std::process::Command::new(command.get_program());
        let config = root.join("configs/ci/sft.yaml").display().to_string();
        let place = if inside.is_empty() { "." } else { ".." };
        let fixed = arguments.iter().map(|argument| match argument.as_str() {
            "configs/ci/sft.yaml" => config.clone(),
            "output_dir=OUT" => format!("output_dir={place}"),
            _ => argument.clone(),
        });
        again.args(fixed).current_dir(run.output().join(inside));
        end(start(&mut again)).expect(0)
    };
    for (inside, name) in [("", "checkpoint-6"), ("", "./checkpoint-6/"), ("checkpoint-6", ".")] {
        assert!(own(inside, name).steps().is_empty());
        assert!(run.checkpoints() == [2, 4, 6] && !run.has("abandoned-course-1"), "{name} in `{inside}`");
    }
}

#[test]
fn rows_of_a_course_that_had_no_checkpoint_yet_are_kept_when_settings_change() {
    let run = plain().set("max_steps", 40).set("save_steps", 4);
    run.run_until(6, "KILL");
    let (last, newest) = (run.rows().len() as u64, *run.checkpoints().last().unwrap());
    if last == newest {
        return; // Killed between a save and the next row: there is nothing to leave.
    }
    run.run(&["--resume", "--set", "learning_rate=5e-3"]).expect(0);
    let kept = trainer::telemetry::read_rows(&run.output().join("abandoned-course-1/metrics.jsonl")).unwrap();
    assert_eq!(kept.len() as u64, last);
    // The same settings write the same rows again.
    let run = plain().set("max_steps", 40).set("save_steps", 4);
    run.run_until(6, "KILL");
    run.run(&["--resume"]).expect(0);
    assert!(!run.has("abandoned-course-1"));
}

#[test]
fn a_resume_that_is_refused_or_fails_moves_nothing() {
    let run = plain().set("max_steps", 6).done();
    let before = names(&run.output());
    let from = run.output().join("checkpoint-2");
    let resume = ["--resume", from.to_str().unwrap()];
    // Refused before anything is loaded, after the model is, and because there is nothing to do.
    for (sets, part) in [
        (&["--set", "lora_r=8"][..], "`lora_r` was 4, is 8"),
        (&["--set", "tokenizer_name_or_path=/nowhere"], "nowhere"),
        (&["--set", "max_steps=1"], "stands at step 2, this run ends at 1"),
    ] {
        run.run(&[&resume[..], sets].concat()).expect_error(1, &[part]);
        assert_eq!(names(&run.output()), before, "{sets:?}");
    }
    // A run that would replace it and fails before it began.
    let replaced = run.run(&["--set", "overwrite_output_dir=true", "--set", "dataset_name=/nowhere"]);
    replaced.expect_error(1, &["/nowhere"]);
    assert_eq!(names(&run.output()), before);
    assert_eq!(run.checkpoints(), [2, 4, 6]);
}

#[test]
fn checkpoints_of_another_run_do_not_mix_with_those_of_one_that_goes_on_from_elsewhere() {
    let other = plain().set("max_steps", 4).set("learning_rate", "2e-3").done();
    let run = plain().set("max_steps", 4).done();
    let from = other.output().join("checkpoint-2");
    let ended = run.run(&["--resume", from.to_str().unwrap(), "--set", "learning_rate=2e-3"]).expect(0);
    assert_eq!(ended.steps(), [3, 4]);
    assert_eq!(run.checkpoints(), [4]);
    assert_eq!(run.rows().len(), 2);
    let aside = run.output().join("abandoned-course-1");
    assert!(aside.join("checkpoint-2").is_dir() && aside.join("checkpoint-4").is_dir());
    assert_eq!(trainer::telemetry::read_rows(&aside.join("metrics.jsonl")).unwrap().len(), 4);
    assert!(run.weights() == other.weights());
}

/// Kills `arguments` at every `stride`-th of its changes to a folder that holds what `old` left, until it has trained a
/// step, and gives each folder with whether something in it had changed to `check`.
fn kill_everywhere(old: &TestRun, stride: usize, arguments: &[&str], check: impl Fn(&TestRun, bool)) {
    let original = names(&old.output());
    let mut num_changed = 0;
    for at in (1..).step_by(stride) {
        let run = plain();
        copy_all(&old.output(), &run.output());
        let place = run.output().display().to_string();
        let arguments: Vec<String> = arguments.iter().map(|argument| argument.replace("OUT", &place)).collect();
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let mut command = run.command(&arguments);
        let ended = end(start(kill_at(&mut command, &run.output(), at)));
        if ended.code.is_some() || !ended.steps().is_empty() {
            assert!(num_changed > 5, "only {num_changed} kills fell after the first change: {}", ended.err);
            return;
        }
        let now = names(&run.output());
        let is_free = |name: &&String| *name == "run.lock" || name.starts_with(".partial-");
        let is_changed = now.symmetric_difference(&original).any(|name| !is_free(&name));
        num_changed += usize::from(is_changed);
        check(&run, is_changed);
    }
}

#[test]
fn a_run_killed_while_it_replaces_another_never_continues_that_one() {
    let old = plain().set("max_steps", 6).done();
    let new = ["--set", "learning_rate=5e-3"];
    let first = [&new[..], &["--set", "overwrite_output_dir=true", "--set", "max_steps=2"]].concat();
    kill_everywhere(&old, 5, &first, |run, is_changed| {
        let ended = run.run(&[&new[..], &["--resume", "--set", "max_steps=8"]].concat());
        if is_changed {
            ended.expect_error(1, &["holds no whole checkpoint"]);
            // Killed before its first row, the new run may have left its own two files, and nothing else is there.
            let left = names(&run.output());
            let own = ["config.resolved.yaml", "metrics.jsonl"];
            assert!(left.iter().all(|name| own.contains(&name.as_str())), "something of the old run is left: {left:?}");
            let text = |name: &str| fs::read_to_string(run.output().join(name)).unwrap_or_default();
            assert_eq!(text("metrics.jsonl"), "");
            assert!(
                !left.contains("config.resolved.yaml") || text("config.resolved.yaml").contains("\nmax_steps: 2\n")
            );
        } else {
            assert_eq!(ended.expect(0).steps(), [7, 8]);
        }
    });
}

#[test]
fn a_run_killed_while_it_leaves_a_course_never_takes_that_up_again() {
    let old = plain().set("max_steps", 6).set("report_to", "tensorboard").done();
    let first = [&LATER[..], &["--resume", "OUT/checkpoint-2", "--set", "max_steps=4"]].concat();
    kill_everywhere(&old, 5, &first, |run, is_changed| {
        let ended = run.run(&[&LATER[..], &["--resume", "--set", "max_steps=8"]].concat()).expect(0);
        assert_eq!(ended.steps().first(), Some(if is_changed { &3 } else { &7 }), "{}", ended.err);
        if is_changed {
            let aside = run.output().join("abandoned-course-1");
            for step in [4, 6] {
                trainer::checkpoint::open(&aside.join(format!("checkpoint-{step}"))).unwrap();
            }
            assert_eq!(trainer::telemetry::read_rows(&aside.join("metrics.jsonl")).unwrap().len(), 6);
            assert_eq!(run.checkpoints(), [2, 4, 6, 8]);
        }
    });
}

/// What a user may have put beside a run.
const FOREIGN: [&str; 8] = [
    "README.md",
    "adapter_config.json.bak",
    "checkpoint-best/notes.txt",
    "checkpoint-7/model.bin",
    "model-final.safetensors",
    "runs/notes.txt",
    "vocab.json",
    "partial-notes.txt",
];

fn put_foreign(run: &TestRun) {
    for name in FOREIGN {
        let path = run.output().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "mine").unwrap();
    }
}

/// The names in `output_dir` that are not the user's, all of which must be there.
#[track_caller]
fn own_names(run: &TestRun) -> BTreeSet<String> {
    for name in FOREIGN {
        assert_eq!(fs::read_to_string(run.output().join(name)).unwrap(), "mine", "{name}");
    }
    let of_user: Vec<&str> = FOREIGN.iter().map(|name| name.split('/').next().unwrap()).collect();
    names(&run.output()).into_iter().filter(|name| !of_user.contains(&name.as_str())).collect()
}

#[test]
fn a_new_run_leaves_nothing_of_an_older_one_and_all_that_is_the_users() {
    let lora = plain().set("report_to", "tensorboard").done();
    let old_events = names(&lora.output().join("runs"));
    put_foreign(&lora);
    let full = ["--set", "use_peft=false", "--set", "load_in_4bit=false", "--set", "overwrite_output_dir=true"];
    // Full fine-tuning after an adapter, stopped before its end.
    let mut command = lora.command(&[&full[..], &["--set", "max_steps=500", "--set", "save_steps=300"]].concat());
    let mut child = start(&mut command);
    let begun = std::time::Instant::now();
    let is_new = || !lora.has("adapter_config.json") && !lora.has(".replaced-run") && lora.has("metrics.jsonl");
    while !is_new() || lora.rows().is_empty() {
        assert!(begun.elapsed().as_secs() < 50);
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(own_names(&lora), set(&["config.resolved.yaml", "metrics.jsonl", "run.lock"]));
    let events = names(&lora.output().join("runs"));
    assert!(events.len() == 2 && events.is_disjoint(&old_events), "{old_events:?} and then {events:?}");

    // To its end, in a folder with shards of an older save.
    lora.run(&[&full[..], &["--set", "max_steps=2"]].concat()).expect(0);
    let model = set(&[
        "checkpoint-2",
        "config.json",
        "config.resolved.yaml",
        "curves.svg",
        "metrics.jsonl",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]);
    let without_generation = |mut names: BTreeSet<String>| {
        names.remove("generation_config.json");
        names
    };
    assert_eq!(without_generation(own_names(&lora)), model);
    for name in ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    {
        fs::write(lora.output().join(name), "old").unwrap();
    }
    lora.run(&[&full[..], &["--set", "max_steps=2"]].concat()).expect(0);
    assert_eq!(without_generation(own_names(&lora)), model);

    // And an adapter after full fine-tuning.
    lora.run(&["--set", "overwrite_output_dir=true", "--set", "max_steps=2"]).expect(0);
    let adapter = set(&[
        "adapter_config.json",
        "adapter_model.safetensors",
        "checkpoint-2",
        "config.resolved.yaml",
        "curves.svg",
        "metrics.jsonl",
        "tokenizer.json",
        "tokenizer_config.json",
    ]);
    assert_eq!(without_generation(own_names(&lora)), adapter);
}

#[test]
fn grpo_after_sft_leaves_no_rows_and_sft_after_grpo_no_completions() {
    let grpo = TestRun::grpo().set("report_to", "tensorboard").done();
    let sft = TestRun::sft().set("overwrite_output_dir", "true");
    copy_all(&grpo.output(), &sft.output());
    sft.run(&[]).expect(0);
    assert!(!sft.has("completions.jsonl") && !sft.has("runs"));
    assert!(sft.rows().iter().all(|row| !row.contains_key("reward")));
}

#[test]
fn a_model_without_its_run_is_not_taken_for_this_runs_own() {
    let run = plain().done();
    for name in ["metrics.jsonl", "config.resolved.yaml"] {
        fs::remove_file(run.output().join(name)).unwrap();
    }
    for step in run.checkpoints() {
        fs::remove_dir_all(run.output().join(format!("checkpoint-{step}"))).unwrap();
    }
    let full = ["--set", "use_peft=false", "--set", "load_in_4bit=false"];
    let parts = ["already holds a trained model (`adapter_config.json`)", "`overwrite_output_dir: true`"];
    run.run(&full).expect_error(1, &parts);
    run.run(&[&full[..], &["--set", "overwrite_output_dir=true"]].concat()).expect(0);
    assert!(run.has("model.safetensors") && !run.has("adapter_config.json"));
}

#[test]
fn the_folder_of_the_base_model_keeps_it() {
    let run = plain();
    copy_files(Path::new("data/tiny-qwen"), &run.output());
    let base = fs::read(run.output().join("model.safetensors")).unwrap();
    let place = run.output().display().to_string();
    let own = ["--set", "init_random=false", "--set", &format!("model_name_or_path={place}"), "--set", "max_steps=2"];
    run.run(&own).expect(0);
    run.run(&[&own[..], &["--set", "overwrite_output_dir=true"]].concat()).expect(0);
    assert!(fs::read(run.output().join("model.safetensors")).unwrap() == base && run.has("config.json"));
    assert!(run.has("adapter_model.safetensors"));

    // What a run starts from is not cleared away under it.
    let adapter = run.output().join("checkpoint-2");
    let start = format!("adapter_name_or_path={}", adapter.display());
    let parts = ["`adapter_name_or_path: ", "checkpoint-2` is part of the run in", "choose another `output_dir`"];
    run.run(&["--set", "overwrite_output_dir=true", "--set", &start]).expect_error(1, &parts);
    assert!(adapter.join("adapter_model.safetensors").is_file());
}

#[test]
fn leftovers_of_killed_writes_are_removed_at_the_top_too() {
    let run = plain();
    fs::create_dir_all(run.output().join(".partial-results-x/inside")).unwrap();
    for name in [".partial-abc123", ".partial-results-x/inside/file"] {
        fs::write(run.output().join(name), "half").unwrap();
    }
    run.run(&["--set", "max_steps=1"]).expect(0);
    run.checkpoints();
}

#[cfg(unix)]
mod links {
    use super::*;
    use std::os::unix::fs::symlink;

    /// Names that a run writes.
    const WRITTEN: [&str; 8] = [
        "run.lock",
        "metrics.jsonl",
        "completions.jsonl",
        "config.resolved.yaml",
        "curves.svg",
        "adapter_model.safetensors",
        "checkpoint-2",
        "runs",
    ];

    /// Runs with `name` as a link to something outside, which must stay as it is, and nothing may come to lie there.
    fn try_link(name: &str, kind: &str, arguments: &[&str], prepared: Option<&TestRun>) {
        let run = TestRun::grpo().set("max_steps", 2).set("report_to", "tensorboard");
        if let Some(prepared) = prepared {
            copy_all(&prepared.output(), &run.output());
        }
        fs::create_dir_all(run.output()).unwrap();
        let outside = run.beside("outside");
        fs::create_dir_all(&outside).unwrap();
        let (place, target) = (run.output().join(name), outside.join("victim"));
        match kind {
            "dangling" => {}
            "folder" => {
                fs::create_dir(&target).unwrap();
                fs::write(target.join("precious"), "precious").unwrap();
            }
            _ => fs::write(&target, "precious").unwrap(),
        }
        if place.symlink_metadata().is_ok_and(|metadata| metadata.is_dir()) {
            fs::remove_dir_all(&place).unwrap();
        } else if place.symlink_metadata().is_ok() {
            fs::remove_file(&place).unwrap();
        }
        if kind == "hard" {
            fs::hard_link(&target, &place).unwrap()
        } else {
            symlink(&target, &place).unwrap()
        }
        let ended = run.run(arguments);
        let what = format!("{name} as a {kind} link with {arguments:?}: {}\n{}", ended.out, ended.err);
        if ended.code != Some(0) {
            assert_eq!(ended.code, Some(1), "{what}");
            assert!(ended.err.contains(&place.display().to_string()) || ended.err.contains("already holds"), "{what}");
            assert!(!ended.err.contains("panicked"), "{what}");
        }
        let left = names(&outside);
        match kind {
            "dangling" => assert!(left.is_empty(), "{what}"),
            "folder" => {
                assert_eq!(names(&target), set(&["precious"]), "{what}");
                assert_eq!(fs::read_to_string(target.join("precious")).unwrap(), "precious", "{what}");
            }
            _ => assert_eq!(fs::read_to_string(&target).unwrap(), "precious", "{what}"),
        }
    }

    #[test]
    fn nothing_is_written_through_a_link_of_a_new_run() {
        for name in WRITTEN {
            for kind in ["file", "dangling", "folder", "hard"] {
                try_link(name, kind, &["--set", "overwrite_output_dir=true"], None);
            }
        }
    }

    #[test]
    fn nothing_is_written_through_a_link_of_a_resumed_run() {
        let prepared = TestRun::grpo().set("max_steps", 2).set("report_to", "tensorboard").set("save_steps", 1).done();
        for name in WRITTEN {
            for kind in ["file", "dangling", "folder", "hard"] {
                try_link(name, kind, &["--resume", "--set", "max_steps=3"], Some(&prepared));
            }
        }
    }
}
