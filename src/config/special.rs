//! Values that only one or two keys have: target modules, devices, intervals, optimizer names and the like.

use std::path::PathBuf;

use super::home;
use super::settings::{DeviceChoice, PackingStrategy, Projection, ReportTo, Resume, ScaleRewards};
use super::value::{
    Mismatch, Parse, all, as_bool, as_float, describe, listed, parse_integer, parse_word, valid_values,
};
use super::yaml::{Node, Value};

/// Module names of the seven projections and the word for all of them.
const TARGETS: &[&str] = &["all-linear", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

/// What `lora_target_modules` names: sorted, each projection once.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct TargetModules(pub(super) Vec<Projection>);

impl Parse for TargetModules {
    const KIND: &'static str = "one or a list of";
    const VALUES: &'static [&'static str] = TARGETS;

    fn parse(node: &Node) -> Result<Self, Vec<Mismatch>> {
        let items = match &node.value {
            Value::List(items) if !items.is_empty() => items.as_slice(),
            Value::Scalar { .. } => std::slice::from_ref(node),
            _ => {
                let wrong = Mismatch::expected(node, "`all-linear` or a list of module names");
                return Err(vec![wrong.help(format!("valid values: {}", listed(TARGETS)))]);
            }
        };
        if let [Node { value: Value::Scalar { text, .. }, .. }] = items
            && text == "all-linear"
        {
            return Ok(Self(Projection::ALL.to_vec()));
        }
        let mut found = all(items.iter().map(|item| projection(item, items.len())))?;
        found.sort_unstable();
        let distinct = found.len();
        found.dedup();
        if found.len() < distinct {
            return Err(vec![Mismatch::new(node, "names a module twice").help("name each module once")]);
        }
        Ok(Self(found))
    }
}

fn projection(node: &Node, count: usize) -> Result<Projection, Vec<Mismatch>> {
    let Value::Scalar { text, .. } = &node.value else { return Err(vec![Mismatch::expected(node, "a module name")]) };
    if let Some(found) = Projection::ALL.into_iter().find(|projection| projection.name() == text) {
        return Ok(found);
    }
    let what = format!("does not know {}", describe(node));
    let help = match text.as_str() {
        "all-linear" => format!("`all-linear` stands alone; here it is one of {count}"),
        "lm_head" | "embed_tokens" => {
            format!("adapters go on the decoder layers' projections only; {}", valid_values("", TARGETS))
        }
        _ if text.contains(['.', '*', '(', '|', '^', '$']) => {
            format!(
                "patterns and module paths are not supported, a name means it in every layer; {}",
                valid_values("", TARGETS)
            )
        }
        _ => valid_values(text, TARGETS),
    };
    Err(vec![Mismatch::new(node, what).help(help)])
}

/// `optim`: the names transformers has for AdamW, whatever holds its moments. The names of its other optimizers, with which
/// other updates are computed, are errors.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct AdamW(pub(super) &'static str);

