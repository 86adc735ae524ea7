//! Which texts of a conversation a template prints, and where.
//!
//! A character that the conversation does not contain is put into the middle of every text, and the conversation rendered
//! again. If the template prints the same text but for those characters, they tell exactly what it printed. If it does
//! not (it looked at the text), each text is searched for in order.

use serde_json::Value;

use super::messages::THOUGHT_FIELDS;

/// Supplementary private use area A, in which the marks are.
const FIRST_MARK: u32 = 0xF_0000;
const LAST_MARK: u32 = 0xF_FFFD;

/// What a piece of text is in its message.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum What {
    Content,
    /// A thought, and the field it stands in.
    Thought(&'static str),
    ToolCalls,
    Field(String),
}

/// One piece of text.
#[derive(Clone, Debug)]
pub(super) struct Piece {
    pub(super) turn: usize,
    pub(super) what: What,
    text: String,
    /// Characters of the content behind the mark; of contents only.
    rest: Option<String>,
}

/// A conversation with marks in it.
#[derive(Clone, Debug)]
pub(super) struct Probed {
    pub(super) turns: Vec<Value>,
    pub(super) pieces: Vec<Piece>,
    has_marks: bool,
}

/// What a template printed.
#[derive(Clone, Debug, Default)]
pub(super) struct Seen {
    /// Pieces that are missing in the text, by turn.
    pub(super) missing: Vec<(usize, What)>,
    /// Of each turn where its content ends in the text, in characters.
    pub(super) ends: Vec<Option<usize>>,
}

/// Puts marks into the messages.
pub(super) fn probe(turns: &[Value]) -> Probed {
    let mut probed = Probed { turns: turns.to_vec(), pieces: Vec::new(), has_marks: true };
    for (index, turn) in turns.iter().enumerate() {
        let Value::Object(fields) = turn else { continue };
        for (name, value) in fields {
            match (name.as_str(), value) {
                // Who speaks, and what only programs read.
                ("role" | "id" | "tool_call_id" | "call_id" | "type", _) => {}
                ("content", Value::String(text)) => {
                    let mut marker = Marker { pieces: &mut probed.pieces, turn: index };
                    probed.turns[index][name] = Value::String(marker.content(text));
                }
                ("tool_calls", calls) => {
                    let mut marker = Marker { pieces: &mut probed.pieces, turn: index };
                    probed.turns[index][name] = marker.leaves(calls, &What::ToolCalls);
                }
                (_, value) => {
                    let thought = THOUGHT_FIELDS.iter().find(|field| **field == name).copied();
                    let what = thought.map_or_else(|| What::Field(name.clone()), What::Thought);
                    let mut marker = Marker { pieces: &mut probed.pieces, turn: index };
                    probed.turns[index][name] = marker.leaves(value, &what);
                }
            }
        }
    }
    let has_own = turns.iter().any(|turn| turn.to_string().chars().any(is_mark));
    probed.has_marks = !has_own && probed.pieces.len() as u32 <= LAST_MARK - FIRST_MARK;
    probed
}

fn is_mark(character: char) -> bool {
    (FIRST_MARK..=LAST_MARK).contains(&(character as u32))
}

struct Marker<'a> {
    pieces: &'a mut Vec<Piece>,
    turn: usize,
}

