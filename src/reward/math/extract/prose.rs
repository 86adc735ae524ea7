//! Answers in sentences: after "the answer is" or `####`, or the last formula or number.

use std::sync::LazyLock;

use fancy_regex::{Match, Regex};

use crate::reward::math::Answer;

/// Longest tail of a text that is searched, in bytes.
const TAIL: usize = 4000;

/// The answer of a text without boxes and tags.
pub(super) fn answer(text: &str) -> Option<String> {
    match announced(text) {
        Announced::Statement(sentence) => statement(sentence),
        Announced::Denied => None,
        Announced::Nothing => short_line(text).or_else(|| last_expression(tail(text))),
    }
}

static ANNOUNCED: LazyLock<Regex> = LazyLock::new(|| {
    let words = r"\b(?:answer|option|choice)\b\**\s*(?:is|are|:|=|\*\*:)\s*(?:\*\*)?\s*:?";
    let chinese = r"答案\s*(?:应该|应当)?\s*(?:是|为|不是|不为)?\s*:?";
    Regex::new(&format!("(?i)(?:####|{words}|{chinese})[ \\t]*"))
        .expect("the pattern is a constant that a test compiles")
});

static DOUBTED: LazyLock<Regex> = LazyLock::new(|| {
    let pattern = r"(?i)(?:\bnot|n't|\bnever|\bdoubt|\bunlikely)\s+(?:\w+\s+){0,2}(?:the\s+)?(?:\w+\s+)?$";
    Regex::new(pattern).expect("the pattern is a constant that a test compiles")
});

/// What a text announces as its answer.
enum Announced<'a> {
    Nothing,
    /// Only what the answer is not.
    Denied,
    /// The sentence after the announcement.
    Statement(&'a str),
}

/// What follows the last "the answer is", "Answer:" or `####`.
fn announced(text: &str) -> Announced<'_> {
    let tail = tail(text);
    let Some(found) = ANNOUNCED.find_iter(tail).flatten().last() else { return Announced::Nothing };
    let is_denied = found.as_str().contains("不是") || found.as_str().contains("不为");
    if is_denied || DOUBTED.is_match(&tail[..found.start()]).unwrap_or(true) {
        return Announced::Denied;
    }
    let rest = tail[found.end()..].trim_start();
    let line = rest.lines().next().map_or(rest, str::trim);
    let end = [". ", "。", "! "].iter().filter_map(|stop| line.find(stop)).min().unwrap_or(line.len());
    if line[..end].trim().is_empty() { Announced::Nothing } else { Announced::Statement(&line[..end]) }
}

/// The answer that a sentence or a part of one states.
pub(super) fn statement(sentence: &str) -> Option<String> {
    // What explains the answer, or says what it is not, is cut off.
    const CUTS: &[&str] = &[
        ", not ",
        " (not ",
        " rather than ",
        " instead of ",
        " because ",
        " since ",
        ", since ",
        ", as ",
        ", which ",
        ", where ",
        ", so ",
        " (since ",
        " (because ",
    ];
    let sentence = sentence.trim();
    if is_answer(sentence) {
        return Some(sentence.to_owned());
    }
    let cut = CUTS.iter().filter_map(|c| sentence.find(c)).min().map(|at| sentence[..at].trim());
    if let Some(cut) = cut.filter(|c| !c.is_empty()) {
        return statement(cut);
    }
    let lines: Vec<&str> = sentence.lines().map(str::trim).filter(|l| !l.is_empty()).collect();
    if lines.len() > 1 {
        return answer(sentence);
    }
    if is_open(sentence) || is_denying(sentence) {
        return None;
    }
    if let Some(formula) = formula(sentence) {
        return is_answer(formula).then(|| formula.to_owned());
    }
    let numbers: Vec<Match<'_>> = NUMBER.find_iter(sentence).flatten().collect();
    match numbers.as_slice() {
        [] => (!sentence.is_empty()).then(|| sentence.to_owned()),
        // Words around a number, as in "the answer is that he has 12 apples left".
        [one] => Some(with_unit(sentence, one)),
        // `15 dollars for 3 tickets`
        [first, ..] if first.start() == 0 && sentence[first.end()..].trim_start().starts_with(char::is_alphabetic) => {
            Some(with_unit(sentence, first))
        }
        _ => None,
    }
}

