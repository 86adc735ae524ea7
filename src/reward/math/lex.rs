//! Cuts an answer into tokens: numbers, letters, commands, texts, signs.
//!
//! Spacing, sizing and style commands disappear here, Unicode signs become their LaTeX commands, and thousands
//! separators are joined, so that the grammar in `parse` stays small.

/// Longest answer in characters.
pub(super) const LONGEST: usize = 4096;

/// What a token is.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Kind {
    /// Digits with at most one decimal point, and an exponent as in `1.5e-3`.
    Number(String),
    /// A run of letters.
    Word(String),
    /// `\name`, without the backslash.
    Command(String),
    /// The content of `\text{...}` and its relatives, trimmed.
    Text(String),
    /// Any other character.
    Sign(char),
}

/// A token and whether a space stood before it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Token {
    pub(super) kind: Kind,
    pub(super) is_spaced: bool,
}

/// Commands that only change how things look.
const INVISIBLE: &[&str] = &[
    "left",
    "right",
    "big",
    "Big",
    "bigg",
    "Bigg",
    "bigl",
    "bigr",
    "Bigl",
    "Bigr",
    "biggl",
    "biggr",
    "Biggl",
    "Biggr",
    "middle",
    "displaystyle",
    "textstyle",
    "scriptstyle",
    "limits",
    "nolimits",
    "rm",
    "bf",
    "it",
    "large",
    "Large",
    "boldmath",
    "nonumber",
    "boxed",
    "fbox",
    "bm",
    "boldsymbol",
    "mathbf",
    "mathit",
    "ensuremath",
    "hline",
    "phantom",
];

/// Commands whose argument is text.
const TEXTUAL: &[&str] = &[
    "text",
    "mathrm",
    "textbf",
    "textit",
    "textrm",
    "texttt",
    "textsf",
    "mbox",
    "hbox",
    "mathsf",
    "mathtt",
    "operatorname",
    "emph",
    "textup",
    "textnormal",
    "mathbb",
    "mathcal",
];

/// Signs and the commands they stand for.
const UNICODE: &[(char, &str)] = &[
    ('×', "times"),
    ('·', "cdot"),
    ('⋅', "cdot"),
    ('∙', "cdot"),
    ('÷', "div"),
    ('≤', "le"),
    ('≥', "ge"),
    ('≠', "ne"),
    ('≈', "approx"),
    ('π', "pi"),
    ('∞', "infty"),
    ('√', "sqrt"),
    ('±', "pm"),
    ('∓', "mp"),
    ('∪', "cup"),
    ('∩', "cap"),
    ('∈', "in"),
    ('∅', "emptyset"),
    ('θ', "theta"),
    ('α', "alpha"),
    ('β', "beta"),
    ('γ', "gamma"),
    ('λ', "lambda"),
    ('μ', "mu"),
    ('φ', "phi"),
    ('ω', "omega"),
    ('σ', "sigma"),
    ('°', "circ"),
    ('º', "circ"),
];

/// Cuts `text` into tokens; `None` if it is too long.
pub(super) fn tokens(text: &str) -> Option<Vec<Token>> {
    let chars: Vec<char> = text.chars().take(LONGEST + 1).collect();
    if chars.len() > LONGEST {
        return None;
    }
    let mut lexer = Lexer { chars, at: 0, is_spaced: false, depth: 0, tokens: Vec::new() };
    while lexer.at < lexer.chars.len() {
        lexer.step();
    }
    Some(lexer.tokens)
}

struct Lexer {
    chars: Vec<char>,
    at: usize,
    is_spaced: bool,
    /// Open brackets: inside them a comma separates items and never thousands.
    depth: usize,
    tokens: Vec<Token>,
}

impl Lexer {
    fn peek(&self, ahead: usize) -> Option<char> {
        self.chars.get(self.at + ahead).copied()
    }

    fn push(&mut self, kind: Kind) {
        self.tokens.push(Token { kind, is_spaced: self.is_spaced });
        self.is_spaced = false;
    }

    fn sign(&mut self, sign: char) {
        self.at += 1;
        self.push(Kind::Sign(sign));
    }

