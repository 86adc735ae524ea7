//! Finds the final answer in a completion or in a worked solution.
//!
//! The rule is that one place counts, found without knowing the right answer, and that what the text leaves open is no
//! answer: an unclosed or empty last box, alternatives, a number that is only denied.

mod boxes;
mod prose;

use super::normalize::narrow;
use boxes::Boxes;

/// Where a final answer may be found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extraction {
    /// In `\boxed{}` or `\fbox{}` only.
    Boxed,
    /// In `\boxed{}`, else in `<answer>`, else after "the answer is" or `####`, else the whole text if it is one short
    /// line, else the last formula or number.
    Any,
}

/// Tags around reasoning, as models and prompts use them.
const REASONING: &[(&str, &str)] = &[
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<scratchpad>", "</scratchpad>"),
    ("<seed:think>", "</seed:think>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
];

/// The final answer in `text`: the first of the places of [`Extraction::Any`] that is there, and the last of its kind.
///
/// Only what follows the reasoning counts, and reasoning that does not end has no answer. Several boxes joined by
/// commas, "and", or words that leave the choice open, are one answer with several items. A last box that is empty or not closed is no
/// answer, and then no other place is looked at.
pub fn final_answer(text: &str, extraction: Extraction) -> Option<String> {
    let text = narrow(conclusion(text));
    match boxes::last(&text) {
        Boxes::Answer(answer) => return Some(answer),
        Boxes::Broken => return None,
        Boxes::None if extraction == Extraction::Boxed => return None,
        Boxes::None => {}
    }
    match tagged(&text) {
        Some(content) => prose::statement(content.trim()),
        None => prose::answer(&text),
    }
}

/// Whether a prompt ends by opening the reasoning, as chat templates of reasoning models do.
pub(in crate::reward) fn opens_reasoning(prompt: &str) -> bool {
    REASONING.iter().any(|(open, _)| prompt.trim_end().ends_with(open))
}

/// Whether `text` closes reasoning.
pub(in crate::reward) fn closes_reasoning(text: &str) -> bool {
    REASONING.iter().any(|(_, close)| text.contains(close))
}

/// What follows the reasoning, up to reasoning that does not end.
fn conclusion(text: &str) -> &str {
    let mut rest = text;
    for (_, close) in REASONING {
        rest = rest.rsplit_once(close).map_or(rest, |(_, after)| after);
    }
    for (open, _) in REASONING {
        rest = rest.split_once(open).map_or(rest, |(before, _)| before);
    }
    rest
}

/// The content of the last `<answer>...</answer>`.
fn tagged(text: &str) -> Option<&str> {
    let end = text.rfind("</answer>")?;
    let start = text[..end].rfind("<answer>")? + "<answer>".len();
    Some(&text[start..end])
}

#[cfg(test)]
mod tests {
    use super::{Extraction, final_answer};

    fn any(text: &str) -> Option<String> {
        final_answer(text, Extraction::Any)
    }

    #[test]
    fn the_last_box_wins_and_braces_balance() {
        for (text, expected) in [
            (r"\boxed{1}, no: \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
            (r"so \fbox{7} <answer>8</answer>", "7"),
            (r"$\boxed {\{1, 2\}}$", r"\{1, 2\}"),
            (r"\boxed{3} and \boxed{4}", "3, 4"),
            (r"\boxed{3} $\text{ and } $ \boxed{4}", "3, 4"),
            (r"first \boxed{3}. But that was wrong, it is \boxed{4}", "4"),
            (r"\boxed{3}... wait, or rather \boxed{4}", "4"),
            (r"\boxed{\boxed{7}}", "7"),
            (r"\boxed 7", "7"),
            (r"so $\boxed 42$.", "42"),
            (r"\boxed{7}. That is in \boxed as asked.", "7"),
            (r"not 5 but \boxed{7}", "7"),
        ] {
            assert_eq!(any(text).as_deref(), Some(expected), "{text}");
            assert_eq!(final_answer(text, Extraction::Boxed).as_deref(), Some(expected), "{text}");
        }
        assert_eq!(final_answer("the answer is 5", Extraction::Boxed), None);
    }

    #[test]
    fn boxes_that_leave_the_answer_open_are_no_single_answer() {
        // Each is worth nothing where 7 is right.
        for text in [
            r"\boxed{7",
            r"\boxed{7} and so \boxed{",
            r"\boxed{7}, that is \boxed{}",
            r"\boxed{ }. The answer is 7",
            r"\boxed{8 \boxed{7}}",
            r"it is not \boxed{7}",
            r"$x \neq \boxed{7}$",
        ] {
            assert_eq!(any(text), None, "{text}");
        }
        for text in
            [r"\boxed{8} or \boxed{7}", r"\boxed{8}, or maybe it is \boxed{7}", r"\boxed{8} or possibly \boxed{7}"]
        {
            assert_eq!(any(text).as_deref(), Some("8, 7"), "{text}");
        }
    }

    #[test]
    fn reasoning_does_not_count() {
        for (text, expected) in [
            (r"<think>\boxed{7}</think> The answer is 9.", Some("9.")),
            (r"<think>\boxed{7}</think>", None),
            (r"<think>so it is \boxed{7}", None),
            (r"\boxed{7} <think>or is it \boxed{8}", Some("7")),
            (r"so it is \boxed{9}</think> \boxed{7}", Some("7")),
            (r"<think>a</think> \boxed{8} <think>b</think> \boxed{7}", Some("7")),
            (r"[THINK]\boxed{8}[/THINK]\boxed{7}", Some("7")),
            (r"<reasoning>8</reasoning><answer>7</answer>", Some("7")),
        ] {
            assert_eq!(any(text).as_deref(), expected, "{text}");
        }
    }

    #[test]
    fn other_places_are_searched_in_order() {
        for (text, expected) in [
            ("<think>3</think><answer> 42 </answer>", "42"),
            ("<answer>The total is 42 apples</answer>", "42"),
            ("He has 3.\n#### 1,234", "1,234"),
            ("So the answer is 7.", "7."),
            ("The final answer is: $\\frac{3}{4}$. I hope it is correct.", "$\\frac{3}{4}$"),
            ("The answer is $\\frac{3}{4}$, since it is so.", "$\\frac{3}{4}$"),
            ("**Answer:** 12 dollars", "12 dollars"),
            ("So it is **73**.\n---\n✅ Final Answer: **73**", "73**"),
            ("Answer: B", "B"),
            ("The correct option is (C).", "(C)."),
            ("68", "68"),
            ("x = 5", "x = 5"),
            ("Adding them up I get 12 and then 15 in total", "15"),
            ("That leaves -3.5 percent, or $x = 4$ then.", "x = 4"),
            ("It falls by 5 to -12,000", "-12,000"),
            ("a ratio of 3/4", "3/4"),
            ("about .5", ".5"),
            ("The length is 3 cm.", "3 cm"),
            ("It costs £5 in all.", "£5"),
            ("So there are 3 and 4", "3 and 4"),
            ("The train leaves at 10:30.", "10:30"),
            ("答案是 42。", "42."),
            ("所以答案为：４２", "42"),
            ("The answer is 7, not 8.", "7"),
        ] {
            assert_eq!(any(text).as_deref(), Some(expected), "{text}");
        }
        for text in [
            "I do not know",
            "",
            "between 3-5",
            "The answer is not 7.",
            "It is not 7",
            "I don't think the answer is 7.",
            "The answer is 8 or maybe 7",
            "Perhaps it is 7",
            "1 2 3 4 5 6 7",
            "on 2020-01-15",
            "答案不是 7",
        ] {
            assert_eq!(any(text), None, "{text}");
        }
    }
}
