//! Several data sets read as one.
//!
//! Two forms: open-r1's draws a share of each data set's rows at random and shuffles all of them (`open_r1/utils/data.py`,
//! `get_dataset`); TRL's takes all rows, or the first ones in given proportions, one data set after the other
//! (`trl/scripts/utils.py`, `get_dataset`).

use serde::{Deserialize, Serialize};

use super::Error;
use super::hub::{Access, Progress};
use super::rows::Dataset;
use super::source::{Source, Wanted};
use crate::config::settings::{MixturePart, MixtureSettings, Share};
use crate::rng::Stream;

/// What a run read from one data set, for the plan.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// Name and split, e.g. `open-thoughts/x train[:10%]`.
    pub name: String,
    /// Rows taken.
    pub taken: usize,
    /// Rows there were.
    pub available: usize,
}

/// Reads all parts and puts them together.
///
/// # Errors
/// If a part cannot be read, or nothing is taken of it.
pub(super) fn load(settings: &MixtureSettings, progress: &mut Progress<'_>) -> Result<(Dataset, Vec<Part>), Error> {
    let mut read = Vec::new();
    for part in &settings.parts {
        read.push(read_part(part, progress)?);
    }
    let available: Vec<usize> = read.iter().map(Dataset::len).collect();
    let counts = counts(settings, &available)?;
    let mut parts = Vec::new();
    let mut taken = Vec::new();
    for (index, (rows, part)) in read.into_iter().zip(&settings.parts).enumerate() {
        let count = counts[index];
        let rows = match part.share {
            Share::All => rows,
            Share::Fraction(_) => rows.slice(0..count),
            Share::Weight(_) => {
                let mut order: Vec<usize> = (0..rows.len()).collect();
                Stream::new(settings.seed, "mixture part", index as u64, 0).shuffle(&mut order);
                rows.pick(&order[..count])
            }
        };
        parts.push(Part { name: format!("{} {}", part.path, part.split), taken: count, available: available[index] });
        taken.push(rows);
    }
    let mut all = Dataset::concat(taken);
    if settings.is_shuffled {
        let mut order: Vec<usize> = (0..all.len()).collect();
        Stream::new(settings.seed, "mixture", 0, 0).shuffle(&mut order);
        all = all.pick(&order);
    }
    Ok((all, parts))
}

fn read_part(part: &MixturePart, progress: &mut Progress<'_>) -> Result<Dataset, Error> {
    let wanted = Wanted {
        name: &part.path,
        config: part.config.as_deref(),
        revision: &part.revision,
        folder: part.data_dir.as_deref(),
        data_files: &part.data_files,
        key: "path",
    };
    let mut source = Source::locate(wanted, Access::from_environment(), progress)?;
    let mut rows = source.read(&part.split, "split", progress)?;
    if let Some(columns) = &part.columns {
        rows.keep_columns(columns)?;
    }
    Ok(rows)
}