    fn step(&mut self) {
        let Some(c) = self.peek(0) else { return };
        match c {
            '\\' => self.command(),
            '$' | '£' | '€' | '¥' | '₹' | '`' => self.at += 1,
            '~' => self.space(),
            c if c.is_whitespace() => self.space(),
            '0'..='9' => self.number(),
            '.' if self.peek(1).is_some_and(|d| d.is_ascii_digit()) => self.number(),
            '*' if self.peek(1) == Some('*') => {
                self.at += 1;
                self.sign('^');
            }
            '<' | '>' | '!' | '=' if self.peek(1) == Some('=') => {
                let name = match c {
                    '<' => "le",
                    '>' => "ge",
                    '!' => "ne",
                    _ => "eq",
                };
                self.at += 2;
                self.push(Kind::Command(name.to_owned()));
            }
            '−' | '–' | '—' => self.sign('-'),
            '⁄' => self.sign('/'),
            '²' | '³' => {
                self.sign('^');
                self.push(Kind::Number(if c == '²' { "2" } else { "3" }.to_owned()));
            }
            '(' | '[' => {
                self.depth += 1;
                self.sign(c);
            }
            ')' | ']' => {
                self.depth = self.depth.saturating_sub(1);
                self.sign(c);
            }
            c => self.letters_or_sign(c),
        }
    }

    fn space(&mut self) {
        self.at += 1;
        self.is_spaced = true;
    }

    fn letters_or_sign(&mut self, c: char) {
        if let Some((_, name)) = UNICODE.iter().find(|(sign, _)| *sign == c) {
            self.at += 1;
            self.push(Kind::Command((*name).to_owned()));
        } else if c.is_alphabetic() {
            let word: String = self.chars[self.at..].iter().take_while(|c| c.is_alphabetic()).collect();
            let length = word.chars().count();
            // A Greek letter inside a run is a symbol of its own.
            let length = word.chars().take(length).position(|c| UNICODE.iter().any(|(s, _)| *s == c)).unwrap_or(length);
            self.at += length;
            self.push(Kind::Word(word.chars().take(length).collect()));
        } else {
            self.sign(c);
        }
    }

    fn command(&mut self) {
        self.at += 1;
        let name: String = self.chars[self.at..].iter().take_while(|c| c.is_ascii_alphabetic()).collect();
        if name.is_empty() {
            let Some(c) = self.peek(0) else { return };
            self.at += 1;
            match c {
                ',' | ';' | ':' | ' ' | '!' | '>' | '\n' | '(' | ')' | '[' | ']' => self.is_spaced = true,
                '\\' => self.push(Kind::Command("newline".to_owned())),
                '{' | '}' | '|' => {
                    if c == '{' {
                        self.depth += 1;
                    } else if c == '}' {
                        self.depth = self.depth.saturating_sub(1);
                    }
                    self.push(Kind::Command(c.to_string()));
                }
                '$' => {}
                other => self.push(Kind::Sign(other)),
            }
            return;
        }
        self.at += name.len();
        if INVISIBLE.contains(&name.as_str()) {
            // `\left.` and `\right.` stand for no bracket at all.
            if matches!(name.as_str(), "left" | "right") && self.peek(0) == Some('.') {
                self.at += 1;
            }
        } else if TEXTUAL.contains(&name.as_str()) {
            self.text();
        } else {
            match name.as_str() {
                "quad" | "qquad" | "thinspace" | "space" | "enspace" => self.is_spaced = true,
                "dfrac" | "tfrac" | "cfrac" => self.push(Kind::Command("frac".to_owned())),
                "leq" | "leqslant" => self.push(Kind::Command("le".to_owned())),
                "geq" | "geqslant" => self.push(Kind::Command("ge".to_owned())),
                "neq" => self.push(Kind::Command("ne".to_owned())),
                "lt" => self.push(Kind::Sign('<')),
                "gt" => self.push(Kind::Sign('>')),
                "degree" | "degrees" | "textdegree" => self.push(Kind::Command("circ".to_owned())),
                "lbrace" | "rbrace" => {
                    self.push(Kind::Command(if name == "lbrace" { "{" } else { "}" }.to_owned()));
                }
                "lbrack" => self.push(Kind::Sign('[')),
                "rbrack" => self.push(Kind::Sign(']')),
                "vert" | "lvert" | "rvert" => self.push(Kind::Sign('|')),
                "varnothing" => self.push(Kind::Command("emptyset".to_owned())),
                "ast" => self.push(Kind::Sign('*')),
                "dots" | "ldots" | "cdots" => self.push(Kind::Command("dots".to_owned())),
                "tbinom" | "dbinom" => self.push(Kind::Command("binom".to_owned())),
                "textpercent" => self.push(Kind::Sign('%')),
                _ => self.push(Kind::Command(name)),
            }
        }
    }

