//! `trainer preprocess`: training on what it leaves is training on the rows, to the last bit; and what it refuses.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::test_run::{TestRun, names};

/// Turns whose answers a mask can find.
const TEMPLATE: &str = "{% for m in messages %}<|im_start|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}";

fn folder(run: &TestRun) -> PathBuf {
    run.output().join("preprocessed")
}

/// The same run on preprocessed rows, whose raw files are gone.
#[track_caller]
fn prepared(run: TestRun) -> TestRun {
    run.preprocess(&[]).expect(0);
    let expected = ["eval.bin", "manifest.json", "train.bin"];
    assert!(names(&folder(&run)).iter().all(|name| expected.contains(&name.as_str())));
    assert!(names(&run.output()).iter().all(|name| !name.starts_with('.')), "leftovers");
    let _ = fs::remove_file(run.beside("rows.jsonl"));
    let place = folder(&run);
    run.set("preprocessed", place.display())
}

#[track_caller]
fn trains_the_same(run: impl Fn() -> TestRun) {
    let plain = run().done();
    let ready = prepared(run()).done();
    ready.assert_same(&plain);
    assert!(!ready.rows().is_empty());
}

/// Copies rows beside the run, where they can be changed or removed.
fn with_rows(run: TestRun, text: &str) -> TestRun {
    let place = run.beside("rows.jsonl");
    fs::write(&place, text).unwrap();
    run.set("dataset_name", place.display())
}

fn own_rows(run: TestRun, file: &str) -> TestRun {
    let text = fs::read_to_string(Path::new("data/arithmetic").join(file)).unwrap();
    with_rows(run, &text)
}

fn chats(run: TestRun) -> TestRun {
    let turn = |role: &str, content: String| json!({"role": role, "content": content});
    let row = |n: usize| {
        let turns = [turn("user", format!("{n}+1=")), turn("assistant", format!("{}", n + 1))];
        let more = [turn("user", format!("{n}+2=")), turn("assistant", format!("{}", n + 2))];
        let turns = [&turns[..], if n.is_multiple_of(2) { &more } else { &[] }].concat();
        json!({"messages": turns}).to_string()
    };
    let rows: Vec<String> = (0..40).map(row).collect();
    fs::write(run.beside("template.jinja"), TEMPLATE).unwrap();
    let template = run.beside("template.jinja").display().to_string();
    with_rows(run, &rows.join("\n")).set("chat_template_path", template)
}

#[test]
fn packed_sft_trains_the_same() {
    trains_the_same(|| own_rows(TestRun::sft(), "sft.jsonl"));
    trains_the_same(|| own_rows(TestRun::sft().set("packing_strategy", "wrapped"), "sft.jsonl"));
}

#[test]
fn sft_of_whole_and_cut_examples_trains_the_same() {
    trains_the_same(|| own_rows(TestRun::sft().set("packing", "false"), "sft.jsonl"));
    let cut = || TestRun::sft().set("packing", "false").set("max_length", 7).set("truncation_mode", "keep_end");
    trains_the_same(|| own_rows(cut(), "sft.jsonl"));
}

#[test]
fn conversations_of_which_the_assistant_s_part_is_learnt_train_the_same() {
    trains_the_same(|| chats(TestRun::sft().set("assistant_only_loss", "true").set("packing", "false")));
    trains_the_same(|| chats(TestRun::sft().set("assistant_only_loss", "true")));
}

#[test]
fn grpo_with_answers_trains_the_same() {
    trains_the_same(|| own_rows(TestRun::grpo(), "train.jsonl"));
    let evaluated = || TestRun::grpo().set("eval_strategy", "steps").set("eval_steps", 2).set("eval_fraction", 0.2);
    trains_the_same(|| own_rows(evaluated(), "train.jsonl"));
}

