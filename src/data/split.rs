//! Qwen2's split of text into the pieces that BPE works on.
//!
//! A hand-written scanner for the one regular expression that all Qwen tokenizers use ([`QWEN2_SPLIT`]); the general
//! engine backtracks because of its look-ahead and takes most of the time of tokenising. Character classes come from the
//! same engine, once. Called by the encoder; equal to the expression on any text (property test).

use std::sync::LazyLock;

use fancy_regex::Regex;

/// The `pre_tokenizer` of Qwen2's tokenizer.json; llama.cpp calls it `qwen2`.
pub(super) const QWEN2_SPLIT: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// What the expression tells apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    Other,
    Letter,
    Number,
    Space,
}

/// The class of every Unicode character.
static CLASSES: LazyLock<Vec<Class>> = LazyLock::new(|| {
    let all: String = ('\0'..=char::MAX).collect();
    let mut classes = vec![Class::Other; char::MAX as usize + 1];
    for (pattern, class) in [(r"\p{L}+", Class::Letter), (r"\p{N}+", Class::Number), (r"\s+", Class::Space)] {
        let pattern = Regex::new(pattern).expect("a constant pattern, compiled by every test of this module");
        for run in pattern.find_iter(&all).flatten() {
            run.as_str().chars().for_each(|character| classes[character as usize] = class);
        }
    }
    classes
});

/// The pieces of a text, in order and without gaps.
pub(super) fn pieces(text: &str) -> Pieces<'_> {
    Pieces { rest: text, classes: &CLASSES }
}

/// See [`pieces`].
pub(super) struct Pieces<'a> {
    rest: &'a str,
    classes: &'static [Class],
}

impl<'a> Iterator for Pieces<'a> {
    type Item = &'a str;

    fn next(&mut self) -> Option<&'a str> {
        let first = self.rest.chars().next()?;
        let (piece, rest) = self.rest.split_at(self.length(first));
        self.rest = rest;
        Some(piece)
    }
}

impl Pieces<'_> {
    fn class(&self, character: char) -> Class {
        self.classes[character as usize]
    }

    /// Bytes of the run of characters from `start` that satisfy `belongs`.
    fn run(&self, start: usize, belongs: impl Fn(char) -> bool) -> usize {
        let tail = &self.rest[start..];
        tail.find(|character| !belongs(character)).unwrap_or(tail.len())
    }

    /// Bytes of the next piece, which starts with `first`: the expression's alternatives in their order.
    fn length(&self, first: char) -> usize {
        let width = first.len_utf8();
        let letters = |start| self.run(start, |c| self.class(c) == Class::Letter);
        let others = |start| self.run(start, |c| self.class(c) == Class::Other);
        let class = self.class(first);
        if first == '\''
            && let Some(length) = contraction(&self.rest[width..])
        {
            return width + length;
        }
        if class == Class::Letter {
            return letters(0);
        }
        if class == Class::Number {
            return width;
        }
        if first != '\r' && first != '\n' {
            let count = letters(width);
            if count > 0 {
                return width + count;
            }
        }
        let start = if first == ' ' { width } else { 0 };
        let count = others(start);
        if count > 0 {
            let end = start + count;
            return end + self.run(end, is_line_end);
        }
        // White space, and what follows it is no longer of interest to the alternatives above.
        let spaces = self.run(0, |c| self.class(c) == Class::Space);
        let run = &self.rest[..spaces];
        if let Some(last) = run.rfind(is_line_end) {
            return last + 1;
        }
        // The last character before something visible is left to it, unless it is the only one.
        let last = run.chars().next_back().map_or(0, char::len_utf8);
        if spaces < self.rest.len() && spaces > last { spaces - last } else { spaces }
    }
}

fn is_line_end(character: char) -> bool {
    character == '\r' || character == '\n'
}

/// Bytes of `s`, `t`, `re`, `ve`, `m`, `ll` or `d` in any case; the long s is an s.
fn contraction(text: &str) -> Option<usize> {
    let mut characters = text.chars();
    let first = characters.next()?;
    let second = || characters.clone().next();
    match first {
        's' | 'S' | 'ſ' | 't' | 'T' | 'm' | 'M' | 'd' | 'D' => Some(first.len_utf8()),
        'r' | 'R' | 'v' | 'V' => second().filter(|c| matches!(c, 'e' | 'E')).map(|_| 2),
        'l' | 'L' => second().filter(|c| matches!(c, 'l' | 'L')).map(|_| 2),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn by_expression(text: &str) -> Vec<String> {
        static EXPRESSION: LazyLock<Regex> = LazyLock::new(|| Regex::new(QWEN2_SPLIT).unwrap());
        EXPRESSION.find_iter(text).map(|found| found.unwrap().as_str().to_string()).collect()
    }

    #[test]
    fn hard_cases_are_split_as_by_the_expression() {
        for text in [
            "Hello'Ve world 123\n\n  foo",
            "it'S 'ſ 'RE'll'LL'v've 're's'x",
            "  \t\n \r\n x  ",
            " \n a\u{a0}b\u{3000}\u{3000}c\u{2028}d",
            "   ",
            " ",
            "\n",
            "a.b.c !!\n\n?? \n",
            "你好，世界 🌍 — naïve ½ⅷ²",
            "\u{345}\u{24B6}x e\u{301}",
            "",
        ] {
            assert_eq!(pieces(text).collect::<Vec<_>>(), by_expression(text), "{text:?}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn any_text_is_split_as_by_the_expression(
            text in prop_oneof![
                "[ \t\r\n'stSTreRElLmdDvVfx1.,!ſ½é你\u{a0}\u{3000}\u{345}🌍-]{0,24}",
                "\\PC{0,24}",
                prop::collection::vec(any::<char>(), 0..24).prop_map(|characters| characters.into_iter().collect()),
            ]
        ) {
            prop_assert_eq!(pieces(&text).collect::<Vec<_>>(), by_expression(&text));
        }
    }
}
