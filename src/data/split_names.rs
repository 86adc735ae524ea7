//! Which files belong to a split, by their names alone.
//!
//! A file belongs to the split that a folder above it or its own name is: `train/a.jsonl`, `train.jsonl`,
//! `data/train-00000-of-00002.parquet`, `train_1.csv`. Where no name is exactly that, a name that holds the split's word
//! between delimiters counts (`gsm8k_train.jsonl`), as in `datasets`' patterns; but never several variants at once:
//! `train` is neither `train_sft` nor `train_gen`.

use std::collections::BTreeSet;

/// Words that name splits, grouped by meaning; the first is the one that `datasets` uses.
const SPLIT_WORDS: [&[&str]; 3] =
    [&["train", "training"], &["test", "testing", "eval", "evaluation"], &["validation", "valid", "val", "dev"]];

/// Extensions that stand behind a name, all of which are cut off.
const EXTENSIONS: [&str; 11] =
    ["jsonl", "ndjson", "json", "parquet", "arrow", "csv", "tsv", "txt", "gz", "zst", "zstd"];

/// Words that number the files of one split.
const PART_WORDS: [&str; 6] = ["part", "shard", "chunk", "split", "file", "batch"];

/// Files of a split; empty where none belongs to it.
pub(super) fn of_split(files: &[String], split: &str) -> Vec<String> {
    let synonyms = SPLIT_WORDS.iter().find(|words| words.contains(&split)).copied().unwrap_or_default();
    let words: Vec<&str> =
        std::iter::once(split).chain(synonyms.iter().copied().filter(|word| *word != split)).collect();
    let with = |belongs: &dyn Fn(&str) -> bool| -> Vec<String> {
        files.iter().filter(|file| parts(file).any(belongs)).cloned().collect()
    };
    for word in &words {
        for exact in
            [&(|part: &str| part == *word) as &dyn Fn(&str) -> bool, &|part| unsharded(part) == *word, &|part| {
                unnumbered(unsharded(part)) == *word
            }]
        {
            let found = with(exact);
            if !found.is_empty() {
                return found;
            }
        }
    }
    for word in &words {
        let found = with(&|part| variant(part, word).is_some());
        let variants: BTreeSet<String> =
            found.iter().flat_map(|file| parts(file).filter_map(|part| variant(part, word))).collect();
        // A name with a shard's number is a split's own name.
        let is_other_split = found.iter().any(|file| {
            parts(file).any(|part| part != unsharded(part) && variant(part, word).is_some_and(|v| !v.is_empty()))
        });
        if variants.len() == 1 && !is_other_split {
            return found;
        }
    }
    Vec::new()
}

/// Whether a file's path names a split at all.
pub(super) fn names_a_split(file: &str) -> bool {
    SPLIT_WORDS.iter().flat_map(|words| words.iter()).any(|word| parts(file).any(|part| variant(part, word).is_some()))
}

/// The name of the split that a file seems to belong to, for messages.
pub(super) fn label(file: &str) -> Option<String> {
    let is_named =
        |part: &&str| SPLIT_WORDS.iter().flat_map(|words| words.iter()).any(|word| variant(part, word).is_some());
    parts(file).find(is_named).map(|part| unnumbered(unsharded(part)).to_string())
}

/// The parts of a path that may name a split: folders, and the file name without its extensions.
fn parts(file: &str) -> impl Iterator<Item = &str> {
    let mut stem = file;
    while let Some((rest, extension)) = stem.rsplit_once('.') {
        if !EXTENSIONS.contains(&extension.to_lowercase().as_str()) {
            break;
        }
        stem = rest;
    }
    stem.split('/')
}

/// `train-00000-of-00003` and `train-00000-of-00003-0123abcd` without their number.
fn unsharded(part: &str) -> &str {
    let is_number = |text: &str| text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit());
    let at = part.match_indices("-of-").find(|&(at, _)| {
        let before = at.checked_sub(6).and_then(|start| part.get(start..at));
        before.is_some_and(|text| text.starts_with('-') && is_number(&text[1..]))
            && part.get(at + 4..at + 9).is_some_and(is_number)
    });
    at.map_or(part, |(at, _)| &part[..at - 6])
}

/// `train_1`, `train-part2`, `train.shard_003` without their number.
fn unnumbered(part: &str) -> &str {
    let stem = part.trim_end_matches(|c: char| c.is_ascii_digit());
    if stem == part || stem.is_empty() {
        return part;
    }
    let stem = stem.trim_end_matches(is_delimiter);
    let word = PART_WORDS.iter().find_map(|word| stem.strip_suffix(word).filter(|rest| rest.ends_with(is_delimiter)));
    word.unwrap_or(stem).trim_end_matches(is_delimiter)
}

