//! Recipes of open-r1, alignment-handbook and TRL, as people bring them: `tests/recipes` holds each with its keys and kinds
//! of values. With a small model and small data in the place of theirs, each passes the check of its configuration, and
//! each of a family that is supported trains.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use trainer::config::{self, Context, Source};

use crate::test_run::{TestRun, copy_files};

/// Whose model a recipe names.
#[derive(Clone, Copy, PartialEq)]
enum Family {
    /// One that is supported.
    Qwen,
    /// Another architecture: the configuration is checked, nothing is trained.
    Other,
}

/// One recipe.
struct Recipe {
    name: &'static str,
    family: Family,
    /// The number of ranks it is made for, where its batches do not divide by its groups on one.
    ranks: usize,
    /// What is replaced to train on one rank, beside model, data, lengths and output.
    replaced: &'static [&'static str],
}

const fn recipe(name: &'static str, family: Family) -> Recipe {
    Recipe { name, family, ranks: 1, replaced: &[] }
}

const fn of_7_ranks(name: &'static str) -> Recipe {
    Recipe { name, family: Family::Qwen, ranks: 7, replaced: &["per_device_train_batch_size=14"] }
}

const RECIPES: [Recipe; 20] = [
    recipe("openr1-r1-distill-grpo", Family::Qwen),
    recipe("openr1-olympic-coder-32b-sft", Family::Qwen),
    recipe("openr1-olympic-coder-7b-sft", Family::Qwen),
    recipe("openr1-distill-7b-sft", Family::Qwen),
    recipe("openr1-qwen-1.5b-grpo", Family::Qwen),
    of_7_ranks("openr1-qwen-1.5b-grpo-code"),
    of_7_ranks("openr1-qwen-1.5b-grpo-ioi"),
    recipe("openr1-qwen-coder-7b-grpo-codeforces", Family::Qwen),
    recipe("handbook-constitutional-anthropic", Family::Other),
    recipe("handbook-constitutional-grok", Family::Other),
    recipe("handbook-smollm-sft", Family::Other),
    recipe("handbook-smollm2-sft", Family::Other),
    recipe("handbook-smollm2-small-sft", Family::Other),
    recipe("handbook-smollm3-mid", Family::Other),
    recipe("handbook-smollm3-sft", Family::Other),
    recipe("handbook-starchat2-sft", Family::Other),
    recipe("handbook-zephyr-full", Family::Other),
    recipe("handbook-zephyr-qlora", Family::Other),
    recipe("handbook-zephyr-gemma", Family::Other),
    recipe("trl-cli", Family::Qwen),
];

impl Recipe {
    fn task(&self) -> &'static str {
        if self.name.contains("grpo") { "grpo" } else { "sft" }
    }

    fn path(&self) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/recipes").join(format!("{}.yaml", self.name))
    }

    /// The file as plain values.
    fn values(&self) -> Value {
        serde_saphyr::from_str(&fs::read_to_string(self.path()).unwrap()).unwrap()
    }

    /// What puts data in `folder` in the place of the recipe's data sets.
    fn data_sets(&self, folder: &Path) -> Vec<String> {
        let values = self.values();
        let place = |id: &str| folder.join(id.replace('/', "-"));
        let text = |value: Option<&Value>, default: &str| value.and_then(Value::as_str).unwrap_or(default).to_owned();
        let Some(mixture) = values.get("dataset_mixture") else {
            let id = values["dataset_name"].as_str().unwrap();
            let config = values.get("dataset_config").and_then(Value::as_str);
            for split in ["train", "test"] {
                write_rows(&place(id), config, split, id);
            }
            return vec![format!("dataset_name={}", place(id).display())];
        };
        let mut mixture = mixture.clone();
        for part in mixture["datasets"].as_array_mut().unwrap() {
            let id = part["id"].as_str().unwrap().to_owned();
            write_rows(&place(&id), part["config"].as_str(), &text(part.get("split"), "train"), &id);
            part["id"] = json!(place(&id));
            // Of eight rows a thousandth is none.
            if part.get("weight").and_then(Value::as_f64).is_some_and(|weight| weight < 0.125) {
                part["weight"] = json!(0.25);
            }
        }
        if mixture.get("test_split_size").is_some_and(|size| size.as_f64() >= Some(1.0)) {
            mixture["test_split_size"] = json!(2);
        }
        vec![format!("dataset_mixture={mixture}")]
    }
}

