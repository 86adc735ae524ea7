//! From the texts to entries of keys: file and overrides, each key once, other names and maps of arguments undone.
//!
//! Overrides count more than the file, and the later of two more than the earlier. Two names for one key go together
//! where they say the same; where they differ nothing tells which was meant, and that is an error.

use std::collections::BTreeMap;

use super::diagnose::{Place, Problem, Problems, Source};
use super::field::Command;
use super::foreign::{self, ForeignKey, Rule};
use super::keys;
use super::launcher;
use super::nested;
use super::value::{as_bool, as_float, describe};
use super::yaml::{self, Entry, Node, Value};

/// An entry by the name of its key.
pub(super) struct Given {
    /// Key and value.
    pub(super) entry: Entry,
    /// The text it stands in: 0 is the file, then the overrides.
    pub(super) source: usize,
    /// The name it is written under.
    written: String,
    /// From a map whose entries count more than the keys they stand for.
    is_stronger: bool,
}

/// What the texts give.
pub(super) struct Collected {
    /// Entries of keys of the command, and of names that nobody knows.
    pub(super) entries: Vec<Given>,
    /// Keys that a name already reported as wrong stands for.
    pub(super) misspelt: Vec<&'static str>,
    /// Whether the file asks for vLLM, where it says.
    pub(super) uses_vllm: Option<bool>,
}

/// Reads the file and the overrides; `None` if the file is no map of keys, so that nothing can be said about what it lacks.
pub(super) fn collect(
    file: &Source,
    overrides: &[String],
    command: Command,
    problems: &mut Problems,
) -> (Collected, bool) {
    let root = file_entries(file, command, problems);
    let is_readable = root.is_some();
    let mut raw: Vec<(Entry, usize)> = root.unwrap_or_default().into_iter().map(|entry| (entry, 0)).collect();
    for (at, text) in overrides.iter().enumerate() {
        if let Some(entry) = override_entry(text, at + 1, problems).filter(|entry| !says_nothing(entry, command)) {
            let key = canonical(&entry.key, command).to_owned();
            raw.retain(|(earlier, _)| canonical(&earlier.key, command) != key);
            raw.push((entry, at + 1));
        }
    }
    let mut collected = Collected { entries: Vec::new(), misspelt: Vec::new(), uses_vllm: None };
    let mut idle = BTreeMap::new();
    for (entry, source) in raw {
        if entry.key == "use_vllm"
            && let Value::Scalar { text, .. } = &entry.node.value
        {
            collected.uses_vllm = as_bool(text);
        }
        let Some(key) = foreign::find(&entry.key, command) else {
            let written = entry.key.clone();
            collected.merge(Given { entry, source, written, is_stronger: false }, problems);
            continue;
        };
        sort_foreign(key, entry, source, command, &mut collected, &mut idle, problems);
    }
    warn_idle(idle, problems);
    (collected, is_readable)
}

/// Whether an entry is another name of a key with nothing in it, whatever null means for the key.
fn says_nothing(entry: &Entry, command: Command) -> bool {
    let is_other_name = foreign::find(&entry.key, command).is_some_and(|key| key.rule.stands_for().is_some());
    is_other_name && entry.node.value == Value::Null
}

/// The key that a name stands for: itself, or what it is another name of.
fn canonical(name: &str, command: Command) -> &str {
    foreign::find(name, command).and_then(|key| key.rule.stands_for()).unwrap_or(name)
}

impl Collected {
    /// Adds an entry, unless its key is there with the same value.
    fn merge(&mut self, given: Given, problems: &mut Problems) {
        let Some(at) = self.entries.iter().position(|other| other.entry.key == given.entry.key) else {
            self.entries.push(given);
            return;
        };
        let earlier = &self.entries[at];
        if same(&earlier.entry.node, &given.entry.node) {
            return;
        }
        // What `--set` says counts more than the file, whatever the two names are.
        if (earlier.source == 0) != (given.source == 0) {
            if earlier.source == 0 {
                self.entries[at] = given;
            }
            return;
        }
        let place = |given: &Given| Place::new(given.source, &given.entry.key_span);
        let [first, again] = [earlier, &given].map(|given| given.written.as_str());
        if earlier.is_stronger != given.is_stronger {
            let (strong, weak) = if given.is_stronger { (&given, earlier) } else { (earlier, &given) };
            let [strong_value, weak_value] = [strong, weak].map(|given| describe(&given.entry.node));
            let message = format!(
                "`{}` is {strong_value}, which counts more than the {weak_value} of `{}`",
                strong.written, weak.written
            );
            problems.warn(Problem::new(message).at(place(strong), ""));
            if given.is_stronger {
                self.entries[at] = given;
            }
            return;
        }
        let (message, help) = if first == again {
            (format!("`{first}` stands here twice"), "keep one of the two")
        } else {
            (format!("`{first}` and `{again}` are the same key, with two values"), "keep one of the two")
        };
        problems.error(Problem::new(message).at(place(earlier), "first").at(place(&given), "again").help(help));
    }
}

