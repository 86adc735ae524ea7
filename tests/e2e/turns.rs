//! The end of a turn: it ends generation here, and the saved files say so to others.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::test_run::{TestRun, generate};

/// Turns as Qwen's, in the few characters that the tiny vocabulary has.
const TEMPLATE: &str = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}";

fn json_file(folder: &Path, name: &str) -> Value {
    serde_json::from_slice(&fs::read(folder.join(name)).unwrap()).unwrap()
}

/// What the console said, without its line breaks.
fn unwrapped(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// A run on conversations in which every answer is a seven.
fn chats(run: TestRun, template: &str) -> TestRun {
    let turn = |role: &str, content: &str| json!({"role": role, "content": content});
    let row = |question: &str| json!({"messages": [turn("user", question), turn("assistant", "7")]}).to_string();
    let rows: Vec<String> = ["1+2=", "3+4=", "5+6=", "9+1="].map(row).to_vec();
    fs::write(run.beside("chats.jsonl"), rows.join("\n")).unwrap();
    fs::write(run.beside("template.jinja"), template).unwrap();
    let (data, template) = (run.beside("chats.jsonl"), run.beside("template.jinja"));
    run.set("dataset_name", data.display())
        .set("chat_template_path", template.display())
        .set("eval_strategy", "no")
        .set("eval_fraction", "null")
        .set("packing", "false")
}

#[test]
fn a_base_model_trained_on_turns_stops_at_their_end_and_says_so_in_its_files() {
    let run = chats(TestRun::full().set("max_steps", 60).set("learning_rate", "5e-3"), TEMPLATE);
    let ended = run.run(&[]).expect(0);
    assert!(unwrapped(&ended.out).contains("`<|im_end|>` ends the chat template's turns"));
    let output = run.output();
    assert_eq!(json_file(&output, "generation_config.json")["eos_token_id"], json!([3, 1]));
    assert_eq!(json_file(&output, "config.json")["eos_token_id"], json!(3));
    assert_eq!(json_file(&output, "tokenizer_config.json")["eos_token"], "<|im_end|>");
    assert_eq!(fs::read_to_string(output.join("chat_template.jinja")).unwrap(), TEMPLATE);
    let ended = generate(&output, &["--prompt", "1+2=", "--max-new-tokens", "40"]).expect(0);
    assert_eq!(ended.out, "7\n", "it ends with the turn, long before 40 tokens");
}

#[test]
fn an_adapter_s_folder_says_where_turns_end() {
    let run = chats(TestRun::sft(), TEMPLATE).done();
    let output = run.output();
    assert_eq!(json_file(&output, "generation_config.json")["eos_token_id"], json!([3, 1]));
    assert_eq!(json_file(&output, "tokenizer_config.json")["eos_token"], "<|im_end|>");
    assert!(run.has("tokenizer.json") && run.has("chat_template.jinja"));
    // Plain text goes through no template: the end of a document stays what it was.
    let run = TestRun::sft().done();
    assert_eq!(json_file(&run.output(), "tokenizer_config.json")["eos_token"], "<|endoftext|>");
    assert_eq!(json_file(&run.output(), "generation_config.json")["eos_token_id"], json!([1, 3]));
}

#[test]
fn eos_token_is_appended_saved_and_checked() {
    let run = TestRun::full().set("max_steps", 60).set("learning_rate", "5e-3").set("eos_token", "<|im_end|>");
    fs::write(run.beside("data.jsonl"), "{\"prompt\": \"1+2=\", \"completion\": \"7\"}\n").unwrap();
    let data = run.beside("data.jsonl");
    let run = run.set("dataset_name", data.display()).done();
    assert_eq!(json_file(&run.output(), "generation_config.json")["eos_token_id"], json!([3, 1]));
    assert_eq!(json_file(&run.output(), "config.json")["eos_token_id"], json!(3));
    let ended = generate(&run.output(), &["--prompt", "1+2=", "--raw", "--max-new-tokens", "40"]).expect(0);
    assert_eq!(ended.out, "7\n");

    let wrong = TestRun::sft().set("eos_token", "<|im_ned|>").run(&[]);
    wrong.expect_error(1, &["`eos_token: <|im_ned|>` is not a token", "`<|im_end|>`"]);
}

#[test]
fn templates_come_from_text_files_and_folders_and_one_without_an_end_is_warned_of() {
    let inline = TestRun::sft();
    let open = "{% for m in messages %}{{ m.content }} {% endfor %}";
    let run = chats(inline, open);
    let ended = run.run(&[]).expect(0);
    assert!(ended.err.contains("never prints a token that ends a sequence"), "{}", ended.err);

    let folder = run.beside("other");
    fs::create_dir(&folder).unwrap();
    fs::copy("data/tiny-qwen/tokenizer.json", folder.join("tokenizer.json")).unwrap();
    let config = json!({"chat_template": TEMPLATE, "eos_token": "<|im_end|>"}).to_string();
    fs::write(folder.join("tokenizer_config.json"), config).unwrap();
    let run = run.set("chat_template_path", folder.display()).set("overwrite_output_dir", "true").done();
    assert_eq!(fs::read_to_string(run.output().join("chat_template.jinja")).unwrap(), TEMPLATE);

    let text = format!("\"{}\"", TEMPLATE.replace('\n', "\\n"));
    let run = run.set("chat_template_path", "null").set("chat_template", &text).done();
    assert_eq!(fs::read_to_string(run.output().join("chat_template.jinja")).unwrap(), TEMPLATE);
    let both = run.set("chat_template_path", "x.jinja").run(&[]);
    both.expect_error(2, &["`chat_template` and `chat_template_path` both give the chat template"]);
}

#[test]
fn grpo_completions_end_with_the_turn() {
    let run = TestRun::grpo();
    let prompt = json!({"prompt": [{"role": "user", "content": "1+2="}], "answer": "3"}).to_string();
    fs::write(run.beside("prompts.jsonl"), format!("{prompt}\n{prompt}\n{prompt}\n{prompt}\n")).unwrap();
    fs::write(run.beside("template.jinja"), TEMPLATE).unwrap();
    let (data, template) = (run.beside("prompts.jsonl"), run.beside("template.jinja"));
    let run = run
        .set("dataset_name", data.display())
        .set("chat_template_path", template.display())
        .set("max_completion_length", 64)
        .set("eval_strategy", "no")
        .set("eval_fraction", "null")
        .done();
    // Random weights: one token in 32 or so ends a completion.
    let completions = run.completions();
    assert!(completions.iter().any(|completion| completion["is_truncated"] == false), "{completions:?}");
    assert_eq!(json_file(&run.output(), "generation_config.json")["eos_token_id"], json!([3, 1]));
}

#[test]
fn thoughts_that_the_template_cuts_are_learnt_and_said_and_lost_rows_are_refused() {
    let cuts = "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}{% elif m.role == 'assistant' %}<|im_end|>{{ m.content.split('</think>')[-1] }}<|endoftext|>{% endif %}{% endfor %}";
    let tokens = |answer: Value| {
        let run = chats(TestRun::sft().set("max_steps", 1), cuts);
        let row = json!({"messages": [{"role": "human", "content": "1+2="}, answer]}).to_string();
        fs::write(run.beside("chats.jsonl"), row).unwrap();
        let ended = run.run(&[]).expect(0);
        assert!(unwrapped(&ended.out).contains("the role `human` is read as `user`"), "{}", ended.out);
        (run.metric("num_tokens")[0], ended.err)
    };
    let (plain, said) = tokens(json!({"role": "assistant", "content": "3"}));
    assert!(!said.contains("reasoning"), "{said}");
    let forms = [
        json!({"role": "assistant", "content": "<think>\n1+1+1\n</think>\n\n3"}),
        json!({"role": "assistant", "content": "1+1+1\n</think>\n\n3"}),
        json!({"role": "assistant", "content": "3", "reasoning_content": "1+1+1"}),
        json!({"role": "assistant", "content": "3", "reasoning": "1+1+1"}),
    ];
    let counts: Vec<f64> = forms.into_iter().map(|form| tokens(form).0).collect();
    assert!(counts.iter().all(|&count| count == counts[0] && count >= plain + 5.0), "{counts:?}, {plain}");

    let run = chats(TestRun::sft(), cuts);
    let row = json!({"messages": [{"role": "user", "content": "1"}, {"role": "critic", "content": "2"}]}).to_string();
    fs::write(run.beside("chats.jsonl"), row).unwrap();
    run.run(&[]).expect_error(1, &["chats.jsonl`, line 1", "prints nothing of what is to be learnt", "`critic`"]);
}
