//! From text to settings: entries of the file and of `--set`, sorted into ours, foreign and unknown, then resolved.

use super::diagnose::{ConfigError, Place, Problem, Problems, Source};
use super::field::Command;
use super::foreign::{self, Rule};
use super::keys::{self, KEYS, RawConfig};
use super::resolve::{self, Context};
use super::resolve_grpo;
use super::settings::{GrpoSettings, SftSettings};
use super::value::{as_bool, nearest};
use super::write;
use super::yaml::{self, Entry, Value};

/// Settings, and what came with them.
#[derive(Clone, Debug, PartialEq)]
pub struct Loaded<S> {
    /// The settings, checked.
    pub settings: S,
    /// What was accepted but has no effect, or works but likely not as meant; one line each, with its place.
    pub warnings: Vec<String>,
    /// The settings as a config file with every key spelled out, for `output_dir/config.resolved.yaml`.
    pub resolved_yaml: String,
}

/// Reads the config of `trainer sft`. `overrides` are `key=value` texts, each of which replaces what the file says.
///
/// # Errors
/// A report of everything that is wrong.
pub fn load_sft(
    source: &Source,
    overrides: &[String],
    context: &Context<'_>,
) -> Result<Loaded<SftSettings>, ConfigError> {
    load(
        Command::Sft,
        source,
        overrides,
        context,
        |raw, _, problems| resolve::sft(raw, context, problems),
        write::sft_yaml,
    )
}

/// Reads the config of `trainer grpo`. `overrides` are `key=value` texts, each of which replaces what the file says.
///
/// # Errors
/// A report of everything that is wrong.
pub fn load_grpo(
    source: &Source,
    overrides: &[String],
    context: &Context<'_>,
) -> Result<Loaded<GrpoSettings>, ConfigError> {
    let resolve =
        |raw: &RawConfig, uses_vllm, problems: &mut Problems| resolve_grpo::grpo(raw, context, uses_vllm, problems);
    load(Command::Grpo, source, overrides, context, resolve, write::grpo_yaml)
}

fn load<S>(
    command: Command,
    source: &Source,
    overrides: &[String],
    context: &Context<'_>,
    resolve: impl Fn(&RawConfig, bool, &mut Problems) -> Option<S>,
    write: impl Fn(&S, &[String]) -> String,
) -> Result<Loaded<S>, ConfigError> {
    let mut problems = Problems::default();
    let mut sources = vec![source.clone()];
    sources.extend(overrides.iter().map(|text| Source::new("--set", text.as_str())));

    let file = file_entries(source, command, &mut problems);
    // Without entries nothing can be said about missing keys, or about keys that do not go together.
    let is_readable = file.is_some();
    let mut entries = file.unwrap_or_default();
    for (at, text) in overrides.iter().enumerate() {
        if let Some(entry) = override_entry(text, at + 1, &mut problems) {
            let key = canonical(&entry.key, command).to_owned();
            entries.retain(|(earlier, _)| canonical(&earlier.key, command) != key);
            entries.push((entry, at + 1));
        }
    }

    let mut raw = RawConfig::new(command);
    let mut uses_vllm = false;
    let mut misspelt = Vec::new();
    for (mut entry, source) in entries {
        if entry.key == "use_vllm" {
            uses_vllm = matches!(&entry.node.value, Value::Scalar { text, .. } if as_bool(text) == Some(true));
        }
        misspelt.extend(sort_foreign(&mut entry, source, command, &mut problems));
        if !raw.read(command, &entry, source, &mut problems) && foreign::find(&entry.key, command).is_none() {
            misspelt.extend(report_unknown(&entry, source, command, &mut problems));
        }
    }
    let settings = if is_readable {
        raw.require(command, &misspelt, &mut problems);
        resolve(&raw, uses_vllm, &mut problems)
    } else {
        None
    };
    let warnings = problems.finish(&sources)?;
    // `resolve` gives nothing only after it reported something, and then `finish` has returned.
    let settings = settings.expect("a config without problems has settings");
    let resolved_yaml = write(&settings, &header(command, source, overrides, context));
    Ok(Loaded { settings, warnings, resolved_yaml })
}

fn header(command: Command, source: &Source, overrides: &[String], context: &Context<'_>) -> Vec<String> {
    let one_line = |text: &str| text.split(['\n', '\r']).collect::<Vec<_>>().join(" ");
    let mut lines = vec![
        format!(
            "Resolved config of `{command} {}`: every key with its value, defaults included.",
            one_line(source.name())
        ),
        format!("trainer {}, commit {}", env!("CARGO_PKG_VERSION"), context.git_commit.unwrap_or("unknown")),
        format!("ranks: {}", context.world_size),
    ];
    lines.extend(overrides.iter().map(|text| format!("--set {}", one_line(text))));
    lines.push("The same command with this file gives the same run.".into());
    lines
}