/// Whether two values mean the same for every key: spelt alike, or the same number or truth value.
fn same(a: &Node, b: &Node) -> bool {
    match (&a.value, &b.value) {
        (Value::Null, Value::Null) => true,
        (Value::Scalar { text: a, .. }, Value::Scalar { text: b, .. }) => {
            a == b
                || as_float(a).is_some_and(|value| as_float(b) == Some(value))
                || as_bool(a).is_some_and(|value| as_bool(b) == Some(value))
        }
        (Value::List(a), Value::List(b)) => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same(a, b)),
        (Value::Map(a), Value::Map(b)) => {
            a.len() == b.len()
                && a.iter().all(|entry| b.iter().any(|other| entry.key == other.key && same(&entry.node, &other.node)))
        }
        _ => false,
    }
}

/// Names without effect and their places, by the reason.
type Idle = BTreeMap<&'static str, Vec<(&'static str, Place)>>;

/// Deals with a key that is not ours.
fn sort_foreign(
    key: &'static ForeignKey,
    mut entry: Entry,
    source: usize,
    command: Command,
    collected: &mut Collected,
    idle: &mut Idle,
    problems: &mut Problems,
) {
    let at_key = Place::new(source, &entry.key_span);
    let at_value = if entry.node.span.is_empty() { at_key.clone() } else { Place::new(source, &entry.node.span) };
    match key.rule {
        Rule::NoEffect(_) if foreign::is_empty(&entry.node) => {}
        Rule::NoEffect(why) => idle.entry(why).or_default().push((key.name, at_key)),
        Rule::Lacking { off, .. } if foreign::is_off(&entry.node, off) => {}
        Rule::Lacking { off, why } => {
            let off = match off {
                [] => "null",
                ["", ..] => "\"\"",
                [first, ..] => first,
            };
            let problem = Problem::new(format!("`{}` asks for something that is not supported: {why}", key.name));
            let help = format!("remove the key (`{}: {off}` is accepted)", key.name);
            problems.error(problem.at(at_value, "not supported").help(help));
        }
        Rule::Entries(table) => {
            for inner in nested::expand(&entry, table, source, problems) {
                let written = format!("{}.{}", key.name, inner.key);
                collected.merge(Given { entry: inner, source, written, is_stronger: table.is_stronger }, problems);
            }
        }
        Rule::Ambiguous(to) => {
            let mut problem = Problem::new(format!("`{}` is called `{to}`", key.name));
            problem.help = keys::find(to, command).map(|key| key.doc.to_owned());
            problems.error(problem.at(at_key, format!("write `{to}`")));
            collected.misspelt.push(to);
        }
        Rule::Alias(to) | Rule::Renamed(to) if keys::find(to, command).is_none() => {
            let message = format!("`{}` is called `{to}`, a key of `{}`", key.name, command.other());
            problems.error(Problem::new(message).at(at_key, "not here"));
        }
        Rule::Alias(_) | Rule::Renamed(_) if says_nothing(&entry, command) => {}
        Rule::Alias(to) | Rule::Renamed(to) => {
            if matches!(key.rule, Rule::Renamed(_)) {
                problems.warn(
                    Problem::new(format!("`{}` is called `{to}` here and is read as that", key.name)).at(at_key, ""),
                );
            }
            let written = std::mem::replace(&mut entry.key, to.to_owned());
            collected.merge(Given { entry, source, written, is_stronger: false }, problems);
        }
    }
}

