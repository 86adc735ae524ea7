//! Reward functions in Python: called as TRL calls them, and every way in which one can fail.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};
use tempfile::TempDir;
use trainer::config::settings::{RewardSettings, RewardSpec};
use trainer::reward::{Error, Progress, Rewards, Sample, Scores, check};

/// A folder with the file `r.py`.
struct Functions {
    folder: TempDir,
}

impl Functions {
    fn new(source: &str) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::write(folder.path().join("r.py"), source).expect("written");
        Self { folder }
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn start(&self, specs: &[RewardSpec]) -> Result<Rewards, Error> {
        let settings = RewardSettings { path: vec![self.path().to_path_buf()], ..RewardSettings::default() };
        Rewards::start(specs, &settings, &|| false)
    }

    /// Starts functions of `r.py` by name.
    fn named(&self, names: &[&str]) -> Rewards {
        let specs: Vec<_> = names.iter().map(|name| function(&format!("r.py:{name}"))).collect();
        self.start(&specs).unwrap_or_else(|error| panic!("{error}"))
    }

    fn refused(&self, target: &str) -> String {
        match self.start(&[function(target)]) {
            Ok(_) => panic!("{target} was loaded"),
            Err(error) => error.to_string(),
        }
    }
}

fn function(target: &str) -> RewardSpec {
    RewardSpec::Python { target: target.to_owned(), name: None, parameters: Map::new(), timeout_secs: 60.0 }
}

fn with(target: &str, parameters: Value, name: Option<&str>) -> RewardSpec {
    let Value::Object(parameters) = parameters else { panic!("parameters are a map") };
    RewardSpec::Python { target: target.to_owned(), name: name.map(Into::into), parameters, timeout_secs: 60.0 }
}

/// Scores completions of plain prompts, each with a row `{"answer": its place, "level": "easy"}`.
fn score(rewards: &mut Rewards, completions: &[&str]) -> Result<Scores, Error> {
    score_as(rewards, &json!("1+1="), completions)
}

fn score_as(rewards: &mut Rewards, prompt: &Value, completions: &[&str]) -> Result<Scores, Error> {
    let rows: Vec<Map<String, Value>> = (0..completions.len())
        .map(|place| json!({"prompt": prompt, "answer": place, "level": "easy"}).as_object().expect("a map").clone())
        .collect();
    let ids: Vec<Vec<u32>> = completions.iter().map(|text| text.bytes().map(u32::from).collect()).collect();
    let samples: Vec<Sample<'_>> = completions
        .iter()
        .enumerate()
        .map(|(place, completion)| Sample {
            prompt,
            prompt_text: "1+1=",
            completion,
            completion_ids: &ids[place],
            completion_tokens: ids[place].len(),
            max_completion_length: 100,
            is_truncated: false,
            row: &rows[place],
        })
        .collect();
    rewards.show_progress(Progress { step: 3, max_steps: 10, num_train_epochs: 2.0, train_batch_size: 2 });
    rewards.score(&samples, &|| false)
}

fn complaint(source: &str) -> String {
    let functions = Functions::new(source);
    score(&mut functions.named(&["f"]), &["a", "bb", "ccc"]).expect_err("a complaint").to_string()
}

#[test]
fn functions_are_called_as_trl_calls_them() {
    let functions = Functions::new(
        r#"
import functools, json

def everything(prompts, completions, completion_ids, **kwargs):
    state = kwargs["trainer_state"]
    kwargs["log_metric"]("seen", len(prompts))
    kwargs["log_metric"]("seen", 5)
    kwargs["log_extra"]("shout", [c.upper() for c in completions])
    assert sorted(kwargs) == ["answer", "level", "log_extra", "log_metric", "trainer_state"], sorted(kwargs)
    assert prompts == ["1+1="] * 3 and kwargs["level"] == ["easy"] * 3 and kwargs["answer"] == [0, 1, 2]
    assert completion_ids == [[97], [98, 98], [99, 99, 99]], completion_ids
    assert (state.global_step, state.max_steps, state.epoch) == (3, 10, 0.6)
    assert not hasattr(state, "log_history")
    return [len(c) for c in completions]

def few(completions, answer):
    return (a > 0 if a != 1 else None for a in answer)

class Judge:
    def __init__(self, weight): self.weight = weight
    def __call__(self, completions, **kwargs): return [self.weight] * len(completions)
    def method(self, completions, **kwargs): return [self.weight + 1] * len(completions)

judge = Judge(0.25)
part = functools.partial(few)
short = lambda completions, **kwargs: [float("nan"), 0, True]
"#,
    );
    let mut rewards = functions.named(&["everything", "few", "judge", "judge.method", "short"]);
    // TRL's names: `__name__`, the class of an object.
    assert_eq!(rewards.names(), ["everything", "few", "Judge", "method", "<lambda>"]);
    for _ in 0..2 {
        let scores = score(&mut rewards, &["a", "bb", "ccc"]).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(
            scores.by_function,
            [
                vec![Some(1.0), Some(2.0), Some(3.0)],
                vec![Some(0.0), None, Some(1.0)],
                vec![Some(0.25); 3],
                vec![Some(1.25); 3],
                vec![None, Some(0.0), Some(1.0)],
            ]
        );
        assert_eq!(scores.metrics.iter().collect::<Vec<_>>(), [(&"seen".to_owned(), &4.0)]);
        assert_eq!(scores.columns["shout"], [json!("A"), json!("BB"), json!("CCC")]);
    }
    assert_eq!(functions.named(&["part"]).names(), ["few"]);
    // The names in the file tell two apart that Python calls the same.
    assert_eq!(functions.named(&["part", "few"]).names(), ["part", "few"]);
}

