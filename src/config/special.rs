//! Values that only one or two keys have: target modules, devices, intervals, optimizer names and the like.

use std::path::PathBuf;

use super::home;
use super::settings::{
    DeviceChoice, ModuleSet, OptimizerKind, PackingStrategy, Projection, ReportTo, Resume, ScaleRewards,
};
use super::value::{
    Mismatch, Parse, all, as_bool, as_float, describe, listed, parse_integer, parse_word, valid_values,
};
use super::yaml::{Node, Value};

/// The last part of the path of every module that can have an adapter.
const TARGETS: &[&str] =
    &["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head", "embed_tokens"];
/// PEFT's word for every linear module but the head.
const ALL_LINEAR: &str = "all-linear";

/// What `lora_target_modules` says: names are sorted as [`TARGETS`], paths after them, each once.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct TargetModules(pub(super) ModuleSet);

impl Parse for TargetModules {
    const KIND: &'static str = "`all-linear`, a list of module names or a regular expression";

    fn parse(node: &Node) -> Result<Self, Vec<Mismatch>> {
        let items = match &node.value {
            Value::Null => return Ok(Self(ModuleSet::of_qwen())),
            Value::List(items) if !items.is_empty() => items.as_slice(),
            Value::Scalar { .. } => std::slice::from_ref(node),
            _ => {
                let wrong = Mismatch::expected(node, Self::KIND);
                return Err(vec![wrong.help(format!("names are {}", listed(TARGETS)))]);
            }
        };
        // TRL takes a list of one for its text.
        if let [only @ Node { value: Value::Scalar { text, .. }, .. }] = items {
            if text.eq_ignore_ascii_case(ALL_LINEAR) {
                return Ok(Self(ModuleSet::Names(Projection::ALL.map(|p| p.name().into()).to_vec())));
            }
            let Some(names) = names_in(text) else { return pattern(only, text).map(Self) };
            let checked = all(names.iter().map(|name| target(only, name, names.len())))?;
            return Ok(Self(ModuleSet::Names(distinct(node, checked)?)));
        }
        let checked = all(items.iter().map(|item| match &item.value {
            Value::Scalar { text, .. } => target(item, text, items.len()),
            _ => Err(vec![Mismatch::expected(item, "a module name")]),
        }))?;
        Ok(Self(ModuleSet::Names(distinct(node, checked)?)))
    }
}

/// The names in a text that is nothing but names with commas or spaces between them.
fn names_in(text: &str) -> Option<Vec<&str>> {
    let is_name = |name: &&str| {
        name.split('.').all(|part| !part.is_empty() && part.chars().all(|c| c.is_ascii_alphanumeric() || c == '_'))
    };
    let parts = || text.split(|c: char| c == ',' || c.is_whitespace()).map(str::trim).filter(|part| !part.is_empty());
    (parts().next().is_some() && parts().all(|part| is_name(&part))).then(|| parts().collect())
}

fn pattern(node: &Node, text: &str) -> Result<ModuleSet, Vec<Mismatch>> {
    match fancy_regex::Regex::new(text) {
        Ok(_) => Ok(ModuleSet::Pattern(text.to_owned())),
        Err(error) => {
            let what = format!("is neither names nor a regular expression: {error}");
            let help = "a pattern is matched with the whole module path, e.g. `.*\\.self_attn\\.(q|v)_proj`";
            Err(vec![Mismatch::new(node, what).help(help)])
        }
    }
}

/// A name or a path that can be one of several.
fn target(node: &Node, name: &str, count: usize) -> Result<String, Vec<Mismatch>> {
    let last = name.rsplit('.').next().unwrap_or(name);
    if names_in(name).is_some_and(|names| names == [name]) && TARGETS.contains(&last) {
        return Ok(name.to_owned());
    }
    let help = if name.eq_ignore_ascii_case(ALL_LINEAR) {
        format!("`all-linear` stands alone; here it is one of {count}")
    } else if names_in(name).is_none() {
        "in a list every text is a name, also in PEFT; give one pattern as a text, with `|` for alternatives".into()
    } else {
        valid_values(last, TARGETS)
    };
    Err(vec![Mismatch::new(node, format!("does not know `{name}`")).help(help)])
}

