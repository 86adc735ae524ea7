//! Finds the final answer in a completion or in a worked solution.

use std::sync::LazyLock;

use fancy_regex::Regex;

/// Longest tail of a text that is searched for a bare number, in bytes.
const TAIL: usize = 4000;

/// Where a final answer may be found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extraction {
    /// In `\boxed{}` or `\fbox{}` only.
    Boxed,
    /// In `\boxed{}`, else in `<answer>`, else after "the answer is" or `####`, else the whole text if it is one short
    /// line, else the last formula or number.
    Any,
}

/// The final answer in `text`: the first of the places of [`Extraction::Any`] that is there, and the last of its kind.
///
/// Several boxes joined only by commas, spaces or "and" are one answer with several items.
pub fn final_answer(text: &str, extraction: Extraction) -> Option<String> {
    let boxed = boxed(text);
    if boxed.is_some() || extraction == Extraction::Boxed {
        return boxed;
    }
    tagged(text).or_else(|| announced(text)).or_else(|| short_line(text)).or_else(|| last_expression(text))
}

/// The content of the last box, or of the last boxes if several are joined.
fn boxed(text: &str) -> Option<String> {
    const LONGEST_JOINT: usize = 24;
    let mut found: Vec<(usize, usize, &str)> = Vec::new();
    let mut from = 0;
    while let Some((start, length)) = next_box(&text[from..]).map(|(s, l)| (from + s, l)) {
        let open = start + length;
        match closing_brace(&text[open..]) {
            Some((content, end)) => {
                // A box in a box: the outer one is taken.
                found.push((start, open + end, content));
                from = open + end;
            }
            None => from = open,
        }
    }
    let mut answers = Vec::new();
    let mut next_start = None;
    for (start, end, content) in found.into_iter().rev() {
        if let Some(next) = next_start {
            let joint = &text[end..next];
            let words = joint.replace(['$', ',', '.', ';', '\\', '(', ')'], " ");
            if joint.len() > LONGEST_JOINT || !words.split_whitespace().all(|w| matches!(w, "and" | "or" | "quad")) {
                break;
            }
        }
        next_start = Some(start);
        answers.push(content.trim());
    }
    answers.reverse();
    answers.dedup();
    let answer = answers.join(", ");
    (!answer.is_empty()).then_some(answer)
}

/// Where the next `\boxed` or `\fbox` starts, and the length up to its opening brace.
fn next_box(text: &str) -> Option<(usize, usize)> {
    let mut from = 0;
    loop {
        let start = from + text[from..].find('\\')?;
        let rest = &text[start + 1..];
        let name = ["boxed", "fbox"].into_iter().find(|name| rest.starts_with(name));
        if let Some(name) = name {
            let after = &rest[name.len()..];
            let spaces = after.len() - after.trim_start().len();
            if after[spaces..].starts_with('{') {
                return Some((start, 1 + name.len() + spaces));
            }
        }
        from = start + 1;
    }
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

/// The content of the last `<answer>...</answer>`.
fn tagged(text: &str) -> Option<String> {
    let end = text.rfind("</answer>")?;
    let start = text[..end].rfind("<answer>")? + "<answer>".len();
    let content = text[start..end].trim();
    // Inside the tags people write sentences as well.
    let answer = announced(content).or_else(|| short_line(content)).or_else(|| last_expression(content));
    answer.or_else(|| (!content.is_empty()).then(|| content.to_owned()))
}

static ANNOUNCED: LazyLock<Regex> = LazyLock::new(|| {
    let pattern = r"(?i)(?:####|\banswer\b\**\s*(?:is|:|=|\*\*:)\s*(?:\*\*)?\s*:?)[ \t]*";
    Regex::new(pattern).expect("the pattern is a constant that a test compiles")
});

/// What follows the last "the answer is", "Answer:" or `####`, to the end of the sentence.
fn announced(text: &str) -> Option<String> {
    let tail = tail(text);
    let start = ANNOUNCED.find_iter(tail).flatten().last()?.end();
    let rest = tail[start..].trim_start();
    let line = rest.lines().next()?.trim();
    let line = if line.is_empty() { rest } else { line };
    let sentence = line.find(". ").map_or(line, |end| &line[..end]);
    let answer = formula(sentence).unwrap_or(sentence).trim();
    if answer.is_empty() {
        return None;
    }
    if super::Answer::parse(answer).is_ok_and(|a| a.is_mathematics() || a.choice.is_some()) {
        return Some(answer.to_owned());
    }
    // Words around a number, as in "the answer is that he has 12 apples left".
    let number = NUMBER.find_iter(answer).flatten().last().map(|m| m.as_str().trim().to_owned());
    number.or_else(|| Some(answer.to_owned()))
}

/// The whole text, if it is one short line that is mathematics.
fn short_line(text: &str) -> Option<String> {
    const LONGEST: usize = 200;
    let line = text.trim();
    let is_answer = !line.is_empty()
        && line.len() <= LONGEST
        && !line.contains('\n')
        && super::Answer::parse(line).is_ok_and(|a| a.is_mathematics() || a.choice.is_some());
    is_answer.then(|| line.to_owned())
}

static NUMBER: LazyLock<Regex> = LazyLock::new(|| {
    // A sign is one only where no letter, digit or bracket stands before it.
    let sign = r"(?:(?<![\w)\]}])[-+−])?";
    let digits = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+)";
    let tail = r"(?:[eE][-+]?[0-9]+\b)?(?:[ \t]*/[ \t]*[0-9]+)?(?:[ \t]*\\?%)?";
    let pattern = &format!("{sign}{digits}{tail}");
    Regex::new(pattern).expect("the pattern is a constant that a test compiles")
});