#[test]
fn conversations_are_lists_of_messages() {
    let functions = Functions::new(
        r#"
def f(prompts, completions, **kwargs):
    assert prompts == [[{"role": "user", "content": "hi"}]] * 2, prompts
    assert all(list(c[0]) == ["role", "content"] and c[0]["role"] == "assistant" for c in completions)
    return [len(c[0]["content"]) for c in completions]
"#,
    );
    let prompt = json!([{"role": "user", "content": "hi"}]);
    let scores = score_as(&mut functions.named(&["f"]), &prompt, &["é\n", "\u{1f600}\u{2028}\""]);
    assert_eq!(scores.expect("scores").by_function, [vec![Some(2.0), Some(3.0)]]);
}

#[test]
fn async_functions_run_side_by_side_and_after_the_others() {
    let functions = Functions::new(
        r#"
import asyncio
order, gate = [], None

async def first(completions, **kwargs):
    global gate
    gate = asyncio.Event()
    order.append("first")
    await gate.wait()
    return [1.0] * len(completions)

async def second(completions, **kwargs):
    order.append("second")
    gate.set()
    return [2.0] * len(completions)

class Late:
    async def __call__(self, completions, **kwargs): return [3.0] * len(completions)

late = Late()

def plain(completions, **kwargs):
    order.append("plain")
    return [len(order)] * len(completions)
"#,
    );
    let mut rewards = functions.named(&["first", "second", "late", "plain"]);
    let scores = score(&mut rewards, &["a"]).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(scores.by_function, [vec![Some(1.0)], vec![Some(2.0)], vec![Some(3.0)], vec![Some(1.0)]]);
    let scores = score(&mut rewards, &["a"]).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(scores.by_function[3], [Some(4.0)], "the loop and the module are those of the first call");
}

#[test]
fn results_of_libraries_are_numbers() {
    // Stand-ins with the methods that numpy's and torch's have.
    let functions = Functions::new(
        r#"
from decimal import Decimal
from fractions import Fraction

class Array(list):
    def tolist(self): return list(self)

class Scalar:
    def __init__(self, value): self.value = value
    def item(self): return self.value

def array(completions, **kwargs): return Array([0.5, float("nan"), 2])
def scalars(completions, **kwargs): return [Scalar(0.5), Scalar(True), Scalar(float("nan"))]
def exact(completions, **kwargs): return (Decimal("0.5"), Fraction(1, 4), None)
"#,
    );
    let scores = score(&mut functions.named(&["array", "scalars", "exact"]), &["a", "b", "c"]).expect("scores");
    assert_eq!(
        scores.by_function,
        [[Some(0.5), None, Some(2.0)], [Some(0.5), Some(1.0), None], [Some(0.5), Some(0.25), None],]
    );
}

#[test]
fn what_functions_print_read_and_start_does_not_disturb_them() {
    let functions = Functions::new(
        r#"
import os, subprocess, sys
print("at import")

def f(completions, **kwargs):
    print("hello", {"id": 1, "scores": [9]})
    sys.stdout.write("no line break")
    os.write(1, b'{"id": 1, "scores": [9]}\n')
    subprocess.run(["echo", '{"id": 1, "scores": [9]}'])
    assert sys.stdin.read() == ""
    kwargs["log_extra"]("odd", ["\ud800", float("inf"), object])
    return [1] * len(completions)
"#,
    );
    let mut rewards = functions.named(&["f"]);
    for _ in 0..3 {
        let scores = score(&mut rewards, &["a", "b", "c"]).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(scores.by_function, [vec![Some(1.0); 3]]);
        assert_eq!(scores.columns["odd"][1], Value::Null);
    }
}

