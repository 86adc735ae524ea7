//! Values that only one or two keys have: target modules, devices, intervals, optimizer names and the like.

use std::path::PathBuf;

use super::settings::{DeviceChoice, Projection, ReportTo, Resume, ScaleRewards};
use super::value::{Mismatch, Parse, all, as_bool, describe, listed, parse_integer, parse_word, valid_values};
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

/// `optim`: the names transformers has for the one optimizer there is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct AdamW;

impl Parse for AdamW {
    const KIND: &'static str = "one of";
    const VALUES: &'static [&'static str] = &["adamw_torch", "adamw_torch_fused", "adamw_hf"];

    fn parse(node: &Node) -> Result<Self, Vec<Mismatch>> {
        let Value::Scalar { text, .. } = &node.value else { return Err(vec![Mismatch::expected(node, "one word")]) };
        if Self::VALUES.contains(&text.as_str()) {
            return Ok(Self);
        }
        let help = if text.contains("8bit") || text.contains("paged") {
            format!(
                "moments are f32 and only those of trained weights exist, so with an adapter they are small; use `{}`",
                Self::VALUES[0]
            )
        } else {
            format!("AdamW is the only optimizer; {}", valid_values("", Self::VALUES))
        };
        Err(vec![Mismatch::new(node, format!("does not know {}", describe(node))).help(help)])
    }
}

/// `report_to`: one name or a list; empty is `none`.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Sinks(pub(super) Vec<ReportTo>);

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
        let sinks = all(items.iter().map(|item| {
            let name = parse_word(item, ReportTo::NAMES).map_err(|wrong| {
                let note = "metrics are always in output_dir/metrics.jsonl as well";
                wrong
                    .into_iter()
                    .map(|w| Mismatch { help: w.help.map(|help| format!("{help}; {note}")), ..w })
                    .collect::<Vec<_>>()
            })?;
            Ok(name.parse::<ReportTo>().expect("every name of a choice is read by its from_str"))
        }))?;
        if sinks.len() > 1 && sinks.contains(&ReportTo::None) {
            return Err(vec![Mismatch::new(node, "holds `none` beside other sinks").help("drop one or the other")]);
        }
        let mut sinks: Vec<_> = sinks.into_iter().filter(|sink| *sink != ReportTo::None).collect();
        sinks.dedup();
        Ok(Self(sinks))
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
    const KIND: &'static str = "an integer, at least 1, or -1";

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
}

impl Parse for Resume {
    const KIND: &'static str = "true, false or a checkpoint folder";

    fn parse(node: &Node) -> Result<Self, Vec<Mismatch>> {
        match &node.value {
            Value::Null => Ok(Self::No),
            Value::Scalar { text, .. } if !text.is_empty() => Ok(match as_bool(text) {
                Some(true) => Self::Latest,
                Some(false) => Self::No,
                None => Self::Path(PathBuf::from(text)),
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
        assert_eq!(read("adamw_hf"), Ok(AdamW));
        assert!(read::<AdamW>("paged_adamw_8bit").is_err());
        assert_eq!(read("none"), Ok(Sinks(vec![])));
        assert_eq!(read("[tensorboard]"), Ok(Sinks(vec![ReportTo::Tensorboard])));
        assert!(read::<Sinks>("wandb").is_err());
        assert!(read::<Sinks>("[none, tensorboard]").is_err());
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
