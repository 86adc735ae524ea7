//! What preparing rows had to change, could not keep or guessed: counted over all rows, with the first place of each.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

/// Something about one row.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Finding {
    /// A role of another convention is read as one that templates know.
    Role { from: String, to: &'static str },
    /// The column `system` became the first message.
    SystemColumn,
    /// A column stands beside messages that cannot take it.
    UnusedColumn { column: &'static str, why: &'static str },
    /// The template prints nothing of messages of this role.
    LostRole { role: String },
    /// The template does not print this field of messages of this role.
    LostField { role: String, field: String },
    /// The template does not print the thoughts of turns to be learnt.
    LostThought { field: &'static str },
    /// The template leaves thoughts out of turns that are not learnt.
    EarlierThought,
    /// The template cuts thoughts; they were kept.
    KeptThought,
    /// The template does not print tools.
    LostTools,
    /// The generation prompt opens a thought that the completion does not have.
    UnopenedThought,
    /// Prompt and completion share no border of tokens.
    Boundary,
}

impl Finding {
    /// The sentence about `rows`, and whether it is a warning.
    fn sentence(&self, rows: &str) -> (bool, String) {
        let text = match self {
            Self::Role { from, to } => return (false, format!("{rows}: the role `{from}` is read as `{to}`")),
            Self::SystemColumn => {
                return (false, format!("{rows}: the column `system` is the first message of the conversation"));
            }
            Self::EarlierThought => {
                return (
                    false,
                    format!("{rows}: the chat template leaves the reasoning of earlier turns out of the prompt"),
                );
            }
            Self::KeptThought => {
                return (
                    false,
                    format!(
                        "{rows}: the chat template cuts the assistant's reasoning, which is to be learnt; it is kept in \
                         the training text"
                    ),
                );
            }
            Self::UnusedColumn { column, why } => format!("{rows}: the column `{column}` is not used: {why}"),
            Self::LostRole { role } => {
                format!(
                    "{rows}: the chat template prints nothing of messages with the role `{role}`; they are left out"
                )
            }
            Self::LostField { role, field } => {
                format!(
                    "{rows}: the chat template does not print the field `{field}` of `{role}` messages; it is left out"
                )
            }
            Self::LostThought { field } => format!(
                "{rows}: the chat template does not print the assistant's reasoning (`{field}`); it is left out of what is \
                 learnt"
            ),
            Self::LostTools => format!("{rows}: the chat template does not print the column `tools`; it is left out"),
            Self::UnopenedThought => format!(
                "{rows}: the generation prompt opens a thought (`<think>`) that the completion does not begin with; the \
                 completion is learnt without it"
            ),
            Self::Boundary => format!(
                "{rows}: the tokens of the prompt are not the first tokens of prompt + completion; what follows their \
                 common beginning is learnt"
            ),
        };
        (true, text)
    }
}

/// Findings of all rows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Findings {
    counts: BTreeMap<Finding, (usize, String)>,
}

/// What is to be said about the data before a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Note {
    /// Whether something is lost or guessed, not only adapted.
    pub is_warning: bool,
    /// The sentence, with the number of rows and the first of them.
    pub text: String,
}

impl Findings {
    /// Counts the findings of one row.
    pub(super) fn add(&mut self, row: BTreeSet<Finding>, place: impl Fn() -> String) {
        for finding in row {
            self.counts.entry(finding).or_insert_with(|| (0, place())).0 += 1;
        }
    }

    /// How many rows have it.
    #[cfg(test)]
    pub(super) fn count(&self, finding: &Finding) -> usize {
        self.counts.get(finding).map_or(0, |(count, _)| *count)
    }

    /// One note for each kind of finding.
    pub fn notes(&self) -> Vec<Note> {
        let note = |(finding, (count, first)): (&Finding, &(usize, String))| {
            let rows = if *count == 1 { "1 row".to_string() } else { format!("{count} rows") };
            let (is_warning, text) = finding.sentence(&rows);
            Note { is_warning, text: format!("{text} (first: {first})") }
        };
        self.counts.iter().map(note).collect()
    }
}
