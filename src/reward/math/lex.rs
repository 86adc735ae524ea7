//! Cuts an answer into tokens: numbers, letters, commands, texts, signs.
//!
//! Spacing, sizing and style commands disappear here, Unicode signs become their LaTeX commands, and thousands
//! separators are joined, so that the grammar in `parse` stays small.

use super::expression::Function;

/// Longest answer in characters.
pub(super) const LONGEST: usize = 4096;

/// What a token is.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Kind {
    /// Digits with at most one decimal point, then repeating digits as in `0.1(6)`, and an exponent as in `1.5e-3`.
    Number(String),
    /// A run of letters.
    Word(String),
    /// `\name`, without the backslash.
    Command(String),
    /// The content of `\text{...}` and its relatives, trimmed.
    Text(String),
    /// A sign of money, as its unit.
    Currency(String),
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
    "underline",
    "mathcal",
    "mathop",
    "strut",
];

/// Commands that are left out with their argument.
const WITHOUT_ARGUMENT: &[&str] =
    &["phantom", "hphantom", "vphantom", "hspace", "vspace", "tag", "label", "color", "textcolor", "mspace", "kern"];

/// Commands whose argument is text.
const TEXTUAL: &[&str] =
    &["text", "textbf", "textit", "textrm", "texttt", "textsf", "mbox", "hbox", "emph", "textup", "textnormal"];

/// Commands whose argument is a name in upright letters: a constant, a function, a unit.
const UPRIGHT: &[&str] = &["mathrm", "mathsf", "mathtt", "operatorname"];

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
    ('∖', "setminus"),
    ('∨', "lor"),
    ('∧', "land"),
    ('∠', "angle"),
    ('△', "triangle"),
    ('⌊', "lfloor"),
    ('⌋', "rfloor"),
    ('⌈', "lceil"),
    ('⌉', "rceil"),
    ('ℝ', "reals"),
    ('ℤ', "integers"),
    ('ℚ', "rationals"),
    ('ℕ', "naturals"),
    ('ℂ', "complexes"),
    ('≡', "equiv"),
    ('Δ', "Delta"),
    ('ρ', "rho"),
    ('τ', "tau"),
    ('ε', "epsilon"),
    ('δ', "delta"),
    ('φ', "phi"),
    ('ψ', "psi"),
    ('ξ', "xi"),
    ('η', "eta"),
    ('∆', "Delta"),
    ('ϕ', "phi"),
];

