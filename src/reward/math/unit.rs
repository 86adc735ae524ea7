//! Units: what a value measures or counts, and how much of the base unit it is.

use std::collections::{BTreeMap, BTreeSet};

use num_bigint::BigInt;
use num_rational::BigRational;
use num_traits::One;

/// A product of powers of base units with a factor, and whatever else is counted.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Unit {
    /// How many of the base units one of it is.
    pub(super) factor: BigRational,
    /// The exponent of each base unit.
    powers: BTreeMap<&'static str, i32>,
    /// Words that are no units, as in `5 apples`, singular and in lower case.
    nouns: BTreeSet<String>,
    /// What was written, where each name is one letter: `m/s` may also be a product of variables.
    letters: Option<Vec<(String, i32)>>,
}

/// Names, base unit, and the factor to it as a fraction.
type Row = (&'static [&'static str], &'static str, (i64, i64));

const UNITS: &[Row] = &[
    (&["m", "meter", "metre"], "m", (1, 1)),
    (&["cm", "centimeter", "centimetre"], "m", (1, 100)),
    (&["mm", "millimeter", "millimetre"], "m", (1, 1000)),
    (&["dm", "decimeter", "decimetre"], "m", (1, 10)),
    (&["km", "kilometer", "kilometre"], "m", (1000, 1)),
    (&["nm", "nanometer", "nanometre"], "m", (1, 1_000_000_000)),
    (&["inch", "inches"], "m", (254, 10_000)),
    (&["ft", "foot", "feet"], "m", (3048, 10_000)),
    (&["yd", "yard"], "m", (9144, 10_000)),
    (&["mi", "mile"], "m", (1_609_344, 1000)),
    (&["kg", "kilogram", "kilo"], "kg", (1, 1)),
    (&["g", "gm", "gram", "gramme"], "kg", (1, 1000)),
    (&["mg", "milligram"], "kg", (1, 1_000_000)),
    (&["lb", "lbs", "pound"], "kg", (45_359_237, 100_000_000)),
    (&["oz", "ounce"], "kg", (45_359_237, 1_600_000_000)),
    (&["s", "sec", "second"], "s", (1, 1)),
    (&["ms", "millisecond"], "s", (1, 1000)),
    (&["min", "mins", "minute"], "s", (60, 1)),
    (&["h", "hr", "hrs", "hour"], "s", (3600, 1)),
    (&["day"], "s", (86_400, 1)),
    (&["week"], "s", (604_800, 1)),
    (&["month"], "month", (1, 1)),
    (&["yr", "yrs", "year"], "month", (12, 1)),
    (&["L", "l", "liter", "litre"], "litre", (1, 1)),
    (&["mL", "ml", "milliliter", "millilitre"], "litre", (1, 1000)),
    (&["gallon", "gal"], "gallon", (1, 1)),
    (&["quart"], "gallon", (1, 4)),
    (&["pint"], "gallon", (1, 8)),
    (&["dollar", "USD", "usd", "buck"], "dollar", (1, 1)),
    (&["cent"], "dollar", (1, 100)),
    (&["euro", "EUR", "eur"], "euro", (1, 1)),
    (&["GBP", "gbp"], "sterling", (1, 1)),
    (&["yuan", "RMB", "CNY", "元", "块"], "yuan", (1, 1)),
    (&["yen", "JPY"], "yen", (1, 1)),
    (&["rupee", "INR", "Rs"], "rupee", (1, 1)),
    (&["won", "KRW"], "won", (1, 1)),
    (&["rad", "radian"], "radian", (1, 1)),
    (&["N", "newton"], "newton", (1, 1)),
    (&["J", "joule"], "joule", (1, 1)),
    (&["kJ", "kilojoule"], "joule", (1000, 1)),
    (&["W", "watt"], "watt", (1, 1)),
    (&["kW", "kilowatt"], "watt", (1000, 1)),
    (&["V", "volt"], "volt", (1, 1)),
    (&["A", "amp", "ampere"], "ampere", (1, 1)),
    (&["mA", "milliampere"], "ampere", (1, 1000)),
    (&["ohm", "Ω"], "ohm", (1, 1)),
    (&["Hz", "hertz"], "hertz", (1, 1)),
    (&["kHz", "kilohertz"], "hertz", (1000, 1)),
    (&["MHz", "megahertz"], "hertz", (1_000_000, 1)),
    (&["Pa", "pascal"], "pascal", (1, 1)),
    (&["kPa", "kilopascal"], "pascal", (1000, 1)),
    (&["mol", "mole"], "mole", (1, 1)),
    (&["K", "kelvin"], "kelvin", (1, 1)),
    (&["celsius"], "celsius", (1, 1)),
    (&["fahrenheit"], "fahrenheit", (1, 1)),
    (&["unit"], "unit", (1, 1)),
];