/// Eight rows of a split, of the columns that a data set of this name has.
fn write_rows(folder: &Path, config: Option<&str>, split: &str, id: &str) {
    let folder = config.map_or_else(|| folder.to_owned(), |config| folder.join(config));
    fs::create_dir_all(&folder).unwrap();
    let row = |n: usize| {
        let (question, answer) = (format!("{n} + 1 ="), (n + 1).to_string());
        match id {
            "org/math" => json!({"problem": question, "solution": format!("${answer}$"), "answer": answer}),
            "org/code" => json!({
                "problem_statement": question,
                "verification_info": {
                    "language": "python",
                    "test_cases": [{"input": "1\n", "output": "2\n", "fn_name": null, "type": "stdin_stdout"}],
                },
            }),
            "org/ioi" | "org/codeforces" => json!({
                "problem": question,
                "prompt": question,
                "language": "python",
                "time_limit": 1.0,
                "memory_limit": 64,
                "official_tests": [{"input": "1\n", "output": "2\n"}],
                "test_cases": [{"input": "1\n", "output": "2\n"}],
            }),
            "org/text" => json!({"text": format!("{question} {answer}"), "label": 0}),
            _ => json!({
                "messages": [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": format!("<think>\n{n}\n</think>\n{answer}")},
                ],
                "chat_template_kwargs": {"enable_thinking": true},
                "source": "made up",
            }),
        }
    };
    let rows: Vec<String> = (0..8).map(|n| row(n).to_string()).collect();
    fs::write(folder.join(format!("{split}.jsonl")), rows.join("\n")).unwrap();
}

/// A tiny Qwen that holds a thousand tokens.
fn tiny_model(folder: &Path) -> PathBuf {
    let model = folder.join("model");
    copy_files(&Path::new(env!("CARGO_MANIFEST_DIR")).join("data/tiny-qwen"), &model);
    let path = model.join("config.json");
    let config = fs::read_to_string(&path).unwrap();
    let longer = config.replace("\"max_position_embeddings\": 256", "\"max_position_embeddings\": 1024");
    assert_ne!(config, longer);
    fs::write(path, longer).unwrap();
    model
}

#[test]
fn every_recipe_passes_the_check_of_its_configuration() {
    let folder = tempfile::tempdir().unwrap();
    let model = tiny_model(folder.path());
    let mut names: Vec<_> = RECIPES.iter().map(|recipe| format!("{}.yaml", recipe.name)).collect();
    names.sort_unstable();
    let there = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/recipes");
    assert_eq!(crate::test_run::names(&there).into_iter().collect::<Vec<_>>(), names);
    for recipe in &RECIPES {
        let mut sets = recipe.data_sets(folder.path());
        sets.push(format!("model_name_or_path={}", model.display()));
        let source = Source::read(&recipe.path()).unwrap();
        let launched = (recipe.ranks > 1).then_some(recipe.ranks);
        let context = Context { launched, check_reward: Some(trainer::reward::check), ..Context::default() };
        let outcome = match recipe.task() {
            "grpo" => config::load_grpo(&source, &sets, &context).map(|loaded| loaded.warnings),
            _ => config::load_sft(&source, &sets, &context).map(|loaded| loaded.warnings),
        };
        let warnings = outcome.unwrap_or_else(|error| panic!("{}: {error}", recipe.name));
        assert!(warnings.len() <= 16, "{}: {warnings:#?}", recipe.name);
    }
}

/// Trains two steps of a recipe.
fn train(recipe: &Recipe) {
    let folder = tempfile::tempdir().unwrap();
    let mut sets = recipe.data_sets(folder.path());
    sets.push(format!("model_name_or_path={}", tiny_model(folder.path()).display()));
    let length = if recipe.task() == "grpo" { "max_completion_length=8" } else { "max_length=512" };
    sets.extend(["max_steps=2", "bf16=false", "disable_tqdm=true", length].map(str::to_owned));
    // The models that recipes name have a template of their own.
    if recipe.values().get("chat_template").is_none_or(Value::is_null) {
        let template = folder.path().join("template.jinja");
        fs::write(&template, "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}").unwrap();
        sets.push(format!("chat_template_path={}", template.display()));
    }
    sets.extend(recipe.replaced.iter().map(ToString::to_string));
    let run = sets.iter().fold(TestRun::of(recipe.task(), recipe.path()), |run, set| {
        let (key, value) = set.split_once('=').unwrap();
        run.set(key, value)
    });
    let ended = run.run(&[]);
    assert_eq!(ended.code, Some(0), "{}: {}\n{}", recipe.name, ended.out, ended.err);
    assert!(run.rows().iter().any(|row| row.get("step") == Some(&json!(2))), "{}: {}", recipe.name, ended.out);
    assert_eq!(ended.out.contains("hf upload "), recipe.name != "trl-cli", "{}: {}", recipe.name, ended.out);
}

#[test]
fn recipes_of_sft_for_qwen_train() {
    RECIPES.iter().filter(|recipe| recipe.family == Family::Qwen && recipe.task() == "sft").for_each(train);
}

#[test]
fn recipes_of_grpo_for_qwen_train() {
    RECIPES.iter().filter(|recipe| recipe.family == Family::Qwen && recipe.task() == "grpo").for_each(train);
}

/// What their files ask for is there; only their models are not.
#[test]
fn recipes_of_other_families_train_a_qwen() {
    RECIPES.iter().filter(|recipe| recipe.family == Family::Other).for_each(train);
}
