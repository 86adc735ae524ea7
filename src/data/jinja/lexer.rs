//! A template's text to tokens, with Jinja2's rules for white space: `trim_blocks` and `lstrip_blocks` are on, `-` strips,
//! `+` keeps, one line break at the end of the text goes, and every kind of line break becomes `\n` (`jinja2/lexer.py`,
//! `tokeniter`).

use super::Error;
use super::text::is_space;

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Token {
    Data(String),
    VariableBegin,
    VariableEnd,
    BlockBegin,
    BlockEnd,
    Name(String),
    Str(String),
    Int(i128),
    Float(f64),
    Operator(&'static str),
    End,
}

impl Token {
    /// What it is, for messages.
    pub(super) fn describe(&self) -> String {
        match self {
            Self::Data(_) => "text".into(),
            Self::VariableBegin => "`{{`".into(),
            Self::VariableEnd => "`}}`".into(),
            Self::BlockBegin => "`{%`".into(),
            Self::BlockEnd => "`%}`".into(),
            Self::Name(name) => format!("`{name}`"),
            Self::Str(_) => "a string".into(),
            Self::Int(_) | Self::Float(_) => "a number".into(),
            Self::Operator(operator) => format!("`{operator}`"),
            Self::End => "the end of the template".into(),
        }
    }
}

/// Longest first, so that `//` is not two of `/`.
const OPERATORS: [&str; 25] = [
    "//", "**", "==", "!=", ">=", "<=", "+", "-", "/", "*", "%", "~", "[", "]", "(", ")", "{", "}", ">", "<", "=", ".",
    ":", "|", ",",
];

struct Lexer<'s> {
    source: &'s str,
    at: usize,
    line: u32,
    line_starting: bool,
    tokens: Vec<(Token, u32)>,
}

/// The tokens of a template, each with its line, and [`Token::End`] last.
pub(super) fn tokens(source: &str) -> Result<Vec<(Token, u32)>, Error> {
    let normalised = source.replace("\r\n", "\n").replace('\r', "\n");
    let source = normalised.strip_suffix('\n').unwrap_or(&normalised);
    let mut lexer = Lexer { source, at: 0, line: 1, line_starting: true, tokens: Vec::new() };
    lexer.run().map_err(|error| error.at(lexer.line))?;
    let line = lexer.line;
    lexer.tokens.push((Token::End, line));
    Ok(lexer.tokens)
}

