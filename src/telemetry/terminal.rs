//! The one place that writes to standard output.
//!
//! A [`Terminal`] is made once in `main` and handed down. It knows whether a person is watching (both streams are a
//! terminal that understands cursor movement) and owns the group of progress bars, so that a line or a log event
//! written while bars are drawn lands above them. On a pipe, in a file or in a Slurm log there are no control codes.

use std::io::{self, IsTerminal, Write};
use std::sync::{Arc, Mutex, PoisonError};

use indicatif::{MultiProgress, ProgressDrawTarget};

/// Columns assumed where nobody says how wide the output is.
const WIDTH_WITHOUT_TERMINAL: usize = 120;
/// Narrower than this nothing can be laid out; wrap as if it were this wide.
const SMALLEST_WIDTH: usize = 40;

/// Where text for people goes. Cheap to clone; clones share the stream and the bars.
#[derive(Clone, Debug)]
pub struct Terminal {
    output: Output,
    bars: MultiProgress,
    is_interactive: bool,
    has_color: bool,
    width: Option<usize>,
}

#[derive(Clone, Debug)]
enum Output {
    Standard,
    Memory(Arc<Mutex<Vec<u8>>>),
}

impl Terminal {
    /// Looks at the streams and the environment of this process.
    pub fn detect() -> Self {
        let is_dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        let is_interactive = io::stdout().is_terminal() && io::stderr().is_terminal() && !is_dumb;
        let has_color = is_interactive && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        let target = if is_interactive { ProgressDrawTarget::stderr_with_hz(8) } else { ProgressDrawTarget::hidden() };
        Self {
            output: Output::Standard,
            bars: MultiProgress::with_draw_target(target),
            is_interactive,
            has_color,
            width: None,
        }
    }

    /// A terminal that keeps what is printed in memory: plain, `width` columns wide, no bars.
    pub fn memory(width: usize) -> Self {
        Self {
            output: Output::Memory(Arc::default()),
            bars: MultiProgress::with_draw_target(ProgressDrawTarget::hidden()),
            is_interactive: false,
            has_color: false,
            width: Some(width),
        }
    }

    /// What a [`Terminal::memory`] has collected; empty for the real one.
    pub fn collected(&self) -> String {
        match &self.output {
            Output::Standard => String::new(),
            Output::Memory(bytes) => {
                String::from_utf8_lossy(&bytes.lock().unwrap_or_else(PoisonError::into_inner)).into_owned()
            }
        }
    }

    /// Writes `text` as it is to standard output, above any progress bars, and flushes.
    ///
    /// # Errors
    /// If the stream is closed or full; the kind is `BrokenPipe` when the reader went away.
    pub fn print(&self, text: &str) -> io::Result<()> {
        match &self.output {
            Output::Standard => self.above_bars(|| {
                let mut stream = io::stdout().lock();
                stream.write_all(text.as_bytes())?;
                stream.flush()
            }),
            Output::Memory(bytes) => {
                bytes.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(text.as_bytes());
                Ok(())
            }
        }
    }

    /// Runs `write` while no bar is on the screen.
    pub(crate) fn above_bars<T>(&self, write: impl FnOnce() -> T) -> T {
        self.bars.suspend(write)
    }

    /// The group all progress bars belong to.
    pub(super) fn bars(&self) -> &MultiProgress {
        &self.bars
    }

    /// Whether a person is watching and lines can be redrawn.
    pub fn is_interactive(&self) -> bool {
        self.is_interactive
    }

    /// Columns available for text.
    pub fn width(&self) -> usize {
        let columns = self.width.or_else(|| {
            if self.is_interactive {
                console::Term::stdout().size_checked().map(|(_, columns)| columns.into())
            } else {
                None
            }
        });
        columns.unwrap_or(WIDTH_WITHOUT_TERMINAL).max(SMALLEST_WIDTH)
    }

    /// `text` in bold where the terminal has colours.
    pub fn bold(&self, text: &str) -> String {
        self.paint("1", text)
    }

    /// `text` dimmed where the terminal has colours.
    pub fn dim(&self, text: &str) -> String {
        self.paint("2", text)
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.has_color { format!("\x1b[{code}m{text}\x1b[0m") } else { text.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_memory_terminal_collects_plain_text_in_order() {
        let terminal = Terminal::memory(20);
        let clone = terminal.clone();
        terminal.print(&terminal.bold("a")).unwrap();
        clone.print(&clone.dim("b\n")).unwrap();
        assert_eq!(terminal.collected(), "ab\n");
        assert!(!terminal.is_interactive());
        assert_eq!(terminal.width(), SMALLEST_WIDTH, "a width nothing fits into is raised");
    }

    #[test]
    fn under_a_test_runner_or_a_pipe_the_detected_terminal_is_plain() {
        // Standard error of a test runner may be a terminal, its standard output is captured or a pipe in CI; where both
        // are terminals the answer must be the opposite.
        let terminal = Terminal::detect();
        assert_eq!(
            terminal.is_interactive(),
            io::stdout().is_terminal()
                && io::stderr().is_terminal()
                && std::env::var_os("TERM").is_none_or(|t| t != "dumb")
        );
        if !terminal.is_interactive() {
            assert_eq!(terminal.bold("x"), "x");
            assert_eq!(terminal.width(), WIDTH_WITHOUT_TERMINAL);
        }
    }
}