fn distinct(node: &Node, mut names: Vec<String>) -> Result<Vec<String>, Vec<Mismatch>> {
    let place = |name: &String| TARGETS.iter().position(|target| target == name).unwrap_or(TARGETS.len());
    names.sort_by(|one, other| (place(one), one).cmp(&(place(other), other)));
    let given = names.len();
    names.dedup();
    if names.len() < given {
        return Err(vec![Mismatch::new(node, "names a module twice").help("name each module once")]);
    }
    Ok(names)
}

/// Module names, as a list or as one text with commas; null is none.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct ModuleNames(pub(super) Vec<String>);

impl Parse for ModuleNames {
    const KIND: &'static str = "a list of module names";

    fn parse(node: &Node) -> Result<Self, Vec<Mismatch>> {
        let items = match &node.value {
            Value::Null => &[],
            Value::List(items) => items.as_slice(),
            Value::Scalar { .. } => std::slice::from_ref(node),
            Value::Map(_) => return Err(vec![Mismatch::expected(node, Self::KIND)]),
        };
        let names = all(items.iter().map(|item| {
            let Value::Scalar { text, .. } = &item.value else {
                return Err(vec![Mismatch::expected(item, "a module name")]);
            };
            let names = names_in(text).map(|names| names.into_iter().map(String::from).collect::<Vec<_>>());
            names.ok_or_else(|| vec![Mismatch::expected(item, "a module name, e.g. `lm_head`")])
        }))?;
        let mut names = names.concat();
        names.sort_unstable();
        names.dedup();
        Ok(Self(names))
    }
}

/// `optim`: the names transformers has for AdamW, whatever holds its moments, and for Lion, and Muon. The names of other
/// optimizers, with which other updates are computed, are errors.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct AdamW(pub(super) &'static str);

impl AdamW {
    /// The rule that it names.
    pub(super) fn kind(self) -> OptimizerKind {
        match self.0 {
            "muon" => OptimizerKind::Muon,
            name if name.contains("lion") => OptimizerKind::Lion,
            name if name.contains("8bit") => OptimizerKind::AdamW8bit,
            _ => OptimizerKind::AdamW,
        }
    }

    /// Bytes that its moments take for each trained parameter, where it is named for something smaller than two f32.
    pub(super) fn promised_bytes(self) -> Option<usize> {
        match self.0 {
            name if name.contains("4bit") => Some(1),
            name if name.contains("8bit") => Some(2),
            "adamw_anyprecision" => Some(4),
            _ => None,
        }
    }

    /// Whether its moments are to move to host memory under pressure.
    pub(super) fn is_paged(self) -> bool {
        self.0.starts_with("paged")
    }
}

impl Parse for AdamW {
    const KIND: &'static str = "one of";
    const VALUES: &'static [&'static str] = &[
        "adamw_torch",
        "adamw_torch_fused",
        "adamw_hf",
        "adamw_torch_xla",
        "adamw_torch_npu_fused",
        "adamw_apex_fused",
        "adamw_anyprecision",
        "adamw_torch_8bit",
        "adamw_torch_4bit",
        "adamw_8bit",
        "adamw_bnb_8bit",
        "paged_adamw",
        "paged_adamw_32bit",
        "paged_adamw_8bit",
        "lion_32bit",
        "paged_lion_32bit",
        "muon",
    ];

    fn parse(node: &Node) -> Result<Self, Vec<Mismatch>> {
        let Value::Scalar { text, .. } = &node.value else { return Err(vec![Mismatch::expected(node, "one word")]) };
        if let Some(name) = Self::VALUES.iter().find(|name| *name == text) {
            return Ok(Self(name));
        }
        let help = valid_values("", Self::VALUES);
        Err(vec![Mismatch::new(node, format!("does not know {}", describe(node))).help(help)])
    }
}

