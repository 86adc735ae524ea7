//! A child process under a keeper, spoken to by lines, with a limit on every wait.
//!
//! Three threads serve it, so that no full pipe blocks the caller: one writes, one reads lines, one keeps the last
//! lines of standard error and logs all of them. They end when the process does.

use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStderr, ChildStdin, ChildStdout, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

use crate::reward::error::excerpt;
use crate::reward::keeper;

/// Longest line of standard output, in bytes.
const LONGEST_LINE: usize = 64 << 20;
/// Lines of standard error that are kept.
const KEPT_LINES: usize = 20;
/// Longest kept line, in bytes.
const LONGEST_KEPT: u64 = 500;
/// How long a process may take to exit by itself once its standard input ends.
const GRACE: Duration = Duration::from_secs(1);
/// How long a keeper may take to kill what it keeps.
const KEEPER_GRACE: Duration = Duration::from_secs(5);
/// How often a wait for an answer asks whether it should be given up.
const TICK: Duration = Duration::from_millis(50);

type LastLines = Arc<Mutex<VecDeque<String>>>;

/// A running program.
pub(in crate::reward) struct Process {
    /// The program's keeper.
    child: Child,
    requests: Option<Sender<Vec<u8>>>,
    lines: Receiver<Line>,
    /// The start of a line that has not ended yet.
    unfinished: Arc<Mutex<String>>,
    stderr: LastLines,
}

enum Line {
    Whole(String),
    TooLong(String),
}

/// What came from standard output.
pub(in crate::reward) enum Received {
    /// A line, without its end.
    Line(String),
    /// The start of a line that does not end within the limit.
    TooLong(String),
    /// Nothing until the deadline.
    Nothing,
    /// The wait was given up.
    Interrupted,
    /// Standard output has ended.
    End,
}

impl Process {
    /// Starts `program`; `name` stands before its messages in the log.
    ///
    /// # Errors
    /// What the system says.
    pub(in crate::reward) fn start(name: &str, program: &str, arguments: &[String]) -> io::Result<Self> {
        keeper::find_program(program)?;
        let mut child = keeper::kept(program, arguments)
            .env("PYTHONUNBUFFERED", "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let missing = || io::Error::other("the system gave it no pipe");
        let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let (stdin, stdout) = (stdin.ok_or_else(missing)?, stdout.ok_or_else(missing)?);
        let stderr = stderr.ok_or_else(missing)?;
        let (request_sender, requests) = channel();
        // Bounded: a program that writes without being asked blocks itself, not our memory.
        let (line_sender, lines) = sync_channel(4);
        let (kept, unfinished) = (LastLines::default(), Arc::<Mutex<String>>::default());
        let (keeper, begun, name) = (Arc::clone(&kept), Arc::clone(&unfinished), name.to_owned());
        spawn("reward-stdin", move || write_requests(stdin, &requests))?;
        spawn("reward-stdout", move || read_lines(stdout, &line_sender, &begun))?;
        spawn("reward-stderr", move || keep_last_lines(&name, stderr, &keeper))?;
        Ok(Self { child, requests: Some(request_sender), lines, unfinished, stderr: kept })
    }

    /// Queues a request. That the program no longer reads shows when its answer is awaited.
    pub(in crate::reward) fn send(&self, request: Vec<u8>) {
        if let Some(requests) = &self.requests {
            let _ = requests.send(request);
        }
    }

    /// Waits for the next line until `deadline`, or until `is_interrupted`.
    pub(in crate::reward) fn receive(&self, deadline: Instant, is_interrupted: &dyn Fn() -> bool) -> Received {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                // Also for a program that writes without end.
                return Received::Nothing;
            }
            match self.lines.recv_timeout(left.min(TICK)) {
                Ok(Line::Whole(line)) => return Received::Line(line),
                Ok(Line::TooLong(start)) => return Received::TooLong(start),
                Err(RecvTimeoutError::Disconnected) => return Received::End,
                Err(RecvTimeoutError::Timeout) if is_interrupted() => return Received::Interrupted,
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }

    /// The start of what the program wrote to standard output since its last line break.
    pub(in crate::reward) fn unfinished(&self) -> Option<String> {
        let begun = self.unfinished.lock().unwrap_or_else(PoisonError::into_inner);
        (!begun.trim().is_empty()).then(|| excerpt(&begun))
    }

    /// Waits for the program to end by itself.
    pub(in crate::reward) fn wait(&mut self, limit: Duration) -> Option<ExitStatus> {
        let deadline = Instant::now() + limit;
        loop {
            match self.child.try_wait() {
                Ok(Some(status)) => return Some(status),
                Ok(None) if Instant::now() < deadline => thread::sleep(Duration::from_millis(5)),
                _ => return None,
            }
        }
    }

    /// Kills the program with all that it started, and returns its last lines on standard error.
    pub(in crate::reward) fn kill(mut self) -> Vec<String> {
        self.end(Duration::ZERO);
        // The thread that keeps the last lines may still be reading what is in the pipe.
        let deadline = Instant::now() + Duration::from_millis(200);
        while Arc::strong_count(&self.stderr) > 1 && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(2));
        }
        self.stderr.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }

    /// Ends standard input, waits `grace` for the program to exit, then has its keeper kill what is left.
    fn end(&mut self, grace: Duration) {
        self.requests = None;
        if self.wait(grace).is_some() {
            return;
        }
        let keeper = Pid::from_raw(self.child.id() as i32);
        let _ = kill(keeper, Signal::SIGTERM);
        if self.wait(KEEPER_GRACE).is_none() {
            let _ = killpg(keeper, Signal::SIGKILL);
            let _ = self.child.wait();
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.requests.is_some() {
            self.end(GRACE);
        }
    }
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    thread::Builder::new().name(name.to_owned()).spawn(work).map(drop)
}