/// Whether a text is mathematics or a letter as it stands.
fn is_answer(text: &str) -> bool {
    Answer::parse(text).is_ok_and(|a| a.is_mathematics() || a.is_choice())
}

/// The whole text, if it is one short line that is mathematics.
fn short_line(text: &str) -> Option<String> {
    const LONGEST: usize = 200;
    let line = text.trim();
    let is_short = !line.is_empty() && line.len() <= LONGEST && !line.contains('\n');
    (is_short && is_answer(line)).then(|| line.to_owned())
}

fn words(text: &str) -> impl Iterator<Item = String> {
    text.split(|c: char| !c.is_alphanumeric() && c != '\'').filter(|w| !w.is_empty()).map(str::to_lowercase)
}

/// Whether words leave open what the answer is.
fn is_open(sentence: &str) -> bool {
    const OPEN: &[&str] =
        &["or", "maybe", "perhaps", "possibly", "probably", "either", "might", "could", "unsure", "guess"];
    words(sentence).any(|w| OPEN.contains(&w.as_str())) || sentence.contains('?')
}

fn is_denying(sentence: &str) -> bool {
    words(sentence)
        .any(|w| matches!(w.as_str(), "not" | "never" | "neither" | "nor" | "cannot" | "wrong") || w.ends_with("n't"))
        || ["不是", "不等于", "≠", "\\ne"].iter().any(|sign| sentence.contains(sign))
}

static NUMBER: LazyLock<Regex> = LazyLock::new(|| {
    // A sign is one only where no letter, digit or bracket stands before it.
    let sign = r"(?:(?<![\w)\]}])[-+−])?";
    let digits = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+)";
    let tail = r"(?:[eE][-+]?[0-9]+\b)?(?:[ \t]*/[ \t]*[0-9]+)?(?:[ \t]*\\?%)?";
    let pattern = &format!("{sign}{digits}{tail}");
    Regex::new(pattern).expect("the pattern is a constant that a test compiles")
});

/// The number with the sign of money before it and the measure after it, if they are there.
fn with_unit(text: &str, number: &Match<'_>) -> String {
    const MOST_WORDS: usize = 4;
    let money = text[..number.start()].chars().next_back().filter(|c| matches!(c, '£' | '€' | '¥' | '₹'));
    let start = number.start() - money.map_or(0, char::len_utf8);
    if money.is_some() {
        return text[start..number.end()].trim().to_owned();
    }
    let after = &text[number.end()..];
    let stop = after
        .find(|c: char| !c.is_alphanumeric() && !matches!(c, ' ' | '/' | '^' | '²' | '³' | '°'))
        .unwrap_or(after.len());
    let ends: Vec<usize> = after[..stop]
        .char_indices()
        .filter(|(at, c)| *at > 0 && *c == ' ')
        .map(|(at, _)| at)
        .chain([stop])
        .take(MOST_WORDS)
        .collect();
    for end in ends.into_iter().rev() {
        let candidate = text[start..number.end() + end].trim();
        let is_preposition = candidate.ends_with(" in") && end < stop; // no inch
        if is_preposition {
            continue;
        }
        if Answer::parse(candidate).is_ok_and(|a| a.is_measured()) {
            return candidate.to_owned();
        }
    }
    text[start..number.end()].trim().to_owned()
}