#[test]
fn keyword_arguments_come_from_the_configuration() {
    let functions =
        Functions::new("def f(completions, limit, base=0): return [base + limit / len(c) for c in completions]");
    let mut rewards = functions
        .start(&[
            with("r.py:f", json!({"limit": 6}), Some("a")),
            with("r.py:f", json!({"limit": 3, "base": 1}), Some("b")),
        ])
        .unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(rewards.names(), ["a", "b"]);
    let scores = score(&mut rewards, &["a", "bb", "ccc"]).expect("scores");
    assert_eq!(scores.by_function[0], [Some(6.0), Some(3.0), Some(2.0)]);
    assert_eq!(scores.by_function[1], [Some(4.0), Some(2.5), Some(2.0)]);
    let wrong = functions.start(&[with("r.py:f", json!({"limt": 6}), None)]);
    let message = wrong.err().expect("a complaint").to_string();
    assert!(message.contains("takes no argument `limt`; it takes `base`, `completions`, `limit`"), "{message}");
}

#[test]
fn imports_that_fail_are_explained() {
    let functions = Functions::new("import not_there_at_all\ndef f(completions): pass\n");
    let package = functions.path().join("package");
    std::fs::create_dir(&package).expect("created");
    std::fs::write(package.join("broken.py"), "def f(:\n").expect("written");
    std::fs::write(package.join("fails.py"), "x = 1\nraise RuntimeError('no key')\n").expect("written");
    std::fs::write(package.join("leaves.py"), "import sys\nsys.exit(3)\n").expect("written");
    std::fs::write(
        package.join("good.py"),
        "def score(completions, **kw): return [0] * len(completions)\nclass K: pass\nn = 3\n",
    )
    .expect("written");
    for (target, parts) in [
        (
            "r.py:f",
            &["`f` (`r.py:f`, run by `", "it imports `not_there_at_all`", "`reward_python`", "r.py\", line 1"][..],
        ),
        ("nowhere.py:f", &["there is no such file; looked for `/", "/nowhere.py`"]),
        ("pakage.good.score", &["there is no module `pakage`, neither installed nor in `/", "`reward_path`"]),
        ("package.god.score", &["there is no module `package.god`"]),
        ("package.broken.f", &["its module fails", "broken.py\", line 1", "SyntaxError"]),
        ("package.fails.f", &["its module fails", "fails.py\", line 2", "RuntimeError: no key"]),
        ("package.leaves.f", &["its module fails", "SystemExit: 3"]),
        ("package.good.scor", &["has no `scor`, did you mean `score`?"]),
        ("package.good.zzz", &["has no `zzz`; its functions are `score`"]),
        ("package.good:K", &["(type), expected a function"]),
        ("package.good.n", &["is 3 (int), expected a function"]),
    ] {
        let message = functions.refused(target);
        for part in parts {
            assert!(message.contains(part), "{target}: `{part}` is missing in {message}");
        }
        assert!(!message.contains("<reward helper>"), "{target}: {message}");
    }
    let settings = RewardSettings { python: Some("/no/such/python".into()), ..RewardSettings::default() };
    let started = Rewards::start(&[function("r.py:f")], &settings, &|| false);
    let message = started.err().expect("a complaint").to_string();
    assert!(
        message.contains("no Python was started: No such file") && message.contains("`reward_python`"),
        "{message}"
    );
}

#[test]
fn calls_that_fail_are_explained() {
    for (source, parts) in [
        (
            "def g(c):\n    return c['x']\ndef f(completions, **kw):\n    return [g(c) for c in completions]",
            &["reward function `f` (`r.py:f`", "failed", "r.py\", line 2, in g", "TypeError: string indices"][..],
        ),
        (
            "def f(completions, solution, **kw): pass",
            &["needs `solution`, which the data set does not have", "`answer`"],
        ),
        ("def f(completions, **kw): return [1]", &["returned 1 scores for 3 completions"]),
        ("def f(completions, **kw): return 1", &["returned 1 (int), expected a list of 3 numbers or None"]),
        ("def f(completions, **kw): pass", &["returned None (NoneType), expected a list"]),
        ("def f(completions, **kw): return 'abc'", &["returned 'abc' (str), expected a list"]),
        ("def f(completions, **kw): return [0, 'high', 1]", &["returned 'high' (str) for completion 1"]),
        ("def f(completions, **kw): return [0, 1, float('inf')]", &["returned inf (float) for completion 2"]),
        ("def f(completions, **kw): return [0, 1, 10 ** 400]", &["for completion 2 of the batch, expected a number"]),
        ("def f(completions, **kw): return [0, 1, 1e39]", &["returned 1e+39 (float) for completion 2"]),
        ("def f(completions, **kw): return [0, [1], 2]", &["returned [1] (list) for completion 1"]),
        ("def f(limit=3, **kw): return lambda completions, **kw: [0] * 3", &["it makes reward functions; call it"]),
        ("import sys\ndef f(completions, **kw): sys.exit(2)", &["r.py\", line 2", "SystemExit: 2"]),
        ("import os\ndef f(completions, **kw): os._exit(7)", &["ended the Python that runs it (exit status: 7)"]),
        (
            "import os, sys\ndef f(completions, **kw):\n    print('my last words', file=sys.stderr, flush=True)\n    os.abort()",
            &["signal: 6", "my last words"],
        ),
        ("async def f(completions, **kw): raise ValueError('late')", &["r.py\", line 1, in f", "ValueError: late"]),
        ("async def f(completions, **kw): return [1]", &["returned 1 scores for 3 completions"]),
    ] {
        let message = complaint(source);
        for part in parts {
            assert!(message.contains(part), "{source}: `{part}` is missing in {message}");
        }
        assert!(!message.contains("<reward helper>"), "{source}: {message}");
    }
}

