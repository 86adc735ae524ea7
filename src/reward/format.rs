//! Rewards for the layout of a completion.
//!
//! Chat templates of reasoning models (DeepSeek-R1-Distill) end the prompt with `<think>`, so that the completion
//! starts inside it. Every reward here then puts that tag in front of the completion, where TRL's would always give 0;
//! the parameter `count_prompt: false` switches that off.

use std::borrow::Cow;
use std::sync::LazyLock;

use fancy_regex::Regex;

use serde_json::Value;

use super::Sample;
use super::error::Error;
use super::parameters::Parameters;
use super::registry::Scorer;

/// The completion with the tag that the prompt opened.
fn with_opened_tag<'a>(sample: &Sample<'a>, counts_prompt: bool) -> Cow<'a, str> {
    const TAG: &str = "<think>";
    let prompt = sample.prompt_text;
    if counts_prompt
        && prompt.trim_end().ends_with(TAG)
        && !sample.completion.trim_start().starts_with(TAG)
        && let Some(start) = prompt.rfind(TAG)
    {
        return Cow::Owned(format!("{}{}", &prompt[start..], sample.completion));
    }
    Cow::Borrowed(sample.completion)
}

fn scorer(counts_prompt: bool, score: impl Fn(&str) -> f64 + Send + Sync + 'static) -> Scorer {
    Box::new(move |_, sample| Ok(Some(score(&with_opened_tag(sample, counts_prompt)))))
}

/// `think_format`: TRL's `think_format_reward`. 1 if the completion matches `^<think>(?!.*<think>)(.*?)</think>.*$`
/// with the dot matching line breaks: it starts with the only `<think>`, and a `</think>` follows.
///
/// Parameters: `count_prompt` (default true).
pub(super) fn think_format(parameters: &mut Parameters<'_>) -> Result<Scorer, Error> {
    let counts_prompt = parameters.flag("count_prompt", true)?;
    Ok(scorer(counts_prompt, |text| {
        let is_right = text
            .strip_prefix("<think>")
            .is_some_and(|inside| !inside.contains("<think>") && inside.contains("</think>"));
        f64::from(u8::from(is_right))
    }))
}

/// `tag_format`: 1 if the completion is `<think>...</think><answer>...</answer>`, each tag once, with only spaces
/// between and around the two parts.
///
/// Parameters: `newlines` (default false: tags need no lines of their own), `count_prompt` (default true).
pub(super) fn tag_format(parameters: &mut Parameters<'_>) -> Result<Scorer, Error> {
    layout(parameters, false)
}

static LINES: LazyLock<Regex> = LazyLock::new(|| {
    // Python's `re.match` with DOTALL and MULTILINE: `$` is before any line break.
    let pattern = r"(?s)\A<think>\n.*?\n</think>\n<answer>\n.*?\n</answer>(?:\n|\z)";
    Regex::new(pattern).expect("the pattern is a constant that a test compiles")
});

/// `format`: open-r1's `format_reward`. 1 if the completion starts with what
/// `^<think>\n.*?\n</think>\n<answer>\n.*?\n</answer>$` matches, a line break or nothing after it. It may go on behind
/// that line break: `tag_format` with `newlines: true` allows nothing but spaces there, and each tag once.
///
/// Parameters: `newlines` (default true; false is `tag_format`), `count_prompt` (default true).
pub(super) fn line_format(parameters: &mut Parameters<'_>) -> Result<Scorer, Error> {
    if !parameters.flag("newlines", true)? {
        return layout(parameters, false);
    }
    let counts_prompt = parameters.flag("count_prompt", true)?;
    Ok(scorer(counts_prompt, |text| f64::from(u8::from(LINES.is_match(text).unwrap_or(false)))))
}

fn layout(parameters: &mut Parameters<'_>, newlines: bool) -> Result<Scorer, Error> {
    let newlines = parameters.flag("newlines", newlines)?;
    let counts_prompt = parameters.flag("count_prompt", true)?;
    Ok(scorer(counts_prompt, move |text| f64::from(u8::from(has_layout(text.trim(), newlines)))))
}

fn has_layout(text: &str, newlines: bool) -> bool {
    let tags = ["<think>", "</think>", "<answer>", "</answer>"];
    if tags.iter().any(|tag| text.matches(tag).count() != 1) {
        return false;
    }
    let parts = text
        .strip_prefix("<think>")
        .and_then(|rest| rest.strip_suffix("</answer>"))
        .and_then(|inside| inside.split_once("</think>"))
        .and_then(|(think, rest)| rest.split_once("<answer>").map(|(between, answer)| (think, between, answer)));
    let Some((think, between, answer)) = parts else { return false };
    let is_on_lines = |part: &str| part.len() >= 2 && part.starts_with('\n') && part.ends_with('\n');
    between.trim().is_empty() && (!newlines || (is_on_lines(think) && between.contains('\n') && is_on_lines(answer)))
}

