//! Reward functions, and where those run that are not built in.

use std::path::PathBuf;

use super::{CodeSandbox, CodeScoring};

/// One reward function as named in the file.
#[derive(Clone, Debug, PartialEq)]
pub enum RewardSpec {
    /// A built-in, e.g. `accuracy`, with its parameters.
    Builtin {
        /// The built-in's name.
        name: String,
        /// Its parameters, checked by the built-in.
        parameters: serde_json::Map<String, serde_json::Value>,
    },
    /// A program that reads JSON lines and writes scores.
    Command {
        /// Name in metrics.
        name: String,
        /// Program and arguments.
        command: Vec<String>,
        /// Seconds one batch may take.
        timeout_secs: f64,
    },
    /// A function in Python, as TRL calls them.
    Python {
        /// `file.py:function`, `package.module.function` or `package.module:function`.
        target: String,
        /// Name in metrics; `None`: the function's own.
        name: Option<String>,
        /// Keyword arguments of every call.
        parameters: serde_json::Map<String, serde_json::Value>,
        /// Seconds one batch may take.
        timeout_secs: f64,
    },
}

/// Where reward functions run that are not built in.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RewardSettings {
    /// The Python of functions in Python; `None`: that of an active virtual environment, else `python3`.
    pub python: Option<PathBuf>,
    /// Folders where it looks for files and modules, after the working directory.
    pub path: Vec<PathBuf>,
    /// How code of completions is run.
    pub code: CodeSettings,
}

/// How rewards run the code in completions.
#[derive(Clone, Debug, PartialEq)]
pub struct CodeSettings {
    /// Whether to refuse a machine that cannot keep files, network and processes out of reach.
    pub sandbox: CodeSandbox,
    /// Completions whose code runs at a time; `None`: as many as there are cores.
    pub parallel: Option<usize>,
    /// Language that `code_format` looks for where rows name none.
    pub language: String,
    /// Tests after which it is looked whether one has failed, where a failed one decides; `None`: run all.
    pub test_batch_size: Option<usize>,
    /// How `cf_code` turns passed tests into a score.
    pub scoring: CodeScoring,
    /// Paths that the code must not see, wherever they lie.
    pub hidden: Vec<PathBuf>,
}

impl Default for CodeSettings {
    fn default() -> Self {
        Self {
            sandbox: CodeSandbox::BestEffort,
            parallel: None,
            language: "python".into(),
            test_batch_size: Some(1),
            scoring: CodeScoring::WeightedSum,
            hidden: Vec::new(),
        }
    }
}

impl RewardSettings {
    /// Folders where Python looks for files and modules: the working directory first, as TRL does.
    #[must_use]
    pub fn search_path(&self) -> Vec<PathBuf> {
        let here = std::env::current_dir().unwrap_or_else(|_| PathBuf::from("."));
        let mut folders = vec![here.clone()];
        for folder in &self.path {
            let folder = here.join(folder);
            if !folders.contains(&folder) {
                folders.push(folder);
            }
        }
        folders
    }
}
