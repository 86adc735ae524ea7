//! Mixtures of data sets: `dataset_mixture` as open-r1 and alignment-handbook have it, `datasets` as TRL has it.

use serde_json::{Map, Value as Json};

use super::settings::{MixturePart, Share};
use super::value::{Mismatch, Parse, json, nearest, valid_values};
use super::yaml::{Node, Value};

/// Keys of an entry: TRL's `DatasetConfig` and open-r1's, which name the same things differently.
const ENTRY_KEYS: &[&str] =
    &["path", "id", "name", "config", "revision", "data_dir", "data_files", "split", "columns", "fraction", "weight"];

/// `dataset_mixture: {datasets, seed, test_split_size}`.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Mixture {
    pub(super) parts: Vec<MixturePart>,
    pub(super) seed: u64,
    pub(super) test_split_size: Option<f64>,
    /// The map as it stands.
    pub(super) text: Map<String, Json>,
}

/// `datasets: [...]`.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Datasets {
    pub(super) parts: Vec<MixturePart>,
    /// The list as it stands.
    pub(super) text: Vec<Json>,
}

impl Parse for Mixture {
    const KIND: &'static str = "a map with `datasets`";

    fn parse(node: &Node) -> Result<Self, Vec<Mismatch>> {
        const KEYS: &[&str] = &["datasets", "seed", "test_split_size"];
        let entries = match &node.value {
            Value::Null => return Ok(Self::default()),
            Value::Map(entries) => entries,
            _ => return Err(vec![Mismatch::expected(node, Self::KIND)]),
        };
        let mut mixture = Self { text: Map::parse(node)?, ..Self::default() };
        for entry in entries {
            match entry.key.as_str() {
                "datasets" => mixture.parts = parts(&entry.node)?,
                "seed" => mixture.seed = u64::parse(&entry.node)?,
                "test_split_size" => mixture.test_split_size = Option::<f64>::parse(&entry.node)?,
                other => {
                    return Err(vec![
                        Mismatch::new(&entry.node, format!("does not know `{other}`")).help(valid_values(other, KEYS)),
                    ]);
                }
            }
        }
        if mixture.parts.is_empty() {
            return Err(vec![Mismatch::new(node, "names no data set").help("add `datasets: [{id: ..., split: ...}]`")]);
        }
        Ok(mixture)
    }
}

impl Parse for Datasets {
    const KIND: &'static str = "a list of maps with `path`";

    fn parse(node: &Node) -> Result<Self, Vec<Mismatch>> {
        match &node.value {
            Value::Null => Ok(Self::default()),
            Value::List(items) if items.is_empty() => Ok(Self::default()),
            Value::List(items) => {
                let text: Result<Vec<Json>, Vec<Mismatch>> = items.iter().map(json).collect();
                Ok(Self { parts: parts(node)?, text: text? })
            }
            _ => Err(vec![Mismatch::expected(node, Self::KIND)]),
        }
    }
}

fn parts(node: &Node) -> Result<Vec<MixturePart>, Vec<Mismatch>> {
    let Value::List(items) = &node.value else { return Err(vec![Mismatch::expected(node, Datasets::KIND)]) };
    let parts: Vec<MixturePart> = items.iter().map(part).collect::<Result<_, _>>()?;
    let counts = |is: fn(&Share) -> bool| parts.iter().filter(|part| is(&part.share)).count();
    let fractions = counts(|share| matches!(share, Share::Fraction(_)));
    if fractions > 0 && fractions < parts.len() {
        return Err(vec![
            Mismatch::new(node, "gives `fraction` for some data sets only")
                .help("give it for all of them or for none; `weight` is the share of a data set's own rows"),
        ]);
    }
    Ok(parts)
}

fn part(node: &Node) -> Result<MixturePart, Vec<Mismatch>> {
    let Value::Map(entries) = &node.value else {
        return Err(vec![Mismatch::expected(node, "a map with `path` or `id`")]);
    };
    let mut part = MixturePart { revision: "main".into(), split: "train".into(), ..MixturePart::default() };
    let positive = |node: &Node| -> Result<Option<f64>, Vec<Mismatch>> {
        match Option::<f64>::parse(node)? {
            Some(number) if number <= 0.0 => {
                Err(vec![Mismatch::new(node, format!("is {number}, expected more than 0"))])
            }
            number => Ok(number),
        }
    };
    for entry in entries {
        let value = &entry.node;
        match entry.key.as_str() {
            "path" | "id" => part.path = String::parse(value)?,
            "name" | "config" => part.config = Option::parse(value)?,
            "revision" => part.revision = String::parse(value)?,
            "data_dir" => part.data_dir = Option::parse(value)?,
            "split" => part.split = String::parse(value)?,
            "columns" => {
                part.columns = if value.value == Value::Null { None } else { Some(Vec::<String>::parse(value)?) };
            }
            "data_files" => part.data_files = data_files(value)?,
            "fraction" => part.share = positive(value)?.map_or(part.share, Share::Fraction),
            "weight" => match positive(value)? {
                Some(weight) if weight > 1.0 => {
                    return Err(vec![
                        Mismatch::new(value, format!("is {weight}; a data set has no more than all of its rows"))
                            .help("give a share up to 1.0"),
                    ]);
                }
                weight => part.share = weight.map_or(part.share, Share::Weight),
            },
            other => {
                let near = nearest(other, ENTRY_KEYS.iter().copied()).unwrap_or("path");
                let wrong = Mismatch::new(value, format!("does not know `{other}` of a data set"));
                return Err(vec![wrong.help(valid_values(near, ENTRY_KEYS))]);
            }
        }
    }
    if part.path.is_empty() {
        return Err(vec![
            Mismatch::new(node, "has a data set without a name")
                .help("add `path` (or `id`): a file, a folder or a hub id"),
        ]);
    }
    Ok(part)
}

/// One pattern, a list of them, or a map of splits.
fn data_files(node: &Node) -> Result<Vec<(String, Vec<String>)>, Vec<Mismatch>> {
    let patterns = |node: &Node| match &node.value {
        Value::List(_) => Vec::<String>::parse(node),
        _ => String::parse(node).map(|pattern| vec![pattern]),
    };
    match &node.value {
        Value::Null => Ok(Vec::new()),
        Value::Map(entries) => entries.iter().map(|entry| Ok((entry.key.clone(), patterns(&entry.node)?))).collect(),
        _ => Ok(vec![("train".into(), patterns(node)?)]),
    }
}
