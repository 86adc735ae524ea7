//! `reward_funcs`: built-ins by name, functions in Python by file or module, and programs by command line.
//!
//! ```yaml
//! reward_funcs:
//!   - accuracy                                  # a built-in
//!   - {kind: contains, text: because}           # a built-in with its parameters
//!   - my_rewards.py:brevity                     # a function in a file
//!   - my_package.rewards.score                  # a function in a module, as TRL names them
//!   - {kind: my_rewards.py:brevity, limit: 200} # with keyword arguments
//!   - command: python3 style.py --strict        # a program, split into words as a shell would (no shell runs)
//!   - {kind: command, name: tests, command: [./grade, --fast], timeout_secs: 120}
//! ```
//!
//! The names and parameters of the built-ins belong to the `reward` room, which checks them through
//! `Context::check_reward`.

use std::path::Path;

use serde_json::Map;

use super::settings::RewardSpec;
use super::value::{Mismatch, Parse, all, describe, json, listed, nearest};
use super::yaml::{Entry, Node, Value};

/// Seconds that a reward program may take for one batch unless `timeout_secs` says otherwise.
pub(super) const DEFAULT_TIMEOUT_SECS: f64 = 60.0;
/// The same for a function in Python, which may ask a judge elsewhere; TRL has no limit.
pub(super) const PYTHON_TIMEOUT_SECS: f64 = 600.0;

/// A reward function and where its names stand, for the check by the `reward` room.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct RawReward {
    pub(super) spec: RewardSpec,
    /// The node that names the built-in or the program.
    pub(super) name_span: std::ops::Range<usize>,
    /// The parameters' keys.
    pub(super) parameter_spans: Vec<(String, std::ops::Range<usize>)>,
}

/// The value of `reward_funcs`.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct RewardList(pub(super) Vec<RawReward>);

impl Parse for RewardList {
    const KIND: &'static str = "a list of reward functions";

    fn parse(node: &Node) -> Result<Self, Vec<Mismatch>> {
        let items = match &node.value {
            Value::List(items) if !items.is_empty() => items.as_slice(),
            Value::Scalar { .. } | Value::Map(_) => std::slice::from_ref(node),
            _ => return Err(vec![Mismatch::expected(node, Self::KIND).help("name one, e.g. `[accuracy]`")]),
        };
        let rewards: Vec<RawReward> = all(items.iter().map(reward))?;
        let mut wrong = Vec::new();
        for (at, reward) in rewards.iter().enumerate() {
            let name = reward_name(&reward.spec);
            if rewards[..at].iter().any(|earlier| reward_name(&earlier.spec) == name) {
                let wrong_name = Mismatch {
                    what: format!("holds two reward functions called `{name}`; their metrics would be mixed up"),
                    help: Some("give a program or function another `name`; use a built-in once".into()),
                    span: reward.name_span.clone(),
                };
                wrong.push(wrong_name);
            }
        }
        if wrong.is_empty() { Ok(Self(rewards)) } else { Err(wrong) }
    }
}

/// The name of a reward in metrics.
pub(super) fn reward_name(spec: &RewardSpec) -> &str {
    match spec {
        RewardSpec::Builtin { name, .. }
        | RewardSpec::Command { name, .. }
        | RewardSpec::Python { name: Some(name), .. } => name,
        RewardSpec::Python { name: None, target, .. } => target.rsplit([':', '.']).next().unwrap_or(target),
    }
}

fn reward(node: &Node) -> Result<RawReward, Vec<Mismatch>> {
    match &node.value {
        Value::Scalar { text, .. } => match text.strip_prefix("command:") {
            Some(line) => {
                let words = split_words(line).map_err(|what| vec![Mismatch::new(node, what)])?;
                command(node, words, None, DEFAULT_TIMEOUT_SECS)
            }
            None => builtin(node, node, text, &[]),
        },
        Value::Map(entries) => reward_map(node, entries),
        _ => Err(vec![Mismatch::new(node, format!("expects a name or a map for each reward, got {}", describe(node)))]),
    }
}

