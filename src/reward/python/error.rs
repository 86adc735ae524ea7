//! How a reward function in Python failed, in sentences.

use std::process::ExitStatus;

use serde_json::{Map, Value};

/// What went wrong with a function or with the Python that runs it.
#[derive(Debug, thiserror::Error)]
pub enum PythonError {
    /// The interpreter could not be started.
    #[error(
        "could not be loaded: no Python was started: {0}; install Python 3.8 or later, or name one as `reward_python`"
    )]
    Start(std::io::Error),
    /// The file is not there.
    #[error("could not be loaded: there is no such file; looked for {looked}")]
    File {
        /// The places.
        looked: String,
    },
    /// The function's own module is not there.
    #[error(
        "could not be loaded: there is no module `{module}`, neither installed nor in {looked}; check the name, install \
        it, or name the folder that holds it as `reward_path`"
    )]
    NoModule {
        /// Its name.
        module: String,
        /// The folders.
        looked: String,
    },
    /// The module imports another that is not there.
    #[error(
        "could not be loaded: it imports `{module}`, which is not installed there; install it, or name a Python that \
        has it as `reward_python`\n{traceback}"
    )]
    Missing {
        /// Its name.
        module: String,
        /// Where it is imported.
        traceback: String,
    },
    /// The module failed while it was imported.
    #[error("could not be loaded: its module fails\n{traceback}")]
    Import {
        /// Where and why.
        traceback: String,
    },
    /// The module has no such name.
    #[error("could not be loaded: its module has no `{attribute}`{near}")]
    Attribute {
        /// The name.
        attribute: String,
        /// Other names.
        near: String,
    },
    /// It is not a function.
    #[error("is {got}, expected a function or an object that can be called")]
    NotCallable {
        /// What it is.
        got: String,
    },
    /// It takes no such parameter.
    #[error("takes no argument `{argument}`; it takes {names}")]
    Argument {
        /// The parameter.
        argument: String,
        /// Those it takes.
        names: String,
    },
    /// It needs an argument that is no column.
    #[error("needs {missing}, which the data set does not have; it is offered {columns}")]
    Column {
        /// The arguments.
        missing: String,
        /// What there is.
        columns: String,
    },
    /// It raised an exception.
    #[error("failed\n{traceback}")]
    Raised {
        /// Where and why.
        traceback: String,
    },
    /// It returned a function.
    #[error(
        "returned a function: it makes reward functions; call it in your file (`reward = make_reward(...)`) and name \
        the result"
    )]
    Factory,
    /// It returned something that is no list.
    #[error("returned {got}, expected a list of {expected} numbers or None")]
    Result {
        /// What it returned.
        got: String,
        /// Completions in the batch.
        expected: u64,
    },
    /// It returned another number of scores.
    #[error("returned {got} scores for {expected} completions; expected one per completion, in their order")]
    Count {
        /// Scores.
        got: u64,
        /// Completions.
        expected: u64,
    },
    /// A score is no number.
    #[error(
        "returned {got} for completion {index} of the batch, expected a number that is finite in 32 bits, or None where \
        the reward does not apply"
    )]
    Score {
        /// Position in the batch.
        index: u64,
        /// The score.
        got: String,
    },
    /// It took too long.
    #[error(
        "did not return within {seconds} seconds and was stopped; raise its `timeout_secs`, or find out where it hangs"
    )]
    TimedOut {
        /// The limit.
        seconds: f64,
    },
    /// An async function took too long, as the helper noticed.
    #[error(
        "did not return within its `timeout_secs` and was stopped; raise it, or find out where it hangs; it waited in\n{traceback}"
    )]
    AwaitedTooLong {
        /// Where it was.
        traceback: String,
    },
    /// Python ended.
    #[error("ended the Python that runs it ({})", status.as_ref().map_or_else(|| "no status".to_owned(), ToString::to_string))]
    Died {
        /// How, if the system said so.
        status: Option<ExitStatus>,
    },
    /// The helper and this program do not understand each other.
    #[error("disturbed the conversation with the Python that runs it: {0}")]
    Protocol(String),
    /// An earlier call failed.
    #[error("is not loaded any more: a function failed in an earlier batch")]
    Stopped,
}

impl PythonError {
    /// Reads an `error` of the helper: the function's place among all, and the problem.
    pub(super) fn read(error: &Map<String, Value>) -> (usize, Self) {
        let text = |key: &str| error.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        let count = |key: &str| error.get(key).and_then(Value::as_u64).unwrap_or_default();
        let names = |key: &str| -> Vec<String> {
            let list = error.get(key).and_then(Value::as_array).into_iter().flatten();
            list.filter_map(Value::as_str).map(|name| format!("`{name}`")).collect()
        };
        let joined = |key: &str| {
            let names = names(key);
            if names.is_empty() { "nothing".to_owned() } else { names.join(", ") }
        };
        let problem = match text("kind").as_str() {
            "file" => Self::File { looked: joined("looked") },
            "missing" if error.get("is_own").and_then(Value::as_bool) == Some(true) => {
                Self::NoModule { module: text("module"), looked: joined("looked") }
            }
            "missing" => Self::Missing { module: text("module"), traceback: text("traceback") },
            "import" => Self::Import { traceback: text("traceback") },
            "attribute" => Self::Attribute {
                attribute: text("attribute"),
                near: match (names("near").first(), joined("names")) {
                    (Some(near), _) => format!(", did you mean {near}?"),
                    (None, names) => format!("; its functions are {names}"),
                },
            },
            "callable" => Self::NotCallable { got: text("got") },
            "argument" => Self::Argument { argument: text("argument"), names: joined("names") },
            "column" => Self::Column { missing: joined("missing"), columns: joined("columns") },
            "raised" => Self::Raised { traceback: text("traceback") },
            "factory" => Self::Factory,
            "result" => Self::Result { got: text("got"), expected: count("expected") },
            "count" => Self::Count { got: count("got"), expected: count("expected") },
            "score" => Self::Score { index: count("index"), got: text("got") },
            "timeout" => Self::AwaitedTooLong { traceback: text("traceback") },
            other => Self::Protocol(format!("an error of the kind `{other}`")),
        };
        (count("function") as usize, problem)
    }

    /// Whether what Python wrote to standard error helps to understand it.
    pub(in crate::reward) fn needs_last_words(&self) -> bool {
        matches!(self, Self::TimedOut { .. } | Self::Died { .. } | Self::Protocol(_))
    }
}
