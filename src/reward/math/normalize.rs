//! Characters of other widths, scripts and heights, as the ones that the grammar knows.

use std::borrow::Cow;

/// `text` with full-width characters as narrow ones, superscripts as `^{...}`, vulgar fractions as `\frac`, and what
/// cannot be seen left out.
pub(super) fn plain(text: &str) -> Cow<'_, str> {
    if text.is_ascii() {
        return Cow::Borrowed(text);
    }
    let mut result = String::with_capacity(text.len());
    let mut open = None;
    for c in text.chars() {
        let raised = superscript(c).map(|s| ('^', s)).or_else(|| subscript(c).map(|s| ('_', s)));
        if open.is_some() && open != raised.map(|(sign, _)| sign) {
            result.push('}');
            open = None;
        }
        match raised {
            Some((sign, character)) => {
                if open.is_none() {
                    result.push(sign);
                    result.push('{');
                    open = Some(sign);
                }
                result.push(character);
            }
            None => push_plain(&mut result, c),
        }
    }
    if open.is_some() {
        result.push('}');
    }
    Cow::Owned(result)
}

/// `text` with full-width characters as narrow ones and without what cannot be seen; nothing else changes.
pub(super) fn narrow(text: &str) -> Cow<'_, str> {
    if text.is_ascii() {
        return Cow::Borrowed(text);
    }
    Cow::Owned(text.chars().filter(|c| !is_invisible(*c)).map(narrowed).collect())
}

fn push_plain(result: &mut String, c: char) {
    if is_invisible(c) {
        return;
    }
    if let Some((above, below)) = vulgar(c) {
        result.extend(["\\frac{", &above.to_string(), "}{", &below.to_string(), "}"]);
        return;
    }
    match c {
        '…' | '⋯' => result.push_str("\\ldots "),
        '″' => result.push_str("''"),
        c => result.push(narrowed(c)),
    }
}

/// Joiners, marks of direction and variation selectors.
fn is_invisible(c: char) -> bool {
    matches!(c, '\u{ad}' | '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{2064}' | '\u{feff}'
        | '\u{fe00}'..='\u{fe0f}')
}

fn narrowed(c: char) -> char {
    match c {
        '\u{ff01}'..='\u{ff5e}' => char::from_u32(u32::from(c) - 0xfee0).unwrap_or(c),
        // Digits in the styles of mathematics: bold, double-struck, sans-serif, monospace.
        '\u{1d7ce}'..='\u{1d7ff}' => char::from_digit((u32::from(c) - 0x1d7ce) % 10, 10).unwrap_or(c),
        '、' => ',',
        '。' | '｡' => '.',
        '∶' | '︓' => ':',
        '⁄' | '∕' => '/',
        '′' | '’' => '\'',
        '‐' | '‑' | '‒' | '–' | '—' | '−' | '﹣' => '-',
        '∣' => '|',
        '〈' | '⟨' => '⟨',
        '〉' | '⟩' => '⟩',
        '【' => '[',
        '】' => ']',
        '\u{3000}' => ' ',
        c => c,
    }
}

fn superscript(c: char) -> Option<char> {
    Some(match c {
        '⁰' => '0',
        '¹' => '1',
        '²' => '2',
        '³' => '3',
        '⁴'..='⁹' => char::from_digit(u32::from(c) - 0x2070, 10)?,
        '⁻' => '-',
        '⁺' => '+',
        'ⁿ' => 'n',
        _ => return None,
    })
}

fn subscript(c: char) -> Option<char> {
    match c {
        '₀'..='₉' => char::from_digit(u32::from(c) - 0x2080, 10),
        'ₙ' => Some('n'),
        _ => None,
    }
}

fn vulgar(c: char) -> Option<(u8, u8)> {
    Some(match c {
        '½' => (1, 2),
        '⅓' => (1, 3),
        '⅔' => (2, 3),
        '¼' => (1, 4),
        '¾' => (3, 4),
        '⅕' => (1, 5),
        '⅖' => (2, 5),
        '⅗' => (3, 5),
        '⅘' => (4, 5),
        '⅙' => (1, 6),
        '⅚' => (5, 6),
        '⅐' => (1, 7),
        '⅛' => (1, 8),
        '⅜' => (3, 8),
        '⅝' => (5, 8),
        '⅞' => (7, 8),
        '⅑' => (1, 9),
        '⅒' => (1, 10),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::{narrow, plain};

    #[test]
    fn widths_heights_and_fractions_become_plain() {
        for (text, expected) in [
            ("４２％", "42%"),
            ("（１，２）", "(1,2)"),
            ("x²+y₁₂", "x^{2}+y_{12}"),
            ("10⁻³", "10^{-3}"),
            ("2½", r"2\frac{1}{2}"),
            ("4\u{200b}2", "42"),
            ("𝟕", "7"),
            ("abc", "abc"),
        ] {
            assert_eq!(plain(text), expected, "{text}");
        }
        assert_eq!(narrow("x²＝４"), "x²=4");
    }
}
