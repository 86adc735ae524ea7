//! One completion and its tests: read from a row, run in the sandbox.

use std::fmt;
use std::path::Path;
use std::time::Instant;

use serde_json::{Value, json};

use super::cases::{Case, Tests, same_text, same_value};
use super::languages::{Language, Toolbox, limits};
use crate::reward::Sample;
use crate::reward::error::{Error, excerpt};
use crate::reward::sandbox::{Finished, Job, Sandbox, SandboxError};

/// Calls a function in the sandbox.
const HARNESS: &[u8] = include_bytes!("harness.py");
/// Output that every program may write; more where more is expected.
const LEAST_OUTPUT: usize = 1 << 20;
/// Limits of compiling.
const COMPILE_SECS: f64 = 30.0;
const MOST_COMPILED: usize = 64 << 20;

/// The columns that a reward reads.
#[derive(Clone, Debug)]
pub(super) enum Form {
    /// `verification_info`.
    Verification { column: Option<String> },
    /// `official_tests`, `language`, `generated_checker`, `time_limit`, `memory_limit`.
    Codeforces { column: Option<String> },
    /// `test_cases`, `grader_files`, `id`.
    Olympiad { column: Option<String> },
}

/// Why there is no score.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Untestable {
    /// The row has no tests.
    NoTests,
    /// Code in this language does not run here.
    Language(String),
    /// The problem reads and writes files.
    Files,
}

impl fmt::Display for Untestable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoTests => write!(f, "the row has no tests"),
            Self::Language(name) => write!(
                f,
                "code in `{name}` does not run here; Python does, and where they are installed JavaScript (node), C and C++ \
                 (gcc, g++)"
            ),
            Self::Files => write!(f, "the problem reads and writes files (`input_mode: file`)"),
        }
    }
}

/// Limits of the tests of one completion.
#[derive(Clone, Copy, Debug)]
pub(super) struct Budget {
    pub(super) case_secs: f64,
    /// All tests of a completion together; those that do not come to run fail.
    pub(super) total_secs: f64,
    pub(super) memory_bytes: u64,
}

/// How the tests of a completion went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Verdict {
    pub(super) has_code: bool,
    pub(super) compiles: bool,
    pub(super) passed: usize,
    pub(super) tests: usize,
}

/// A completion's code and its tests.
#[derive(Clone, Debug)]
pub(super) struct Task {
    language: Language,
    code: Option<String>,
    cases: Vec<Case>,
    /// A program that says whether an output is right, where several are.
    checker: Option<String>,
    /// Other sources and headers of the program.
    more_files: Vec<(String, String)>,
    case_secs: Option<f64>,
    memory_bytes: Option<u64>,
}