/// The key that a name stands for: itself, or what it is another spelling of.
fn canonical(name: &str, command: Command) -> &str {
    match foreign::find(name, command).map(|key| key.rule) {
        Some(Rule::Alias(of)) => of,
        _ => name,
    }
}

/// The entries of the file, each key once; `None` if it is no map of keys.
fn file_entries(source: &Source, command: Command, problems: &mut Problems) -> Option<Vec<(Entry, usize)>> {
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
    let mut kept: Vec<(Entry, usize)> = Vec::with_capacity(entries.len());
    for entry in entries {
        let key = canonical(&entry.key, command);
        if let Some((earlier, _)) = kept.iter().find(|(earlier, _)| canonical(&earlier.key, command) == key) {
            let message = if earlier.key == entry.key {
                format!("`{key}` stands here twice")
            } else {
                format!("`{}` and `{}` are the same key", earlier.key, entry.key)
            };
            problems.error(
                Problem::new(message)
                    .at(Place::new(0, &earlier.key_span), "first")
                    .at(Place::new(0, &entry.key_span), "again")
                    .help("keep one of the two"),
            );
            continue;
        }
        kept.push((entry, 0));
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
fn shift(node: &mut yaml::Node, by: usize) {
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

/// Deals with a foreign key; an alias takes the name of its key. Gives the key that a renamed one stands for.
fn sort_foreign(entry: &mut Entry, source: usize, command: Command, problems: &mut Problems) -> Option<&'static str> {
    let key = foreign::find(&entry.key, command)?;
    let at_key = Place::new(source, &entry.key_span);
    let at_value = if entry.node.span.is_empty() { at_key.clone() } else { Place::new(source, &entry.node.span) };
    match key.rule {
        Rule::Alias(of) => entry.key = of.to_owned(),
        Rule::NoEffect(why) => {
            problems.warn(Problem::new(format!("`{}` has no effect: {why}", key.name)).at(at_key, ""));
        }
        Rule::Lacking { off, .. } if foreign::is_off(&entry.node, off) => {}
        Rule::Lacking { off, why } => {
            let off = match off {
                [] => "null",
                [first, ..] => first,
            };
            let problem = Problem::new(format!("`{}` asks for something that is not supported: {why}", key.name));
            problems.error(
                problem
                    .at(at_value, "not supported")
                    .help(format!("remove the key (`{}: {off}` is accepted)", key.name)),
            );
        }
        Rule::Renamed(to) => {
            let elsewhere = match keys::find(to, command) {
                Some(_) => String::new(),
                None => format!(", a key of `{}`", other(command)),
            };
            let mut problem = Problem::new(format!("`{}` is called `{to}`{elsewhere}", key.name));
            problem.help = keys::find(to, command).map(|key| key.doc.to_owned());
            problems.error(problem.at(at_key, format!("write `{to}`")));
            return Some(to);
        }
    }
    None
}

fn other(command: Command) -> Command {
    match command {
        Command::Sft => Command::Grpo,
        Command::Grpo => Command::Sft,
    }
}

/// Reports a key that nobody knows; gives the one it likely is.
fn report_unknown(entry: &Entry, source: usize, command: Command, problems: &mut Problems) -> Option<&'static str> {
    let mut likely = None;
    let place = Place::new(source, &entry.key_span);
    let elsewhere = other(command);
    let problem = if keys::find(&entry.key, elsewhere).is_some() || foreign::find(&entry.key, elsewhere).is_some() {
        Problem::new(format!("`{}` is a key of `{elsewhere}`, not of `{command}`", entry.key))
            .at(place, "not here")
            .help(format!("remove it, or run `{elsewhere}`"))
    } else if let Some((outer, inner)) =
        entry.key.split_once('.').filter(|(outer, _)| keys::find(outer, command).is_some())
    {
        Problem::new(format!("`{}` is no key: keys are flat", entry.key))
            .at(place, "unknown key")
            .help(format!("give the whole map: `{outer}: {{{inner}: ...}}`"))
    } else {
        let ours = KEYS.iter().filter(|key| key.commands.include(command)).map(|key| key.name);
        let theirs = foreign::FOREIGN_KEYS
            .iter()
            .filter(|key| key.commands.include(command) && !matches!(key.rule, Rule::Renamed(_)))
            .map(|key| key.name);
        likely = nearest(&entry.key, ours.chain(theirs));
        let help = match likely {
            Some(name) => format!("did you mean `{name}`?"),
            None => "docs/config.md lists every key".into(),
        };
        Problem::new(format!("`{}` is no key of `{command}`", entry.key)).at(place, "unknown key").help(help)
    };
    problems.error(problem);
    likely
}