/// Names that are a quotient of units.
const QUOTIENTS: &[(&str, &str, &str)] = &[
    ("mph", "mi", "h"),
    ("kmh", "km", "h"),
    ("kph", "km", "h"),
    ("kmph", "km", "h"),
    ("mps", "m", "s"),
    ("fps", "ft", "s"),
];

/// Words between or after units that say nothing about the value.
const EMPTY_WORDS: &[&str] =
    &["of", "the", "a", "an", "in", "total", "altogether", "all", "each", "her", "his", "their"];

/// Words that make something else of the value before them than so many of a thing.
const CHANGING_WORDS: &[&str] = &[
    "not",
    "no",
    "isn",
    "isnt",
    "is",
    "are",
    "was",
    "were",
    "be",
    "or",
    "and",
    "maybe",
    "perhaps",
    "possibly",
    "probably",
    "might",
    "may",
    "could",
    "can",
    "if",
    "but",
    "except",
    "excluding",
    "wrong",
    "incorrect",
    "false",
    "true",
    "correct",
    "right",
    "never",
    "than",
    "plus",
    "minus",
    "times",
    "about",
    "around",
    "approximately",
    "roughly",
    "almost",
    "nearly",
    "at",
    "least",
    "most",
    "else",
    "either",
    "neither",
    "nor",
    "where",
    "when",
    "for",
    "unless",
    "then",
    "instead",
    "rather",
    "mod",
    "modulo",
    "base",
    "choose",
    "to",
    "through",
    "between",
    "from",
    "unknown",
    "undefined",
    "infinity",
    "error",
    "guess",
    "which",
    "without",
    "with",
    "divided",
    "multiplied",
    "over",
    "because",
    "since",
    "so",
    "thus",
    "also",
    "hundred",
    "thousand",
    "million",
    "billion",
    "trillion",
    "dozen",
    "half",
    "percent",
    "answer",
    "equals",
    "equal",
    "alternatively",
    "otherwise",
    "until",
    "unlike",
    "any",
    "some",
    "every",
    "as",
    "only",
    "that",
    "this",
    "we",
    "it",
    "he",
    "she",
    "they",
    "i",
];

/// What a word does to the value before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sense {
    /// Nothing.
    Empty,
    /// It may change the value: with such a word a text is no value with a unit.
    Changing,
    /// It names a unit or a thing.
    Naming,
}

/// The sense of a word after a value.
pub(super) fn sense(word: &str) -> Sense {
    let lower = word.to_lowercase();
    if lower.ends_with("n't") || CHANGING_WORDS.contains(&lower.as_str()) {
        Sense::Changing
    } else if EMPTY_WORDS.contains(&lower.as_str()) {
        Sense::Empty
    } else {
        Sense::Naming
    }
}

/// How often a word multiplies the number before it: `2 million`.
pub(super) fn multiplier(word: &str) -> Option<i64> {
    Some(match word.to_lowercase().as_str() {
        "dozen" => 12,
        "hundred" => 100,
        "thousand" => 1000,
        "million" => 1_000_000,
        "billion" => 1_000_000_000,
        "trillion" => 1_000_000_000_000,
        _ => return None,
    })
}

