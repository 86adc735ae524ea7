//! `trainer generate` on what training left.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::test_run::{Ended, TestRun, copy_files, end, generate, names, trainer};

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

/// Turns as Qwen's, in the few characters that the tiny vocabulary has.
const TEMPLATE: &str = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}";

/// One of the models in `tests/golden/qlora_step`, with a tokenizer of its 160 tokens: random weights that, greedily too, say
/// different things on different prompts.
fn golden_model(name: &str, to: &Path) -> PathBuf {
    copy_files(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/qlora_step").join(name), to);
    let mut tokenizer: Value = serde_json::from_slice(&fs::read("data/tiny-qwen/tokenizer.json").unwrap()).unwrap();
    let vocab = tokenizer["model"]["vocab"].as_object_mut().unwrap();
    for id in vocab.len() as u32..160 {
        vocab.insert(char::from_u32(0x4E00 + id).unwrap().into(), id.into());
    }
    fs::write(to.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    fs::write(to.join("tokenizer_config.json"), "{}").unwrap();
    to.to_path_buf()
}

/// One of them with a chat template and so many positions.
fn chat_model(folder: &Path, template: &str, positions: usize) -> PathBuf {
    let model = golden_model("plain_absmax/base", &folder.join("model"));
    fs::write(model.join("chat_template.jinja"), template).unwrap();
    let mut config: Value = serde_json::from_slice(&fs::read(model.join("config.json")).unwrap()).unwrap();
    config["max_position_embeddings"] = positions.into();
    fs::write(model.join("config.json"), config.to_string()).unwrap();
    model
}

fn rows(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The completion of each row of a JSONL file of prompts.
fn completions(model: &Path, prompts: &[Value], more: &[&str]) -> Vec<String> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("prompts.jsonl");
    let lines: Vec<String> = prompts.iter().map(Value::to_string).collect();
    fs::write(&file, lines.join("\n")).unwrap();
    let out = text(generate(model, &[&["--prompts-file", file.to_str().unwrap()], more].concat()));
    rows(&out).iter().map(|row| row["completion"].as_str().unwrap().to_string()).collect()
}

fn user(content: &str) -> Value {
    json!({"role": "user", "content": content})
}

fn answer(content: &str) -> Value {
    json!({"role": "assistant", "content": content})
}

/// Talks to a model: writes `lines` and ends the input.
fn talk(model: &Path, lines: &str, more: &[&str]) -> Ended {
    let mut command = trainer();
    command.arg("generate").arg("--model").arg(model).arg("--interactive").args(more);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
    end(child)
}

#[test]
fn rows_come_out_in_order_with_their_columns_and_their_completions() {
    let folder = tempfile::tempdir().unwrap();
    let model = chat_model(folder.path(), TEMPLATE, 256);
    let (file, output) = (folder.path().join("prompts.jsonl"), folder.path().join("new/out.jsonl"));
    let lines = [
        r#"{"id": 123456789012345678901234567890, "prompt": "9+12=", "answer": {"value": 21, "unit": null}}"#,
        r#"{"prompt": [{"role": "user", "content": "9+12="}], "id": 2}"#,
        r#"{"messages": [{"role": "user", "content": "1+2="}, {"role": "assistant", "content": "3"}, {"role": "user", "content": "4+5="}]}"#,
        r#"{"prompt": "1+2=", "id": 4}"#,
    ];
    fs::write(&file, lines.join("\n\n")).unwrap();
    let (from, to) = (file.to_str().unwrap(), output.to_str().unwrap());
    let options = ["--prompts-file", from, "--max-new-tokens", "8"];
    let printed = text(generate(&model, &options));
    assert_eq!(text(generate(&model, &[&options[..], &["--output", to]].concat())), "");
    assert_eq!(fs::read_to_string(&output).unwrap(), printed);
    assert_eq!(names(output.parent().unwrap()).len(), 1, "nothing is left beside it");
    assert_eq!(printed.lines().count(), lines.len());
    for (line, object) in printed.lines().zip(lines) {
        assert!(line.starts_with(object.strip_suffix('}').unwrap()), "{line}");
    }
    let rows = rows(&printed);
    for row in &rows {
        let tokens = row["completion_tokens"].as_u64().unwrap();
        let is_cut = row["finish_reason"] == "length";
        assert!(is_cut == (tokens == 8) || row["finish_reason"] == "stop", "{row}");
    }
    // A text is the turn of a user, and gets what the console shows for it.
    assert_eq!(rows[0]["completion"], rows[1]["completion"]);
    let shown = text(generate(&model, &["--prompt", "1+2=", "--max-new-tokens", "8"]));
    assert_eq!(format!("{}\n", rows[3]["completion"].as_str().unwrap()), shown);
    // The conversation's last message is answered after the others.
    let alone = completions(&model, &[json!({"prompt": "4+5="})], &["--max-new-tokens", "8"]);
    assert_ne!(rows[2]["completion"].as_str().unwrap(), alone[0]);

    // As they are: another prompt than in the template, and no conversation.
    let raw = generate(&model, &["--prompts-file", from, "--raw"]);
    raw.expect_error(2, &["prompts.jsonl`, line 3", "the prompt is a conversation", "--raw"]);
    let texts = [json!({"prompt": "9+12="})];
    let ask = |model: &Path, more: &[&str]| completions(model, &texts, &[&["--max-new-tokens", "8"], more].concat());
    let (raw, chat) = (ask(&model, &["--raw"]), ask(&model, &[]));
    assert_ne!(raw, chat);
    let bare = golden_model("plain_absmax/base", &folder.path().join("bare"));
    assert_eq!(raw, ask(&bare, &[]), "without a template");
    assert_ne!(ask(&model, &["--system", "add"]), chat);
}

#[test]
fn why_a_completion_ended_is_told() {
    let run = TestRun::full().done();
    let prompts = run.beside("prompts.txt");
    fs::write(&prompts, "9+12=\n1+2=\n").unwrap();
    let output = run.beside("out.jsonl");
    let ask = |limit: &str| {
        let (from, to) = (prompts.to_str().unwrap(), output.to_str().unwrap());
        text(generate(&run.output(), &["--prompts-file", from, "--output", to, "--max-new-tokens", limit]));
        rows(&fs::read_to_string(&output).unwrap())
    };
    // Prompts of a text file have one column. The training data have short numbers as completions.
    let (long, short) = (ask("200"), ask("1"));
    assert_eq!([&long[0]["prompt"], &long[1]["prompt"]], ["9+12=", "1+2="]);
    for (long, short) in long.iter().zip(&short) {
        let text = long["completion"].as_str().unwrap();
        let tokens = long["completion_tokens"].as_u64().unwrap() as usize;
        assert_eq!((&long["finish_reason"], tokens), (&json!("stop"), text.len() + 1), "a token a digit, and the end");
        let first = &text[..1];
        assert_eq!(
            (&short["finish_reason"], &short["completion_tokens"], &short["completion"]),
            (&json!("length"), &json!(1), &json!(first))
        );
    }
}

#[test]
fn several_completions_of_a_prompt_stand_together_and_differ() {
    let prompts = [json!({"prompt": "9+12=", "id": 1}), json!({"prompt": "1+2=", "id": 2})];
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("prompts.jsonl");
    fs::write(&file, format!("{}\n{}\n", prompts[0], prompts[1])).unwrap();
    let model = Path::new("data/tiny-qwen");
    let more = ["--temperature", "1.5", "--num-return-sequences", "3", "--max-new-tokens", "12"];
    let ask = |seed: &str| {
        let from = ["--prompts-file", file.to_str().unwrap(), "--seed", seed];
        rows(&text(generate(model, &[&from[..], &more].concat())))
    };
    let found = ask("1");
    let ids: Vec<u64> = found.iter().map(|row| row["id"].as_u64().unwrap()).collect();
    assert_eq!(ids, [1, 1, 1, 2, 2, 2]);
    let texts: BTreeSet<&str> = found.iter().map(|row| row["completion"].as_str().unwrap()).collect();
    assert_eq!(texts.len(), 6, "{texts:?}");
    assert_eq!(ask("1"), found);
    assert_ne!(ask("2"), found);
    let from = ["--prompts-file", file.to_str().unwrap(), "--seed", "1", "--max-num-seqs", "2"];
    assert_eq!(rows(&text(generate(model, &[&from[..], &more].concat()))), found, "two at a time");
    let console = text(generate(model, &[&["--prompt", "9+12=", "--seed", "1"][..], &more].concat()));
    let expected: Vec<String> =
        found[..3].iter().map(|row| format!("### 9+12=\n{}\n", row["completion"].as_str().unwrap())).collect();
    assert_eq!(console, expected.concat());
}

#[test]
fn a_wrong_file_of_prompts_or_of_completions_is_said_and_nothing_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let model = Path::new("data/tiny-qwen");
    let (file, output) = (folder.path().join("prompts.jsonl"), folder.path().join("out.jsonl"));
    let (from, to) = (file.to_str().unwrap(), output.to_str().unwrap());
    let long = json!({"prompt": "1+".repeat(200)}).to_string();
    let conversation = json!({"messages": [user("1+2=")]}).to_string();
    let cases: [(&str, i32, &[&str]); 6] = [
        ("{\"prompt\": \"1\"", 1, &["prompts.jsonl`, line 2: not valid JSON at column"]),
        ("{\"text\": \"1\"}", 1, &["prompts.jsonl`, line 2: no `prompt` and no `messages`; the columns are `text`"]),
        ("{\"prompt\": \"1\", \"completion\": \"2\"}", 1, &["line 2: the column `completion`", "rename or remove"]),
        ("{\"prompt\": \"\"}", 1, &["prompts.jsonl`, line 2", "no tokens"]),
        (&long, 1, &["prompts.jsonl`, line 2", "400 tokens", "256", "shorten the prompt"]),
        (&conversation, 2, &["prompts.jsonl`, line 2", "has no chat template"]),
    ];
    for (line, code, parts) in cases {
        fs::write(&file, format!("{{\"prompt\": \"1+2=\"}}\n{line}\n")).unwrap();
        let ended = generate(model, &["--prompts-file", from, "--output", to]).expect_error(code, parts);
        assert_eq!((ended.out.as_str(), names(folder.path()).len()), ("", 1), "{line}");
    }
    fs::write(&file, "{\"prompt\": \"1+2=\"}\n").unwrap();
    generate(model, &["--prompts-file", from, "--output", from]).expect_error(2, &["is the file of prompts"]);
    let several = ["--prompts-file", from, "--num-return-sequences", "2"];
    generate(model, &several).expect_error(2, &["`--num-return-sequences 2`", "--temperature 0"]);
    generate(model, &["--interactive"]).expect_error(2, &["has no chat template", "--interactive"]);
}

#[test]
fn a_conversation_is_remembered_until_it_is_reset() {
    let folder = tempfile::tempdir().unwrap();
    let model = chat_model(folder.path(), TEMPLATE, 256);
    let limit = ["--max-new-tokens", "12"];
    let (one, two) = ("9+12=", "1+2=");
    let first = completions(&model, &[json!({"messages": [user(one)]})], &limit).remove(0);
    let fresh = completions(&model, &[json!({"messages": [user(two)]})], &limit).remove(0);
    let both = json!({"messages": [user(one), answer(&first), user(two)]});
    let second = completions(&model, &[both], &limit).remove(0);
    assert_ne!(second, fresh, "the second turn must depend on the first");

    let said = |lines: &str, more: &[&str]| talk(&model, lines, &[&limit[..], more].concat()).expect(0).out;
    assert_eq!(said(&format!("{one}\n{two}\n"), &[]), format!("{first}\n{second}\n"));
    // Empty lines are no messages; the last line needs no end; what comes after the end is not read.
    assert_eq!(said(&format!("\n{one}\r\n  \n{two}"), &[]), format!("{first}\n{second}\n"));
    assert_eq!(said(&format!("{one}\n/reset\n{two}\n/exit\n{one}\n"), &[]), format!("{first}\n{fresh}\n"));
    let system = completions(&model, &[json!({"prompt": two})], &[&limit[..], &["--system", "add"]].concat()).remove(0);
    assert_eq!(said(two, &["--system", "add"]), format!("{system}\n"));
    assert_eq!(said("", &[]), "");
}

#[test]
fn a_message_without_room_is_left_out_of_the_conversation() {
    let folder = tempfile::tempdir().unwrap();
    let model = chat_model(folder.path(), TEMPLATE, 64);
    let limit = ["--max-new-tokens", "6"];
    let first = completions(&model, &[json!({"prompt": "9+12="})], &limit).remove(0);
    let both = json!({"messages": [user("9+12="), answer(&first), user("1+2=")]});
    let second = completions(&model, &[both], &limit).remove(0);
    let ended = talk(&model, &format!("9+12=\n{}\n1+2=\n", "1+".repeat(100)), &limit).expect(0);
    assert_eq!(ended.out, format!("{first}\n{second}\n"));
    let errors: Vec<&str> = ended.err.lines().filter(|line| line.starts_with("error: ")).collect();
    let [error] = errors[..] else { panic!("expected one message: {}", ended.err) };
    for part in ["the conversation has 2", "the model holds 64", "the message is left out", "/reset"] {
        assert!(error.contains(part), "`{part}` is missing in {error}");
    }
    // So is one that the template refuses.
    let refusing = format!(
        "{{% if messages[-1].content == '?' %}}{{{{ raise_exception('no question') }}}}{{% endif %}}{TEMPLATE}"
    );
    fs::write(model.join("chat_template.jinja"), refusing).unwrap();
    let ended = talk(&model, "9+12=\n?\n1+2=\n", &limit).expect(0);
    assert_eq!(ended.out, format!("{first}\n{second}\n"));
    assert!(ended.err.contains("no question") && ended.err.contains("the message is left out"), "{}", ended.err);
    // An answer that is cut says by what.
    let cut = talk(&model, "9+12=\n", &["--max-new-tokens", "3", "--temperature", "1.5"]).expect(0);
    assert!(cut.err.contains("the answer ends at 3 tokens (`--max-new-tokens`)"), "{}", cut.err);
}

#[test]
fn ctrl_c_ends_an_answer_and_not_the_conversation() {
    let folder = tempfile::tempdir().unwrap();
    // No token ends an answer, and a test does not last as long as so many.
    let model = chat_model(folder.path(), "{% for m in messages %}{{ m.content }}\n{% endfor %}", 1 << 16);
    let mut command = trainer();
    command.arg("generate").arg("--model").arg(&model).args(["--interactive", "--max-new-tokens", "60000"]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut input = child.stdin.take().unwrap();
    input.write_all(b"9+12=\n").unwrap();
    let out = child.stdout.as_mut().unwrap();
    let mut byte = [0];
    out.read_exact(&mut byte).unwrap();
    let kill = format!("kill -INT {}", child.id());
    let interrupt = || Command::new("sh").args(["-c", &kill]).status().unwrap();
    interrupt();
    input.write_all(b"1+2=\n").unwrap();
    // The end of the first answer, then the beginning of the second.
    let mut is_next = false;
    let out = child.stdout.as_mut().unwrap();
    while !is_next {
        out.read_exact(&mut byte).unwrap();
        is_next = byte == *b"\n";
    }
    out.read_exact(&mut byte).unwrap();
    interrupt();
    input.write_all(b"/exit\n").unwrap();
    let ended = end(child).expect(0);
    assert_eq!(ended.err.matches("the answer was ended by Ctrl-C").count(), 2, "{}", ended.err);
}

#[test]
fn weights_packed_on_the_way_say_what_packed_files_say() {
    let folder = tempfile::tempdir().unwrap();
    let prompts = ["9+12=", "1+2=", "the", "40-7=", "(x)"].map(|prompt| json!({"prompt": prompt}));
    for (case, nested) in [("plain_absmax", false), ("double_quant", true)] {
        let model = |name: &str| golden_model(&format!("{case}/{name}"), &folder.path().join(case).join(name));
        // `base_bnb4bit` is what bitsandbytes made of `base`.
        let (base, stored) = (model("base"), model("base_bnb4bit"));
        let ask =
            |model: &Path, more: &[&str]| completions(model, &prompts, &[&["--max-new-tokens", "48"], more].concat());
        let flags: &[&str] = if nested { &["--load-in-4bit", "--use-bnb-nested-quant"] } else { &["--load-in-4bit"] };
        let packed = ask(&base, flags);
        assert_eq!(packed, ask(&stored, &[]), "{case}");
        assert_ne!(packed, ask(&base, &[]), "{case}: 4 bits change something");
        // Packed files stay as they are, which is said.
        let ended = generate(&stored, &["--prompt", "1+2=", "--max-new-tokens", "48", "--load-in-4bit"]).expect(0);
        assert_eq!(ended.out, format!("{}\n", packed[1]));
        assert!(
            ended.err.contains("`--load-in-4bit` has no effect") && ended.err.contains("in 4 bits already"),
            "{}",
            ended.err
        );
    }
}
