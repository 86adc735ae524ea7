//! Sample completions as people read them: prompt, completion, rewards, wrapped to the terminal.

use super::terminal::Terminal;

/// Lines shown of one prompt or completion; the rest is in `completions.jsonl`.
const MOST_LINES: usize = 16;

/// One completion to show.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sample {
    /// What the model was asked.
    pub prompt: String,
    /// What it wrote.
    pub completion: String,
    /// Scores by reward function, in their order; NaN where a function gave none.
    pub rewards: Vec<(String, f64)>,
    /// The group-relative advantage.
    pub advantage: Option<f64>,
    /// Tokens of the completion.
    pub completion_tokens: Option<usize>,
}

/// The samples of one step as text.
pub(super) fn render(step: u64, samples: &[Sample], terminal: &Terminal) -> String {
    let width = terminal.width().min(120);
    let title = format!("── completions at step {step} ");
    let mut lines = vec![terminal.dim(&rule(&title, width))];
    for (index, sample) in samples.iter().enumerate() {
        if index > 0 {
            lines.push(terminal.dim(&rule("", width / 4)));
        }
        lines.extend(field("prompt", &sample.prompt, width, terminal));
        lines.extend(field("completion", &sample.completion, width, terminal));
        let mut scores: Vec<String> = sample.rewards.iter().map(|(name, score)| format!("{name} {score:.2}")).collect();
        scores.extend(sample.advantage.map(|advantage| format!("advantage {advantage:+.2}")));
        scores.extend(sample.completion_tokens.map(|tokens| format!("{tokens} tokens")));
        if !scores.is_empty() {
            lines.extend(field("rewards", &scores.join(" · "), width, terminal));
        }
    }
    lines.push(terminal.dim(&rule("", width)));
    lines.push(String::new());
    lines.join("\n")
}

fn rule(start: &str, width: usize) -> String {
    format!("{start}{}", "─".repeat(width.saturating_sub(console::measure_text_width(start))))
}

/// A label and its wrapped value beside it.
fn field(label: &str, value: &str, width: usize, terminal: &Terminal) -> Vec<String> {
    const COLUMN: usize = 12;
    let mut lines = wrap(&printable(value.trim()), width.saturating_sub(COLUMN).max(20));
    if lines.len() > MOST_LINES {
        let hidden = lines.len() - MOST_LINES;
        lines.truncate(MOST_LINES);
        lines.push(format!("… {hidden} more lines in completions.jsonl"));
    }
    let labels = std::iter::once(label).chain(std::iter::repeat(""));
    labels
        .zip(&lines)
        .map(|(label, line)| format!("{}{line}", terminal.dim(&format!("{label:<COLUMN$}"))).trim_end().to_string())
        .collect()
}

/// Control characters as escapes, so that no completion can move the cursor or change colours; tabs as spaces.
fn printable(text: &str) -> String {
    let mut clean = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '\n' => clean.push('\n'),
            '\t' => clean.push_str("    "),
            control if control.is_control() => clean.extend(control.escape_default()),
            other => clean.push(other),
        }
    }
    clean
}

/// Breaks `text` at spaces into lines of at most `width` columns; a longer word is cut. Line breaks and the indent of
/// the text stay. At least one line.
pub(super) fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = Vec::new();
    for paragraph in text.split('\n') {
        let mut line = String::new();
        let mut used = 0;
        for piece in paragraph.split_inclusive(' ') {
            let word = piece.trim_end_matches(' ');
            let word_width = console::measure_text_width(word);
            if used > 0 && used + word_width > width {
                lines.push(std::mem::take(&mut line).trim_end().to_string());
                used = 0;
            }
            for character in piece.chars() {
                let columns = console::measure_text_width(character.encode_utf8(&mut [0; 4]));
                if used + columns > width {
                    if character == ' ' {
                        continue;
                    }
                    lines.push(std::mem::take(&mut line));
                    used = 0;
                }
                line.push(character);
                used += columns;
            }
        }
        lines.push(line.trim_end().to_string());
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrapping_keeps_every_word_and_stays_inside_the_width() {
        let text =
            "The quick brown fox — 日本語のテキスト — jumps\n  over averyveryverylongwordthatdoesnotfit anywhere";
        for width in [8, 10, 13, 40] {
            let lines = wrap(text, width);
            assert!(lines.iter().all(|line| console::measure_text_width(line) <= width), "{width}: {lines:?}");
            let letters = |s: &str| s.chars().filter(|c| !c.is_whitespace()).collect::<String>();
            assert_eq!(letters(&lines.concat()), letters(text), "{width}");
        }
        assert_eq!(wrap("", 10), [""]);
        assert_eq!(wrap("a b\n\nc", 10), ["a b", "", "c"]);
        assert_eq!(wrap("one two three", 7), ["one two", "three"]);
    }

    #[test]
    fn a_sample_shows_its_fields_in_one_column_and_cannot_emit_control_codes() {
        let sample = Sample {
            prompt: "What is 3 + 4?".into(),
            completion: "\x1b[2Jseven\x07".into(),
            rewards: vec![("accuracy".into(), 1.0), ("format".into(), f64::NAN)],
            advantage: Some(-0.5),
            completion_tokens: Some(3),
        };
        let text = render(7, &[sample], &Terminal::memory(60));
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[0].starts_with("── completions at step 7 ──"), "{text}");
        assert_eq!(lines[1], "prompt      What is 3 + 4?");
        assert_eq!(lines[2], "completion  \\u{1b}[2Jseven\\u{7}");
        assert_eq!(lines[3], "rewards     accuracy 1.00 · format NaN · advantage -0.50 · 3");
        assert_eq!(lines[4], "            tokens");
        assert!(text.chars().all(|c| c == '\n' || !c.is_control()));
    }

    #[test]
    fn a_long_completion_says_how_much_is_hidden() {
        let sample = Sample { completion: "x\n".repeat(40), ..Sample::default() };
        let text = render(1, &[sample], &Terminal::memory(60));
        assert!(text.contains("… 24 more lines in completions.jsonl"), "{text}");
    }
}