fn reward_map(node: &Node, entries: &[Entry]) -> Result<RawReward, Vec<Mismatch>> {
    let mut seen: Vec<&str> = Vec::new();
    for entry in entries {
        if seen.contains(&entry.key.as_str()) {
            let what = format!("holds `{}` twice in one reward", entry.key);
            return Err(vec![Mismatch {
                what,
                help: Some("keep one of the two".into()),
                span: entry.key_span.clone(),
            }]);
        }
        seen.push(&entry.key);
    }
    let find = |key: &str| entries.iter().find(|entry| entry.key == key);
    let kind = match find("kind") {
        Some(Entry { node: Node { value: Value::Scalar { text, .. }, .. }, .. }) => Some(text.as_str()),
        Some(entry) => {
            return Err(vec![Mismatch::new(
                &entry.node,
                format!("expects a name as `kind`, got {}", describe(&entry.node)),
            )]);
        }
        None => None,
    };
    match (kind, find("command")) {
        (Some("command") | None, Some(line)) => command_map(node, entries, &line.node),
        (Some("command"), None) => Err(vec![
            Mismatch::new(node, "holds a `kind: command` without `command`")
                .help("add `command: [program, argument, ...]`"),
        ]),
        (Some(name), _) => {
            let kind_node = &find("kind").expect("a kind was just read").node;
            let parameters: Vec<&Entry> = entries.iter().filter(|entry| entry.key != "kind").collect();
            builtin(node, kind_node, name, &parameters)
        }
        (None, None) => Err(vec![Mismatch::new(node, "holds a map with neither `kind` nor `command`").help(
            "write `kind: NAME` for a built-in, `kind: FILE.py:FUNCTION` for a function in Python, \
                 `command: [program, ...]` for a program",
        )]),
    }
}

fn command_map(node: &Node, entries: &[Entry], line: &Node) -> Result<RawReward, Vec<Mismatch>> {
    const KEYS: &[&str] = &["kind", "name", "command", "timeout_secs"];
    let mut wrong = Vec::new();
    for entry in entries.iter().filter(|entry| !KEYS.contains(&entry.key.as_str())) {
        let hint =
            nearest(&entry.key, KEYS.iter().copied()).map_or(String::new(), |name| format!("did you mean `{name}`? "));
        wrong.push(Mismatch {
            what: format!("holds a command with the unknown key `{}`", entry.key),
            help: Some(format!("{hint}A command takes {}", listed(KEYS))),
            span: entry.key_span.clone(),
        });
    }
    let find = |key: &str| entries.iter().find(|entry| entry.key == key).map(|entry| &entry.node);
    let mut keep = |result: Result<(), Vec<Mismatch>>| wrong.extend(result.err().unwrap_or_default());
    let mut words = Vec::new();
    keep(match &line.value {
        Value::Scalar { text, .. } => {
            split_words(text).map(|split| words = split).map_err(|what| vec![Mismatch::new(line, what)])
        }
        _ => Vec::<String>::parse(line).map(|list| words = list),
    });
    let mut name = None;
    if let Some(node) = find("name") {
        keep(String::parse(node).map(|text| name = Some(text)).map_err(|wrong| within(wrong, "`name`")));
    }
    let mut timeout = DEFAULT_TIMEOUT_SECS;
    if let Some(node) = find("timeout_secs") {
        keep(timeout_secs(node).map(|secs| timeout = secs));
    }
    if wrong.is_empty() { command(node, words, name, timeout) } else { Err(wrong) }
}

fn timeout_secs(node: &Node) -> Result<f64, Vec<Mismatch>> {
    let secs = f64::parse(node).map_err(|wrong| within(wrong, "`timeout_secs`"))?;
    if secs > 0.0 {
        Ok(secs)
    } else {
        Err(vec![Mismatch::new(node, format!("needs a `timeout_secs` greater than 0 seconds, got {secs}"))])
    }
}

/// Says which key of the map a mismatch is about.
fn within(wrong: Vec<Mismatch>, key: &str) -> Vec<Mismatch> {
    wrong
        .into_iter()
        .map(|mismatch| Mismatch { what: format!("holds a {key} that {}", mismatch.what), ..mismatch })
        .collect()
}

fn command(
    node: &Node,
    words: Vec<String>,
    name: Option<String>,
    timeout_secs: f64,
) -> Result<RawReward, Vec<Mismatch>> {
    if words.is_empty() {
        return Err(vec![
            Mismatch::new(node, "holds an empty command").help("write `command: [program, argument, ...]`"),
        ]);
    }
    let name = name.unwrap_or_else(|| command_name(&words));
    Ok(RawReward {
        spec: RewardSpec::Command { name, command: words, timeout_secs },
        name_span: node.span.clone(),
        parameter_spans: Vec::new(),
    })
}