/// One warning for each reason.
fn warn_idle(idle: Idle, problems: &mut Problems) {
    for (why, found) in idle {
        let names: Vec<_> = found.iter().map(|(name, _)| format!("`{name}`")).collect();
        let verb = if names.len() == 1 { "has" } else { "have" };
        let mut problem = Problem::new(format!("{} {verb} no effect: {why}", names.join(", ")));
        for (_, place) in found {
            problem = problem.at(place, "");
        }
        problems.warn(problem);
    }
}

/// Most keys of a file: several times as many as there are.
const MOST_KEYS: usize = 2000;

/// The entries of the file, each key once; `None` if it is no map of keys.
fn file_entries(source: &Source, command: Command, problems: &mut Problems) -> Option<Vec<Entry>> {
    let root = match yaml::parse(source.text()) {
        Ok(root) => root,
        Err(error) => {
            let place = error.span.map_or(0..0, |span| span);
            problems.error(
                Problem::new(format!("this is not YAML: {}", error.message)).at(Place::new(0, &place), "here").help(
                    "the file is a map of `key: value` lines; a string with `: ` or ` #`, or with a leading `*`, `&` \
                         or `!`, goes in quotes",
                ),
            );
            return None;
        }
    };
    let entries = match root.value {
        Value::Null => Vec::new(),
        Value::Map(entries) => entries,
        _ => {
            let start = Place::new(0, &(root.span.start..root.span.start));
            problems.error(Problem::new("the file must be a map of `key: value` lines").at(start, "something else"));
            return None;
        }
    };
    if entries.len() > MOST_KEYS {
        let message = format!("the file has {} keys, and there are no {MOST_KEYS}", entries.len());
        problems.error(Problem::new(message).at(Place::new(0, &entries[0].key_span), ""));
        return None;
    }
    let names: Vec<_> = entries.iter().map(|entry| entry.key.as_str()).collect();
    if let Some((message, help)) = launcher::recognise(&names, command) {
        problems.error(Problem::new(message).at(Place::new(0, &entries[0].key_span), "").help(help));
        return None;
    }
    let mut kept: Vec<Entry> = Vec::with_capacity(entries.len());
    for entry in entries {
        if let Some(earlier) = kept.iter().find(|earlier| earlier.key == entry.key) {
            problems.error(
                Problem::new(format!("`{}` stands here twice", entry.key))
                    .at(Place::new(0, &earlier.key_span), "first")
                    .at(Place::new(0, &entry.key_span), "again")
                    .help("keep one of the two"),
            );
            continue;
        }
        kept.push(entry);
    }
    Some(kept)
}

fn override_entry(text: &str, source: usize, problems: &mut Problems) -> Option<Entry> {
    let whole = Place::new(source, &(0..text.len()));
    let Some((name, value)) = text.split_once('=') else {
        problems.error(
            Problem::new(format!("`--set {text}` has no `=`"))
                .at(whole, "")
                .help("write `--set key=value`, e.g. `--set learning_rate=1e-5`"),
        );
        return None;
    };
    let key = name.trim();
    let key_start = name.len() - name.trim_start().len();
    let offset = name.len() + 1;
    match yaml::parse(value) {
        Ok(mut node) => {
            shift(&mut node, offset);
            Some(Entry { key: key.to_owned(), key_span: key_start..key_start + key.len(), node })
        }
        Err(error) => {
            let span = error.span.map_or(offset..text.len(), |span| span.start + offset..span.end + offset);
            problems.error(
                Problem::new(format!("the value of `--set {key}` is not YAML: {}", error.message))
                    .at(Place::new(source, &span), "here")
                    .help("quote it for the shell and for YAML, e.g. `--set 'stop_strings=[\"a: b\"]'`"),
            );
            None
        }
    }
}

/// Moves every span of a value that was cut out of a longer text.
fn shift(node: &mut Node, by: usize) {
    node.span = node.span.start + by..node.span.end + by;
    match &mut node.value {
        Value::List(items) => items.iter_mut().for_each(|item| shift(item, by)),
        Value::Map(entries) => {
            for entry in entries {
                entry.key_span = entry.key_span.start + by..entry.key_span.end + by;
                shift(&mut entry.node, by);
            }
        }
        Value::Null | Value::Scalar { .. } => {}
    }
}
