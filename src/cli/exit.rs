//! Exit codes, and how errors are mapped to them and shown.

use std::io;

use crate::ranks;

/// How the process ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Everything was done.
    Done,
    /// Something failed; the message says what.
    Failed,
    /// The command line, the configuration or the environment is wrong; nothing was started.
    Usage,
    /// Another process of the run was lost.
    PeerLost,
    /// Stopped by a signal after saving; the run can be resumed.
    Interrupted,
}

impl Exit {
    /// The process's exit code.
    #[must_use]
    pub const fn code(self) -> u8 {
        match self {
            Self::Done => 0,
            Self::Failed => 1,
            Self::Usage => 2,
            Self::PeerLost => 3,
            Self::Interrupted => 130,
        }
    }
}

/// A mistake in what was asked for: exit code 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct UsageError(pub String);

/// Ready-made diagnostics of a configuration, many lines with positions, printed as they are: exit code 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Diagnostics(pub String);

/// The reader of standard output went away: a quiet success, as `trainer config --reference | head` is. Only the console
/// makes this error: a closed pipe to anything else, such as a reward program, is a failure.
#[derive(Debug, thiserror::Error)]
#[error("standard output was closed")]
pub struct OutputClosed;

/// The error of a failed write to standard output.
pub(super) fn output_error(error: io::Error) -> anyhow::Error {
    if error.kind() == io::ErrorKind::BrokenPipe {
        OutputClosed.into()
    } else {
        anyhow::Error::new(error).context("cannot write to standard output")
    }
}

/// The exit of an error, by the first of its causes that has one of its own.
pub(super) fn code_of(error: &anyhow::Error) -> Exit {
    error
        .chain()
        .find_map(|cause| {
            if cause.is::<OutputClosed>() {
                Some(Exit::Done)
            } else if cause.is::<UsageError>() || cause.is::<Diagnostics>() {
                Some(Exit::Usage)
            } else if cause.downcast_ref().is_some_and(ranks::Error::is_of_peer) {
                Some(Exit::PeerLost)
            } else {
                None
            }
        })
        .unwrap_or(Exit::Failed)
}

/// The error as it is shown: `error: what`, then each cause that adds something, indented.
pub(super) fn render(error: &anyhow::Error) -> String {
    if let Some(Diagnostics(text)) = error.downcast_ref() {
        return format!("{}\n", text.trim_end());
    }
    let mut lines = vec![format!("error: {error}")];
    let mut last = error.to_string();
    for cause in error.chain().skip(1) {
        let text = cause.to_string();
        // Many errors end in their source's text already.
        if !last.contains(&text) {
            lines.push(format!("  because {text}"));
        }
        last = text;
    }
    lines.join("\n") + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::{Context, anyhow};

    #[test]
    fn every_kind_of_error_has_its_exit_code_under_any_context() {
        let cases = [
            (anyhow!("x"), Exit::Failed),
            (UsageError("x".into()).into(), Exit::Usage),
            (Diagnostics("x".into()).into(), Exit::Usage),
            (
                ranks::Error::PeerLost { rank: 0, peer: 1, host: "x".into(), operation: "barrier" }.into(),
                Exit::PeerLost,
            ),
            (ranks::Error::NoRanks.into(), Exit::Failed),
            (output_error(io::ErrorKind::BrokenPipe.into()), Exit::Done),
            (output_error(io::ErrorKind::StorageFull.into()), Exit::Failed),
            // A pipe to a program of the run is not the console.
            (anyhow::Error::new(io::Error::from(io::ErrorKind::BrokenPipe)), Exit::Failed),
        ];
        for (error, exit) in cases {
            let shown = format!("{error:#}");
            let error = Err::<(), _>(error).context("outer").unwrap_err();
            assert_eq!(code_of(&error), exit, "{shown}");
        }
        let codes = [Exit::Done, Exit::Failed, Exit::Usage, Exit::PeerLost, Exit::Interrupted].map(Exit::code);
        assert_eq!(codes, [0, 1, 2, 3, 130]);
    }

    #[test]
    fn causes_are_shown_once() {
        let inner = crate::fs::io_error("open", "a.yaml".as_ref())(io::Error::from(io::ErrorKind::NotFound));
        let error = anyhow::Error::new(inner).context("cannot read the configuration");
        assert_eq!(
            render(&error),
            "error: cannot read the configuration\n  because cannot open `a.yaml`: entity not found\n"
        );
        assert_eq!(render(&Diagnostics("two\nlines\n\n".into()).into()), "two\nlines\n");
    }
}
