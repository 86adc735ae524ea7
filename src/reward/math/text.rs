//! Answers as text: decoration, words, multiple-choice letters and a canonical written form.

use super::expression::Expression;
use super::lex::{Kind, Token, tokens};
use super::normalize::plain;

/// Short words that are units or language and never a product of variables. Longer runs of letters always are words.
const SHORT_WORDS: &[&str] = &[
    "cm", "mm", "km", "kg", "mg", "ml", "mL", "ft", "yd", "mi", "oz", "lb", "lbs", "hr", "hrs", "min", "sec", "mph",
    "kmh", "Hz", "kHz", "kJ", "kW", "mA", "Pa", "mol", "rad", "deg", "pct", "USD", "EUR", "usd", "am", "pm", "AM",
    "PM", "yes", "no", "Yes", "No", "YES", "NO", "not", "the", "The", "is", "are", "of", "on", "to", "for", "per",
    "in", "at", "by", "an", "it", "all", "All", "any", "one", "two", "six", "ten", "men", "day", "way", "cup", "egg",
    "cat", "dog", "car", "boy", "box", "pie", "red", "bus", "cars", "sq", "cubic", "units", "odd", "even", "so", "we",
    "if", "its", "has", "was",
];

/// Whether letters are a word, rather than variables written side by side.
pub(super) fn is_word(letters: &str) -> bool {
    letters.chars().count() > 3 || SHORT_WORDS.contains(&letters)
}

/// `text` without spaces, emphasis and punctuation at its ends.
pub(super) fn without_decoration(text: &str) -> &str {
    let is_wrapping = |c: char| c.is_whitespace() || matches!(c, '*' | '$' | '`' | '"' | '“' | '”');
    let mut inner = text.trim_matches(is_wrapping);
    loop {
        let shorter = inner.trim_end_matches(|c: char| is_wrapping(c) || matches!(c, ',' | ';' | ':' | '?'));
        let is_endless = shorter.ends_with("...");
        let shorter = shorter
            .trim_end_matches(|c: char| c == '.' && !is_endless)
            .trim_end_matches(r"\)")
            .trim_end_matches(r"\]")
            .trim_start_matches(r"\(")
            .trim_start_matches(r"\[");
        if shorter.len() == inner.len() {
            return inner;
        }
        inner = shorter;
    }
}

/// The tokens of an answer without its decoration; `None` if it is too long.
pub(super) fn answer_tokens(text: &str) -> Option<Vec<Token>> {
    if text.len() > 8 * super::lex::LONGEST {
        return None;
    }
    tokens(without_decoration(&plain(text)))
}

/// A form of `tokens` in which equal writing is equal: no spaces, no style, words in lower case.
pub(super) fn written_form(tokens: &[Token]) -> String {
    let mut form = String::new();
    let mut before: Option<&Kind> = None;
    for token in tokens {
        let is_joined = !matches!(
            (before, &token.kind),
            (Some(Kind::Number(_)), Kind::Number(_)) | (Some(Kind::Command(_)), Kind::Word(_))
        );
        if !is_joined {
            form.push(' ');
        }
        match &token.kind {
            Kind::Number(text) | Kind::Word(text) => form.push_str(text),
            Kind::Text(text) => form.extend(text.chars().filter(|c| !c.is_whitespace())),
            Kind::Command(name) => {
                form.push('\\');
                form.push_str(name);
            }
            Kind::Currency(unit) => {
                form.push('$');
                form.push_str(unit);
            }
            Kind::Sign(sign) => form.push(*sign),
        }
        before = Some(&token.kind);
    }
    let is_language =
        form.chars().count() > 1 && form.chars().all(|c| c.is_alphabetic() || matches!(c, '\'' | '-' | ','));
    if is_language { form.to_lowercase() } else { form }
}

/// A multiple-choice answer: its letter, and what it says beside it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Choice {
    pub(super) letter: char,
    /// What stands after the letter, if anything does.
    pub(super) content: Option<String>,
}

/// Reads `A`, `(A)`, `A.`, `A) twelve`, `\text{(A)}`; `None` if several letters are named.
pub(super) fn choice(text: &str) -> Option<Choice> {
    let text =
        ["Option ", "option ", "Choice ", "choice "].into_iter().find_map(|p| text.strip_prefix(p)).unwrap_or(text);
    let tokens = answer_tokens(text)?;
    let letter = |kind: &Kind| match kind {
        Kind::Word(word) | Kind::Text(word) => {
            let mut letters = word.chars();
            letters.next().filter(|c| ('A'..='J').contains(c) && letters.next().is_none())
        }
        _ => None,
    };
    let kinds: Vec<&Kind> = tokens.iter().take(4).map(|t| &t.kind).collect();
    let is_over_or_spaced = |at: usize| tokens.get(at).is_none_or(|t| t.is_spaced || matches!(t.kind, Kind::Text(_)));
    let (letter, rest) = match kinds.as_slice() {
        // What `\\text` holds is plain text, which has no `\\text` in it again.
        [Kind::Text(inner)] if inner.chars().count() > 1 && !inner.contains('\\') => return choice(inner),
        [Kind::Text(inner), ..] if inner.chars().count() > 1 && !inner.contains('\\') => {
            // `\\text{(B) }12`
            let inside = choice(inner).filter(|c| c.content.is_none())?;
            (inside.letter, 1)
        }
        [one] if tokens.len() == 1 => (letter(one)?, 1),
        [Kind::Sign('('), one, Kind::Sign(')'), ..] if is_over_or_spaced(3) => (letter(one)?, 3),
        [one, Kind::Sign(')' | '.' | ':'), ..] if is_over_or_spaced(2) => (letter(one)?, 2),
        _ => return None,
    };
    let rest = &tokens[rest..];
    // `A or B`, `(A) and (B)`, `A) 12, B) 13` leave the choice open.
    let names_another = rest.iter().any(|t| match &t.kind {
        Kind::Word(word) => {
            word == "or" || word == "and" || word.len() == 1 && word.chars().all(|c| ('A'..='J').contains(&c))
        }
        Kind::Text(text) => text.split(|c: char| !c.is_alphanumeric()).any(|w| w == "or" || w == "and"),
        _ => false,
    });
    if names_another {
        return None;
    }
    let content = written_form(rest);
    let source = content_after_letter(text, letter);
    Some(Choice { letter, content: (!content.is_empty()).then_some(source) })
}