    /// The argument of `\text`: up to the brace that closes it.
    fn text(&mut self) {
        while self.peek(0).is_some_and(char::is_whitespace) {
            self.at += 1;
        }
        if self.peek(0) != Some('{') {
            return;
        }
        let (mut depth, start) = (0usize, self.at + 1);
        while let Some(c) = self.peek(0) {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                _ => {}
            }
            self.at += 1;
            if depth == 0 {
                break;
            }
        }
        let end = if depth == 0 { self.at - 1 } else { self.at };
        let content: String = self.chars[start..end.max(start)].iter().collect();
        let content = content.trim();
        if !content.is_empty() {
            self.push(Kind::Text(content.to_owned()));
        }
    }

    fn number(&mut self) {
        let mut text = String::new();
        self.digits(&mut text);
        while let Some(length) = self.thousands() {
            self.at += length;
            self.digits(&mut text);
        }
        if self.peek(0) == Some('.') && self.peek(1).is_some_and(|c| c.is_ascii_digit()) {
            text.push('.');
            self.at += 1;
            self.digits(&mut text);
        } else if self.peek(0) == Some('.') && self.peek(1) != Some('.') {
            // `3.` is 3: a full stop or a bare decimal point.
            self.at += 1;
        }
        if matches!(self.peek(0), Some('e' | 'E')) {
            let signed = usize::from(matches!(self.peek(1), Some('+' | '-')));
            if self.peek(1 + signed).is_some_and(|c| c.is_ascii_digit()) {
                text.push('e');
                text.extend(self.peek(1).filter(|_| signed == 1));
                self.at += 1 + signed;
                self.digits(&mut text);
            }
        }
        self.push(Kind::Number(text));
    }

    fn digits(&mut self, text: &mut String) {
        while let Some(c) = self.peek(0).filter(char::is_ascii_digit) {
            text.push(c);
            self.at += 1;
        }
    }

    /// The length of a thousands separator here: one that three digits follow, and no fourth.
    fn thousands(&self) -> Option<usize> {
        let rest = &self.chars[self.at..];
        let separators: [(&[char], bool); 8] = [
            (&['{', ',', '}'], true),
            (&[',', '\\', '!'], true),
            (&['{', ',', '}', '\\', '!'], true),
            (&['\\', ','], true),
            (&['\\', ' '], true),
            (&['_'], true),
            (&[','], self.depth == 0),
            (&[' '], self.depth == 0),
        ];
        let length =
            separators.iter().filter(|(s, allowed)| *allowed && rest.starts_with(s)).map(|(s, _)| s.len()).max()?;
        let is_digit = |i: usize| rest.get(length + i).is_some_and(char::is_ascii_digit);
        let leading = self.chars[..self.at].iter().rev().take_while(|c| c.is_ascii_digit()).count();
        (is_digit(0) && is_digit(1) && is_digit(2) && !is_digit(3) && (1..=3).contains(&leading)).then_some(length)
    }
}

#[cfg(test)]
mod tests {
    use super::{Kind, tokens};

    fn kinds(text: &str) -> Vec<Kind> {
        tokens(text).expect("short").into_iter().map(|t| t.kind).collect()
    }

    #[test]
    fn thousands_are_joined_outside_brackets_only() {
        for text in ["1,234,567", "1{,}234{,}567", r"1,\!234,\!567", r"1\,234\,567", "1 234 567", "1_234_567"] {
            assert_eq!(kinds(text), [Kind::Number("1234567".into())], "{text}");
        }
        assert_eq!(kinds("1,23").len(), 3);
        assert_eq!(kinds("1,2345").len(), 3);
        assert_eq!(kinds("1234,567").len(), 3);
        assert_eq!(kinds("(100,200)").len(), 5);
    }

    #[test]
    fn style_disappears_and_text_keeps_its_words() {
        assert_eq!(kinds(r"\left( \displaystyle 3 \right)"), kinds("(3)"));
        assert_eq!(kinds(r"5\text{ cm}"), [Kind::Number("5".into()), Kind::Text("cm".into())]);
        assert_eq!(kinds(r"\text{"), []);
        assert_eq!(kinds("1.5e-3x"), [Kind::Number("1.5e-3".into()), Kind::Word("x".into())]);
        assert_eq!(kinds("2πr").len(), 3);
    }
}