impl AdamW {
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
    ];

    fn parse(node: &Node) -> Result<Self, Vec<Mismatch>> {
        let Value::Scalar { text, .. } = &node.value else { return Err(vec![Mismatch::expected(node, "one word")]) };
        if let Some(name) = Self::VALUES.iter().find(|name| *name == text) {
            return Ok(Self(name));
        }
        let help = format!("AdamW is the only optimizer; {}", valid_values("", Self::VALUES));
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
    const KIND: &'static str = "true, false or a checkpoint folder";

    fn parse(node: &Node) -> Result<Self, Vec<Mismatch>> {
        match &node.value {
            Value::Null => Ok(Self::No),
            Value::Scalar { text, .. } if !text.is_empty() => Ok(match as_bool(text) {
                Some(true) => Self::Latest,
                Some(false) => Self::No,
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
mod tests {
    use super::super::yaml;
    use super::*;

    fn read<T: Parse>(text: &str) -> Result<T, Vec<Mismatch>> {
        T::parse(&yaml::parse(text).expect("valid YAML"))
    }

    #[test]
    fn target_modules_are_sorted_names() {
        assert_eq!(read("[v_proj, q_proj]"), Ok(TargetModules(vec![Projection::QProj, Projection::VProj])),);
        for text in ["all-linear", "[all-linear]"] {
            assert_eq!(read(text), Ok(TargetModules(Projection::ALL.to_vec())), "{text}");
        }
        assert_eq!(read("q_proj"), Ok(TargetModules(vec![Projection::QProj])));
        for (text, says) in [
            ("[q_proj, q_proj]", "once"),
            ("[]", "valid values"),
            ("[q_proj, all-linear]", "stands alone"),
            ("[lm_head]", "projections only"),
            ("[\".*q_proj\"]", "patterns"),
            ("[qproj]", "did you mean `q_proj`"),
        ] {
            let wrong = read::<TargetModules>(text).expect_err(text);
            assert!(wrong[0].help.as_ref().is_some_and(|help| help.contains(says)), "{text}: {wrong:?}");
        }
        assert_eq!(read::<TargetModules>("[a, b, q_proj]").expect_err("two unknown names").len(), 2);
    }

    #[test]
    fn names_and_numbers_with_special_meanings() {
        assert_eq!(read("adamw_hf"), Ok(AdamW("adamw_hf")));
        for (text, bytes, is_paged) in [
            ("adamw_torch_fused", None, false),
            ("paged_adamw_32bit", None, true),
            ("paged_adamw_8bit", Some(2), true),
            ("adamw_bnb_8bit", Some(2), false),
            ("adamw_torch_4bit", Some(1), false),
        ] {
            let optim = read::<AdamW>(text).expect(text);
            assert_eq!((optim.promised_bytes(), optim.is_paged()), (bytes, is_paged), "{text}");
        }
        for text in ["adafactor", "galore_adamw", "stable_adamw", "lion_8bit", "schedule_free_adamw", "sgd"] {
            assert!(read::<AdamW>(text).is_err(), "{text}");
        }
        for text in ["none", "[]", "null", "[none]"] {
            assert_eq!(read(text), Ok(Sinks { sinks: vec![], trackers: vec![] }), "{text}");
        }
        let tensorboard = vec![ReportTo::Tensorboard];
        assert_eq!(read("[tensorboard]"), Ok(Sinks { sinks: tensorboard.clone(), trackers: vec![] }));
        for text in ["wandb", "[wandb]", "[wandb, tensorboard]"] {
            assert_eq!(read(text), Ok(Sinks { sinks: tensorboard.clone(), trackers: vec!["wandb"] }), "{text}");
        }
        assert_eq!(read("all"), Ok(Sinks { sinks: tensorboard, trackers: vec!["all"] }));
        for text in ["[none, tensorboard]", "wandbb", "{a: 1}", "[wandb, x]"] {
            assert!(read::<Sinks>(text).is_err(), "{text}");
        }
        for (text, cadence) in [("0.05", Cadence::Share(0.05)), ("1", Cadence::Steps(1)), ("1.0", Cadence::Steps(1))] {
            assert_eq!(read(text), Ok(cadence), "{text}");
        }
        assert!(read::<Cadence>("1.5").is_err() && read::<Cadence>("-0.5").is_err());
        assert_eq!(read("0"), Ok(EvalCadence(None)));
        for (text, count) in [("-1", 0), ("null", 0), ("0", 0), ("50", 50)] {
            assert_eq!(read(text), Ok(TopK(count)), "{text}");
            assert_eq!(read(text), Ok(Limit(Some(count).filter(|count| *count > 0))), "{text}");
        }
        assert!(read::<TopK>("-2").is_err() && read::<TopK>("0.5").is_err());
        assert_eq!(read("no"), Ok(Recurrence::No));
        assert_eq!(read("false"), Ok(Recurrence::No));
        assert!(read::<Recurrence>("best").is_err());
        assert_eq!(read("best"), Ok(Saving::Best));
        assert_eq!(read("false"), Ok(Saving::At(Recurrence::No)));
        assert!(read::<Saving>("better").is_err());
        assert_eq!(read("-1"), Ok(MaxSteps(None)));
        assert_eq!(read("20"), Ok(MaxSteps(Some(20))));
        assert!(read::<MaxSteps>("0").is_err());
        assert!(read::<MaxSteps>("-2").is_err());
        assert_eq!(read("true"), Ok(Resume::Latest));
        assert_eq!(read("~"), Ok(Resume::No));
        assert_eq!(read("out/checkpoint-5"), Ok(Resume::Path("out/checkpoint-5".into())));
        assert_eq!(read("cuda:1"), Ok(DeviceChoice::Cuda(1)));
        assert!(read::<DeviceChoice>("gpu").is_err());
        assert_eq!(read("true"), Ok(ScaleRewards::Group));
        assert_eq!(read("none"), Ok(ScaleRewards::None));
        assert!(read::<ScaleRewards>("std").is_err());
    }
}
