//! The arguments that `sft` and `grpo` share.

use std::path::PathBuf;

use crate::config::settings::Resume;

/// What to train, and with which changes to the file.
#[derive(Clone, Debug, clap::Args)]
pub struct TrainingArgs {
    /// The configuration: a YAML file with the keys that TRL uses
    #[arg(value_name = "CONFIG")]
    pub config: PathBuf,

    /// Replace a key of the file, e.g. `--set learning_rate=2e-6`; may be given several times, the last one wins
    ///
    /// The value is read as YAML: `--set 'lora_target_modules=[q_proj, v_proj]'`. `trainer config --reference` lists
    /// the keys.
    #[arg(long = "set", value_name = "KEY=VALUE", value_parser = parse_override)]
    pub overrides: Vec<(String, String)>,

    /// Go on from a checkpoint: the newest whole one of `output_dir`, or the one given
    ///
    /// Wins over `resume_from_checkpoint` in the file. The run continues as if it had never stopped.
    #[arg(long, value_name = "CHECKPOINT")]
    #[expect(clippy::option_option, reason = "clap's form of a flag with an optional value")]
    resume: Option<Option<PathBuf>>,
}

impl TrainingArgs {
    /// Where `--resume` says to go on from; `None` leaves it to the file.
    pub fn resume(&self) -> Option<Resume> {
        Some(self.resume.as_ref()?.clone().map_or(Resume::Latest, Resume::Path))
    }
}

fn parse_override(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.trim().is_empty() => Ok((key.trim().into(), value.trim().into())),
        _ => Err("expected KEY=VALUE, e.g. `learning_rate=2e-6`".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: TrainingArgs,
    }

    fn parse(arguments: &[&str]) -> Result<TrainingArgs, String> {
        let all = ["trainer"].iter().chain(arguments);
        Cli::try_parse_from(all).map(|cli| cli.args).map_err(|error| error.to_string())
    }

    #[test]
    fn overrides_keep_their_order_and_everything_after_the_first_equals_sign() {
        let args = parse(&["c.yaml", "--set", "a=1", "--set", "b = x=y", "--set", "a="]).unwrap();
        let expected = [("a", "1"), ("b", "x=y"), ("a", "")].map(|(k, v)| (k.to_string(), v.to_string()));
        assert_eq!(args.overrides, expected);
        for wrong in ["learning_rate", "=3"] {
            let message = parse(&["c.yaml", "--set", wrong]).unwrap_err();
            assert!(message.contains("expected KEY=VALUE"), "{message}");
        }
    }

    #[test]
    fn resume_takes_the_newest_or_a_path_and_leaves_the_file_alone_otherwise() {
        assert_eq!(parse(&["c.yaml"]).unwrap().resume(), None);
        assert_eq!(parse(&["c.yaml", "--resume"]).unwrap().resume(), Some(Resume::Latest));
        assert_eq!(parse(&["c.yaml", "--resume", "--set", "a=1"]).unwrap().resume(), Some(Resume::Latest));
        let path = Some(Resume::Path("out/checkpoint-5".into()));
        assert_eq!(parse(&["c.yaml", "--resume", "out/checkpoint-5"]).unwrap().resume(), path);
        assert_eq!(parse(&["--resume=out/checkpoint-5", "c.yaml"]).unwrap().resume(), path);
        // An empty variable of a script is not a wish for the newest.
        assert!(parse(&["c.yaml", "--resume", ""]).is_err());
    }
}