impl Marker<'_> {
    /// Marks a text that is not blank.
    fn text(&mut self, text: &str, what: &What) -> String {
        let trimmed = text.trim();
        let Some(mark) = char::from_u32(FIRST_MARK + self.pieces.len() as u32).filter(|_| !trimmed.is_empty()) else {
            return text.to_string();
        };
        let at = text.len() - text.trim_start().len() + middle(trimmed);
        let rest = (*what == What::Content).then(|| text[at..].trim_end().to_string());
        self.pieces.push(Piece { turn: self.turn, what: what.clone(), text: trimmed.to_string(), rest });
        format!("{}{mark}{}", &text[..at], &text[at..])
    }

    /// Marks thought and answer of a content each.
    fn content(&mut self, text: &str) -> String {
        let Some(end) = text.rfind("</think>") else { return self.text(text, &What::Content) };
        let (before, tag, thought) = match text[..end].split_once("<think>") {
            Some((before, thought)) => (before, "<think>", thought),
            None => ("", "", &text[..end]),
        };
        let before = self.text(before, &What::Content);
        let thought = self.text(thought, &What::Thought("content"));
        let answer = self.text(&text[end + "</think>".len()..], &What::Content);
        format!("{before}{tag}{thought}</think>{answer}")
    }

    /// Marks all strings in a value.
    fn leaves(&mut self, value: &Value, what: &What) -> Value {
        match value {
            Value::String(text) => Value::String(self.text(text, what)),
            Value::Array(items) => items.iter().map(|item| self.leaves(item, what)).collect(),
            Value::Object(fields) => {
                let leaf = |(name, field): (&String, &Value)| {
                    let is_bookkeeping = matches!(name.as_str(), "id" | "type" | "call_id" | "tool_call_id");
                    let field = if is_bookkeeping { field.clone() } else { self.leaves(field, what) };
                    (name.clone(), field)
                };
                Value::Object(fields.iter().map(leaf).collect())
            }
            other => other.clone(),
        }
    }
}

/// A place near the middle of a text that is not inside a tag or an escape.
fn middle(text: &str) -> usize {
    let is_outside = |at: usize| {
        let before = &text[..at];
        let open = before.rfind('<').is_some_and(|open| {
            let end = text[open..].find('>').map(|end| open + end);
            end.is_some_and(|end| end >= at && !text[open..end].contains(char::is_whitespace))
        });
        !open && !before.ends_with('\\')
    };
    let half = text.len() / 2;
    let boundaries = || text.char_indices().map(|(at, _)| at).filter(|&at| at > 0);
    let later = boundaries().filter(|&at| at >= half).find(|&at| is_outside(at));
    later.or_else(|| boundaries().rev().find(|&at| is_outside(at))).unwrap_or(text.len())
}

impl Probed {
    /// Holds a rendered text against the conversation. `marked` is the text rendered from [`Probed::turns`], if the
    /// template rendered it.
    pub(super) fn see(&self, text: &str, marked: Option<&str>) -> Seen {
        let exact = marked.filter(|_| self.has_marks).and_then(|marked| places(text, marked, self.pieces.len()));
        let places = exact.unwrap_or_else(|| self.search(text));
        let mut seen = Seen { missing: Vec::new(), ends: vec![None; self.turns.len()] };
        for (piece, place) in self.pieces.iter().zip(&places) {
            match place {
                None => seen.missing.push((piece.turn, piece.what.clone())),
                Some(at) => {
                    if let Some(rest) = &piece.rest
                        && text.chars().skip(*at).take(rest.chars().count()).eq(rest.chars())
                    {
                        seen.ends[piece.turn] = Some(at + rest.chars().count());
                    }
                }
            }
        }
        seen.missing.dedup();
        seen
    }

    /// Looks for each piece behind the one before; anywhere if it is not there.
    fn search(&self, text: &str) -> Vec<Option<usize>> {
        let mut from = 0;
        let find = |piece: &Piece| {
            let at = text[from..].find(&piece.text).map(|at| from + at).or_else(|| text.find(&piece.text))?;
            from = from.max(at + piece.text.len());
            let rest = piece.rest.as_ref().map_or(0, String::len);
            Some(text[..(at + piece.text.len()).saturating_sub(rest)].chars().count())
        };
        self.pieces.iter().map(find).collect()
    }
}

/// Where in `text` the marks of `marked` are, if the two are otherwise the same.
fn places(text: &str, marked: &str, count: usize) -> Option<Vec<Option<usize>>> {
    let mut places = vec![None; count];
    let mut plain = text.chars();
    let mut position = 0;
    for character in marked.chars() {
        if is_mark(character) {
            *places.get_mut((character as u32 - FIRST_MARK) as usize)? = Some(position);
        } else if plain.next() == Some(character) {
            position += 1;
        } else {
            return None;
        }
    }
    plain.next().is_none().then_some(places)
}
