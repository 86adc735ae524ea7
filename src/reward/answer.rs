//! Rewards that compare the completion with an answer.

use fancy_regex::Regex;
use serde_json::Value;

use super::Sample;
use super::error::{Error, excerpt};
use super::math::{self, Answer, Extraction, final_answer};
use super::parameters::Parameters;
use super::registry::{self, Scorer};
use crate::config::settings::RewardSpec;

/// The columns that hold the right answer, unless `column` names another.
const ANSWER_COLUMNS: [&str; 2] = ["answer", "solution"];

/// Where the right answers of a reward come from.
struct Gold {
    reward: String,
    columns: Vec<String>,
}

impl Gold {
    /// Reads the parameter `column`.
    fn from_parameters(parameters: &mut Parameters<'_>) -> Result<Self, Error> {
        let columns = match parameters.text("column")? {
            Some(column) => vec![column],
            None => ANSWER_COLUMNS.iter().map(|c| (*c).to_owned()).collect(),
        };
        Ok(Self { reward: parameters.reward().to_owned(), columns })
    }

    /// The right answers of a sample: a list counts as alternatives; empty where the column is null.
    fn of(&self, index: usize, sample: &Sample<'_>) -> Result<Vec<String>, Error> {
        let Some((column, value)) = self.columns.iter().find_map(|c| sample.row.get(c).map(|v| (c, v))) else {
            return Err(Error::MissingColumn {
                reward: self.reward.clone(),
                wanted: self.columns.clone(),
                present: sample.row.keys().cloned().collect(),
                index,
                hint: ", or name the right one with the parameter `column`",
            });
        };
        let alternatives = match value {
            Value::Array(items) => items.iter().map(as_text).collect(),
            Value::Null => Some(Vec::new()),
            one => as_text(one).map(|t| vec![t]),
        };
        alternatives.ok_or_else(|| Error::ColumnType {
            reward: self.reward.clone(),
            column: column.clone(),
            got: excerpt(&value.to_string()),
            expected: "a text, a number or a list of them",
            index,
        })
    }
}

fn as_text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(flag) => Some(flag.to_string()),
        _ => None,
    }
}

fn extraction(parameters: &mut Parameters<'_>) -> Result<Extraction, Error> {
    Ok(if parameters.flag("require_boxed", false)? { Extraction::Boxed } else { Extraction::Any })
}

/// Compares the final answer of a completion with the right one.
pub(super) struct Accuracy {
    gold: Gold,
    extraction: Extraction,
}

impl Accuracy {
    /// Reads the parameters `column` and `require_boxed`.
    pub(super) fn from_parameters(parameters: &mut Parameters<'_>) -> Result<Self, Error> {
        Ok(Self { gold: Gold::from_parameters(parameters)?, extraction: extraction(parameters)? })
    }

    /// 1 or 0 for a sample, `None` if its right answer cannot be read.
    pub(super) fn score(&self, index: usize, sample: &Sample<'_>) -> Result<Option<f64>, Error> {
        self.score_of(index, sample, finished(sample.prompt_text, sample.completion))
    }

    fn score_of(&self, index: usize, sample: &Sample<'_>, text: &str) -> Result<Option<f64>, Error> {
        let right: Vec<Answer> = self.gold.of(index, sample)?.iter().filter_map(|g| read_gold(g)).collect();
        if right.is_empty() {
            return Ok(None);
        }
        let answer = final_answer(text, self.extraction).and_then(|a| Answer::parse(&a).ok());
        Ok(Some(f64::from(u8::from(answer.is_some_and(|a| right.iter().any(|r| r.is_answered_by(&a)))))))
    }
}

/// What of a completion may hold an answer: nothing where it does not end the reasoning. A prompt that ends in `<think>` opens
/// the reasoning that the completion must close before it answers.
fn finished<'a>(prompt_text: &str, completion: &'a str) -> &'a str {
    if math::opens_reasoning(prompt_text) && !math::closes_reasoning(completion) { "" } else { completion }
}

/// What follows the last of the first delimiter that occurs.
fn conclusion<'a>(delimiters: &[String], completion: &'a str) -> Option<&'a str> {
    delimiters.iter().find_map(|delimiter| completion.rsplit_once(delimiter.as_str())).map(|(_, text)| text)
}