/// `style` for `python3 style.py`, `grade` for `./grade --fast`.
fn command_name(words: &[String]) -> String {
    let script = words.iter().skip(1).find(|word| !word.starts_with('-') && Path::new(word).extension().is_some());
    let program = script.unwrap_or(&words[0]);
    Path::new(program).file_stem().map_or_else(|| program.clone(), |stem| stem.to_string_lossy().into_owned())
}

/// A built-in or a function in Python: whatever has a name and parameters.
fn builtin(node: &Node, name_node: &Node, name: &str, parameters: &[&Entry]) -> Result<RawReward, Vec<Mismatch>> {
    if let Some(wrong) = foreign_reward(name_node, name) {
        return Err(vec![wrong]);
    }
    let is_python = is_python_function(name);
    let (mut map, mut spans) = (Map::new(), Vec::new());
    let (mut given_name, mut timeout) = (None, PYTHON_TIMEOUT_SECS);
    for entry in parameters {
        match entry.key.as_str() {
            "name" if is_python => {
                given_name = Some(String::parse(&entry.node).map_err(|wrong| within(wrong, "`name`"))?);
            }
            "timeout_secs" if is_python => timeout = timeout_secs(&entry.node)?,
            key => {
                map.insert(key.to_owned(), json(&entry.node)?);
                spans.push((key.to_owned(), entry.key_span.clone()));
            }
        }
    }
    let name_span = if name_node.span.is_empty() { node.span.clone() } else { name_node.span.clone() };
    let name = name.to_owned();
    Ok(RawReward {
        spec: if is_python {
            RewardSpec::Python { target: name, name: given_name, parameters: map, timeout_secs: timeout }
        } else {
            RewardSpec::Builtin { name, parameters: map }
        },
        name_span,
        parameter_spans: spans,
    })
}

/// Whether a name is `file.py:function`, `package.module.function` or `package.module:function`.
fn is_python_function(name: &str) -> bool {
    let is_path = |text: &str| text.split('.').all(is_identifier);
    match name.rsplit_once(':') {
        Some((place, function)) => is_path(function) && (is_python_file(place) || is_path(place)),
        None => name.contains('.') && is_path(name) && !is_python_file(name),
    }
}

fn is_identifier(text: &str) -> bool {
    !text.is_empty()
        && !text.starts_with(|c: char| c.is_ascii_digit())
        && text.chars().all(|c| c.is_alphanumeric() || c == '_')
}

fn is_python_file(name: &str) -> bool {
    Path::new(name).extension().is_some_and(|extension| extension == "py")
}

/// Names that mean something to TRL but nothing here: reward models; and those that lack something.
fn foreign_reward(node: &Node, name: &str) -> Option<Mismatch> {
    if name.is_empty() {
        return Some(Mismatch::new(node, "holds an empty name"));
    }
    if is_python_function(name) {
        return None;
    }
    if is_python_file(name) {
        return Some(
            Mismatch::new(node, format!("names the file `{name}` without a function"))
                .help(format!("name the function behind a colon: `{name}:FUNCTION`")),
        );
    }
    if name.contains(':') || name.contains('.') {
        return Some(
            Mismatch::new(node, format!("holds `{name}`, which is no function in Python")).help(
                "write `FILE.py:FUNCTION` for a function in a file, `PACKAGE.MODULE.FUNCTION` for one in a module",
            ),
        );
    }
    if name.contains('/') {
        return Some(Mismatch::new(node, format!("names `{name}`, and reward models are not supported")).help(
            "score with a function in Python (`FILE.py:FUNCTION`) or a program \
             (`{kind: command, command: [program, argument]}`)",
        ));
    }
    None
}

/// Words of a command line: blanks separate, quotes and backslashes keep; nothing else is special.
fn split_words(line: &str) -> Result<Vec<String>, String> {
    let (mut words, mut word, mut has_word) = (Vec::new(), String::new(), false);
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        match c {
            '\'' | '"' => {
                has_word = true;
                loop {
                    match chars.next() {
                        None => return Err(format!("holds a command with an open {c}")),
                        Some(end) if end == c => break,
                        Some('\\') if c == '"' => word.push(chars.next().unwrap_or('\\')),
                        Some(inner) => word.push(inner),
                    }
                }
            }
            '\\' => {
                has_word = true;
                word.push(chars.next().unwrap_or('\\'));
            }
            c if c.is_whitespace() => {
                if std::mem::take(&mut has_word) {
                    words.push(std::mem::take(&mut word));
                }
            }
            c => {
                has_word = true;
                word.push(c);
            }
        }
    }
    if has_word {
        words.push(word);
    }
    Ok(words)
}

