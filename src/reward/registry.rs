//! The built-in rewards by name, and making a reward from what the config file says.

use rayon::prelude::*;
use serde_json::{Map, Value};

use super::error::{Error, nearest};
use super::parameters::Parameters;
use super::{Reward, Rewards, Sample, answer, code, command, countdown, format, length};
use crate::config::settings::{RewardSettings, RewardSpec};

/// The score of the sample at a position of its batch.
pub(super) type Scorer = Box<dyn Fn(usize, &Sample<'_>) -> Result<Option<f64>, Error> + Send + Sync>;

/// The scores of all samples of a batch, for a reward that compares them with each other.
pub(super) type Together = Box<dyn Fn(&[Sample<'_>]) -> Result<Vec<Option<f64>>, Error> + Send + Sync>;

/// How a built-in is made, by whether it looks at one sample at a time.
enum Maker {
    Each(fn(&mut Parameters<'_>) -> Result<Scorer, Error>),
    Together(fn(&mut Parameters<'_>) -> Result<Together, Error>),
}

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
        make: Maker::Each(answer::accuracy),
    },
    Builtin {
        name: "reasoning_accuracy",
        aliases: &[],
        doc: "as `accuracy`, looking only behind the last `</think>`; 0 if the reasoning does not end",
        make: Maker::Each(answer::reasoning_accuracy),
    },
    Builtin {
        name: "exact_match",
        aliases: &[],
        doc: "1 if the completion is the column's text, spaces at its ends aside, else 0",
        make: Maker::Each(answer::exact_match),
    },
    Builtin {
        name: "numeric_match",
        aliases: &[],
        doc: "1 if the final answer is a number within a tolerance of the column's, else 0",
        make: Maker::Each(answer::numeric_match),
    },
    Builtin {
        name: "contains",
        aliases: &[],
        doc: "1 if the completion contains a text, or the column's text, else 0",
        make: Maker::Each(answer::contains),
    },
    Builtin {
        name: "regex",
        aliases: &[],
        doc: "1 if a regular expression is found in the completion, else 0",
        make: Maker::Each(answer::regex),
    },
    Builtin {
        name: "think_format",
        aliases: &[],
        doc: "1 if the completion is `<think>...</think>` and then anything, else 0",
        make: Maker::Each(format::think_format),
    },
    Builtin {
        name: "tag_format",
        aliases: &[],
        doc: "1 if the completion is exactly `<think>...</think><answer>...</answer>`, else 0",
        make: Maker::Each(format::tag_format),
    },
    Builtin {
        name: "format",
        aliases: &[],
        doc: "as `tag_format`, with each tag on a line of its own",
        make: Maker::Each(format::line_format),
    },
    Builtin {
        name: "code_format",
        aliases: &["get_code_format"],
        doc: "1 if the completion is laid out as for `format`, with a code block in the answer, else 0",
        make: Maker::Each(format::code_format),
    },
    Builtin {
        name: "tag_count",
        aliases: &[],
        doc: "a quarter for each of the four tags that is there exactly once",
        make: Maker::Each(format::tag_count),
    },
    Builtin {
        name: "reasoning_steps",
        aliases: &[],
        doc: "a third for each sign of a step such as `Step 1:`, `First,` or a line that starts with `-`, 1 at most",
        make: Maker::Each(length::reasoning_steps),
    },
    Builtin {
        name: "length",
        aliases: &["len"],
        doc: "from 0.5 for the shortest completion of a batch to -0.5 for the longest, at most 0 for a wrong answer",
        make: Maker::Together(length::length),
    },
    Builtin {
        name: "cosine",
        aliases: &[],
        doc: "accuracy scaled by a cosine of the length in characters: a short right answer is worth most",
        make: Maker::Each(length::cosine),
    },
    Builtin {
        name: "cosine_scaled",
        aliases: &["get_cosine_scaled"],
        doc: "as `cosine`, with the length in tokens, and no more change beyond the longest length",
        make: Maker::Each(length::cosine_scaled),
    },
    Builtin {
        name: "length_penalty",
        aliases: &["soft_overlong_punishment", "get_soft_overlong_punishment"],
        doc: "0 up to a soft limit of tokens, then falling linearly to -1 at the longest length",
        make: Maker::Each(length::length_penalty),
    },
    Builtin {
        name: "repetition_penalty",
        aliases: &[],
        doc: "the share of repeated word n-grams, times a negative number",
        make: Maker::Each(length::repetition_penalty),
    },
    Builtin {
        name: "token_repetition_penalty",
        aliases: &["get_repetition_penalty"],
        doc: "the share of repeated token n-grams, times a negative number",
        make: Maker::Each(length::token_repetition_penalty),
    },
    Builtin {
        name: "countdown",
        aliases: &[],
        doc: "1 if the answer is arithmetic with each of `nums` used once that gives `target`; part credit for the form",
        make: Maker::Each(countdown::countdown),
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

fn builtin(name: &str, values: &Map<String, Value>) -> Result<BuiltinReward, Error> {
    let plain = name.strip_suffix("_reward").unwrap_or(name);
    let Some(builtin) = find_builtin(name) else {
        let mut names: Vec<&'static str> = builtin_names().into_iter().map(|(name, _)| name).collect();
        names.sort_by(|a, b| strsim::jaro_winkler(plain, b).total_cmp(&strsim::jaro_winkler(plain, a)));
        let nearest = nearest(plain, names.iter().copied());
        return Err(Error::UnknownReward { name: name.to_owned(), nearest, names });
    };
    let mut parameters = Parameters::new(name, values);
    let scoring = match builtin.make {
        Maker::Each(make) => Scoring::Each(make(&mut parameters)?),
        Maker::Together(make) => Scoring::Together(make(&mut parameters)?),
    };
    parameters.finish()?;
    Ok(BuiltinReward { name: name.to_owned(), scoring })
}

enum Scoring {
    Each(Scorer),
    Together(Together),
}

/// A built-in with its parameters: a pure function.
struct BuiltinReward {
    name: String,
    scoring: Scoring,
}

impl Reward for BuiltinReward {
    fn name(&self) -> &str {
        &self.name
    }

    fn is_of_each(&self) -> bool {
        matches!(self.scoring, Scoring::Each(_))
    }

    fn score(&mut self, samples: &[Sample<'_>]) -> Result<Vec<Option<f64>>, Error> {
        match &self.scoring {
            // Small scores are cheap: eight of them at least make a task.
            Scoring::Each(scorer) => {
                samples.par_iter().with_min_len(8).enumerate().map(|(index, sample)| scorer(index, sample)).collect()
            }
            Scoring::Together(score) => score(samples),
        }
    }
}
