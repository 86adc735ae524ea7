//! Answers as text: decoration, words, multiple-choice letters and a canonical written form.

use super::lex::{Kind, Token, tokens};

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
        let shorter = inner
            .trim_end_matches(|c: char| is_wrapping(c) || matches!(c, '.' | ',' | ';' | ':' | '?'))
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
    tokens(without_decoration(text))
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
            Kind::Sign(sign) => form.push(*sign),
        }
        before = Some(&token.kind);
    }
    let is_language =
        form.chars().count() > 1 && form.chars().all(|c| c.is_alphabetic() || matches!(c, '\'' | '-' | ','));
    if is_language { form.to_lowercase() } else { form }
}

/// The letter of a multiple-choice answer: `A`, `(A)`, `A.`, `A) twelve`, `\text{(A)}`.
pub(super) fn choice_letter(tokens: &[Token]) -> Option<char> {
    let letter = |kind: &Kind| match kind {
        Kind::Word(word) | Kind::Text(word) => {
            let mut letters = word.chars();
            letters.next().filter(|c| ('A'..='J').contains(c) && letters.next().is_none())
        }
        _ => None,
    };
    let kinds: Vec<&Kind> = tokens.iter().take(4).map(|t| &t.kind).collect();
    let is_over_or_spaced = |at: usize| tokens.get(at).is_none_or(|t| t.is_spaced || matches!(t.kind, Kind::Text(_)));
    match kinds.as_slice() {
        // What `\\text` holds is plain text, which has no `\\text` in it again.
        [Kind::Text(inner)] if inner.chars().count() > 1 && !inner.contains('\\') => {
            answer_tokens(inner).and_then(|tokens| choice_letter(&tokens))
        }
        [one] if tokens.len() == 1 => letter(one),
        [Kind::Sign('('), one, Kind::Sign(')'), ..] if is_over_or_spaced(3) => letter(one),
        [one, Kind::Sign(')' | '.' | ':'), ..] if is_over_or_spaced(2) => letter(one),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::{answer_tokens, without_decoration};

    fn choice_letter(text: &str) -> Option<char> {
        super::choice_letter(&answer_tokens(text).expect("short"))
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
        for text in ["a", "AB", "(A)(B)", "A + B", "A = 5", "X", "", "12"] {
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