#[test]
fn a_run_goes_on_with_preprocessed_rows_and_without_them() {
    let straight = own_rows(TestRun::sft(), "sft.jsonl").done();
    let run = prepared(own_rows(TestRun::sft(), "sft.jsonl").done());
    let second = run.output().join("checkpoint-2").display().to_string();
    run.run(&["--resume", &second]).expect(0);
    run.assert_same(&straight);

    let run = own_rows(TestRun::sft(), "sft.jsonl");
    run.preprocess(&[]).expect(0);
    let place = format!("preprocessed={}", folder(&run).display());
    run.run(&["--set", &place]).expect(0);
    let second = run.output().join("checkpoint-2").display().to_string();
    run.run(&["--resume", &second]).expect(0);
    run.assert_same(&straight);
    // Rows without some are other rows.
    let text = fs::read_to_string(run.beside("rows.jsonl")).unwrap();
    fs::write(run.beside("rows.jsonl"), text.lines().take(20).collect::<Vec<_>>().join("\n")).unwrap();
    run.preprocess(&[]).expect(0);
    run.run(&["--resume", "--set", "max_steps=5", "--set", &place])
        .expect_error(1, &["was made with other content", "the training rows: there were"]);
}

#[test]
fn every_difference_in_settings_template_and_tokenizer_is_named() {
    let run = chats(TestRun::sft().set("packing", "false").set("eval_strategy", "no").set("eval_fraction", "null"));
    let run = prepared(run);
    run.run(&["--set", "max_length=32"]).expect_error(
        1,
        &["holds rows that were made otherwise", "`max_length` was 64, is 32", "run `trainer preprocess` again"],
    );
    fs::write(run.beside("template.jinja"), TEMPLATE.replace('\n', "")).unwrap();
    let more = ["eos_token=<|im_end|>", "assistant_only_loss=true", "system_prompt=1", "packing=true"];
    let more: Vec<&str> = more.iter().flat_map(|set| ["--set", set]).collect();
    run.run(&more).expect_error(
        1,
        &[
            "`assistant_only_loss` was false, is true",
            "`system_prompt` was null, is ",
            "`packing` was false, is true",
            "the tokenizer (with its special tokens) was blake3 ",
            "the chat template was blake3 ",
        ],
    );
    fs::write(run.beside("template.jinja"), TEMPLATE).unwrap();
    run.run(&["--set", "eval_strategy=steps", "--set", "eval_fraction=0.1"])
        .expect_error(1, &["`eval_fraction` was null, is 0.1", "there are no evaluation rows"]);
    // What changes no row may change.
    run.run(&["--set", "learning_rate=1e-4", "--set", "seed=7"]).expect(0);
}

#[test]
fn a_damaged_or_missing_folder_is_an_error_with_the_name_of_the_file() {
    // A record of evaluation is read after some steps.
    let run = prepared(own_rows(TestRun::sft(), "sft.jsonl")).set("overwrite_output_dir", "true");
    let place = folder(&run);
    for name in ["train.bin", "eval.bin"] {
        let whole = fs::read(place.join(name)).unwrap();
        fs::write(place.join(name), &whole[..whole.len() - 100]).unwrap();
        run.run(&[]).expect_error(1, &[name, "is cut short or damaged at its end", "run `trainer preprocess` again"]);
        fs::write(place.join(name), &whole[..10]).unwrap();
        run.run(&[]).expect_error(1, &[name, "is cut short"]);
        let mut changed = whole.clone();
        (20..whole.len() / 2).for_each(|at| changed[at] ^= 1);
        fs::write(place.join(name), changed).unwrap();
        run.run(&[]).expect_error(1, &[name, "record ", "is damaged"]);
        fs::write(place.join(name), whole).unwrap();
    }
    fs::remove_file(place.join("eval.bin")).unwrap();
    run.run(&[]).expect_error(1, &["cannot open", "eval.bin"]);
    fs::write(place.join("manifest.json"), "{}").unwrap();
    run.run(&[]).expect_error(1, &["manifest.json", "is damaged or was edited"]);
    fs::remove_dir_all(&place).unwrap();
    run.run(&[]).expect_error(1, &["holds no preprocessed data", "remove `preprocessed`"]);
}

