//! Names on the left side of an equation that are no variables: `f(x)`, `\angle ABC`, `AB`, `P(A \cap B)`.

use super::{Kind, Parser, Token};
use crate::reward::math::expression::Function;
use crate::reward::math::text;

/// Commands that are part of a name.
const NAMING: &[&str] =
    &["angle", "triangle", "overline", "vec", "widehat", "hat", "bar", "overrightarrow", "measuredangle", "max", "min"];
/// Letters that name functions; others in front of a bracket are factors.
const FUNCTION_LETTERS: &str = "fghFGHPQRSTEVANpqruvwdDLMW";

impl Parser {
    /// Takes a name in front of `=`, `\approx` or `\in`; nothing if what stands there is an expression.
    pub(super) fn named_left_side(&mut self) -> Option<String> {
        let end = self.left_side_end()?;
        let side = &self.tokens[self.at..end];
        let mut is_name = false;
        let mut depth = 0usize;
        for (at, token) in side.iter().enumerate() {
            let before = at.checked_sub(1).map(|b| &side[b].kind);
            match &token.kind {
                Kind::Sign('(' | '[' | '{') => {
                    if depth == 0 && at == 0 && is_tuple_of_letters(side) {
                        is_name = true; // (x, y)
                    } else if depth == 0 && matches!(token.kind, Kind::Sign('(')) {
                        let is_function = match before {
                            Some(Kind::Word(word)) => is_function_name(word),
                            Some(Kind::Sign('\'' | '}')) => true, // f'(x), f^{-1}(x)
                            Some(Kind::Command(name)) => matches!(name.as_str(), "phi" | "psi" | "Gamma" | "pi"),
                            _ => false,
                        };
                        if !is_function {
                            return None;
                        }
                        is_name = true;
                    }
                    if depth == 0 && matches!(token.kind, Kind::Sign('[')) {
                        if at > 0 {
                            return None;
                        }
                        is_name = true; // [ABC], an area
                    }
                    depth += 1;
                }
                Kind::Sign(')' | ']' | '}') => depth = depth.checked_sub(1)?,
                _ if depth > 0 => {}
                Kind::Word(word) => {
                    let is_single = word.chars().count() == 1;
                    let is_points = word.chars().all(|c| c.is_ascii_uppercase());
                    if !is_single && !is_points && !text::is_word(word) && Function::named(word).is_none() {
                        return None;
                    }
                    is_name |= !is_single;
                }
                Kind::Command(name) if NAMING.contains(&name.as_str()) => is_name = true,
                Kind::Command(name) if super::command::is_symbol(name) => {}
                Kind::Sign('_' | '\'' | '|') => {}
                Kind::Sign('^') => {
                    // Only `^{-1}` is part of a name.
                    let next: Vec<&Kind> = side[at + 1..].iter().take(4).map(|t| &t.kind).collect();
                    let is_inverse = matches!(next.as_slice(),
                        [Kind::Sign('{'), Kind::Sign('-'), Kind::Number(one), Kind::Sign('}')] if one == "1");
                    if !is_inverse {
                        return None;
                    }
                }
                Kind::Number(_) if matches!(before, Some(Kind::Sign('_'))) => {}
                _ => return None,
            }
        }
        if !is_name || depth > 0 {
            return None;
        }
        let name = text::written_form(side);
        self.at = end;
        Some(name)
    }

    /// Where the first relation is that a name can stand in front of.
    fn left_side_end(&self) -> Option<usize> {
        const LONGEST: usize = 24;
        let mut depth = 0usize;
        for at in self.at..self.tokens.len().min(self.at + LONGEST) {
            match &self.tokens[at].kind {
                Kind::Sign('(' | '[' | '{') => depth += 1,
                Kind::Sign(')' | ']' | '}') => depth = depth.checked_sub(1)?,
                Kind::Sign('=') if depth == 0 => return (at > self.at).then_some(at),
                Kind::Command(name) if depth == 0 && matches!(name.as_str(), "approx" | "in") => {
                    return (at > self.at).then_some(at);
                }
                Kind::Sign(',' | ';' | '<' | '>' | '+' | '*' | '/') if depth == 0 => return None,
                _ => {}
            }
        }
        None
    }
}

fn is_tuple_of_letters(side: &[Token]) -> bool {
    let is_letter = |kind: &Kind| matches!(kind, Kind::Word(w) if w.chars().count() == 1);
    side.len() >= 5
        && side.len() % 2 == 1
        && side[side.len() - 1].kind == Kind::Sign(')')
        && side[1..side.len() - 1]
            .iter()
            .enumerate()
            .all(|(at, t)| if at % 2 == 0 { is_letter(&t.kind) } else { t.kind == Kind::Sign(',') })
}

fn is_function_name(word: &str) -> bool {
    let is_letter = word.chars().count() == 1 && FUNCTION_LETTERS.contains(word);
    is_letter || (word.chars().count() > 1 && Function::named(word).is_none() && text::is_word(word))
}