fn delimiters(parameters: &mut Parameters<'_>) -> Result<Vec<String>, Error> {
    Ok(parameters.texts("reasoning_delimiters")?.unwrap_or_else(|| vec!["</think>".to_owned()]))
}

/// Reads final answers as a reward does that looks at nothing else of a completion: to vote over them.
#[derive(Clone, Debug)]
pub struct AnswerReader {
    extraction: Extraction,
    /// Of `reasoning_accuracy`.
    delimiters: Option<Vec<String>>,
}

impl AnswerReader {
    /// The reader of `accuracy`, `reasoning_accuracy` and `numeric_match`; `None` for other rewards.
    pub fn of(spec: &RewardSpec) -> Option<Self> {
        let RewardSpec::Builtin { name, parameters } = registry::own_for_known(spec) else { return None };
        let mut parameters = Parameters::new(&name, &parameters);
        let delimiters = match name.strip_suffix("_reward").unwrap_or(&name) {
            "accuracy" | "numeric_match" => None,
            "reasoning_accuracy" => Some(delimiters(&mut parameters).ok()?),
            _ => return None,
        };
        Some(Self { extraction: extraction(&mut parameters).ok()?, delimiters })
    }

    /// The final answer, if there is one.
    pub fn read(&self, prompt_text: &str, completion: &str) -> Option<Answer> {
        let text = match &self.delimiters {
            Some(delimiters) => conclusion(delimiters, completion)?,
            None => finished(prompt_text, completion),
        };
        Answer::parse(&final_answer(text, self.extraction)?).ok()
    }
}

/// `accuracy`: TRL's and open-r1's `accuracy_reward`. 1 if the final answer of the completion equals the right one, 0
/// if not or if the completion has none, `None` if the right answer cannot be read. What stands inside reasoning tags is
/// no final answer, so a completion whose reasoning does not end is worth 0 (TRL reads boxes there too).
///
/// Parameters: `column` (default `answer`, else `solution`), `require_boxed` (default false: see
/// [`Extraction::Any`]; TRL looks for boxes and formulas only).
pub(super) fn accuracy(parameters: &mut Parameters<'_>) -> Result<Scorer, Error> {
    let accuracy = Accuracy::from_parameters(parameters)?;
    Ok(Box::new(move |index, sample| accuracy.score(index, sample)))
}

/// `reasoning_accuracy`: TRL's `reasoning_accuracy_reward`. As `accuracy`, on what follows the last of the first
/// delimiter that occurs; 0 if none does.
///
/// Parameters: those of `accuracy`, and `reasoning_delimiters` (default `</think>`).
pub(super) fn reasoning_accuracy(parameters: &mut Parameters<'_>) -> Result<Scorer, Error> {
    let accuracy = Accuracy::from_parameters(parameters)?;
    let delimiters = delimiters(parameters)?;
    Ok(Box::new(move |index, sample| match conclusion(&delimiters, sample.completion) {
        Some(text) => accuracy.score_of(index, sample, text),
        None => Ok(Some(0.0)),
    }))
}

/// Reads a right answer: the answer itself, or a worked solution or sentence that ends in one.
fn read_gold(text: &str) -> Option<Answer> {
    let is_worked = text.contains("####") || text.contains("\\boxed") || text.contains("</answer>");
    let direct = if is_worked { None } else { Answer::parse(text).ok() };
    // A formula that is not understood is compared as it is written; its last number is not its answer.
    let has_words = text.split_whitespace().any(|w| w.chars().count() > 1 && w.chars().all(char::is_alphabetic));
    let is_prose = has_words && text.contains(|c: char| c.is_ascii_digit()) && !text.contains(['\\', '^', '_', '=']);
    let is_final = |a: &Answer| a.is_mathematics() || !is_prose;
    if direct.as_ref().is_some_and(is_final) {
        return direct;
    }
    final_answer(text, Extraction::Any).and_then(|a| Answer::parse(&a).ok()).or(direct)
}

