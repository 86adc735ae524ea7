//! Answers in `\boxed{}` and `\fbox{}`.

/// What the boxes of a text say.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Boxes {
    /// There are none.
    None,
    /// The last box is empty, not closed, denied, or holds a box and more.
    Broken,
    /// The content of the last box, or of the last ones if they are joined.
    Answer(String),
}

/// A box: where it starts and ends, and what is in it unless it is not closed.
struct Found<'a> {
    start: usize,
    end: usize,
    content: Option<&'a str>,
}

/// The content of the last box, or of the last boxes if several are joined.
pub(super) fn last(text: &str) -> Boxes {
    let mut found = Vec::new();
    let mut from = 0;
    while let Some((start, after)) = next_name(text, from) {
        match read(text, after) {
            Some((content, end)) => {
                from = if content.is_some() { end } else { after };
                found.push(Found { start, end, content });
            }
            None => from = after, // the word itself, as in "put it in \boxed"
        }
    }
    let mut answers: Vec<&str> = Vec::new();
    let mut next_start = None;
    for found in found.iter().rev() {
        if next_start.is_some_and(|next| !is_joined(&text[found.end..next])) {
            break;
        }
        let Some(content) = found.content.and_then(inner) else {
            if answers.is_empty() {
                return Boxes::Broken;
            }
            break; // an earlier box that is broken says nothing about the last one
        };
        if answers.is_empty() && is_denied(&text[..found.start]) {
            return Boxes::Broken;
        }
        next_start = Some(found.start);
        answers.push(content);
    }
    answers.reverse();
    answers.dedup();
    if answers.is_empty() { Boxes::None } else { Boxes::Answer(answers.join(", ")) }
}

/// Where the next `\boxed` or `\fbox` starts, and where its name ends.
fn next_name(text: &str, from: usize) -> Option<(usize, usize)> {
    ["\\boxed", "\\fbox"]
        .into_iter()
        .filter_map(|name| text[from..].find(name).map(|at| (from + at, from + at + name.len())))
        .min()
}

/// The content of a box whose name ends at `after`, with its end; the content is `None` if it is not closed.
fn read(text: &str, after: usize) -> Option<(Option<&str>, usize)> {
    let rest = &text[after..];
    let open = after + rest.len() - rest.trim_start().len();
    if text[open..].starts_with('{') {
        return Some(match closing_brace(&text[open..]) {
            Some((content, end)) => (Some(content), open + end),
            None => (None, open),
        });
    }
    // `\boxed 7`: up to the next space or sign of a formula's end.
    let is_separated = open > after;
    let content: &str = &text[open..];
    let length =
        content.find(|c: char| c.is_whitespace() || matches!(c, '$' | '\\' | '}' | ',' | ';')).unwrap_or(content.len());
    let content = content[..length].trim_end_matches('.');
    let is_value = content.starts_with(|c: char| c.is_ascii_digit() || c == '-');
    (is_value && is_separated || content.starts_with(|c: char| c.is_ascii_digit()))
        .then_some((Some(content), open + content.len()))
}

/// The content of the braces that open `text`, and where they end.
fn closing_brace(text: &str) -> Option<(&str, usize)> {
    let mut depth = 0usize;
    let mut is_escaped = false;
    for (at, c) in text.char_indices() {
        match c {
            _ if is_escaped => is_escaped = false,
            '\\' => is_escaped = true,
            '{' => depth += 1,
            '}' => {
                depth = depth.saturating_sub(1);
                if depth == 0 {
                    return Some((&text[1..at], at + 1));
                }
            }
            _ => {}
        }
    }
    None
}

/// The content without a box that is all of it; `None` if it is empty or has a box and more in it.
fn inner(content: &str) -> Option<&str> {
    const DEEPEST: usize = 8;
    let mut content = content.trim();
    for _ in 0..DEEPEST {
        let Some((start, after)) = next_name(content, 0) else {
            return (!content.trim_matches(['$', ' ']).is_empty()).then_some(content);
        };
        let (inside, end) = read(content, after)?;
        let is_all =
            content[..start].trim_matches(['$', ' ']).is_empty() && content[end..].trim_matches(['$', ' ']).is_empty();
        content = inside.filter(|_| is_all)?.trim();
    }
    None
}

/// Whether what stands between two boxes makes one answer of them: commas and "and", or words that leave the choice open.
fn is_joined(joint: &str) -> bool {
    const LONGEST: usize = 80;
    const LONGEST_LIST: usize = 32;
    const OPEN: &[&str] =
        &["or", "maybe", "perhaps", "possibly", "alternatively", "either", "otherwise", "might", "could", "或", "或者"];
    const LISTING: &[&str] = &["and", "or", "quad", "和", "或", "for", "part", "a", "b", "c", "d", "i", "ii"];
    const CORRECTING: &[&str] = &[
        "wait",
        "no",
        "not",
        "wrong",
        "mistake",
        "correct",
        "corrected",
        "correction",
        "actually",
        "instead",
        "rather",
        "sorry",
        "error",
        "incorrect",
        "however",
        "but",
        "so",
        "therefore",
        "thus",
        "hence",
        "then",
        "finally",
    ];
    if joint.len() > LONGEST || joint.contains("\n\n") {
        return false;
    }
    let joint = without_name(joint);
    let plain = joint.replace("\\text", " ").replace("\\quad", " ").to_lowercase();
    let words: Vec<&str> = plain.split(|c: char| !c.is_alphanumeric() && c != '\'').filter(|w| !w.is_empty()).collect();
    let is_list = joint.len() <= LONGEST_LIST && words.iter().all(|w| LISTING.contains(w));
    let is_open = words.iter().any(|w| OPEN.contains(w)) && !words.iter().any(|w| CORRECTING.contains(w));
    is_list && !joint.contains('=') || is_open
}

/// The joint without `y_2 =` at its end, which names the next box.
fn without_name(joint: &str) -> &str {
    let Some(before) = joint.trim_end().strip_suffix('=') else { return joint };
    let before = before.trim_end();
    let start = before.rfind(|c: char| c.is_whitespace() || matches!(c, '(' | '$')).map_or(0, |at| at + 1);
    &joint[..start]
}

/// Whether the words before a box deny it.
fn is_denied(before: &str) -> bool {
    let before =
        before.trim_end_matches(|c: char| c.is_whitespace() || matches!(c, '$' | '*' | ':' | '(' | '\\' | '['));
    if before.ends_with("\\neq") || before.ends_with("\\ne") || before.ends_with('≠') {
        return true;
    }
    let word = before.rsplit(|c: char| !c.is_alphanumeric() && c != '\'').next().unwrap_or_default().to_lowercase();
    matches!(word.as_str(), "not" | "never" | "cannot") || word.ends_with("n't") || before.ends_with("不是")
}