impl Task {
    /// Reads a sample.
    ///
    /// # Errors
    /// If the row lacks the column or it holds something else. The inner error: why there are no tests to run.
    pub(super) fn of(
        reward: &str,
        form: &Form,
        index: usize,
        sample: &Sample<'_>,
        toolbox: &Toolbox,
    ) -> Result<Result<Self, Untestable>, Error> {
        let (columns, column) = match form {
            Form::Verification { column } => (&["verification_info"][..], column),
            Form::Codeforces { column } => (&["official_tests", "verification_info"][..], column),
            Form::Olympiad { column } => (&["test_cases", "verification_info"][..], column),
        };
        let wanted: Vec<&str> = column.as_deref().map_or_else(|| columns.to_vec(), |column| vec![column]);
        let Some((name, value)) = wanted.iter().find_map(|name| sample.row.get(*name).map(|value| (*name, value)))
        else {
            return Err(Error::MissingColumn {
                reward: reward.to_owned(),
                wanted: wanted.iter().map(|name| (*name).to_owned()).collect(),
                present: sample.row.keys().cloned().collect(),
                index,
                hint: ", or name the right one with the parameter `column`",
            });
        };
        if value.is_null() {
            return Ok(Err(Untestable::NoTests));
        }
        let Some(tests) = Tests::read(value) else {
            return Err(Error::ColumnType {
                reward: reward.to_owned(),
                column: name.to_owned(),
                got: excerpt(&value.to_string()),
                expected: "tests: {\"language\": \"python\", \"test_cases\": [{\"input\": ..., \"output\": ..., \"type\": \
                    \"stdin_stdout\"}, ...]}",
                index,
            });
        };
        if tests.cases.is_empty() {
            return Ok(Err(Untestable::NoTests));
        }
        let text = |key: &str| sample.row.get(key).and_then(Value::as_str).filter(|text| !text.trim().is_empty());
        let number = |key: &str| sample.row.get(key).and_then(Value::as_f64).filter(|number| *number > 0.0);
        let is_contest = !matches!(form, Form::Verification { .. });
        let default = if matches!(form, Form::Olympiad { .. }) { "cpp" } else { "python" };
        let own = text("language").filter(|_| is_contest).map(str::to_owned);
        let spelt = own.or(tests.language).unwrap_or_else(|| default.to_owned());
        let language = Language::named(&spelt).filter(|language| toolbox.has(*language));
        let Some(language) = language else { return Ok(Err(Untestable::Language(spelt))) };
        let is_call = tests.cases.iter().any(|case| matches!(case, Case::Call { .. }));
        if is_call && language != Language::Python {
            return Ok(Err(Untestable::Language(format!("{spelt}, as a function"))));
        }
        if is_contest && text("input_mode").is_some_and(|mode| mode != "stdio") {
            return Ok(Err(Untestable::Files));
        }
        let is_codeforces = matches!(form, Form::Codeforces { .. });
        let mut task = Self {
            language,
            code: language.last_block(sample.completion).map(str::to_owned),
            cases: tests.cases,
            checker: text("generated_checker").filter(|_| is_codeforces).map(str::to_owned),
            more_files: Vec::new(),
            case_secs: number("time_limit").filter(|_| is_contest),
            // Codeforces' and the olympiads' limits are in megabytes and in bytes.
            memory_bytes: number("memory_limit")
                .filter(|_| is_contest)
                .map(|limit| if limit > 1e6 { limit as u64 } else { (limit * f64::from(1 << 20)) as u64 }),
        };
        if matches!(form, Form::Olympiad { .. }) {
            task.add_grader(sample);
        }
        Ok(Ok(task))
    }

