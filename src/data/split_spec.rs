//! Which part of which splits: `train`, `train[:100]`, `train[10%:20%]`, `train_sft+train_gen`.
//!
//! The language of `datasets.ReadInstruction`: bounds are rows or percent, negative ones count from the end, parts are
//! added with `+`.

use std::ops::Range;

use super::Error;

/// One part: a split and what is taken of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) split: String,
    from: Option<i64>,
    to: Option<i64>,
    is_percent: bool,
    /// Percents are multiples of whole hundredths of the rows (`pct1_dropremainder`), not rounded.
    drops_remainder: bool,
}

/// Reads a specification.
///
/// # Errors
/// If it is not written as above.
pub(super) fn parse(text: &str) -> Result<Vec<Part>, Error> {
    let parts: Option<Vec<Part>> = text.split('+').map(|part| one(part.trim())).collect();
    parts.ok_or_else(|| {
        Error::Setting(format!(
            "`{text}` is no split; expected a name, a slice such as `train[:100]` or `train[10%:20%]`, or several added \
             with `+`"
        ))
    })
}

fn one(text: &str) -> Option<Part> {
    let (text, drops_remainder) = match text.strip_suffix(')').and_then(|text| text.rsplit_once('(')) {
        Some((text, "closest")) => (text, false),
        Some((text, "pct1_dropremainder")) => (text, true),
        Some(_) => return None,
        None => (text, false),
    };
    let (split, slice) = match text.strip_suffix(']') {
        Some(text) => text.split_once('[').map(|(split, slice)| (split, Some(slice)))?,
        None => (text, None),
    };
    let is_name = !split.is_empty() && !split.contains(|c: char| "[](){}:%+\"'\\".contains(c) || c.is_whitespace());
    let bound = |text: &str| -> Option<(Option<i64>, bool)> {
        if text.is_empty() {
            return Some((None, false));
        }
        let digits = text.strip_suffix('%');
        Some((Some(digits.unwrap_or(text).replace('_', "").parse().ok()?), digits.is_some()))
    };
    let (from, to) = match slice {
        None => ((None, false), (None, false)),
        Some(slice) => slice.split_once(':').and_then(|(from, to)| Some((bound(from)?, bound(to)?)))?,
    };
    let is_percent = from.1 || to.1;
    let is_large = |bound: Option<i64>| is_percent && bound.is_some_and(|percent| percent.abs() > 100);
    let is_sound = is_name && !is_large(from.0) && !is_large(to.0);
    is_sound.then(|| Part { split: split.into(), from: from.0, to: to.0, is_percent, drops_remainder })
}

impl Part {
    /// The rows that are meant of `count`.
    pub(super) fn range(&self, count: usize) -> Range<usize> {
        let count = count as i64;
        let rows = |bound: i64| match (self.is_percent, self.drops_remainder) {
            (false, _) => bound,
            (true, true) => bound.saturating_mul(count / 100),
            (true, false) => (bound as f64 * count as f64 / 100.0).round_ties_even() as i64,
        };
        let place = |bound: i64| if bound < 0 { (count + bound).max(0) } else { bound.min(count) };
        let from = place(self.from.map_or(0, rows));
        let to = place(self.to.map_or(count, rows)).max(from);
        from as usize..to as usize
    }

    /// Whether it is all of the split.
    pub(super) fn is_whole(&self) -> bool {
        self.from.is_none() && self.to.is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Against `datasets` 5.2: `ReadInstruction.from_spec(spec).to_absolute({"train": n})`.
    #[test]
    fn slices_are_those_of_datasets() {
        let cases = [
            ("train", 7, 0..7),
            ("train[:100]", 7, 0..7),
            ("train[2:5]", 7, 2..5),
            ("train[-3:]", 7, 4..7),
            ("train[:-3]", 7, 0..4),
            ("train[5:2]", 7, 5..5),
            ("train[:50%]", 7, 0..4),
            ("train[:50%]", 5, 0..2),
            ("train[10%:20%]", 1234, 123..247),
            ("train[-10%:]", 55, 49..55),
            ("train[:33%](pct1_dropremainder)", 1050, 0..330),
            ("train[:1_000]", 5000, 0..1000),
            ("train[10%:20]", 50, 5..10),
        ];
        for (text, count, expected) in cases {
            let parts = parse(text).unwrap();
            assert_eq!((parts.len(), parts[0].range(count)), (1, expected), "{text} of {count}");
        }
        let sum = parse("train_sft + train_gen[:2]").unwrap();
        let names: Vec<&str> = sum.iter().map(|part| part.split.as_str()).collect();
        assert_eq!(names, ["train_sft", "train_gen"]);
    }

    #[test]
    fn what_is_no_split_is_an_error() {
        for text in ["", "train[", "train[5]", "train[a:b]", "train[:200%]", "a b", "train+", "train(x)"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