#[test]
fn what_became_of_the_rows_is_said_and_duplicates_are_counted() {
    let rows = ["1+1=", "1+2=", "1+1=", "1+1=", "1+2=", "1000000000="]
        .map(|prompt| json!({"prompt": prompt, "completion": "3"}).to_string());
    let run = with_rows(TestRun::sft(), &rows.join("\n"))
        .set("packing", "false")
        .set("max_length", 8)
        .set("eval_strategy", "no")
        .set("eval_fraction", "null");
    let ended = run.preprocess(&[]).expect(0);
    assert!(!ended.out.contains("duplicates"), "{}", ended.out);
    let ended = run.preprocess(&["--dedup", "--jobs", "1"]).expect(0);
    let out = ended.out.split_whitespace().collect::<Vec<_>>().join(" ");
    for expected in [
        "threads 1",
        "rows 6 read",
        "duplicates 3 left out",
        "left out 1 without a token to learn (1 of them have some, beyond `max_length`)",
        "kept 2 of ",
        "longest ",
        "━ 2",
        "file train.bin",
        "trainer sft CONFIG --set preprocessed=",
    ] {
        assert!(out.contains(expected), "`{expected}` is missing in\n{}", ended.out);
    }
    let place = folder(&run);
    let ended = run.set("preprocessed", place.display()).set("max_steps", 1).run(&[]).expect(0);
    let out = ended.out.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(out.contains("3 rows left out when they were preprocessed"), "{out}");
}

#[test]
fn changed_raw_data_is_a_warning_and_another_folder_is_left_alone() {
    let run = own_rows(TestRun::grpo(), "train.jsonl");
    let place = run.beside("ready");
    let ended = run.preprocess(&["--output", place.to_str().unwrap()]).expect(0);
    assert!(ended.err.is_empty(), "{}", ended.err);
    fs::write(run.beside("rows.jsonl"), "{\"prompt\": \"1\"}\n").unwrap();
    let run = run.set("preprocessed", place.display());
    let ended = run.run(&[]).expect(0);
    assert!(ended.err.contains("changed since and is not read") && ended.err.contains("rows.jsonl"), "{}", ended.err);
    // The folder of the configuration is the one to write, whatever is in it.
    fs::write(place.join("mine.txt"), "").unwrap();
    run.preprocess(&[]).expect_error(1, &["holds `mine.txt`", "`--output`"]);
    assert!(place.join("train.bin").exists());
    let ended = run.preprocess(&["--task", "sft"]).expect(2);
    assert!(ended.err.contains("`reward_funcs` is a key of `trainer grpo`"), "{}", ended.err);
}

#[test]
fn an_interrupted_job_ends_with_130_and_leaves_nothing() {
    let text = "12+34=46 ".repeat(200);
    let rows: Vec<String> =
        (0..20_000).map(|n| json!({"prompt": format!("{n}="), "completion": text}).to_string()).collect();
    let of = || {
        let run = TestRun::of("preprocess", "configs/ci/sft.yaml").set("max_train_samples", "null");
        with_rows(run, &rows.join("\n")).set("packing", "false")
    };
    let run = of();
    let started = Instant::now();
    let (ended, _) = run.signal_when(&[], "INT", |_| started.elapsed() > Duration::from_millis(700));
    ended.expect(130);
    assert!(!run.output().exists());
    let run = of();
    let is_written =
        |output: &Path| output.exists() && names(output).iter().any(|name| name.starts_with(".partial-preprocessed-"));
    let (ended, _) = run.signal_when(&[], "TERM", is_written);
    let ended = ended.expect(130);
    assert!(ended.out.contains("interrupted; nothing was written"), "{}", ended.out);
    assert!(names(&run.output()).is_empty(), "{:?}", names(&run.output()));
}