/// The last formula between dollar signs or brackets, or the last number, whichever ends later; with all before it that
/// only commas and joining words separate from it.
fn last_expression(tail: &str) -> Option<String> {
    // Formulas and the numbers outside them, from left to right: start, end, whether it is a formula.
    let mut parts: Vec<(usize, usize, bool)> = Vec::new();
    let mut from = 0;
    while let Some((start, content, end)) = next_formula(&tail[from..]) {
        if is_answer(content) {
            parts.push((from + start, from + end, true));
        }
        from += end;
    }
    let formulas = parts.clone();
    let numbers: Vec<Match<'_>> = NUMBER
        .find_iter(tail)
        .flatten()
        .filter(|n| !formulas.iter().any(|(start, end, _)| n.start() < *end && n.end() > *start))
        .collect();
    parts.extend(numbers.iter().map(|n| (n.start(), n.end(), false)));
    parts.sort_unstable();
    let (mut start, end, is_formula) = *parts.last()?;
    let sentence_start = sentence_start(tail, start);
    let sentence = &tail[sentence_start..start];
    // Only what stands right before the number can deny it: "x is not 0, so it is 7" is 7.
    let clause = sentence.rsplit([',', ';', ':']).next().unwrap_or(sentence);
    if is_denying(clause) || is_hedged(&tail[sentence_start..]) {
        return None;
    }
    let mut count = 1;
    for (before_start, before_end, _) in parts.iter().rev().skip(1) {
        if *before_start < sentence_start || !is_listing(&tail[*before_end..start]) {
            break;
        }
        start = *before_start;
        count += 1;
    }
    if count > 1 {
        let list = &tail[start..end];
        return (is_answer(list) && !is_range(list)).then(|| list.to_owned());
    }
    if is_formula {
        return formula(&tail[start..end]).map(str::to_owned);
    }
    let number = numbers.iter().find(|n| n.start() == start)?;
    Some(with_unit(tail, number))
}

/// Words that say that the number is a guess.
fn is_hedged(sentence: &str) -> bool {
    words(sentence)
        .any(|w| matches!(w.as_str(), "maybe" | "perhaps" | "possibly" | "either" | "might" | "unsure" | "guess"))
}

/// Whether nothing but separators stands between two numbers.
fn is_listing(between: &str) -> bool {
    const LONGEST: usize = 16;
    between.len() <= LONGEST
        && words(between).all(|w| matches!(w.as_str(), "and" | "or"))
        && between.chars().all(|c| c.is_alphanumeric() || c.is_whitespace() || ",;/|&-–:$".contains(c))
}

/// Numbers with a sign between them that is no operation in prose: a range, a date, a phone number.
fn is_range(list: &str) -> bool {
    !list.contains('$')
        && NUMBER.find_iter(list).flatten().skip(1).any(|n| {
            let before = list[..n.start()].trim_end();
            before.ends_with(['-', '–', '/'])
                || n.as_str().starts_with('-') && before.ends_with(|c: char| c.is_ascii_digit())
        })
}

fn sentence_start(text: &str, at: usize) -> usize {
    let before = &text[..at];
    ["\n", ". ", "! ", "? ", "。"]
        .iter()
        .filter_map(|stop| before.rfind(stop).map(|s| s + stop.len()))
        .max()
        .unwrap_or(0)
}

/// The first formula of `text`, if it has one.
fn formula(text: &str) -> Option<&str> {
    next_formula(text).map(|(_, content, _)| content)
}

/// Start, content and end of the next formula in dollar signs, `\(...\)` or `\[...\]`.
fn next_formula(text: &str) -> Option<(usize, &str, usize)> {
    const MARKS: [(&str, &str); 4] = [("$$", "$$"), (r"\[", r"\]"), (r"\(", r"\)"), ("$", "$")];
    let (start, (open, close)) =
        MARKS.iter().filter_map(|m| text.find(m.0).map(|at| (at, *m))).min_by_key(|(at, m)| (*at, 2 - m.0.len()))?;
    let inner = start + open.len();
    let length = text[inner..].find(close)?;
    Some((start, text[inner..inner + length].trim(), inner + length + close.len()))
}

fn tail(text: &str) -> &str {
    let mut start = text.len().saturating_sub(TAIL);
    while !text.is_char_boundary(start) {
        start += 1;
    }
    &text[start..]
}
