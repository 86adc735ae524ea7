//! The command that uploads what a run leaves to the hub.

use super::settings::TrainingSettings;

impl TrainingSettings {
    /// The command line that uploads `output_dir`, if the file asks for an upload. Checkpoints stay, as with transformers.
    #[must_use]
    pub fn upload_command(&self) -> Option<String> {
        if !self.hub.push_to_hub {
            return None;
        }
        let folder = self.output_dir.to_string_lossy();
        let whole = std::path::absolute(&self.output_dir).unwrap_or_else(|_| self.output_dir.clone());
        let name = || whole.file_name().map_or_else(|| "model".into(), |name| name.to_string_lossy().into_owned());
        let repository = self.hub.model_id.clone().unwrap_or_else(name);
        let mut command = format!("hf upload {} {} --exclude 'checkpoint-*'", quoted(&repository), quoted(&folder));
        if let Some(revision) = &self.hub.revision {
            command += " --revision ";
            command += &quoted(revision);
        }
        if self.hub.is_private == Some(true) {
            command += " --private";
        }
        Some(command)
    }
}

/// A word of a shell's command line.
fn quoted(word: &str) -> String {
    let is_plain = !word.is_empty() && word.chars().all(|c| c.is_alphanumeric() || "_-./:@+,=".contains(c));
    if is_plain { word.to_owned() } else { format!("'{}'", word.replace('\'', r"'\''")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_quoted_where_a_shell_would_cut_them() {
        for (word, expected) in
            [("me/model-1.5B", "me/model-1.5B"), ("a b", "'a b'"), ("it's", r"'it'\''s'"), ("", "''"), ("~/x", "'~/x'")]
        {
            assert_eq!(quoted(word), expected);
        }
    }
}