#[test]
fn a_function_that_hangs_is_stopped_and_shown_where() {
    for source in [
        "import time\ndef f(completions, **kw):\n    time.sleep(61)",
        "import asyncio\nasync def f(completions, **kw):\n    await asyncio.sleep(61)",
    ] {
        let functions = Functions::new(source);
        let spec =
            RewardSpec::Python { target: "r.py:f".into(), name: None, parameters: Map::new(), timeout_secs: 1.0 };
        let mut rewards = functions.start(&[spec]).unwrap_or_else(|error| panic!("{error}"));
        let begin = Instant::now();
        let message = score(&mut rewards, &["a"]).expect_err("a complaint").to_string();
        assert!(begin.elapsed() < Duration::from_secs(20), "{:?}", begin.elapsed());
        for part in ["did not return within", "`timeout_secs`", "line 3"] {
            assert!(message.contains(part), "{source}: `{part}` is missing in {message}");
        }
        let again = score(&mut rewards, &["a"]).expect_err("a complaint").to_string();
        assert!(again.contains("is not loaded any more"), "{again}");
    }
}

#[test]
fn a_wait_for_a_function_is_given_up_when_the_run_is_stopped() {
    let functions = Functions::new("import time\ndef f(completions, **kw): time.sleep(61)");
    let mut rewards = functions.named(&["f"]);
    let (prompt, row) = (json!("p"), Map::new());
    let sample = Sample {
        prompt: &prompt,
        prompt_text: "p",
        completion: "a",
        completion_ids: &[1],
        completion_tokens: 1,
        max_completion_length: 1,
        is_truncated: false,
        row: &row,
    };
    let begin = Instant::now();
    let result = rewards.score(&[sample], &|| begin.elapsed() > Duration::from_millis(300));
    assert!(matches!(&result, Err(Error::Interrupted { name }) if name == "f"), "{result:?}");
    assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
}

#[test]
fn functions_of_trl_that_are_built_in_need_no_package() {
    let functions = Functions::new("");
    let known = ["trl.rewards.think_format_reward", "trl.rewards:accuracy_reward", "open_r1.rewards.tag_count_reward"];
    for target in known {
        assert_eq!(check(&function(target)), Ok(()), "{target}");
        let mut rewards = functions.start(&[function(target)]).unwrap_or_else(|error| panic!("{target}: {error}"));
        assert!(rewards.surroundings().is_empty(), "{target}: no Python is started");
        let expected = target.rsplit(['.', ':']).next().expect("a name");
        assert_eq!(rewards.names(), [expected]);
        score(&mut rewards, &["a"]).unwrap_or_else(|error| panic!("{target}: {error}"));
    }
    let wrong = check(&with("trl.rewards.think_format_reward", json!({"strict": true}), None));
    assert!(wrong.is_err_and(|message| message.contains("has no parameter `strict`")));
    assert!(functions.refused("trl.rewards.of_another_version").contains("module"), "it is looked for");
}

#[test]
fn the_examples_of_the_repository_score() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/rewards/functions.py");
    let target = |name: &str| format!("{}:{name}", file.display());
    let specs = [
        with(&target("brevity"), json!({"limit": 10}), None),
        with(&target("keywords"), json!({"words": ["a", "b"]}), None),
        with(&target("agrees"), json!({}), None),
    ];
    let settings = RewardSettings { path: vec![PathBuf::from("/")], ..RewardSettings::default() };
    let mut rewards = Rewards::start(&specs, &settings, &|| false).unwrap_or_else(|error| panic!("{error}"));
    let scores = score(&mut rewards, &["a0", "ab2", ""]).expect("scores");
    assert_eq!(
        scores.by_function,
        [[Some(0.8), Some(0.7), Some(1.0)], [Some(0.5), Some(1.0), Some(0.0)], [Some(1.0), Some(0.0), Some(0.0)],]
    );
    assert_eq!(scores.metrics["keywords/best"], 1.0);
}
