//! `trainer generate`: completions of prompts, to look at a model or an adapter.

use std::path::PathBuf;

use clap::ArgGroup;

use super::{Context, Exit};

const EXAMPLES: &str = "\
Examples:
  trainer generate --model Qwen/Qwen2.5-0.5B-Instruct --prompt 'What is 12 * 7?'
  trainer generate --model model.gguf --prompt 'def fibonacci(n):' --raw --max-new-tokens 64 --stream
  trainer generate --model models/qwen --adapter out/grpo --prompts-file prompts.txt --temperature 0.7 --top-p 0.95";

/// Let a model complete prompts
#[derive(Clone, Debug, clap::Args)]
#[command(after_long_help = EXAMPLES, group(ArgGroup::new("prompts").required(true).args(["prompt", "prompts_file"])))]
pub struct Args {
    /// A model folder, a `.gguf` file or a Hugging Face id
    #[arg(long, value_name = "MODEL")]
    pub model: String,

    /// A folder with a PEFT LoRA adapter for the model
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,

    /// The prompt
    #[arg(long, value_name = "TEXT")]
    pub prompt: Option<String>,

    /// A text file with one prompt per line; empty lines are left out
    #[arg(long, value_name = "FILE")]
    pub prompts_file: Option<PathBuf>,

    /// Put prompts into the model's chat template [default: where the model has one]
    #[arg(long, conflicts_with = "raw")]
    chat: bool,

    /// Give prompts to the model as they are
    #[arg(long)]
    raw: bool,

    /// A system message in front of every prompt
    #[arg(long, value_name = "TEXT", conflicts_with = "raw")]
    pub system: Option<String>,

    /// Longest completion in tokens
    #[arg(long, value_name = "TOKENS", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_new_tokens: u32,

    /// Divides the logits before sampling; 0 takes the likeliest token every time
    #[arg(long, value_name = "NUMBER", default_value_t = 0.0, allow_negative_numbers = true, value_parser = parse_temperature)]
    pub temperature: f64,

    /// Sample from the likeliest tokens that together have this probability, in (0, 1]; 1 is off
    #[arg(long, value_name = "SHARE", default_value_t = 1.0, value_parser = parse_top_p)]
    pub top_p: f64,

    /// Sample from this many of the likeliest tokens; 0 is off
    #[arg(long, value_name = "TOKENS", default_value_t = 0)]
    pub top_k: usize,

    /// Seed of the random draws: the same seed gives the same text
    #[arg(long, value_name = "NUMBER", default_value_t = 42)]
    pub seed: u64,

    /// Print a completion while it is written instead of at its end; takes one prompt
    #[arg(long, conflicts_with = "prompts_file")]
    pub stream: bool,
}

/// How a prompt becomes tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PromptForm {
    /// In the chat template if the model has one.
    ChatIfPossible,
    /// In the chat template; a model without one is an error.
    Chat,
    /// As it is.
    Raw,
}

impl Args {
    /// How prompts become tokens. A system message asks for the chat template.
    pub fn prompt_form(&self) -> PromptForm {
        if self.raw {
            PromptForm::Raw
        } else if self.chat || self.system.is_some() {
            PromptForm::Chat
        } else {
            PromptForm::ChatIfPossible
        }
    }

    /// The prompts, from the command line or the file.
    ///
    /// # Errors
    /// If the file cannot be read or holds no prompt.
    pub fn prompts(&self) -> anyhow::Result<Vec<String>> {
        let Some(path) = &self.prompts_file else {
            return Ok(self.prompt.iter().cloned().collect());
        };
        let text = std::fs::read_to_string(path).map_err(crate::fs::io_error("read", path))?;
        let prompts: Vec<String> = text.lines().filter(|line| !line.trim().is_empty()).map(Into::into).collect();
        if prompts.is_empty() {
            anyhow::bail!(super::UsageError(format!("`{}` holds no prompt; write one per line", path.display())));
        }
        Ok(prompts)
    }
}

fn parse_temperature(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value.is_finite() && value >= 0.0 => Ok(value),
        _ => Err("expected a number of at least 0, e.g. 0.7".into()),
    }
}

fn parse_top_p(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value > 0.0 && value <= 1.0 => Ok(value),
        _ => Err("expected a share above 0 and at most 1, e.g. 0.95".into()),
    }
}

/// Generates.
///
/// # Errors
/// If the model cannot be loaded or a prompt cannot be completed.
pub fn run(args: &Args, _context: &Context) -> anyhow::Result<Exit> {
    anyhow::bail!("`trainer generate --model {}` is not connected to the rollout", args.model)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: Args,
    }

    fn parse(arguments: &[&str]) -> Result<Args, String> {
        let all = ["trainer", "--model", "m"].iter().chain(arguments);
        Cli::try_parse_from(all).map(|cli| cli.args).map_err(|error| error.to_string())
    }

    #[test]
    fn one_source_of_prompts_is_required_and_contradictions_are_refused() {
        let cases: [(&[&str], &str); 8] = [
            (&[], "required"),
            (&["--prompt", "x", "--prompts-file", "y"], "cannot be used with"),
            (&["--prompt", "x", "--chat", "--raw"], "cannot be used with"),
            (&["--prompt", "x", "--system", "s", "--raw"], "cannot be used with"),
            (&["--prompts-file", "y", "--stream"], "cannot be used with"),
            (&["--prompt", "x", "--temperature", "-1"], "at least 0"),
            (&["--prompt", "x", "--top-p", "0"], "above 0"),
            (&["--prompt", "x", "--max-new-tokens", "0"], "0 is not in"),
        ];
        for (arguments, expected) in cases {
            let message = parse(arguments).unwrap_err();
            assert!(message.contains(expected), "{arguments:?}: {message}");
        }
    }

    #[test]
    fn the_form_follows_the_flags() {
        let form = |arguments: &[&str]| parse(&[&["--prompt", "x"], arguments].concat()).unwrap().prompt_form();
        assert_eq!(form(&[]), PromptForm::ChatIfPossible);
        assert_eq!(form(&["--chat"]), PromptForm::Chat);
        assert_eq!(form(&["--system", "s"]), PromptForm::Chat);
        assert_eq!(form(&["--raw"]), PromptForm::Raw);
    }

    #[test]
    fn prompts_come_from_the_line_or_the_file() {
        assert_eq!(parse(&["--prompt", "a\nb"]).unwrap().prompts().unwrap(), ["a\nb"]);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("prompts.txt");
        let read = |text: &str| {
            std::fs::write(&path, text).unwrap();
            parse(&["--prompts-file", path.to_str().unwrap()]).unwrap().prompts()
        };
        assert_eq!(read("one\n\n two\r\n").unwrap(), ["one", " two"]);
        assert!(read(" \n").unwrap_err().to_string().contains("holds no prompt"));
        std::fs::remove_file(&path).unwrap();
        let missing = parse(&["--prompts-file", path.to_str().unwrap()]).unwrap().prompts().unwrap_err();
        assert!(missing.to_string().contains("cannot read"), "{missing}");
    }
}