fn write_requests(mut stdin: ChildStdin, requests: &Receiver<Vec<u8>>) {
    for request in requests {
        // A program that closed its input is noticed by the end of its output.
        if stdin.write_all(&request).and_then(|()| stdin.flush()).is_err() {
            return;
        }
    }
}

fn read_lines(stdout: ChildStdout, lines: &SyncSender<Line>, unfinished: &Mutex<String>) {
    /// How much of an unfinished line is kept for messages.
    const SHOWN: usize = 1000;
    let mut reader = BufReader::new(stdout);
    let mut line = Vec::new();
    loop {
        let (is_whole, is_over) = match reader.fill_buf() {
            Ok([]) | Err(_) => (!line.is_empty(), true),
            Ok(read) => {
                let end = read.iter().position(|byte| *byte == b'\n');
                let taken = end.map_or(read.len(), |at| at + 1);
                line.extend_from_slice(&read[..taken]);
                reader.consume(taken);
                (end.is_some(), false)
            }
        };
        let is_long = line.len() > LONGEST_LINE;
        let start = || String::from_utf8_lossy(&line[..line.len().min(SHOWN)]).into_owned();
        *unfinished.lock().unwrap_or_else(PoisonError::into_inner) = if is_whole { String::new() } else { start() };
        let sent = if is_long {
            lines.send(Line::TooLong(start()))
        } else if is_whole {
            let whole = Line::Whole(String::from_utf8_lossy(&line).trim_end().to_owned());
            line.clear();
            lines.send(whole)
        } else {
            Ok(())
        };
        if is_over || is_long || sent.is_err() {
            return;
        }
    }
}

fn keep_last_lines(name: &str, stderr: ChildStderr, kept: &LastLines) {
    let mut reader = BufReader::new(stderr);
    loop {
        let mut line = Vec::new();
        // A longer line is kept in pieces.
        match reader.by_ref().take(LONGEST_KEPT).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        let line = String::from_utf8_lossy(&line).trim_end().to_owned();
        if line.is_empty() {
            continue;
        }
        tracing::info!("{name}: {line}");
        let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() == KEPT_LINES {
            kept.pop_front();
        }
        kept.push_back(line);
    }
}