#[cfg(test)]
mod tests {
    use super::super::yaml;
    use super::*;

    fn read(text: &str) -> Result<Vec<RewardSpec>, Vec<Mismatch>> {
        let list = RewardList::parse(&yaml::parse(text).expect("valid YAML"))?;
        Ok(list.0.into_iter().map(|reward| reward.spec).collect())
    }

    fn program(name: &str, words: &[&str], timeout_secs: f64) -> RewardSpec {
        RewardSpec::Command {
            name: name.into(),
            command: words.iter().map(ToString::to_string).collect(),
            timeout_secs,
        }
    }

    fn function(
        target: &str,
        name: Option<&str>,
        parameters: &Map<String, serde_json::Value>,
        secs: f64,
    ) -> RewardSpec {
        RewardSpec::Python {
            target: target.into(),
            name: name.map(Into::into),
            parameters: parameters.clone(),
            timeout_secs: secs,
        }
    }

    #[test]
    fn every_form_is_read() {
        let text = "
- accuracy
- {kind: length, max_tokens: 200}
- command: python3 'my style.py' --strict
- \"command: ./grade --fast\"
- {kind: command, name: tests, command: [./run, a b], timeout_secs: 5}
- my_rewards.py:brevity
- my_package.rewards.score
- {kind: \"../a b/r.py:Judge.score\", name: judge, timeout_secs: 5, max_tokens: 200}
";
        let mut parameters = Map::new();
        parameters.insert("max_tokens".into(), 200.into());
        assert_eq!(
            read(text),
            Ok(vec![
                RewardSpec::Builtin { name: "accuracy".into(), parameters: Map::new() },
                RewardSpec::Builtin { name: "length".into(), parameters: parameters.clone() },
                program("my style", &["python3", "my style.py", "--strict"], DEFAULT_TIMEOUT_SECS),
                program("grade", &["./grade", "--fast"], DEFAULT_TIMEOUT_SECS),
                program("tests", &["./run", "a b"], 5.0),
                function("my_rewards.py:brevity", None, &Map::new(), PYTHON_TIMEOUT_SECS),
                function("my_package.rewards.score", None, &Map::new(), PYTHON_TIMEOUT_SECS),
                function("../a b/r.py:Judge.score", Some("judge"), &parameters, 5.0),
            ])
        );
        assert_eq!(read("accuracy").map(|specs| specs.len()), Ok(1));
    }

    #[test]
    fn wrong_forms_say_how_to_write_it() {
        for (text, says) in [
            ("[rewards.py]", "`rewards.py:FUNCTION`"),
            ("[\"rewards.py:\"]", "FILE.py:FUNCTION"),
            ("[my-lib.rewards.score]", "PACKAGE.MODULE.FUNCTION"),
            ("[\"a/b:c\"]", "FILE.py:FUNCTION"),
            ("[OpenAssistant/reward-model]", "program"),
            ("[{kind: command}]", "command: [program"),
            ("[{command: []}]", "command: [program"),
            ("[{command: a, timeout: 3}]", "did you mean `timeout_secs`"),
            ("[{max: 3}]", "kind: NAME"),
            ("[accuracy, accuracy]", "once"),
            ("[a.score, b.score]", "another `name`"),
            ("[]", "accuracy"),
            ("[{kind: a, x: 1, x: 2}]", "keep one"),
        ] {
            let wrong = read(text).expect_err(text);
            assert!(wrong[0].help.as_ref().is_some_and(|help| help.contains(says)), "{text}: {wrong:?}");
        }
        for text in [
            "[{command: a, timeout_secs: 0}]",
            "[{command: a, timeout_secs: x}]",
            "[{command: \"a 'b\"}]",
            "[[a]]",
            "[{kind: [a]}]",
            "[{kind: a.b, timeout_secs: 0}]",
            "[{kind: a.b, name: [c]}]",
        ] {
            read(text).expect_err(text);
        }
        assert_eq!(read("[a.py, {kind: command}, ok]").expect_err("two wrong rewards").len(), 2);
    }
}
