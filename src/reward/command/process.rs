//! A child process in its own group, spoken to by lines, with a limit on every wait.
//!
//! Three threads serve it, so that no full pipe blocks the caller: one writes, one reads lines, one keeps the last
//! lines of standard error. They end when the process does.

use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Longest line of standard output, in bytes.
const LONGEST_LINE: u64 = 64 << 20;
/// Lines of standard error that are kept.
const KEPT_LINES: usize = 20;
/// Longest kept line, in bytes.
const LONGEST_KEPT: u64 = 500;
/// How long a process may take to exit by itself once its standard input ends.
const GRACE: Duration = Duration::from_secs(1);
/// How often a wait for an answer asks whether it should be given up.
const TICK: Duration = Duration::from_millis(50);

type LastLines = Arc<Mutex<VecDeque<String>>>;

/// A running program.
pub(super) struct Process {
    child: Child,
    requests: Option<Sender<Vec<u8>>>,
    lines: Receiver<Line>,
    stderr: LastLines,
}

enum Line {
    Whole(String),
    TooLong(String),
}

/// What came from standard output.
pub(super) enum Received {
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
    /// Starts `program` in a new process group.
    ///
    /// # Errors
    /// What the system says.
    pub(super) fn start(program: &str, arguments: &[String]) -> io::Result<Self> {
        let mut child = Command::new(program)
            .args(arguments)
            .env("PYTHONUNBUFFERED", "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()?;
        let missing = || io::Error::other("the system gave it no pipe");
        let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let (stdin, stdout) = (stdin.ok_or_else(missing)?, stdout.ok_or_else(missing)?);
        let stderr = stderr.ok_or_else(missing)?;
        let (request_sender, requests) = channel();
        // Bounded: a program that writes without being asked blocks itself, not our memory.
        let (line_sender, lines) = sync_channel(4);
        let kept = LastLines::default();
        let keeper = Arc::clone(&kept);
        spawn("reward-stdin", move || write_requests(stdin, &requests))?;
        spawn("reward-stdout", move || read_lines(stdout, &line_sender))?;
        spawn("reward-stderr", move || keep_last_lines(stderr, &keeper))?;
        Ok(Self { child, requests: Some(request_sender), lines, stderr: kept })
    }

    /// Queues a request. That the program no longer reads shows when its answer is awaited.
    pub(super) fn send(&self, request: Vec<u8>) {
        if let Some(requests) = &self.requests {
            let _ = requests.send(request);
        }
    }

    /// Waits for the next line until `deadline`, or until `is_interrupted`.
    pub(super) fn receive(&self, deadline: Instant, is_interrupted: &dyn Fn() -> bool) -> Received {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left.min(TICK)) {
                Ok(Line::Whole(line)) => return Received::Line(line),
                Ok(Line::TooLong(start)) => return Received::TooLong(start),
                Err(RecvTimeoutError::Disconnected) => return Received::End,
                Err(RecvTimeoutError::Timeout) if left.is_zero() => return Received::Nothing,
                Err(RecvTimeoutError::Timeout) if is_interrupted() => return Received::Interrupted,
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }

    /// Waits for the program to end by itself.
    pub(super) fn wait(&mut self, limit: Duration) -> Option<ExitStatus> {
        let deadline = Instant::now() + limit;
        loop {
            match self.child.try_wait() {
                Ok(Some(status)) => return Some(status),
                Ok(None) if Instant::now() < deadline => thread::sleep(Duration::from_millis(5)),
                _ => return None,
            }
        }
    }

    /// Kills the program with its process group, and returns its last lines on standard error.
    pub(super) fn kill(mut self) -> Vec<String> {
        self.end(Duration::ZERO);
        // The thread that keeps the last lines may still be reading what is in the pipe.
        let deadline = Instant::now() + Duration::from_millis(200);
        while Arc::strong_count(&self.stderr) > 1 && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(2));
        }
        self.stderr.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }

    /// Ends standard input, waits `grace` for the program to exit, then kills what is left of its group.
    fn end(&mut self, grace: Duration) {
        self.requests = None;
        let has_ended = self.wait(grace).is_some();
        // The group outlives its leader if a child of the program is still there.
        kill_group(self.child.id());
        if !has_ended {
            let _ = self.child.kill();
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

/// Sends SIGKILL to a process group, by the shell's own `kill`: the system call itself would need unsafe code.
fn kill_group(group: u32) {
    let _ = Command::new("/bin/sh")
        .args(["-c", "kill -s KILL -- -\"$0\"", &group.to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
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

fn read_lines(stdout: ChildStdout, lines: &SyncSender<Line>) {
    let mut reader = BufReader::new(stdout);
    loop {
        let mut line = Vec::new();
        let line = match reader.by_ref().take(LONGEST_LINE).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) if line.len() as u64 == LONGEST_LINE => {
                Line::TooLong(String::from_utf8_lossy(&line[..200]).into_owned())
            }
            Ok(_) => Line::Whole(String::from_utf8_lossy(&line).trim_end().to_owned()),
        };
        let is_over = matches!(line, Line::TooLong(_));
        if lines.send(line).is_err() || is_over {
            return;
        }
    }
}

fn keep_last_lines(stderr: ChildStderr, kept: &LastLines) {
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
        let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() == KEPT_LINES {
            kept.pop_front();
        }
        kept.push_back(line);
    }
}
