//! The built-in rewards by name, and making a reward from what the config file says.

use rayon::prelude::*;
use serde_json::{Map, Value};

use super::error::{Error, nearest};
use super::parameters::Parameters;
use super::{Reward, Rewards, Sample, answer, code, command, countdown, format, length};
use crate::config::settings::{RewardSettings, RewardSpec};

/// The score of the sample at a position of its batch.
pub(super) type Scorer = Box<dyn Fn(usize, &Sample<'_>) -> Result<Option<f64>, Error> + Send + Sync>;

type Maker = fn(&mut Parameters<'_>) -> Result<Scorer, Error>;

struct Builtin {
    name: &'static str,
    /// TRL's or open-r1's names, where they differ by more than the suffix `_reward`.
    aliases: &'static [&'static str],
    doc: &'static str,
    make: Maker,
}

const BUILTINS: &[Builtin] = &[
    Builtin {
        name: "accuracy",
        aliases: &[],
        doc: "1 if the final answer is mathematically equal to the column `answer` or `solution`, else 0",
        make: answer::accuracy,
    },
    Builtin {
        name: "reasoning_accuracy",
        aliases: &[],
        doc: "as `accuracy`, looking only behind the last `</think>`; 0 if the reasoning does not end",
        make: answer::reasoning_accuracy,
    },
    Builtin {
        name: "exact_match",
        aliases: &[],
        doc: "1 if the completion is the column's text, spaces at its ends aside, else 0",
        make: answer::exact_match,
    },
    Builtin {
        name: "numeric_match",
        aliases: &[],
        doc: "1 if the final answer is a number within a tolerance of the column's, else 0",
        make: answer::numeric_match,
    },
    Builtin {
        name: "contains",
        aliases: &[],
        doc: "1 if the completion contains a text, or the column's text, else 0",
        make: answer::contains,
    },
    Builtin {
        name: "regex",
        aliases: &[],
        doc: "1 if a regular expression is found in the completion, else 0",
        make: answer::regex,
    },
    Builtin {
        name: "think_format",
        aliases: &[],
        doc: "1 if the completion is `<think>...</think>` and then anything, else 0",
        make: format::think_format,
    },
    Builtin {
        name: "tag_format",
        aliases: &[],
        doc: "1 if the completion is exactly `<think>...</think><answer>...</answer>`, else 0",
        make: format::tag_format,
    },
    Builtin {
        name: "format",
        aliases: &[],
        doc: "as `tag_format`, with each tag on a line of its own",
        make: format::line_format,
    },
    Builtin {
        name: "code_format",
        aliases: &["get_code_format"],
        doc: "1 if the completion is laid out as for `format`, with a code block in the answer, else 0",
        make: format::code_format,
    },
    Builtin {
        name: "tag_count",
        aliases: &[],
        doc: "a quarter for each of the four tags that is there exactly once",
        make: format::tag_count,
    },
    Builtin {
        name: "length_penalty",
        aliases: &["soft_overlong_punishment", "get_soft_overlong_punishment"],
        doc: "0 up to a soft limit of tokens, then falling linearly to -1 at the longest length",
        make: length::length_penalty,
    },
    Builtin {
        name: "repetition_penalty",
        aliases: &["get_repetition_penalty"],
        doc: "the share of repeated word n-grams, times a negative number",
        make: length::repetition_penalty,
    },
    Builtin {
        name: "countdown",
        aliases: &[],
        doc: "1 if the answer is arithmetic with each of `nums` used once that gives `target`; part credit for the form",
        make: countdown::countdown,
    },
];

/// Name and one-line description of every built-in reward.
pub fn builtin_names() -> Vec<(&'static str, &'static str)> {
    BUILTINS.iter().map(|b| (b.name, b.doc)).chain(code::NAMES.iter().copied()).collect()
}

/// Modules whose functions are built in under their own names, so that no Python is needed for them.
const KNOWN_MODULES: &[&str] = &["trl.rewards", "open_r1.rewards"];

/// The built-in that stands for a function of `trl.rewards` or `open_r1.rewards`; any other entry as it is.
pub(super) fn own_for_known(spec: &RewardSpec) -> RewardSpec {
    if let RewardSpec::Python { target, name: None, parameters, .. } = spec
        && let Some((module, function)) = target.rsplit_once(['.', ':'])
        && KNOWN_MODULES.iter().any(|known| module == *known || module.starts_with(&format!("{known}.")))
        && is_builtin(function)
    {
        return RewardSpec::Builtin { name: function.to_owned(), parameters: parameters.clone() };
    }
    spec.clone()
}

/// Makes the reward that one entry of `reward_funcs` describes; a reward program is started, and so is a Python of its own
/// for a function in Python. [`super::Rewards`] has one Python for all of them.
///
/// # Errors
/// If there is no such built-in, it has no such parameter, a parameter is wrong, or the program does not start.
pub fn build(spec: &RewardSpec) -> Result<Box<dyn Reward>, Error> {
    match spec {
        RewardSpec::Builtin { name, .. } if code::is_code(name) => alone(spec),
        RewardSpec::Builtin { name, parameters } => Ok(Box::new(builtin(name, parameters)?)),
        RewardSpec::Command { name, command, timeout_secs } => {
            Ok(Box::new(command::CommandReward::start(name, command, *timeout_secs)?))
        }
        RewardSpec::Python { .. } => alone(spec),
    }
}

/// A reward outside of a run that needs what a run has for all of its kind.
struct Alone(Rewards);

fn alone(spec: &RewardSpec) -> Result<Box<dyn Reward>, Error> {
    Ok(Box::new(Alone(Rewards::start(std::slice::from_ref(spec), &RewardSettings::default(), &|| false)?)))
}

impl Reward for Alone {
    fn name(&self) -> &str {
        &self.0.names()[0]
    }

    fn score(&mut self, samples: &[Sample<'_>]) -> Result<Vec<Option<f64>>, Error> {
        Ok(self.0.score(samples, &|| false)?.by_function.swap_remove(0))
    }
}

/// Says what is wrong with one entry of `reward_funcs`, without starting a program; the message names the reward or its
/// parameter in backticks. `config` calls it through its `RewardCheck`, so that the place in the file is shown.
///
/// # Errors
/// As [`build`], but for whether a program starts.
pub fn check(spec: &RewardSpec) -> Result<(), String> {
    match &own_for_known(spec) {
        RewardSpec::Builtin { name, parameters } if code::is_code(name) => code::check(name, parameters),
        RewardSpec::Builtin { name, parameters } => builtin(name, parameters).map(drop),
        RewardSpec::Command { name, command, timeout_secs } => command::check(name, command, *timeout_secs),
        // Known once it is imported.
        RewardSpec::Python { .. } => Ok(()),
    }
    .map_err(|error| error.to_string())
}

fn find_builtin(name: &str) -> Option<&'static Builtin> {
    let plain = name.strip_suffix("_reward").unwrap_or(name);
    BUILTINS.iter().find(|b| b.name == plain || b.aliases.contains(&plain))
}

fn is_builtin(name: &str) -> bool {
    code::is_code(name) || find_builtin(name).is_some()
}

fn builtin(name: &str, values: &Map<String, Value>) -> Result<PerSample, Error> {
    let plain = name.strip_suffix("_reward").unwrap_or(name);
    let Some(builtin) = find_builtin(name) else {
        let mut names: Vec<&'static str> = builtin_names().into_iter().map(|(name, _)| name).collect();
        names.sort_by(|a, b| strsim::jaro_winkler(plain, b).total_cmp(&strsim::jaro_winkler(plain, a)));
        let nearest = nearest(plain, names.iter().copied());
        return Err(Error::UnknownReward { name: name.to_owned(), nearest, names });
    };
    let mut parameters = Parameters::new(name, values);
    let scorer = (builtin.make)(&mut parameters)?;
    parameters.finish()?;
    Ok(PerSample { name: name.to_owned(), scorer })
}

/// A reward that looks at one sample at a time: a pure function, evaluated on all cores.
struct PerSample {
    name: String,
    scorer: Scorer,
}

impl Reward for PerSample {
    fn name(&self) -> &str {
        &self.name
    }

    fn score(&mut self, samples: &[Sample<'_>]) -> Result<Vec<Option<f64>>, Error> {
        // Small scores are cheap: eight of them at least make a task.
        let scorer = &self.scorer;
        samples.par_iter().with_min_len(8).enumerate().map(|(index, sample)| scorer(index, sample)).collect()
    }
}