/// The last formula between dollar signs or brackets, or the last number, whichever ends later.
fn last_expression(text: &str) -> Option<String> {
    let tail = tail(text);
    let number = NUMBER.find_iter(tail).flatten().last();
    let number_end = number.map_or(0, |m| m.end());
    let mut last_formula = None;
    let mut from = 0;
    while let Some((start, content, end)) = next_formula(&tail[from..]) {
        let _ = start;
        if super::Answer::parse(content).is_ok_and(|a| a.is_mathematics()) {
            last_formula = Some((from + end, content.to_owned()));
        }
        from += end;
    }
    match last_formula {
        Some((end, content)) if end >= number_end => Some(content),
        _ => number.map(|m| m.as_str().trim().to_owned()),
    }
}

/// The first formula of `text`, if it has one.
fn formula(text: &str) -> Option<&str> {
    next_formula(text).map(|(_, content, _)| content)
}

/// Start, content and end of the next formula in dollar signs, `\(...\)` or `\[...\]`.
fn next_formula(text: &str) -> Option<(usize, &str, usize)> {
    const MARKS: [(&str, &str); 4] = [("$$", "$$"), (r"\[", r"\]"), (r"\(", r"\)"), ("$", "$")];
    let (start, (open, close)) =
        MARKS.iter().filter_map(|m| text.find(m.0).map(|at| (at, *m))).min_by_key(|(at, m)| (*at, 2 - m.0.len()))?;
    let inner = start + open.len();
    let length = text[inner..].find(close)?;
    Some((start, text[inner..inner + length].trim(), inner + length + close.len()))
}

fn tail(text: &str) -> &str {
    let mut start = text.len().saturating_sub(TAIL);
    while !text.is_char_boundary(start) {
        start += 1;
    }
    &text[start..]
}

#[cfg(test)]
mod tests {
    use super::{Extraction, final_answer};

    fn any(text: &str) -> Option<String> {
        final_answer(text, Extraction::Any)
    }

    #[test]
    fn the_last_box_wins_and_braces_balance() {
        assert_eq!(any(r"\boxed{1}, no: \boxed{\frac{1}{2}}.").as_deref(), Some(r"\frac{1}{2}"));
        assert_eq!(any(r"so \fbox{7} <answer>8</answer>").as_deref(), Some("7"));
        assert_eq!(any(r"$\boxed {\{1, 2\}}$").as_deref(), Some(r"\{1, 2\}"));
        assert_eq!(any(r"\boxed{3} and \boxed{4}").as_deref(), Some("3, 4"));
        assert_eq!(any(r"first \boxed{3}. But that was wrong, it is \boxed{4}").as_deref(), Some("4"));
        assert_eq!(final_answer(r"\boxed{12", Extraction::Boxed), None);
        assert_eq!(final_answer("the answer is 5", Extraction::Boxed), None);
    }

    #[test]
    fn other_places_are_searched_in_order() {
        for (text, expected) in [
            ("<think>3</think><answer> 42 </answer>", "42"),
            ("<answer>The total is 42 apples</answer>", "42"),
            ("He has 3.\n#### 1,234", "1,234"),
            ("So the answer is 7.", "7."),
            ("The final answer is: $\\frac{3}{4}$. I hope it is correct.", "\\frac{3}{4}"),
            ("**Answer:** 12 dollars", "12 dollars"),
            ("Answer: B", "B"),
            ("68", "68"),
            ("x = 5", "x = 5"),
            ("Adding them up I get 12 and then 15 in total", "15"),
            ("That leaves -3.5 percent, or $x = 4$ then.", "x = 4"),
            ("It falls by 5 to -12,000", "-12,000"),
            ("between 3-5", "5"),
            ("a ratio of 3/4", "3/4"),
            ("about .5", ".5"),
        ] {
            assert_eq!(any(text).as_deref(), Some(expected), "{text}");
        }
        assert_eq!(any("I do not know"), None);
        assert_eq!(any(""), None);
    }
}
