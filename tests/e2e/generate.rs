//! `trainer generate` on what training left.

use std::fs;

use crate::test_run::{Ended, TestRun, generate};

fn text(ended: Ended) -> String {
    let ended = ended.expect(0);
    assert_eq!(ended.err, "");
    ended.out
}

#[test]
fn a_trained_model_answers_greedily_sampled_streamed_and_from_a_file() {
    let run = TestRun::full().done();
    let model = run.output();
    let ask = |more: &[&str]| text(generate(&model, &[&["--max-new-tokens", "8"], more].concat()));

    let greedy = ask(&["--prompt", "9+12="]);
    // The training data have nothing but numbers as completions.
    assert!(greedy.trim_end().chars().all(|c| c.is_ascii_digit() || c == '-') && greedy.len() > 1, "{greedy:?}");
    assert_eq!(ask(&["--prompt", "9+12="]), greedy);
    assert_eq!(ask(&["--prompt", "9+12=", "--seed", "7"]), greedy);
    assert_eq!(ask(&["--prompt", "9+12=", "--stream"]), greedy);
    assert_eq!(ask(&["--prompt", "9+12=", "--raw"]), greedy);
    assert_eq!(ask(&["--prompt", "9+12=", "--temperature", "1", "--top-k", "1"]), greedy);

    let sampled = |seed: &str| ask(&["--prompt", "9+12=", "--temperature", "1.5", "--seed", seed]);
    assert_eq!(sampled("1"), sampled("1"));
    assert!(["2", "3", "4", "5", "6"].into_iter().any(|seed| sampled(seed) != sampled("1")));
    let streamed = ask(&["--prompt", "9+12=", "--temperature", "1.5", "--seed", "1", "--stream"]);
    assert_eq!(streamed, sampled("1"));

    let prompts = run.beside("prompts.txt");
    fs::write(&prompts, "9+12=\n\n1+2=\n40-7=\n").unwrap();
    let answers = ask(&["--prompts-file", prompts.to_str().unwrap()]);
    let each: String =
        ["9+12=", "1+2=", "40-7="].map(|prompt| format!("### {prompt}\n{}", ask(&["--prompt", prompt]))).concat();
    assert_eq!(answers, each);
}

#[test]
fn an_adapter_changes_the_answers_of_its_base() {
    let base = TestRun::full().done();
    let run = TestRun::sft()
        .model(&base.output())
        .set("load_in_4bit", "false")
        .set("learning_rate", "2e-2")
        .set("max_steps", 20)
        .set("dataset_name", base.beside("data.jsonl").display())
        .set("eval_strategy", "no")
        .set("eval_fraction", "null");
    let rows = ["9+12=", "1+2=", "4-1=", "20+3="]
        .map(|prompt| format!("{{\"prompt\":\"{prompt}\",\"completion\":\"777\"}}\n"));
    fs::write(base.beside("data.jsonl"), rows.concat()).unwrap();
    let run = run.done();
    let adapter = run.output();
    let ask = |more: &[&str]| text(generate(&base.output(), &[&["--prompt", "9+12="], more].concat()));
    assert_eq!(ask(&["--adapter", adapter.to_str().unwrap()]), "777\n");
    assert_ne!(ask(&[]), "777\n");
    // The adapter of a checkpoint is an adapter too.
    let checkpoint = adapter.join("checkpoint-20");
    assert_eq!(ask(&["--adapter", checkpoint.to_str().unwrap()]), "777\n");
}

#[test]
fn what_cannot_be_generated_is_said() {
    let run = TestRun::full().set("max_steps", 1).done();
    let model = run.output();
    let long = "1+".repeat(200);
    let missing = run.beside("missing");
    let missing = missing.to_str().unwrap();
    let cases: [(&[&str], i32, &[&str]); 6] = [
        (&["--prompt", &long], 1, &["400 tokens", "256", "shorten the prompt"]),
        (&["--prompt", ""], 1, &["no tokens", "at least one"]),
        (&["--prompt", "1", "--chat"], 2, &["has no chat template", "leave out --chat"]),
        (&["--prompt", "1", "--adapter", missing], 1, &["no adapter at", missing, "adapter_config.json"]),
        (&["--prompt", "1", "--adapter", model.to_str().unwrap()], 1, &["no adapter at", "adapter_config.json"]),
        (&["--prompts-file", missing], 1, &["cannot read", missing]),
    ];
    for (arguments, code, parts) in cases {
        let ended = generate(&model, arguments).expect_error(code, parts);
        assert_eq!(ended.out, "", "{arguments:?}");
    }
    let empty = run.beside("empty.txt");
    fs::write(&empty, "\n \n").unwrap();
    generate(&model, &["--prompts-file", empty.to_str().unwrap()])
        .expect_error(2, &["holds no prompt", "one per line"]);
    generate(&run.beside("missing"), &["--prompt", "1"]).expect_error(1, &["no model at", missing, ".gguf"]);
}