    /// The headers and sources that an olympiad links to a submission (`grader_files`), and the includes that open-r1's
    /// `add_includes` puts in front of it.
    fn add_grader(&mut self, sample: &Sample<'_>) {
        let files = sample.row.get("grader_files").and_then(Value::as_array).into_iter().flatten();
        for file in files.filter_map(Value::as_array) {
            let [Value::String(name), Value::String(content)] = file.as_slice() else { continue };
            let base = name.rsplit('/').next().unwrap_or(name);
            let is_source = [".h", ".hpp", ".cpp", ".cc"].iter().any(|end| base.ends_with(end));
            let is_plain = base.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c));
            if name.starts_with("graders/") && is_source && is_plain && base != self.language.file() {
                self.more_files.push((base.to_owned(), content.clone()));
            }
        }
        let Some(code) = &mut self.code else { return };
        let mut head = "#include <bits/stdc++.h>\n".to_owned();
        let id = sample.row.get("id").and_then(Value::as_str).unwrap_or_default();
        if self.more_files.iter().any(|(name, _)| *name == format!("{id}.h")) && !code.contains(&format!("\"{id}.h\""))
        {
            head.extend(["#include \"", id, ".h\"\n"]);
        }
        if !code.contains("using namespace std;") && !code.contains("std::") {
            head += "using namespace std;\n";
        }
        code.insert_str(0, &head);
    }

    /// Runs the tests one after the other. `stop_after`: after every so many it is looked whether one has failed, and then
    /// the rest is left.
    ///
    /// # Errors
    /// If the sandbox fails, or the caller gives up.
    pub(super) fn run(
        &self,
        sandbox: &Sandbox,
        toolbox: &Toolbox,
        budget: &Budget,
        stop_after: Option<usize>,
        is_stopped: &dyn Fn() -> bool,
    ) -> Result<Verdict, SandboxError> {
        let tests = self.cases.len();
        let mut verdict = Verdict { has_code: self.code.is_some(), compiles: true, passed: 0, tests };
        let Some(code) = &self.code else { return Ok(verdict) };
        let case_secs = self.case_secs.unwrap_or(budget.case_secs);
        let memory = self.memory_bytes.unwrap_or(budget.memory_bytes).max(64 << 20);
        let compiled = if self.language.is_compiled() {
            let compiled = self.compile(code, sandbox, toolbox, is_stopped)?;
            verdict.compiles = compiled.is_some();
            if compiled.is_none() {
                return Ok(verdict);
            }
            compiled
        } else {
            None
        };
        let mut used = 0.0;
        for (index, case) in self.cases.iter().enumerate() {
            if is_stopped() {
                return Err(SandboxError::Interrupted);
            }
            let at_edge = stop_after.is_some_and(|size| index.is_multiple_of(size));
            if (at_edge && verdict.passed < index) || used >= budget.total_secs {
                break;
            }
            let begin = Instant::now();
            let limits = limits(memory, case_secs.min(budget.total_secs - used));
            let source = compiled.as_deref().unwrap_or(code.as_bytes());
            let program = if compiled.is_some() { "compiled" } else { self.language.file() };
            let command = toolbox.run(self.language, program).unwrap_or_default();
            let is_right = match case {
                Case::Streams { input, output } => {
                    let job = Job {
                        program: &command,
                        files: &[(program, source)],
                        input: input.as_bytes(),
                        limits,
                        most_output: LEAST_OUTPUT.max(2 * output.len()),
                    };
                    let finished = sandbox.run(&job, is_stopped)?;
                    match (text_of(&finished), &self.checker) {
                        (None, _) => false,
                        (Some(got), None) => same_text(&got, output),
                        (Some(got), Some(checker)) => {
                            check(checker, [input, output, &got], sandbox, toolbox, is_stopped)?
                        }
                    }
                }
                Case::Call { name, arguments, output } => {
                    let request = json!({"name": name, "arguments": arguments}).to_string();
                    let job = Job {
                        program: &command,
                        files: &[(program, HARNESS), ("solution.py", source)],
                        input: request.as_bytes(),
                        limits,
                        most_output: LEAST_OUTPUT.max(2 * output.to_string().len()),
                    };
                    let got = text_of(&sandbox.run(&job, is_stopped)?);
                    let got = got.and_then(|text| serde_json::from_str::<Value>(&text).ok());
                    got.is_some_and(|got| same_value(&got, output))
                }
            };
            verdict.passed += usize::from(is_right);
            used += begin.elapsed().as_secs_f64();
        }
        Ok(verdict)
    }

    fn compile(
        &self,
        code: &str,
        sandbox: &Sandbox,
        toolbox: &Toolbox,
        is_stopped: &dyn Fn() -> bool,
    ) -> Result<Option<Vec<u8>>, SandboxError> {
        let is_unit = |name: &str| Path::new(name).extension().is_some_and(|end| end == "cpp" || end == "cc");
        let own = self.language.file();
        let more = self.more_files.iter().map(|(name, content)| (name.as_str(), content.as_bytes()));
        let files: Vec<(&str, &[u8])> = std::iter::once((own, code.as_bytes())).chain(more).collect();
        let units: Vec<&str> =
            files.iter().map(|(name, _)| *name).filter(|name| *name == own || is_unit(name)).collect();
        let program = toolbox.compile(self.language, &units).unwrap_or_default();
        let job = Job {
            program: &program,
            files: &files,
            input: b"",
            limits: limits(2 << 30, COMPILE_SECS),
            most_output: MOST_COMPILED,
        };
        let finished = sandbox.run(&job, is_stopped)?;
        Ok((finished.code == Some(0) && !finished.output.is_empty()).then_some(finished.output))
    }
}

/// The output of a program that ended well.
fn text_of(finished: &Finished) -> Option<String> {
    (finished.code == Some(0)).then(|| String::from_utf8_lossy(&finished.output).into_owned())
}

/// Asks a checker, `python checker.py input.txt correct_output.txt output.txt`, which prints 1 for a right output. It comes
/// with the data, not from the completion, and runs in a sandbox of its own all the same.
fn check(
    checker: &str,
    [input, expected, got]: [&String; 3],
    sandbox: &Sandbox,
    toolbox: &Toolbox,
    is_stopped: &dyn Fn() -> bool,
) -> Result<bool, SandboxError> {
    let mut program = toolbox.run(Language::Python, "checker.py").unwrap_or_default();
    program.extend(["input.txt", "correct_output.txt", "output.txt"].map(str::to_owned));
    let job = Job {
        program: &program,
        files: &[
            ("checker.py", checker.as_bytes()),
            ("input.txt", input.as_bytes()),
            ("correct_output.txt", expected.as_bytes()),
            ("output.txt", got.as_bytes()),
        ],
        input: b"",
        limits: limits(1 << 30, 30.0),
        most_output: 10_000,
    };
    let said = text_of(&sandbox.run(&job, is_stopped)?);
    Ok(said.is_some_and(|text| text.trim().parse() == Ok(1.0)))
}