/// `exact_match`: 1 if the completion is the right answer to the letter, 0 if not, `None` if the column is null.
///
/// Parameters: `column`, `ignore_case` (default false), `extract` (default false: compare the whole completion; true:
/// its final answer as `accuracy` finds it). Spaces at the ends never count.
pub(super) fn exact_match(parameters: &mut Parameters<'_>) -> Result<Scorer, Error> {
    let gold = Gold::from_parameters(parameters)?;
    let ignores_case = parameters.flag("ignore_case", false)?;
    let extracts = parameters.flag("extract", false)?;
    let folded = move |text: &str| {
        let text = text.trim();
        if ignores_case { text.to_lowercase() } else { text.to_owned() }
    };
    Ok(Box::new(move |index, sample| {
        let right = gold.of(index, sample)?;
        if right.is_empty() {
            return Ok(None);
        }
        let answer = if extracts { final_answer(sample.completion, Extraction::Any) } else { None };
        let answer = folded(if extracts { answer.as_deref().unwrap_or("") } else { sample.completion });
        Ok(Some(f64::from(u8::from(right.iter().any(|r| folded(r) == answer)))))
    }))
}

/// `numeric_match`: 1 if the final answer is a number with |answer - right| <= `tolerance` + `relative_tolerance` *
/// |right|, 0 if not, `None` if the right answer is no number.
///
/// Parameters: `column`, `require_boxed`, `tolerance` (default 1e-6, at least 0), `relative_tolerance` (default 0).
pub(super) fn numeric_match(parameters: &mut Parameters<'_>) -> Result<Scorer, Error> {
    let gold = Gold::from_parameters(parameters)?;
    let extraction = extraction(parameters)?;
    let is_tolerance = |t: f64| t >= 0.0;
    let tolerance = parameters.number("tolerance", 1e-6, "a number of at least 0", is_tolerance)?;
    let relative = parameters.number("relative_tolerance", 0.0, "a number of at least 0", is_tolerance)?;
    Ok(Box::new(move |index, sample| {
        let right: Vec<f64> =
            gold.of(index, sample)?.iter().filter_map(|g| read_gold(g).and_then(|a| a.value())).collect();
        if right.is_empty() {
            return Ok(None);
        }
        let answer = final_answer(sample.completion, extraction).and_then(|a| Answer::parse(&a).ok()?.value());
        let is_near = |answer: f64| right.iter().any(|r| (answer - r).abs() <= tolerance + relative * r.abs());
        Ok(Some(f64::from(u8::from(answer.is_some_and(is_near)))))
    }))
}

/// `contains`: 1 if the completion contains one of the texts, 0 if not, `None` if they come from a column that is null.
///
/// Parameters: `text` (a text or a list; default: the column), `column`, `ignore_case` (default false).
pub(super) fn contains(parameters: &mut Parameters<'_>) -> Result<Scorer, Error> {
    let texts = parameters.texts("text")?;
    let gold = Gold::from_parameters(parameters)?;
    let ignores_case = parameters.flag("ignore_case", false)?;
    Ok(Box::new(move |index, sample| {
        let wanted = match &texts {
            Some(texts) => texts.clone(),
            None => gold.of(index, sample)?,
        };
        if wanted.is_empty() {
            return Ok(None);
        }
        let is_found = if ignores_case {
            let completion = sample.completion.to_lowercase();
            wanted.iter().any(|w| completion.contains(&w.to_lowercase()))
        } else {
            wanted.iter().any(|w| sample.completion.contains(w.as_str()))
        };
        Ok(Some(f64::from(u8::from(is_found))))
    }))
}

/// `regex`: 1 if the pattern is found in the completion, 0 if not. A search that backtracks more than a million times
/// ends as "not found".
///
/// Parameters: `pattern` (required; the syntax of the `fancy-regex` crate, with look-around), `full_match` (default
/// false: anywhere; true: the whole completion, spaces at its ends aside).
pub(super) fn regex(parameters: &mut Parameters<'_>) -> Result<Scorer, Error> {
    let pattern = parameters.text("pattern")?;
    let is_full = parameters.flag("full_match", false)?;
    let Some(pattern) = pattern else { return Err(parameters.wrong("pattern", "a regular expression")) };
    let whole = if is_full { format!(r"\A(?:{pattern})\z") } else { pattern };
    let regex =
        Regex::new(&whole).map_err(|error| parameters.wrong("pattern", &format!("a regular expression ({error})")))?;
    Ok(Box::new(move |_, sample| {
        let text = if is_full { sample.completion.trim() } else { sample.completion };
        Ok(Some(f64::from(u8::from(regex.is_match(text).unwrap_or(false)))))
    }))
}
