//! Titled sections of aligned keys and values: the plan a run opens with and the summary it closes with.

use super::terminal::Terminal;

/// One section, e.g. `[Model]`. Values carry their units.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    title: String,
    rows: Vec<(String, String)>,
}

impl Section {
    /// An empty section.
    pub fn new(title: impl Into<String>) -> Self {
        Self { title: title.into(), rows: Vec::new() }
    }

    /// Adds a line.
    #[must_use]
    pub fn row(mut self, key: impl Into<String>, value: impl std::fmt::Display) -> Self {
        self.push(key, value);
        self
    }

    /// Adds a line.
    pub fn push(&mut self, key: impl Into<String>, value: impl std::fmt::Display) {
        self.rows.push((key.into(), value.to_string()));
    }

    /// Whether it has no lines.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }
}

/// The sections as text; keys of all sections share one column, long values are wrapped under their start.
pub(super) fn render(sections: &[Section], terminal: &Terminal) -> String {
    let column = sections
        .iter()
        .flat_map(|section| &section.rows)
        .map(|(key, _)| console::measure_text_width(key))
        .max()
        .unwrap_or(0);
    let indent = 2 + column + 2;
    let width = terminal.width().saturating_sub(indent).max(20);
    let mut lines = Vec::new();
    for section in sections {
        lines.push(terminal.bold(&format!("[{}]", section.title)));
        for (key, value) in &section.rows {
            let padding = " ".repeat(column - console::measure_text_width(key));
            let value = super::samples::wrap(value, width).join(&format!("\n{}", " ".repeat(indent)));
            lines.push(format!("  {}{padding}  {value}", terminal.dim(key)));
        }
        lines.push(String::new());
    }
    lines.push(String::new());
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_of_all_sections_stand_in_one_column_and_wrap_under_it() {
        let sections = [
            Section::new("Run").row("seed", 42).row("output_dir", "out/grpo"),
            Section::new("Data").row("prompts", "one two three four five six seven"),
        ];
        assert_eq!(
            render(&sections, &Terminal::memory(40)),
            "[Run]\n  seed        42\n  output_dir  out/grpo\n\n\
             [Data]\n  prompts     one two three four five\n              six seven\n\n"
        );
    }
}