/// How many rows are taken of each part.
fn counts(settings: &MixtureSettings, available: &[usize]) -> Result<Vec<usize>, Error> {
    let parts = settings.parts.iter().zip(available);
    let fractions =
        || settings.parts.iter().filter_map(|p| if let Share::Fraction(f) = p.share { Some(f) } else { None });
    let sum: f64 = fractions().sum();
    // The largest mixture in which no part gives more rows than it has.
    let total = fractions()
        .zip(available)
        .map(|(fraction, &rows)| rows as f64 / (fraction / sum))
        .fold(f64::INFINITY, f64::min);
    let counts = parts.map(|(part, &rows)| {
        let count = match part.share {
            Share::All => rows,
            Share::Weight(weight) => (rows as f64 * weight) as usize,
            Share::Fraction(fraction) => ((fraction / sum * total).round_ties_even() as usize).min(rows),
        };
        if count == 0 {
            let share = if let Share::Weight(share) | Share::Fraction(share) = part.share { share } else { 1.0 };
            return Err(Error::Setting(format!(
                "the mixture takes no row of `{}` {}: {share} of {rows} rows; raise its share or leave it out",
                part.path, part.split
            )));
        }
        Ok(count)
    });
    counts.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(folder: &std::path::Path, name: &str, rows: usize) -> String {
        let path = folder.join(name);
        let lines: Vec<String> = (0..rows).map(|i| format!("{{\"text\": \"{name} {i}\", \"other\": {i}}}")).collect();
        std::fs::write(&path, lines.join("\n")).unwrap();
        path.to_string_lossy().into_owned()
    }

    fn mixture(parts: Vec<(String, &str, Share)>, is_shuffled: bool, seed: u64) -> MixtureSettings {
        let part = |(path, split, share): (String, &str, Share)| MixturePart {
            path,
            split: split.into(),
            share,
            columns: Some(vec!["text".into()]),
            ..MixturePart::default()
        };
        MixtureSettings {
            parts: parts.into_iter().map(part).collect(),
            seed,
            is_shuffled,
            test_split_size: None,
            text: ("datasets", String::new()),
        }
    }

    fn texts(settings: &MixtureSettings) -> Vec<String> {
        let (rows, _) = load(settings, &mut |_| {}).unwrap();
        rows.rows().iter().map(|row| row["text"].as_str().unwrap().to_string()).collect()
    }

    #[test]
    fn weights_draw_rows_by_the_seed_and_all_rows_are_shuffled() {
        let folder = tempfile::tempdir().unwrap();
        let (a, b) = (write(folder.path(), "a.jsonl", 100), write(folder.path(), "b.jsonl", 10));
        let with = |seed| {
            mixture(vec![(a.clone(), "train", Share::Weight(0.25)), (b.clone(), "train", Share::All)], true, seed)
        };
        let (rows, parts) = load(&with(7), &mut |_| {}).unwrap();
        let counts: Vec<(usize, usize)> = parts.iter().map(|part| (part.taken, part.available)).collect();
        assert_eq!((rows.len(), counts), (35, vec![(25, 100), (10, 10)]));
        assert_eq!(rows.columns(), ["text"]);
        assert!(rows.place(0).contains(".jsonl`, line "), "{}", rows.place(0));
        let (once, again, other) = (texts(&with(7)), texts(&with(7)), texts(&with(8)));
        assert_eq!(once, again);
        assert_ne!(once, other);
        let distinct: std::collections::BTreeSet<&String> = once.iter().collect();
        assert_eq!(distinct.len(), 35, "no row comes twice");
        assert!(!once[..25].iter().all(|text| text.starts_with('a')), "the parts are shuffled together");
    }

    #[test]
    fn fractions_are_shares_of_the_mixture_and_parts_follow_one_another() {
        let folder = tempfile::tempdir().unwrap();
        let (a, b) = (write(folder.path(), "a.jsonl", 100), write(folder.path(), "b.jsonl", 10));
        let parts = vec![(a.clone(), "train", Share::Fraction(3.0)), (b.clone(), "train", Share::Fraction(1.0))];
        let found = texts(&mixture(parts, false, 1));
        let expected: Vec<String> =
            (0..30).map(|i| format!("a.jsonl {i}")).chain((0..10).map(|i| format!("b.jsonl {i}"))).collect();
        assert_eq!(found, expected);
        let sliced = mixture(vec![(a, "train[:2]+train[-1:]", Share::All), (b, "train[:10%]", Share::All)], false, 1);
        assert_eq!(texts(&sliced), ["a.jsonl 0", "a.jsonl 1", "a.jsonl 99", "b.jsonl 0"]);
    }

    #[test]
    fn a_format_with_files_and_files_of_a_folder_are_read() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), "a1.jsonl", 2);
        write(folder.path(), "a2.jsonl", 3);
        write(folder.path(), "b.jsonl", 4);
        let files = |split: &str, pattern: String| vec![(split.to_string(), vec![pattern])];
        let pattern = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
        let rows = |path: &str, data_files, split: &str| {
            let mut settings = mixture(vec![(path.to_string(), split, Share::All)], false, 1);
            settings.parts[0].data_files = data_files;
            load(&settings, &mut |_| {}).map(|(rows, _)| rows.len()).map_err(|e| e.to_string())
        };
        assert_eq!(rows("json", files("train", pattern("a*.jsonl")), "train"), Ok(5));
        assert_eq!(rows("json", files("test", pattern("b.jsonl")), "test[:50%]"), Ok(2));
        let name = folder.path().to_string_lossy().into_owned();
        assert_eq!(rows(&name, files("train", "a[12].jsonl".into()), "train"), Ok(5));
        for (path, data_files, split, words) in [
            ("json", Vec::new(), "train", "is a format, not a data set"),
            ("json", files("train", pattern("c*.jsonl")), "train", "has no file"),
            ("json", files("train", "https://example.org/a.jsonl".into()), "train", "addresses are not read"),
            ("json", files("train", pattern("b.jsonl")), "test", "its splits are `train`"),
        ] {
            let text = rows(path, data_files, split).unwrap_err();
            assert!(text.contains(words), "{text}");
        }
    }

    #[test]
    fn what_takes_nothing_or_keeps_columns_that_are_not_there_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let a = write(folder.path(), "a.jsonl", 3);
        let text = load(&mixture(vec![(a.clone(), "train", Share::Weight(0.1))], true, 1), &mut |_| {}).unwrap_err();
        assert!(text.to_string().contains("takes no row of"), "{text}");
        let mut settings = mixture(vec![(a, "train", Share::All)], false, 1);
        settings.parts[0].columns = Some(vec!["messages".into()]);
        let text = load(&settings, &mut |_| {}).unwrap_err().to_string();
        assert!(text.contains("column `messages` (`columns`) not found; the columns are `text`, `other`"), "{text}");
    }
}