/// `tag_count`: open-r1's `tag_count_reward`. 0.25 for each of `<think>\n`, `\n</think>\n`, `\n<answer>\n`,
/// `\n</answer>` that occurs exactly once.
///
/// Parameters: `newlines` (default true; false counts the bare tags), `count_prompt` (default true).
pub(super) fn tag_count(parameters: &mut Parameters<'_>) -> Result<Scorer, Error> {
    let newlines = parameters.flag("newlines", true)?;
    let counts_prompt = parameters.flag("count_prompt", true)?;
    let tags: [&str; 4] = if newlines {
        ["<think>\n", "\n</think>\n", "\n<answer>\n", "\n</answer>"]
    } else {
        ["<think>", "</think>", "<answer>", "</answer>"]
    };
    Ok(scorer(counts_prompt, move |text| {
        tags.iter().map(|tag| if text.matches(tag).count() == 1 { 0.25 } else { 0.0 }).sum()
    }))
}

/// `code_format`: open-r1's `get_code_format_reward`, `^<think>\n.*?\n</think>\n<answer>\n.*?```LANGUAGE.*?```.*?\n</answer>$`.
/// A column `language` of the row wins over the parameter.
///
/// Parameters: `language` (default `code_language` of the configuration), `count_prompt` (default true).
pub(super) fn code_format(parameters: &mut Parameters<'_>) -> Result<Scorer, Error> {
    let language = parameters.text("language")?.unwrap_or_else(|| "python".to_owned());
    let counts_prompt = parameters.flag("count_prompt", true)?;
    Ok(Box::new(move |_, sample| {
        let language = sample.row.get("language").and_then(Value::as_str).unwrap_or(&language);
        let is_right = has_code_layout(&with_opened_tag(sample, counts_prompt), language);
        Ok(Some(f64::from(u8::from(is_right))))
    }))
}

/// Whether a text matches the pattern of `code_format`. All its parts but the last are literal, so that the first place of each is
/// as good as any other.
fn has_code_layout(text: &str, language: &str) -> bool {
    let Some(mut rest) = text.strip_prefix("<think>\n") else { return false };
    let fence = format!("```{language}");
    for part in ["\n</think>\n<answer>\n", &fence, "```"] {
        match rest.split_once(part) {
            Some((_, after)) => rest = after,
            None => return false,
        }
    }
    // `$` matches at the end and before a line break.
    rest.match_indices("\n</answer>")
        .any(|(at, tag)| matches!(rest[at + tag.len()..].chars().next(), None | Some('\n')))
}

#[cfg(test)]
mod tests {
    use super::{has_code_layout, has_layout};

    #[test]
    fn the_layout_of_code_is_that_of_open_r1() {
        let text = |code: &str| format!("<think>\na\n</think>\n<answer>\nso\n```{code}\n```\n</answer>");
        assert!(has_code_layout(&text("python\nx"), "python"));
        assert!(has_code_layout(&format!("{}\nmore", text("cpp\nx")), "cpp"));
        for (wrong, language) in [
            (text("python\nx"), "cpp"),
            (text("\nx"), "python"),
            (format!("{} more", text("python\nx")), "python"),
            (format!(" {}", text("python\nx")), "python"),
            (text("python\nx").replace("\n```\n", "\n"), "python"),
            (text("python\nx").replace("</think>\n", "</think>"), "python"),
        ] {
            assert!(!has_code_layout(&wrong, language), "{wrong}");
        }
    }

    #[test]
    fn the_layout_needs_every_tag_once_and_in_order() {
        for text in ["<think>a</think><answer>b</answer>", "<think>\na\n</think>\n\n<answer>\nb\n</answer>"] {
            assert!(has_layout(text, false), "{text}");
        }
        assert!(has_layout("<think>\na\n</think>\n<answer>\nb\n</answer>", true));
        for text in [
            "",
            "<think>a</think>",
            "a<think>b</think><answer>c</answer>",
            "<think>a</think>so<answer>b</answer>",
            "<think>a</think><answer>b</answer>c",
            "<answer>b</answer><think>a</think>",
            "<think>a<think>b</think><answer>c</answer>",
            "<think>a</answer><answer>b</think>",
        ] {
            assert!(!has_layout(text, false), "{text}");
        }
        for text in ["<think>a</think><answer>b</answer>", "<think>\n</think>\n<answer>\nb\n</answer>"] {
            assert!(!has_layout(text, true), "{text}");
        }
    }
}