/// What separates words of a name, in `datasets`' patterns.
fn is_delimiter(c: char) -> bool {
    matches!(c, '-' | '.' | '_' | ' ') || c.is_ascii_digit()
}

/// If `word` stands in `part` between delimiters: the words behind it, without numbers.
fn variant(part: &str, word: &str) -> Option<String> {
    let part = unsharded(part);
    let is_border = |c: Option<char>| c.is_none_or(is_delimiter);
    let at = part
        .match_indices(word)
        .map(|(at, _)| at)
        .find(|&at| is_border(part[..at].chars().next_back()) && is_border(part[at + word.len()..].chars().next()))?;
    let behind = part[at + word.len()..].split(is_delimiter);
    Some(behind.filter(|word| !word.is_empty() && !PART_WORDS.contains(word)).collect::<Vec<_>>().join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(names: &[&str]) -> Vec<String> {
        names.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn splits_are_found_in_file_names_and_folders() {
        let cases: [(&[&str], &str, &[&str]); 19] = [
            (
                &["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"],
                "train",
                &["data/train-00000-of-00001.parquet"],
            ),
            (&["data/train-00000-of-00001-0a1b.parquet"], "train", &["data/train-00000-of-00001-0a1b.parquet"]),
            (&["train/a.jsonl", "test/a.jsonl"], "test", &["test/a.jsonl"]),
            (
                &["train_sft-0.parquet", "train_gen-0.parquet", "test_sft-0.parquet"],
                "train_sft",
                &["train_sft-0.parquet"],
            ),
            (&["train.jsonl", "train_extra.jsonl"], "train", &["train.jsonl"]),
            (&["gsm8k_train.jsonl", "gsm8k_test.jsonl"], "train", &["gsm8k_train.jsonl"]),
            (&["gsm8k_train.jsonl", "math_train.jsonl"], "train", &["gsm8k_train.jsonl", "math_train.jsonl"]),
            (&["trained.jsonl", "contest.jsonl"], "test", &[]),
            (&["val.json", "train.json"], "validation", &["val.json"]),
            (&["dev.csv.gz", "train.csv.gz"], "validation", &["dev.csv.gz"]),
            (&["part1.jsonl", "part2.jsonl"], "train", &[]),
            (&["my.train.jsonl"], "train", &["my.train.jsonl"]),
            (&["train_0.csv", "train_1.csv", "test_0.csv"], "train", &["train_0.csv", "train_1.csv"]),
            (&["train-part1.jsonl", "train-part2.jsonl"], "train", &["train-part1.jsonl", "train-part2.jsonl"]),
            (
                &["default/train_sft/0000.parquet", "default/train_gen/0000.parquet"],
                "train_gen",
                &["default/train_gen/0000.parquet"],
            ),
            (&["train_v2.jsonl", "test_v2.jsonl"], "train", &["train_v2.jsonl"]),
            (&["data/part-00000-of-00002.parquet"], "part", &["data/part-00000-of-00002.parquet"]),
            (&["eval/x.jsonl"], "test", &["eval/x.jsonl"]),
            (&["sub/training.jsonl"], "train", &["sub/training.jsonl"]),
        ];
        for (files, split, expected) in cases {
            assert_eq!(of_split(&strings(files), split), strings(expected), "{files:?} {split}");
        }
    }

    #[test]
    fn a_split_never_takes_in_several_variants_nor_a_split_with_its_own_name() {
        let cases: [&[&str]; 6] = [
            &["data/train_sft-00000-of-00001.jsonl", "data/train_gen-00000-of-00001.jsonl"],
            &["train_sft.jsonl", "train_gen.jsonl"],
            &["train_sft/a.jsonl", "train_gen/a.jsonl"],
            &["x/train.sft.parquet", "x/train.gen.parquet"],
            &["train-en.jsonl", "train-de.jsonl"],
            &["data/train_sft-00000-of-00001.parquet", "data/test_sft-00000-of-00001.parquet"],
        ];
        for files in cases {
            assert_eq!(of_split(&strings(files), "train"), strings(&[]), "{files:?}");
            assert!(files.iter().all(|file| names_a_split(file)));
        }
        assert_eq!(label("data/train_sft-00000-of-00001.jsonl").as_deref(), Some("train_sft"));
        assert_eq!(label("train/part1.jsonl").as_deref(), Some("train"));
        assert_eq!(label("notes.jsonl"), None);
    }
}
