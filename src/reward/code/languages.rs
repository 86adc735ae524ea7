//! The languages that code may be in: what runs them, and how a block of each is found.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::reward::python;
use crate::reward::sandbox::{Job, Limits, Sandbox, SandboxError};

/// A language.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Language {
    /// Python 3.
    Python,
    /// JavaScript, run by node.
    JavaScript,
    /// C, compiled by gcc.
    C,
    /// C++, compiled by g++.
    Cpp,
}

impl Language {
    /// The language of this name, as data sets and code blocks write it.
    pub(super) fn named(name: &str) -> Option<Self> {
        Some(match name.trim().to_ascii_lowercase().as_str() {
            "python" | "python3" | "py" | "pypy3" | "pypy 3" | "python 3" => Self::Python,
            "javascript" | "js" | "node" | "nodejs" => Self::JavaScript,
            "c" => Self::C,
            "cpp" | "c++" | "cc" | "cxx" | "c++17" | "c++20" => Self::Cpp,
            _ => return None,
        })
    }

    /// The last block of this language in a text, closed by its fence. open-r1's `extract_code`, but for the spelling of
    /// the language.
    pub(super) fn last_block(self, text: &str) -> Option<&str> {
        const FENCE: &str = "```";
        let (mut rest, mut last) = (text, None);
        while let Some(start) = rest.find(FENCE) {
            rest = &rest[start + FENCE.len()..];
            let Some((label, after)) = rest.split_once('\n') else { break };
            if Self::named(label) == Some(self) && !label.is_empty() {
                let Some(end) = after.find(FENCE) else { break };
                last = Some(&after[..end]);
                rest = &after[end + FENCE.len()..];
            }
        }
        last
    }

    /// The file that its source is in.
    pub(super) const fn file(self) -> &'static str {
        match self {
            Self::Python => "main.py",
            Self::JavaScript => "main.js",
            Self::C => "main.c",
            Self::Cpp => "main.cpp",
        }
    }

    /// Whether it is compiled before it runs.
    pub(super) const fn is_compiled(self) -> bool {
        matches!(self, Self::C | Self::Cpp)
    }
}

/// The programs that run or compile languages on this machine.
#[derive(Clone, Debug)]
pub(super) struct Toolbox {
    python: String,
    /// Folders that it needs.
    folders: Vec<PathBuf>,
    node: Option<String>,
    gcc: Option<String>,
    gpp: Option<String>,
}

impl Toolbox {
    /// Looks for them. Python is needed; `asked` names it.
    pub(super) fn find(asked: Option<&Path>) -> Result<Self, String> {
        /// Where the interpreter really is, and the prefixes of its libraries and of its virtual environment's.
        const ASK: &str = "import os,sys\nfor p in (sys.executable,os.path.realpath(sys.executable),sys.base_prefix,\
            sys.base_exec_prefix,sys.prefix): print(p)";
        let interpreter = python::interpreter(asked);
        let output =
            Command::new(&interpreter).args(["-I", "-c", ASK]).stdin(Stdio::null()).output().map_err(|error| {
                format!(
                    "`{}` cannot be started: {error}; install Python 3.8 or later, or name one as `reward_python`",
                    interpreter.display()
                )
            })?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let lines: Vec<&str> = text.lines().collect();
        let [executable, real, prefixes @ ..] = lines.as_slice() else {
            let words = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            return Err(format!("`{}` does not run: {words}", interpreter.display()));
        };
        // Not the whole prefix: it may be somebody's home.
        let parts = ["bin", "lib", "lib64", "pyvenv.cfg"];
        let mut folders: Vec<PathBuf> =
            prefixes.iter().flat_map(|prefix| parts.map(|part| Path::new(prefix).join(part))).collect();
        folders.extend([executable, real].map(PathBuf::from));
        let found = |name: &str| {
            let places = ["/usr/local/bin", "/usr/bin", "/bin"].map(|folder| format!("{folder}/{name}"));
            places.into_iter().find(|path| Path::new(path).is_file())
        };
        Ok(Self {
            python: (*executable).to_owned(),
            folders,
            node: found("node"),
            gcc: found("gcc"),
            gpp: found("g++"),
        })
    }

    /// Opens a sandbox in which Python runs.
    pub(super) fn open(&self, hidden: &[PathBuf]) -> Result<Sandbox, SandboxError> {
        let program = self.run(Language::Python, "trial.py").unwrap_or_default();
        let job = Job {
            program: &program,
            files: &[("trial.py", b"import json, sys\nprint(json.dumps(sys.stdin.read() * 2))")],
            input: b"abc",
            limits: limits(1 << 30, 30.0),
            most_output: 100,
        };
        Sandbox::open(&self.folders, hidden, &job, b"\"abcabc\"\n")
    }

    /// Whether code in a language can be run here.
    pub(super) fn has(&self, language: Language) -> bool {
        match language {
            Language::Python => true,
            Language::JavaScript => self.node.is_some(),
            Language::C => self.gcc.is_some(),
            Language::Cpp => self.gpp.is_some(),
        }
    }

    /// The command that runs `file`, a source or what was compiled from it.
    pub(super) fn run(&self, language: Language, file: &str) -> Option<Vec<String>> {
        let words = match language {
            Language::Python => vec![self.python.clone(), "-s".into(), "-B".into(), file.into()],
            Language::JavaScript => vec![self.node.clone()?, file.into()],
            Language::C | Language::Cpp => vec![format!("./{file}")],
        };
        Some(words)
    }

    /// The command that compiles sources and writes the program to standard output.
    pub(super) fn compile(&self, language: Language, sources: &[&str]) -> Option<Vec<String>> {
        let compiler = match language {
            Language::C => format!("{} -O2 -std=gnu17", self.gcc.as_ref()?),
            Language::Cpp => format!("{} -O2 -std=gnu++17", self.gpp.as_ref()?),
            Language::Python | Language::JavaScript => return None,
        };
        let script = format!("{compiler} -w -o compiled {} -lm && cat compiled", sources.join(" "));
        Some(vec!["/bin/sh".into(), "-c".into(), script])
    }
}

/// Limits of a program: processes for a runtime with threads, files for a solution that writes one.
pub(super) const fn limits(memory_bytes: u64, wall_secs: f64) -> Limits {
    Limits { wall_secs, memory_bytes, processes: 64, file_bytes: 64 << 20 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_closed_block_of_the_language_counts() {
        let python = |text| Language::Python.last_block(text);
        assert_eq!(python("```python\na\n```"), Some("a\n"));
        assert_eq!(python("so\n```python\na\n```\nor\n```py\nb\n```\n```js\nc\n```"), Some("b\n"));
        assert_eq!(python("```Python3 \r\na```"), Some("a"));
        assert_eq!(python("```\na\n```\n```python\nb\n```"), Some("b\n"));
        assert_eq!(python("```python\n```"), Some(""));
        for none in ["", "a", "```", "```python", "```python\na", "```\na\n```", "```cpp\na\n```", "python\na"] {
            assert_eq!(python(none), None, "{none:?}");
        }
        assert_eq!(Language::Cpp.last_block("```c++\na\n```"), Some("a\n"));
        assert_eq!(Language::C.last_block("```cpp\na\n```"), None);
    }
}