/// Signs of money and the units they stand for.
const CURRENCIES: &[(char, &str)] = &[('£', "GBP"), ('€', "EUR"), ('¥', "yuan"), ('₹', "INR"), ('₩', "KRW")];

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
            '$' | '`' => self.at += 1,
            '~' => self.space(),
            c if c.is_whitespace() => self.space(),
            '0'..='9' => self.number(),
            '.' if self.peek(1).is_some_and(|d| d.is_ascii_digit()) => self.number(),
            '.' if self.rest_starts_with("...") => {
                self.at += 3;
                self.push(Kind::Command("dots".to_owned()));
            }
            // `{:}` and `{,}` keep TeX from adding space.
            '{' if matches!(self.peek(1), Some(',' | ':' | ';' | '=' | '<' | '>' | '+' | '-' | '/'))
                && self.peek(2) == Some('}') =>
            {
                let inner = self.peek(1).unwrap_or(',');
                self.at += 2;
                self.sign(inner);
            }
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
            '⟨' => self.sign('('),
            '⟩' => self.sign(')'),
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
        } else if let Some((_, unit)) = CURRENCIES.iter().find(|(sign, _)| *sign == c) {
            self.at += 1;
            self.push(Kind::Currency((*unit).to_owned()));
        } else if c.is_alphabetic() {
            let word: String = self.chars[self.at..].iter().take_while(|c| c.is_alphabetic()).collect();
            // Chinese and Latin letters side by side are two words.
            let is_ideograph = c > '\u{2e80}';
            let length = word.chars().take_while(|c| (*c > '\u{2e80}') == is_ideograph).count();
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
                '$' => self.push(Kind::Currency("dollar".to_owned())),
                '\'' | '"' | '^' | '~' | '=' | '.' | '-' | '/' | '`' => {} // accents, and hints for line breaks
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
            if let Some(content) = self.group_text() {
                self.push_text(content);
            }
        } else if UPRIGHT.contains(&name.as_str()) {
            self.upright();
        } else if WITHOUT_ARGUMENT.contains(&name.as_str()) {
            self.group_text();
        } else if name == "mathbb" || name == "Bbb" {
            let content = self.group_text().or_else(|| self.letter());
            self.push(Kind::Command(number_set(content.as_deref().unwrap_or_default()).to_owned()));
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
                "langle" => self.push(Kind::Sign('(')),
                "rangle" => self.push(Kind::Sign(')')),
                "colon" => self.push(Kind::Sign(':')),
                "prime" => self.push(Kind::Sign('\'')),
                "R" | "Reals" => self.push(Kind::Command("reals".to_owned())),
                "backslash" | "smallsetminus" => self.push(Kind::Command("setminus".to_owned())),
                "vee" => self.push(Kind::Command("lor".to_owned())),
                "wedge" => self.push(Kind::Command("land".to_owned())),
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

    /// `\text{hours and}` is a unit and a joining word.
    fn push_text(&mut self, content: String) {
        for joint in ["and", "or"] {
            let rest = content
                .strip_suffix(joint)
                .filter(|r| r.ends_with(char::is_whitespace))
                .map(|r| r.trim().trim_end_matches(','));
            if let Some(rest) = rest.filter(|r| !r.is_empty()) {
                self.push(Kind::Text(rest.to_owned()));
                self.push(Kind::Text(joint.to_owned()));
                return;
            }
        }
        self.push(Kind::Text(content));
    }

    /// The name that an upright command gives: a letter, a function, or words.
    fn upright(&mut self) {
        let Some(content) = self.group_text() else { return };
        let is_letter = content.chars().count() == 1 && content.chars().all(char::is_alphabetic);
        if is_letter && !super::unit::is_unit_letter(&content) || Function::named(&content).is_some() {
            self.push(Kind::Word(content));
        } else {
            self.push(Kind::Text(content));
        }
    }

    fn letter(&mut self) -> Option<String> {
        let letter = self.peek(0).filter(|c| c.is_alphabetic())?;
        self.at += 1;
        Some(letter.to_string())
    }

    fn rest_starts_with(&self, text: &str) -> bool {
        text.chars().enumerate().all(|(ahead, c)| self.peek(ahead) == Some(c))
    }

    /// The argument of `\text` and its like, trimmed: up to the brace that closes it. `None` without one, or if it is
    /// empty.
    fn group_text(&mut self) -> Option<String> {
        let start = self.at;
        while self.peek(0).is_some_and(char::is_whitespace) {
            self.at += 1;
        }
        if self.peek(0) != Some('{') {
            self.at = start;
            return None;
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
        (!content.is_empty()).then(|| content.to_owned())
    }

    fn number(&mut self) {
        let mut text = String::new();
        self.digits(&mut text);
        while let Some(length) = self.thousands() {
            self.at += length;
            self.digits(&mut text);
        }
        self.dotted_thousands(&mut text);
        if self.peek(0) == Some('.') && self.fraction_follows() {
            text.push('.');
            self.at += 1;
            self.digits(&mut text);
            self.repetition(&mut text);
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

    /// Whether digits or repeating digits come after the point here.
    fn fraction_follows(&self) -> bool {
        let marks = ["\\overline", "\\bar", "\\dot"];
        let follows = |text: &str| text.chars().enumerate().all(|(ahead, c)| self.peek(1 + ahead) == Some(c));
        let is_mark = marks.iter().any(|m| follows(m) && !self.peek(1 + m.len()).is_some_and(char::is_alphabetic));
        self.peek(1).is_some_and(|c| c.is_ascii_digit())
            || is_mark
            || (self.peek(1) == Some('(') && {
                let inside = self.chars[self.at + 2..].iter().take_while(|c| c.is_ascii_digit()).count();
                inside > 0 && self.peek(2 + inside) == Some(')')
            })
    }

    /// Digits that repeat without end, written in brackets: `0.1\overline{6}`, `0.1\dot{6}`, `0.1(6)` and `0.1666...`
    /// all give `0.1(6)`.
    fn repetition(&mut self, text: &mut String) {
        let start = self.at;
        let repeated = if self.rest_starts_with("\\overline") || self.rest_starts_with("\\bar") {
            self.at += if self.rest_starts_with("\\bar") { 4 } else { 9 };
            self.group_text().or_else(|| self.digit())
        } else if self.rest_starts_with("(") {
            let inside: String = self.chars[self.at + 1..].iter().take_while(|c| c.is_ascii_digit()).collect();
            let is_closed = self.peek(1 + inside.len()) == Some(')');
            self.at += if is_closed { inside.len() + 2 } else { 0 };
            is_closed.then_some(inside)
        } else if self.rest_starts_with("\\dot") && !self.rest_starts_with("\\dots") {
            self.dotted_digits()
        } else {
            return self.endless_tail(text);
        };
        match repeated.filter(|r| !r.is_empty() && r.chars().all(|c| c.is_ascii_digit())) {
            Some(repeated) => text.extend(["(", &repeated, ")"]),
            None => self.at = start,
        }
    }

    /// `\dot{1}4285\dot{7}`: from the first dot to the last.
    fn dotted_digits(&mut self) -> Option<String> {
        self.at += 4;
        let mut repeated = self.group_text().or_else(|| self.digit())?;
        let between: String = self.chars[self.at..].iter().take_while(|c| c.is_ascii_digit()).collect();
        let after = self.at + between.len();
        let is_second = self.chars[after..].iter().take(4).collect::<String>() == "\\dot"
            && self.chars.get(after + 4) != Some(&'s');
        if is_second {
            self.at = after + 4;
            repeated.push_str(&between);
            repeated.push_str(&self.group_text().or_else(|| self.digit())?);
        }
        Some(repeated)
    }

    fn digit(&mut self) -> Option<String> {
        let digit = self.peek(0).filter(char::is_ascii_digit)?;
        self.at += 1;
        Some(digit.to_string())
    }

    /// `0.1666...`: dots after a digit that stands there three times, or after two rounds of several digits.
    fn endless_tail(&mut self, text: &mut String) {
        let mark = ["...", "\\ldots", "\\dots", "\\cdots"].into_iter().find(|m| self.rest_starts_with(m));
        let Some((mark, (_, fraction))) = mark.zip(text.split_once('.')) else { return };
        let period = (1..=fraction.len() / 2).find(|p| {
            let rounds = if *p == 1 { 3 } else { 2 };
            let bytes = fraction.as_bytes();
            bytes.len() >= p * rounds
                && (1..rounds)
                    .all(|r| bytes[bytes.len() - p * (r + 1)..bytes.len() - p * r] == bytes[bytes.len() - p..])
        });
        if let Some(period) = period {
            let repeated = fraction[fraction.len() - period..].to_owned();
            text.extend(["(", &repeated, ")"]);
            self.at += mark.len();
        }
    }

    fn digits(&mut self, text: &mut String) {
        while let Some(c) = self.peek(0).filter(char::is_ascii_digit) {
            text.push(c);
            self.at += 1;
        }
    }

    /// `1.234.567`: with two groups or more the points are separators.
    fn dotted_thousands(&mut self, text: &mut String) {
        const MOST_GROUPS: usize = 16;
        let rest = &self.chars[self.at..];
        let is_group = |i: usize| {
            rest.get(4 * i) == Some(&'.') && (1..=3).all(|d| rest.get(4 * i + d).is_some_and(char::is_ascii_digit))
        };
        let groups = (0..MOST_GROUPS).take_while(|i| is_group(*i)).count();
        let is_over = !rest.get(4 * groups).is_some_and(|c| c.is_ascii_digit() || *c == '.');
        if groups >= 2 && is_over && text.len() <= 3 && !text.starts_with('0') {
            text.extend(rest[..4 * groups].iter().filter(|c| c.is_ascii_digit()));
            self.at += 4 * groups;
        }
    }

    /// The length of a thousands separator here: one that three digits follow, and no fourth.
    fn thousands(&self) -> Option<usize> {
        let rest = &self.chars[self.at..];
        let separators: [(&[char], bool); 10] = [
            (&['{', ',', '}'], true),
            (&[',', '\\', '!'], true),
            (&['{', ',', '}', '\\', '!'], true),
            (&[',', '\\', '!', ' '], true),
            (&['{', ',', '}', ' '], true),
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

/// The command that stands for the numbers `\mathbb{...}` names.
fn number_set(letter: &str) -> &'static str {
    match letter {
        "R" => "reals",
        "Z" => "integers",
        "Q" => "rationals",
        "N" => "naturals",
        "C" => "complexes",
        _ => "unknown set",
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