impl<'s> Lexer<'s> {
    fn rest(&self) -> &'s str {
        &self.source[self.at..]
    }

    fn push(&mut self, token: Token) {
        self.tokens.push((token, self.line));
    }

    /// Goes on by `bytes`, counting lines.
    fn advance(&mut self, bytes: usize) {
        self.line += self.rest()[..bytes].bytes().filter(|&b| b == b'\n').count() as u32;
        self.at += bytes;
    }

    fn push_data(&mut self, text: &str) {
        if !text.is_empty() {
            self.push(Token::Data(text.into()));
        }
    }

    fn run(&mut self) -> Result<(), Error> {
        while !self.rest().is_empty() {
            let rest = self.rest();
            let begin = rest
                .match_indices('{')
                .map(|(at, _)| at)
                .find(|&at| matches!(rest.as_bytes().get(at + 1), Some(b'{' | b'%' | b'#')));
            let Some(begin) = begin else {
                self.push_data(rest);
                self.advance(rest.len());
                break;
            };
            let opening = rest.as_bytes()[begin + 1];
            let text = self.stripped(&rest[..begin], &rest[begin + 2..], opening == b'{');
            self.push_data(text);
            let sign = usize::from(rest[begin + 2..].starts_with(['-', '+']));
            let raw = if opening == b'%' { raw_tag(&rest[begin + 2 + sign..], "raw", false) } else { None };
            self.advance(begin + 2 + sign);
            self.line_starting = false;
            match opening {
                b'#' => self.comment()?,
                b'{' => {
                    self.push(Token::VariableBegin);
                    self.inside(false)?;
                }
                _ if raw.is_some() => {
                    self.advance(raw.unwrap_or(0));
                    self.raw()?;
                }
                _ => {
                    self.push(Token::BlockBegin);
                    self.inside(true)?;
                }
            }
        }
        Ok(())
    }

    /// Text before a tag, without what the tag strips. `after` is what stands behind the tag's first two characters.
    fn stripped<'t>(&self, text: &'t str, after: &str, is_variable: bool) -> &'t str {
        if after.starts_with('-') {
            return text.trim_end_matches(is_space);
        }
        if after.starts_with('+') || is_variable {
            return text;
        }
        let line_begin = text.rfind('\n').map_or(0, |at| at + 1);
        let is_indent = text[line_begin..].chars().all(is_space);
        if is_indent && (line_begin > 0 || self.line_starting) { &text[..line_begin] } else { text }
    }

    fn comment(&mut self) -> Result<(), Error> {
        let rest = self.rest();
        let end = rest.find("#}").ok_or_else(|| Error::new("has a comment without its end `#}`"))?;
        let is_stripping = rest[..end].ends_with('-');
        let is_keeping = rest[..end].ends_with('+');
        self.finish_tag(end + 2, is_stripping, is_keeping);
        Ok(())
    }

    /// Goes behind a closing tag of `bytes` and what it takes with it.
    fn finish_tag(&mut self, bytes: usize, is_stripping: bool, is_keeping: bool) {
        let after = &self.rest()[bytes..];
        let more = if is_stripping {
            after.len() - after.trim_start_matches(is_space).len()
        } else {
            usize::from(!is_keeping && after.starts_with('\n'))
        };
        self.advance(bytes + more);
        self.line_starting = self.source[..self.at].ends_with('\n');
    }

    fn raw(&mut self) -> Result<(), Error> {
        let rest = self.rest();
        let found = rest.match_indices("{%").find_map(|(at, _)| {
            let sign = usize::from(rest[at + 2..].starts_with(['-', '+']));
            raw_tag(&rest[at + 2 + sign..], "endraw", true).map(|length| (at, sign, length))
        });
        let Some((at, sign, length)) = found else {
            return Err(Error::new("has a `raw` block without its end"));
        };
        let text = self.stripped(&rest[..at], &rest[at + 2..], false);
        self.push_data(text);
        self.advance(at + 2 + sign + length);
        self.line_starting = self.source[..self.at].ends_with('\n');
        Ok(())
    }

    /// The inside of `{{ }}` or `{% %}`.
    fn inside(&mut self, is_block: bool) -> Result<(), Error> {
        let mut open: Vec<&'static str> = Vec::new();
        loop {
            let rest = self.rest();
            let Some(next) = rest.chars().next() else {
                return Err(Error::new(format!(
                    "ends inside a tag; expected `{}`",
                    if is_block { "%}" } else { "}}" }
                )));
            };
            if open.is_empty() {
                let end = if is_block { "%}" } else { "}}" };
                let stripping = rest.strip_prefix('-').is_some_and(|rest| rest.starts_with(end));
                let keeping = is_block && rest.strip_prefix('+').is_some_and(|rest| rest.starts_with(end));
                if stripping || keeping || rest.starts_with(end) {
                    self.push(if is_block { Token::BlockEnd } else { Token::VariableEnd });
                    let sign = usize::from(stripping || keeping);
                    self.finish_tag(end.len() + sign, stripping, keeping || !is_block);
                    return Ok(());
                }
            }
            if is_space(next) {
                self.advance(next.len_utf8());
            } else if next.is_ascii_digit() {
                self.number()?;
            } else if next == '_' || next.is_alphanumeric() {
                let length = rest.find(|c: char| !(c == '_' || c.is_alphanumeric())).unwrap_or(rest.len());
                self.push(Token::Name(rest[..length].into()));
                self.advance(length);
            } else if next == '\'' || next == '"' {
                self.string(next)?;
            } else {
                let operator = OPERATORS.into_iter().find(|operator| rest.starts_with(operator));
                let operator = operator.ok_or_else(|| Error::new(format!("has an unexpected character `{next}`")))?;
                match operator {
                    "{" => open.push("}"),
                    "(" => open.push(")"),
                    "[" => open.push("]"),
                    "}" | ")" | "]" => match open.pop() {
                        Some(expected) if expected == operator => {}
                        Some(expected) => {
                            return Err(Error::new(format!("has `{operator}` where `{expected}` is expected")));
                        }
                        None => return Err(Error::new(format!("has an unexpected `{operator}`"))),
                    },
                    _ => {}
                }
                self.push(Token::Operator(operator));
                self.advance(operator.len());
            }
        }
    }

    fn number(&mut self) -> Result<(), Error> {
        let rest = self.rest();
        let bytes = rest.as_bytes();
        let follows_dot = self.source[..self.at].ends_with('.');
        // Digits with single underscores between them.
        let digits = |from: usize, is_digit: &dyn Fn(u8) -> bool| {
            let mut at = from;
            while let Some(&byte) = bytes.get(at) {
                let is_gap = byte == b'_' && at > from && bytes.get(at + 1).is_some_and(|&b| is_digit(b));
                if !is_digit(byte) && !is_gap {
                    break;
                }
                at += 1;
            }
            at
        };
        let decimal = |byte: u8| byte.is_ascii_digit();
        let whole = digits(0, &decimal);
        if !follows_dot {
            let mut end = whole;
            if bytes.get(end) == Some(&b'.') && bytes.get(end + 1).is_some_and(u8::is_ascii_digit) {
                end = digits(end + 1, &decimal);
            }
            if matches!(bytes.get(end), Some(b'e' | b'E')) {
                let sign = usize::from(matches!(bytes.get(end + 1), Some(b'+' | b'-')));
                if bytes.get(end + 1 + sign).is_some_and(u8::is_ascii_digit) {
                    end = digits(end + 1 + sign, &decimal);
                }
            }
            if end > whole {
                let value = rest[..end].replace('_', "").parse().map_err(|_| Error::new("has a broken number"))?;
                self.push(Token::Float(value));
                self.advance(end);
                return Ok(());
            }
        }
        let radix = match (bytes[0], bytes.get(1).map(u8::to_ascii_lowercase)) {
            (b'0', Some(b'x')) => 16,
            (b'0', Some(b'o')) => 8,
            (b'0', Some(b'b')) => 2,
            _ => 10,
        };
        let (from, end) = if radix == 10 {
            // A zero begins only zero.
            let zeros = digits(0, &|byte| byte == b'0');
            (0, if zeros > 0 { zeros } else { whole })
        } else {
            // Python allows an underscore behind the prefix.
            let gap = usize::from(bytes.get(2) == Some(&b'_'));
            (2 + gap, digits(2 + gap, &|byte| char::from(byte).is_digit(radix)))
        };
        if end == from {
            return Err(Error::new("has a broken number"));
        }
        let value = i128::from_str_radix(&rest[from..end].replace('_', ""), radix)
            .map_err(|_| Error::new("has a number of more than 128 bits"))?;
        self.push(Token::Int(value));
        self.advance(end);
        Ok(())
    }

    fn string(&mut self, quote: char) -> Result<(), Error> {
        let rest = self.rest();
        let mut is_escaped = false;
        let end = rest.char_indices().skip(1).find(|&(_, character)| {
            let is_end = character == quote && !is_escaped;
            is_escaped = character == '\\' && !is_escaped;
            is_end
        });
        let (end, _) = end.ok_or_else(|| Error::new("has a string without its end"))?;
        self.push(Token::Str(unescape(&rest[1..end])?));
        self.advance(end + 1);
        Ok(())
    }
}

