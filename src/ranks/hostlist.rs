//! Slurm's host lists: `node[01-03,07],gpu5` is node01, node02, node03, node07, gpu5.
//!
//! Every part may have several brackets and text after them (`rack[1-2]n[01-02]-ib`); a range keeps the width of its
//! first number; the last bracket counts fastest. A pure function of the text.

/// Most hosts that one list may name; a list beyond this is a mistake.
const LIMIT: usize = 65_536;

/// What is wrong with a host list.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("host list `{list}`: {problem}; expected the form of Slurm, e.g. `node[01-03,07],gpu5`")]
pub struct Error {
    list: String,
    problem: String,
}

/// The hosts of a list, in its order.
///
/// # Errors
/// If brackets do not match, a range is not one, a part is empty, or the list is too long.
pub fn expand(list: &str) -> Result<Vec<String>, Error> {
    let wrong = |problem: String| Error { list: shortened(list), problem };
    let mut hosts = Vec::new();
    for part in split_outside_brackets(list).map_err(wrong)? {
        let part = part.trim();
        if part.is_empty() {
            return Err(wrong("a name is empty".into()));
        }
        expand_part(part, &mut hosts).map_err(wrong)?;
    }
    Ok(hosts)
}

/// The first characters of a list, for a message.
fn shortened(list: &str) -> String {
    match list.char_indices().nth(120) {
        None => list.into(),
        Some((end, _)) => format!("{}...", &list[..end]),
    }
}