/// The text after the letter and its bracket.
fn content_after_letter(text: &str, letter: char) -> String {
    let after = text.split_once(letter).map_or("", |(_, after)| after);
    after.trim_start_matches([')', '.', ':', '}', ' ', '~', '\\']).to_owned()
}

/// What some words mean as mathematics: no solution, all numbers, numbers in words.
pub(super) fn meaning_of_words(text: &str) -> Option<Expression> {
    let words = plain_words(text)?;
    Some(match words.as_str() {
        "no solution"
        | "no real solution"
        | "empty set"
        | "there is no solution"
        | "there are no solution"
        | "no real root"
        | "there are no real solution"
        | "null set" => Expression::Set(Vec::new()),
        "all real number"
        | "all real"
        | "real number"
        | "set of real number"
        | "set of all real number"
        | "any real number"
        | "every real number" => Expression::Domain('R'),
        "all integer" | "set of integer" | "set of all integer" => Expression::Domain('Z'),
        "infinity" | "positive infinity" => Expression::Symbol("infinity".to_owned()),
        other => super::parse::whole_number(number_in_words(other)?),
    })
}

/// Words in lower case, singular and without articles; `None` if the text has anything else in it.
pub(super) fn plain_words(text: &str) -> Option<String> {
    let text = without_decoration(text);
    let mut words = Vec::new();
    for word in text.split(|c: char| c.is_whitespace() || matches!(c, '-' | ',' | '~')).filter(|w| !w.is_empty()) {
        if !word.chars().all(|c| c.is_alphabetic() || c == '\'') {
            return None;
        }
        let lower = word.to_lowercase();
        let is_plural = lower.len() > 3 && lower.ends_with('s') && !lower.ends_with("ss");
        if !matches!(lower.as_str(), "the" | "a" | "an") {
            words.push(if is_plural { lower[..lower.len() - 1].to_owned() } else { lower });
        }
    }
    (!words.is_empty()).then(|| words.join(" "))
}

/// `twelve`, `twenty five`, `one hundred`.
fn number_in_words(words: &str) -> Option<i64> {
    const SMALL: [&str; 20] = [
        "zero",
        "one",
        "two",
        "three",
        "four",
        "five",
        "six",
        "seven",
        "eight",
        "nine",
        "ten",
        "eleven",
        "twelve",
        "thirteen",
        "fourteen",
        "fifteen",
        "sixteen",
        "seventeen",
        "eighteen",
        "nineteen",
    ];
    const TENS: [&str; 8] = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"];
    let small = |word: &str| SMALL.iter().position(|w| *w == word).map(|n| n as i64);
    let tens = |word: &str| TENS.iter().position(|w| *w == word).map(|n| 10 * (n as i64 + 2));
    let parts: Vec<&str> = words.split(' ').collect();
    match parts.as_slice() {
        [one] => small(one).or_else(|| tens(one)),
        [ten, one] if tens(ten).is_some() => Some(tens(ten)? + small(one).filter(|n| (1..10).contains(n))?),
        [count, "hundred"] => Some(100 * small(count).filter(|n| (1..10).contains(n))?),
        [count, "thousand"] => Some(1000 * small(count)?),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::{answer_tokens, without_decoration};

    fn choice_letter(text: &str) -> Option<char> {
        super::choice(text).map(|c| c.letter)
    }

    fn written_form(text: &str) -> String {
        super::written_form(&answer_tokens(text).expect("short"))
    }

    #[test]
    fn letters_are_found_in_every_usual_writing_and_not_in_products() {
        for text in
            ["A", "(A)", "A.", "A) 12", "(A) twelve", r"\text{A}", r"\text{(A)}", "**A**", "A: yes", r"\textbf{(A)}"]
        {
            assert_eq!(choice_letter(text), Some('A'), "{text}");
        }
        for text in [
            "a",
            "AB",
            "(A)(B)",
            "A + B",
            "A = 5",
            "X",
            "",
            "12",
            "(A) or (B)",
            "A) 12 or B) 13",
            "(A) and (B)",
            "A. yes, B. no",
        ] {
            assert_eq!(choice_letter(text), None, "{text}");
        }
    }

    #[test]
    fn decoration_goes_and_different_writing_stays_different() {
        assert_eq!(without_decoration(" **$\\frac12$.** "), r"\frac12");
        assert_eq!(without_decoration(r"\(x\)"), "x");
        assert_eq!(written_form("No Solution."), written_form(r"\text{no solution}"));
        assert_ne!(written_form("1 2"), written_form("12"));
        assert_ne!(written_form(r"\frac{1}{23}"), written_form(r"\frac{12}{3}"));
        assert_ne!(written_form("x"), written_form("X"));
    }
}