/// `code_eval_test_batch_size`: an integer from 1 on, or -1 for all tests at once.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct TestBatch(pub(super) Option<usize>);

impl Parse for TestBatch {
    const KIND: &'static str = "an integer or -1";

    fn parse(node: &Node) -> Result<Self, Vec<Mismatch>> {
        match parse_integer(node, Self::KIND)? {
            -1 => Ok(Self(None)),
            size => match usize::try_from(size) {
                Ok(size) if size > 0 => Ok(Self(Some(size))),
                _ => Err(vec![Mismatch::expected(node, "an integer of at least 1, or -1")]),
            },
        }
    }

    fn numbers(&self) -> Vec<f64> {
        self.0.map(|size| size as f64).into_iter().collect()
    }
}

/// Names that transformers has for trackers, all of which stand for files here.
const TRACKERS: &[&str] = &[
    "all",
    "wandb",
    "trackio",
    "mlflow",
    "swanlab",
    "comet_ml",
    "comet",
    "clearml",
    "neptune",
    "azure_ml",
    "codecarbon",
    "dagshub",
    "dvclive",
    "flyte",
    "kubeflow",
];

/// `report_to`: one name or a list; empty is `none`. A tracker's name stands for TensorBoard's files.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Sinks {
    /// Where metrics go.
    pub(super) sinks: Vec<ReportTo>,
    /// Trackers that are named.
    pub(super) trackers: Vec<&'static str>,
}

impl Parse for Sinks {
    const KIND: &'static str = "one or a list of";
    const VALUES: &'static [&'static str] = ReportTo::NAMES;

    fn parse(node: &Node) -> Result<Self, Vec<Mismatch>> {
        let items = match &node.value {
            Value::Null => &[],
            Value::List(items) => items.as_slice(),
            Value::Scalar { .. } => std::slice::from_ref(node),
            Value::Map(_) => return Err(vec![Mismatch::expected(node, "a name or a list of names")]),
        };
        let names: Vec<_> = ReportTo::NAMES.iter().chain(TRACKERS).copied().collect();
        let mut found = all(items.iter().map(|item| parse_word(item, &names)))?;
        if found.len() > 1 && found.contains(&ReportTo::None.as_str()) {
            return Err(vec![Mismatch::new(node, "holds `none` beside other sinks").help("drop one or the other")]);
        }
        found.retain(|name| *name != ReportTo::None.as_str());
        found.sort_unstable();
        found.dedup();
        let trackers: Vec<_> = found.iter().filter(|name| TRACKERS.contains(name)).copied().collect();
        let sinks = if found.is_empty() { Vec::new() } else { vec![ReportTo::Tensorboard] };
        Ok(Self { sinks, trackers })
    }
}

/// A number of optimizer steps, or below 1 a share of all of them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Cadence {
    Steps(usize),
    Share(f64),
}

impl Parse for Cadence {
    const KIND: &'static str = "an integer, or a share below 1";

    fn parse(node: &Node) -> Result<Self, Vec<Mismatch>> {
        if let Value::Scalar { text, .. } = &node.value
            && let Some(share) = as_float(text).filter(|share| *share > 0.0 && *share < 1.0)
        {
            return Ok(Self::Share(share));
        }
        usize::parse(node).map(Self::Steps).map_err(|wrong| {
            let kind = |what: String| what.replacen(usize::KIND, Self::KIND, 1);
            wrong.into_iter().map(|mismatch| Mismatch { what: kind(mismatch.what), help: None, ..mismatch }).collect()
        })
    }

    fn numbers(&self) -> Vec<f64> {
        match self {
            Self::Steps(steps) => vec![*steps as f64],
            Self::Share(_) => Vec::new(),
        }
    }
}

/// `eval_steps`, where 0 is "not given" as well.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct EvalCadence(pub(super) Option<Cadence>);

impl Parse for EvalCadence {
    const KIND: &'static str = Cadence::KIND;