/// Whether a single letter is the usual sign of a unit.
pub(super) fn is_unit_letter(word: &str) -> bool {
    matches!(word, "m" | "s" | "g" | "h" | "L" | "N" | "J" | "W" | "V")
}

/// Whether `word` is a unit of the table, however short.
pub(super) fn is_known(word: &str) -> bool {
    row(word).is_some() || QUOTIENTS.iter().any(|(name, ..)| *name == word)
}

fn row(word: &str) -> Option<&'static Row> {
    let singular = |name: &str| word == name || (name.chars().count() > 2 && is_plural_of(&word.to_lowercase(), name));
    UNITS.iter().find(|(names, ..)| names.iter().any(|n| singular(n)))
}

fn is_plural_of(word: &str, name: &str) -> bool {
    word == name || word.strip_suffix('s') == Some(name)
}

impl Unit {
    /// No unit at all.
    pub(super) fn none() -> Self {
        Self { factor: BigRational::one(), powers: BTreeMap::new(), nouns: BTreeSet::new(), letters: None }
    }

    /// A unit of the table, by name.
    pub(super) fn named(name: &str) -> Self {
        let mut unit = Self::none();
        unit.multiply(name, 1);
        unit
    }

    /// Multiplies by a power of what `word` names.
    pub(super) fn multiply(&mut self, word: &str, exponent: i32) {
        if let Some((_, above, below)) = QUOTIENTS.iter().find(|(name, ..)| *name == word) {
            self.multiply(above, exponent);
            self.multiply(below, -exponent);
            self.letters = None;
            return;
        }
        let Some((_, base, (above, below))) = row(word) else {
            let word = word.to_lowercase();
            let singular = if word.len() > 3 && !word.ends_with("ss") { word.trim_end_matches('s') } else { &word };
            self.nouns.insert(singular.to_owned());
            self.letters = None;
            return;
        };
        let is_first = self.powers.is_empty() && self.nouns.is_empty();
        match &mut self.letters {
            Some(letters) if word.chars().count() == 1 => letters.push((word.to_owned(), exponent)),
            None if is_first && word.chars().count() == 1 => self.letters = Some(vec![(word.to_owned(), exponent)]),
            letters => *letters = None,
        }
        self.factor *= BigRational::new(BigInt::from(*above), BigInt::from(*below)).pow(exponent);
        let power = self.powers.entry(base).or_insert(0);
        *power += exponent;
        if *power == 0 {
            self.powers.remove(base);
        }
    }

    /// Whether both measure the same thing, so that values can be compared in base units.
    pub(super) fn is_same_kind(&self, other: &Self) -> bool {
        let is_noun_shared = self.nouns.is_empty() || other.nouns.is_empty() || !self.nouns.is_disjoint(&other.nouns);
        self.powers == other.powers && is_noun_shared
    }

    /// Whether it is a measure of the table, not only words.
    pub(super) fn is_measure(&self) -> bool {
        !self.powers.is_empty()
    }

    /// The letters it was written with and their exponents, if it was.
    pub(super) fn letters(&self) -> Option<&[(String, i32)]> {
        self.letters.as_deref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_know_their_kind_and_factor() {
        let cm = Unit::named("cm");
        assert!(cm.is_same_kind(&Unit::named("metres")) && cm.is_same_kind(&Unit::named("feet")));
        assert!(!cm.is_same_kind(&Unit::named("kg")) && !cm.is_same_kind(&Unit::named("apples")));
        assert!(Unit::named("apple").is_same_kind(&Unit::named("Apples")));
        assert!(!Unit::named("apples").is_same_kind(&Unit::named("oranges")));
        let mut speed = Unit::named("km");
        speed.multiply("hour", -1);
        assert!(speed.is_same_kind(&Unit::named("mph")) && speed.factor == BigRational::new(5.into(), 18.into()));
        assert_eq!(sense("apples"), Sense::Naming);
        assert_eq!(sense("isn't"), Sense::Changing);
    }
}
