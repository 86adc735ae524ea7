//! From text to settings: the entries of the file and of `--set` are read by their keys, then resolved.

use super::diagnose::{ConfigError, Place, Problem, Problems, Source};
use super::entries::{self, Collected, Given};
use super::field::Command;
use super::foreign::{self, Rule};
use super::keys::{self, KEYS, RawConfig};
use super::resolve::{self, Context};
use super::resolve_grpo;
use super::settings::{GrpoSettings, SftSettings};
use super::value::nearest;
use super::write;
use super::yaml::Entry;

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
        |settings| settings.training.ranks.world_size,
        write::sft_yaml,
    )
}

/// The command whose config this is: GRPO's has `reward_funcs`, under this or an older name.
#[must_use]
pub fn command_of(source: &Source, overrides: &[String]) -> Command {
    // What is wrong with it is said when it is read.
    let (collected, _) = entries::collect(source, overrides, Command::Grpo, &mut Problems::default());
    let has_rewards = collected.entries.iter().any(|given| given.entry.key == "reward_funcs");
    if has_rewards { Command::Grpo } else { Command::Sft }
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
    let ranks = |settings: &GrpoSettings| settings.training.ranks.world_size;
    load(Command::Grpo, source, overrides, context, resolve, ranks, write::grpo_yaml)
}

fn load<S>(
    command: Command,
    source: &Source,
    overrides: &[String],
    context: &Context<'_>,
    resolve: impl Fn(&RawConfig, Option<bool>, &mut Problems) -> Option<S>,
    ranks: impl Fn(&S) -> usize,
    write: impl Fn(&S, &[String]) -> String,
) -> Result<Loaded<S>, ConfigError> {
    let mut problems = Problems::default();
    let mut sources = vec![source.clone()];
    sources.extend(overrides.iter().map(|text| Source::new("--set", text.as_str())));

    let (collected, is_readable) = entries::collect(source, overrides, command, &mut problems);
    let Collected { entries, mut misspelt, uses_vllm } = collected;
    let mut raw = RawConfig::new(command);
    for Given { entry, source, .. } in entries {
        if !raw.read(command, &entry, source, &mut problems) {
            misspelt.extend(report_unknown(&entry, source, command, &mut problems));
        }
    }
    // Without entries nothing can be said about missing keys, or about keys that do not go together.
    let settings = if is_readable {
        if !raw.datasets.value().parts.is_empty() || !raw.dataset_mixture.value().parts.is_empty() {
            misspelt.push("dataset_name");
        }
        raw.require(command, &misspelt, &mut problems);
        resolve(&raw, uses_vllm, &mut problems)
    } else {
        None
    };
    let warnings = problems.finish(&sources)?;
    // `resolve` gives nothing only after it reported something, and then `finish` has returned.
    let settings = settings.expect("a config without problems has settings");
    let resolved_yaml = write(&settings, &header(command, source, overrides, context, ranks(&settings)));
    Ok(Loaded { settings, warnings, resolved_yaml })
}

fn header(command: Command, source: &Source, overrides: &[String], context: &Context<'_>, ranks: usize) -> Vec<String> {
    let one_line = |text: &str| text.split(['\n', '\r']).collect::<Vec<_>>().join(" ");
    let mut lines = vec![
        format!(
            "Resolved config of `{command} {}`: every key with its value, defaults included.",
            one_line(source.name())
        ),
        format!("trainer {}, commit {}", env!("CARGO_PKG_VERSION"), context.git_commit.unwrap_or("unknown")),
        format!("ranks: {ranks}"),
    ];
    lines.extend(overrides.iter().map(|text| {
        let (key, value) = text.split_once('=').unwrap_or((text, ""));
        let value = if is_secret(key) || key.trim() == "env" { "..." } else { value };
        format!("--set {}", one_line(&format!("{key}={value}")))
    }));
    lines.push("The same command with this file gives the same run.".into());
    lines
}

/// Whether what goes by this name is not to be written down: `hub_token`, `WANDB_API_KEY`.
pub(super) fn is_secret(name: &str) -> bool {
    let name = name.trim().to_lowercase();
    let is_of_text = ["bos_", "eos_", "pad_"].iter().any(|start| name.starts_with(start));
    !is_of_text
        && ["token", "key", "secret", "password"].iter().any(|part| name.split(['_', '-']).any(|word| word == *part))
}

/// Reports a key that nobody knows; gives the one it likely is.
fn report_unknown(entry: &Entry, source: usize, command: Command, problems: &mut Problems) -> Option<&'static str> {
    let mut likely = None;
    let place = Place::new(source, &entry.key_span);
    if let Some(whose) = foreign::family(&entry.key, command) {
        let message = format!("`{}` is not known and has no effect: {whose}", entry.key);
        problems.warn(Problem::new(message).at(place, ""));
        return None;
    }
    let elsewhere = command.other();
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
            .filter(|key| key.commands.include(command) && !matches!(key.rule, Rule::Ambiguous(_)))
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