    fn parse(node: &Node) -> Result<Self, Vec<Mismatch>> {
        let cadence = Option::<Cadence>::parse(node)?;
        Ok(Self(cadence.filter(|cadence| *cadence != Cadence::Steps(0))))
    }

    fn numbers(&self) -> Vec<f64> {
        self.0.numbers()
    }
}

/// An amount of memory: a number of bytes, or one with a unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ByteCount(pub(super) u64);

/// Units of memory, those of a thousand and those of 1,024.
const UNITS: &[(&str, f64)] = &[
    ("gib", (1u64 << 30) as f64),
    ("mib", (1u64 << 20) as f64),
    ("kib", 1024.0),
    ("gb", 1e9),
    ("mb", 1e6),
    ("kb", 1e3),
    ("b", 1.0),
    ("", 1.0),
];
/// A pebibyte, which no device has.
const MOST_BYTES: f64 = (1u64 << 50) as f64;

impl Parse for ByteCount {
    const KIND: &'static str = "an amount of memory";

    fn parse(node: &Node) -> Result<Self, Vec<Mismatch>> {
        let expected = || vec![Mismatch::expected(node, Self::KIND).help("write e.g. 11GB, 8GiB or 8589934592")];
        let Value::Scalar { text, .. } = &node.value else { return Err(expected()) };
        parse_bytes(text).map(Self).ok_or_else(expected)
    }
}

/// An amount of memory in words: `11GB`, `8 GiB`, a number of bytes.
pub fn parse_bytes(text: &str) -> Option<u64> {
    let text = text.trim().to_lowercase();
    let bytes = UNITS.iter().find_map(|(unit, factor)| {
        let number: f64 = text.strip_suffix(unit)?.trim().parse().ok()?;
        Some(number * factor).filter(|bytes| (0.0..=MOST_BYTES).contains(bytes))
    });
    bytes.map(|bytes| bytes as u64)
}

/// `save_total_limit`: null, 0 and -1 keep every checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Limit(pub(super) Option<usize>);

impl Parse for Limit {
    const KIND: &'static str = "an integer";

    fn parse(node: &Node) -> Result<Self, Vec<Mismatch>> {
        off_or_count(node, Self::KIND).map(Self)
    }

    fn numbers(&self) -> Vec<f64> {
        self.0.numbers()
    }
}

/// `top_k`: null, 0 and -1 (vLLM's word for it) are off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TopK(pub(super) usize);

impl Parse for TopK {
    const KIND: &'static str = "an integer";

    fn parse(node: &Node) -> Result<Self, Vec<Mismatch>> {
        off_or_count(node, Self::KIND).map(|count| Self(count.unwrap_or(0)))
    }

    fn numbers(&self) -> Vec<f64> {
        vec![self.0 as f64]
    }
}

/// A count, or nothing for null, 0 and -1.
fn off_or_count(node: &Node, kind: &str) -> Result<Option<usize>, Vec<Mismatch>> {
    if node.value == Value::Null {
        return Ok(None);
    }
    match parse_integer(node, kind)? {
        -1 | 0 => Ok(None),
        value => usize::try_from(value)
            .map(Some)
            .map_err(|_| vec![Mismatch::new(node, format!("must be a count, or 0 or -1 for none, got {value}"))]),
    }
}

/// `packing_strategy`, with the name that TRL gave best-fit decreasing before 0.19.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Packing {
    /// What it means.
    pub(super) strategy: PackingStrategy,
    /// Whether the older name was used.
    pub(super) is_old_name: bool,
}

impl Parse for Packing {
    const KIND: &'static str = "one of";
    const VALUES: &'static [&'static str] = PackingStrategy::NAMES;

    fn parse(node: &Node) -> Result<Self, Vec<Mismatch>> {
        let is_old_name = matches!(&node.value, Value::Scalar { text, .. } if text == "ffd");
        let strategy = if is_old_name { PackingStrategy::Bfd } else { PackingStrategy::parse(node)? };
        Ok(Self { strategy, is_old_name })
    }
}