/// The comma-separated parts; commas inside brackets separate numbers.
fn split_outside_brackets(list: &str) -> Result<Vec<&str>, String> {
    let (mut parts, mut start, mut is_inside) = (Vec::new(), 0, false);
    for (at, character) in list.char_indices() {
        match (character, is_inside) {
            ('[', true) => return Err("`[` inside brackets".into()),
            ('[', false) => is_inside = true,
            (']', true) => is_inside = false,
            (']', false) => return Err("`]` without `[`".into()),
            (',', false) => {
                parts.push(&list[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    if is_inside {
        return Err("`[` without `]`".into());
    }
    parts.push(&list[start..]);
    Ok(parts)
}

/// One name with brackets, its hosts added to `hosts`.
fn expand_part(part: &str, hosts: &mut Vec<String>) -> Result<(), String> {
    let mut names = vec![String::new()];
    let mut rest = part;
    while let Some((text, after)) = rest.split_once('[') {
        // `split_outside_brackets` has seen the closing one.
        let Some((inside, after)) = after.split_once(']') else { return Err("`[` without `]`".into()) };
        let numbers = numbers(inside, LIMIT)?;
        if names.len() * numbers.len() + hosts.len() > LIMIT {
            return Err(format!("it names more than {LIMIT} hosts"));
        }
        names = names.iter().flat_map(|n| numbers.iter().map(move |m| format!("{n}{text}{m}"))).collect();
        rest = after;
    }
    if names.len() + hosts.len() > LIMIT {
        return Err(format!("it names more than {LIMIT} hosts"));
    }
    hosts.extend(names.into_iter().map(|name| name + rest));
    Ok(())
}

/// The numbers inside brackets as they stand in the names.
fn numbers(inside: &str, limit: usize) -> Result<Vec<String>, String> {
    let number = |text: &str| -> Result<u64, String> {
        if text.is_empty() || !text.bytes().all(|b| b.is_ascii_digit()) {
            return Err(format!("`{text}` is not a number"));
        }
        text.parse().map_err(|_| format!("`{text}` is too large"))
    };
    let mut all = Vec::new();
    for item in inside.split(',') {
        let (first, last) = item.split_once('-').unwrap_or((item, item));
        let (low, high) = (number(first)?, number(last)?);
        if low > high {
            return Err(format!("the range `{item}` runs backwards"));
        }
        if high - low >= (limit - all.len().min(limit)) as u64 {
            return Err(format!("it names more than {limit} hosts"));
        }
        let width = first.len();
        all.extend((low..=high).map(|n| format!("{n:0width$}")));
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn lists_of_every_form_are_expanded_in_their_order() {
        for (list, hosts) in [
            ("gpu5", &["gpu5"][..]),
            ("node[01-03,07],gpu5", &["node01", "node02", "node03", "node07", "gpu5"]),
            ("n[9-11]", &["n9", "n10", "n11"]),
            ("n[099-101]", &["n099", "n100", "n101"]),
            ("a-1,b.example.org", &["a-1", "b.example.org"]),
            ("rack[1-2]n[01-02]-ib", &["rack1n01-ib", "rack1n02-ib", "rack2n01-ib", "rack2n02-ib"]),
            ("[1-2]", &["1", "2"]),
            ("b2,b1", &["b2", "b1"]),
        ] {
            assert_eq!(expand(list).unwrap(), hosts, "{list}");
        }
    }

    #[test]
    fn broken_lists_say_what_is_wrong() {
        for (list, problem) in [
            ("", "empty"),
            ("a,,b", "empty"),
            ("a[1-2", "without `]`"),
            ("a1-2]", "without `[`"),
            ("a[[1]]", "inside"),
            ("a[3-1]", "backwards"),
            ("a[]", "not a number"),
            ("a[x-2]", "not a number"),
            ("a[1-2-3]", "not a number"),
            ("a[1-99999999999999999999]", "too large"),
            ("a[0-9999999]", "more than"),
            ("a[0-999]b[0-999]", "more than"),
        ] {
            let text = expand(list).unwrap_err().to_string();
            assert!(text.contains(problem) && text.contains(list), "{list}: {text}");
        }
    }

    /// One bracket: its text and the numbers it stands for, with their width.
    fn bracket() -> impl Strategy<Value = (String, Vec<String>)> {
        let item = (0u64..2000, 0u64..5, 0usize..6);
        prop::collection::vec(item, 1..4).prop_map(|items| {
            let mut texts = Vec::new();
            let mut names = Vec::new();
            for (low, extra, width) in items {
                let text = |n: u64| format!("{n:0width$}");
                texts.push(if extra == 0 { text(low) } else { format!("{}-{}", text(low), low + extra) });
                // The width of a range is that of its first number as written.
                let width = text(low).len();
                names.extend((low..=low + extra).map(|n| format!("{n:0width$}")));
            }
            (format!("[{}]", texts.join(",")), names)
        })
    }

    /// One part: text with up to two brackets, and its hosts.
    fn part() -> impl Strategy<Value = (String, Vec<String>)> {
        ("[a-z][a-z.-]{0,4}", prop::collection::vec((bracket(), "[a-z-]{0,3}"), 0..3)).prop_map(|(head, brackets)| {
            let (mut list, mut hosts) = (head.clone(), vec![head]);
            for ((text, numbers), tail) in brackets {
                list += &format!("{text}{tail}");
                hosts = hosts.iter().flat_map(|h| numbers.iter().map(move |n| format!("{h}{n}"))).collect();
                hosts.iter_mut().for_each(|h| h.push_str(&tail));
            }
            (list, hosts)
        })
    }

    proptest! {
        #[test]
        fn a_list_expands_to_what_it_was_written_from(parts in prop::collection::vec(part(), 1..4)) {
            let list: Vec<String> = parts.iter().map(|(list, _)| list.clone()).collect();
            let hosts: Vec<String> = parts.into_iter().flat_map(|(_, hosts)| hosts).collect();
            prop_assert_eq!(expand(&list.join(",")).unwrap(), hosts);
        }

        #[test]
        fn no_text_makes_it_panic(text in "[a-c0-9,\\[\\]\\- ]{0,24}") {
            if let Ok(hosts) = expand(&text) {
                prop_assert!(!hosts.is_empty());
            }
        }
    }
}