/// The length of `\s*NAME\s*` and the end of the tag, or `None` if the tag has another name. `takes_line`: a plain end
/// takes a line break with it, which Jinja2 does for `endraw` only.
fn raw_tag(text: &str, name: &str, takes_line: bool) -> Option<usize> {
    let inner = text.trim_start_matches(is_space).strip_prefix(name)?.trim_start_matches(is_space);
    let after = if let Some(after) = inner.strip_prefix("-%}") {
        after.trim_start_matches(is_space)
    } else if let Some(after) = inner.strip_prefix("+%}").filter(|_| takes_line) {
        after
    } else {
        let after = inner.strip_prefix("%}")?;
        if takes_line { after.strip_prefix('\n').unwrap_or(after) } else { after }
    };
    Some(text.len() - after.len())
}

/// A string literal's text, by Python's escapes.
fn unescape(text: &str) -> Result<String, Error> {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        let Some(next) = rest.chars().next() else { return Err(Error::new("has a string that ends in `\\`")) };
        rest = &rest[next.len_utf8()..];
        let simple = match next {
            '\n' => Some(""),
            '\\' => Some("\\"),
            '\'' => Some("'"),
            '"' => Some("\""),
            'a' => Some("\u{7}"),
            'b' => Some("\u{8}"),
            'f' => Some("\u{c}"),
            'n' => Some("\n"),
            'r' => Some("\r"),
            't' => Some("\t"),
            'v' => Some("\u{b}"),
            _ => None,
        };
        if let Some(simple) = simple {
            out.push_str(simple);
            continue;
        }
        let hex = match next {
            'x' => Some(2),
            'u' => Some(4),
            'U' => Some(8),
            _ => None,
        };
        if let Some(count) = hex {
            let code = rest.get(..count).filter(|code| code.bytes().all(|b| b.is_ascii_hexdigit()));
            let code = code.and_then(|code| u32::from_str_radix(code, 16).ok());
            let code = code.ok_or_else(|| Error::new(format!("has a string with a broken `\\{next}` escape")))?;
            rest = &rest[count..];
            out.push(char_of(code, &mut rest)?);
        } else if next.is_digit(8) {
            let count = rest.bytes().take(2).take_while(|b| (b'0'..b'8').contains(b)).count();
            let code = u32::from_str_radix(&format!("{next}{}", &rest[..count]), 8).unwrap_or(0);
            rest = &rest[count..];
            out.push(char_of(code, &mut rest)?);
        } else if next == 'N' {
            return Err(Error::new("names a character by `\\N{...}`, which is not supported; write it out"));
        } else {
            // Unknown escapes keep their backslash.
            out.push('\\');
            out.push(next);
        }
    }
    out.push_str(rest);
    Ok(out)
}

/// A character by its number; a high surrogate takes the low one that follows.
fn char_of(code: u32, rest: &mut &str) -> Result<char, Error> {
    if (0xD800..0xDC00).contains(&code)
        && let Some(low) = rest.strip_prefix("\\u").and_then(|low| u32::from_str_radix(low.get(..4)?, 16).ok())
        && (0xDC00..0xE000).contains(&low)
    {
        *rest = &rest[6..];
        let code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
        return char::from_u32(code).ok_or_else(|| Error::new("has a broken escape"));
    }
    char::from_u32(code).ok_or_else(|| Error::new(format!("has a string with `\\u{code:04x}`, which is no character")))
}