/// When something recurs, before its number of steps is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Recurrence {
    No,
    Steps,
    Epoch,
}

impl Parse for Recurrence {
    const KIND: &'static str = "one of";
    const VALUES: &'static [&'static str] = &["no", "steps", "epoch"];

    fn parse(node: &Node) -> Result<Self, Vec<Mismatch>> {
        Ok(match parse_word(node, Self::VALUES)? {
            "no" => Self::No,
            "steps" => Self::Steps,
            _ => Self::Epoch,
        })
    }
}

/// `save_strategy`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Saving {
    At(Recurrence),
    Best,
}

impl Parse for Saving {
    const KIND: &'static str = "one of";
    const VALUES: &'static [&'static str] = &["no", "steps", "epoch", "best"];

    fn parse(node: &Node) -> Result<Self, Vec<Mismatch>> {
        match parse_word(node, Self::VALUES)? {
            "best" => Ok(Self::Best),
            _ => Recurrence::parse(node).map(Self::At),
        }
    }
}

/// `max_steps`: -1 (or null) leaves the length of the run to `num_train_epochs`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct MaxSteps(pub(super) Option<usize>);

impl Parse for MaxSteps {
    const KIND: &'static str = "an integer, or -1";

    fn parse(node: &Node) -> Result<Self, Vec<Mismatch>> {
        if node.value == Value::Null {
            return Ok(Self(None));
        }
        match parse_integer(node, Self::KIND)? {
            -1 => Ok(Self(None)),
            value => match usize::try_from(value) {
                Ok(steps) if steps > 0 => Ok(Self(Some(steps))),
                _ => Err(vec![
                    Mismatch::new(node, format!("must be at least 1, got {value}"))
                        .help("-1 leaves the length of the run to `num_train_epochs`"),
                ]),
            },
        }
    }

    fn numbers(&self) -> Vec<f64> {
        self.0.numbers()
    }
}

impl Parse for Resume {
    const KIND: &'static str = "true, false, auto or a checkpoint folder";

    fn parse(node: &Node) -> Result<Self, Vec<Mismatch>> {
        match &node.value {
            Value::Null => Ok(Self::No),
            Value::Scalar { text, .. } if !text.is_empty() => Ok(match as_bool(text) {
                Some(true) => Self::Latest,
                Some(false) => Self::No,
                None if text == "auto" => Self::Auto,
                None => Self::Path(PathBuf::from(home::expand(text))),
            }),
            _ => Err(vec![Mismatch::expected(node, Self::KIND)]),
        }
    }
}

impl Parse for DeviceChoice {
    const KIND: &'static str = "auto, cpu, cuda or cuda:N";

    fn parse(node: &Node) -> Result<Self, Vec<Mismatch>> {
        let Value::Scalar { text, .. } = &node.value else { return Err(vec![Mismatch::expected(node, Self::KIND)]) };
        text.parse().map_err(|_: String| vec![Mismatch::expected(node, Self::KIND)])
    }
}

impl std::str::FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            _ => text
                .strip_prefix("cuda:")
                .and_then(|ordinal| ordinal.parse().ok())
                .map(Self::Cuda)
                .ok_or_else(|| format!("expected {}", <Self as Parse>::KIND)),
        }
    }
}

impl Parse for ScaleRewards {
    const KIND: &'static str = "one of";
    const VALUES: &'static [&'static str] = Self::NAMES;

    fn parse(node: &Node) -> Result<Self, Vec<Mismatch>> {
        // TRL takes true for `group` and false for `none`.
        if let Value::Scalar { text, is_quoted: false } = &node.value
            && let Some(is_scaled) = as_bool(text)
        {
            return Ok(if is_scaled { Self::Group } else { Self::None });
        }
        let name = parse_word(node, Self::NAMES)?;
        Ok(name.parse().expect("every name of a choice is read by its from_str"))
    }
}

#[cfg(test)]
#[path = "special_tests.rs"]
mod tests;
