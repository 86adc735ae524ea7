//! The console of a run: its plan, one line per logged step, progress bars, sample completions, the summary.
//!
//! On a terminal there are bars (optimizer steps below, rollout and evaluation above them while they last) and every line
//! is printed above them. On a pipe or in a Slurm log there are lines only. A console that cannot be written to (the
//! reader of a pipe went away) goes silent and the run goes on: metrics are in files.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use super::plan::{self, Section};
use super::samples::{self, Sample};
use super::{Row, Terminal, line, units};

/// Rank 0's console. Every other rank has a [`Console::silent`] one.
#[derive(Debug)]
pub struct Console {
    terminal: Terminal,
    has_bars: bool,
    is_silent: Arc<AtomicBool>,
    steps: Option<Steps>,
}

#[derive(Debug)]
struct Steps {
    total: u64,
    bar: Option<ProgressBar>,
}

impl Console {
    /// A console on `terminal`; `disable_tqdm` switches bars off, and there are none unless a person is watching.
    pub fn new(terminal: Terminal, disable_tqdm: bool) -> Self {
        let has_bars = terminal.is_interactive() && !disable_tqdm;
        Self { terminal, has_bars, is_silent: Arc::default(), steps: None }
    }

    /// A console that shows nothing, for every rank but the first.
    pub fn silent() -> Self {
        Self { terminal: Terminal::memory(0), has_bars: false, is_silent: Arc::new(AtomicBool::new(true)), steps: None }
    }

    /// Prints titled sections: what the run will do, or what it did.
    pub fn sections(&self, sections: &[Section]) {
        self.write(|terminal| plan::render(sections, terminal));
    }

    /// Prints one line, e.g. where a checkpoint was saved.
    pub fn note(&self, text: &str) {
        self.write(|_| format!("{text}\n"));
    }

    /// Begins the walk over `total` optimizer steps, `done` of which a resumed run has behind it.
    pub fn start_steps(&mut self, done: u64, total: u64) {
        let bar = self.bar(
            "{prefix:>8} {bar:32.cyan/238} {pos}/{len} steps  {elapsed} elapsed, {eta} left  {wide_msg}",
            total,
            "train",
        );
        if let Some(bar) = &bar {
            bar.set_position(done);
            bar.reset_eta();
            bar.enable_steady_tick(Duration::from_millis(500));
        }
        self.steps = Some(Steps { total, bar });
    }

    /// Moves the steps bar to `step`; `message` stands at its end, e.g. `reward 0.52`.
    pub fn step(&self, step: u64, message: &str) {
        if let Some(Steps { bar: Some(bar), .. }) = &self.steps {
            bar.set_position(step);
            bar.set_message(message.to_string());
        }
    }

    /// Prints a logged row as one line.
    pub fn log(&self, row: &Row) {
        let total = self.steps.as_ref().map(|steps| steps.total);
        self.write(|terminal| {
            let width = terminal.is_interactive().then(|| terminal.width());
            format!("{}\n", line::render(row, total, width))
        });
    }

    /// Begins something that lasts within a step: `name` is `rollout` or `eval`, `unit` what `total` counts, e.g.
    /// `sequences`. The bar goes away with the returned value.
    pub fn progress(&self, name: &'static str, total: u64, unit: &'static str) -> Progress {
        let template = "{prefix:>8} {bar:32.green/238} {pos}/{len} {unit}  {wide_msg}".replace("{unit}", unit);
        Progress { bar: self.bar(&template, total, name), start: Instant::now() }
    }

    /// Shows sample completions of a step.
    pub fn completions(&self, step: u64, samples: &[Sample]) {
        if !samples.is_empty() {
            self.write(|terminal| samples::render(step, samples, terminal));
        }
    }

    /// Takes the steps bar off the screen.
    pub fn finish_steps(&mut self) {
        if let Some(Steps { bar: Some(bar), .. }) = self.steps.take() {
            bar.finish_and_clear();
        }
    }

    fn bar(&self, template: &str, total: u64, name: &'static str) -> Option<ProgressBar> {
        if !self.has_bars || self.is_silent.load(Ordering::Relaxed) {
            return None;
        }
        let style = ProgressStyle::with_template(template)
            .expect("the templates above are fixed and tested")
            .progress_chars("━╸─");
        let bar = ProgressBar::new(total).with_style(style).with_prefix(name);
        // Short-lived bars stand above the steps bar.
        Some(match self.steps.as_ref().and_then(|steps| steps.bar.as_ref()) {
            Some(steps) => self.terminal.bars().insert_before(steps, bar),
            None => self.terminal.bars().add(bar),
        })
    }

    fn write(&self, text: impl FnOnce(&Terminal) -> String) {
        if self.is_silent.load(Ordering::Relaxed) {
            return;
        }
        if let Err(error) = self.terminal.print(&text(&self.terminal)) {
            self.is_silent.store(true, Ordering::Relaxed);
            if error.kind() != io::ErrorKind::BrokenPipe {
                tracing::warn!("cannot write to standard output ({error}); the run goes on silently");
            }
        }
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        self.finish_steps();
    }
}

/// Something that lasts within a step. Dropping it takes its bar off the screen.
#[derive(Debug)]
pub struct Progress {
    bar: Option<ProgressBar>,
    start: Instant,
}

impl Progress {
    /// Sets how many of the total are done, and how many tokens that took so far.
    pub fn set(&self, done: u64, tokens: u64) {
        if let Some(bar) = &self.bar {
            bar.set_position(done);
            if tokens > 0 {
                let rate = tokens as f64 / self.start.elapsed().as_secs_f64().max(1e-3);
                bar.set_message(format!("{} tokens, {} tok/s", units::count(tokens), units::short_count(rate)));
            }
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn on_a_pipe_a_run_is_lines_without_control_codes() {
        let terminal = Terminal::memory(80);
        let mut console = Console::new(terminal.clone(), false);
        console.sections(&[Section::new("Run").row("steps", "2 optimizer steps")]);
        console.start_steps(0, 2);
        for step in 1..=2_u64 {
            let rollout = console.progress("rollout", 8, "sequences");
            rollout.set(8, 100);
            drop(rollout);
            console.step(step, "reward 0.5");
            console.log(json!({"step": step, "loss": 0.25}).as_object().unwrap());
        }
        console.finish_steps();
        console.note("saved out/checkpoint-2");
        assert_eq!(
            terminal.collected(),
            "[Run]\n  steps  2 optimizer steps\n\nstep 1/2  loss  0.2500\nstep 2/2  loss  0.2500\nsaved out/checkpoint-2\n"
        );
    }

    #[test]
    fn a_silent_console_shows_nothing() {
        let console = Console::silent();
        console.note("x");
        assert_eq!(console.terminal.collected(), "");
    }

    #[test]
    fn every_bar_template_is_valid() {
        let mut console = Console::new(Terminal::memory(80), false);
        console.has_bars = true;
        console.start_steps(3, 10);
        let steps = console.steps.as_ref().unwrap().bar.as_ref().unwrap();
        assert_eq!((steps.position(), steps.length()), (3, Some(10)));
        let rollout = console.progress("rollout", 8, "sequences");
        rollout.set(4, 1000);
        assert_eq!(rollout.bar.as_ref().unwrap().position(), 4);
        assert!(rollout.bar.as_ref().unwrap().message().starts_with("1,000 tokens, "));
        console.finish_steps();
        assert!(console.steps.is_none());
    }
}
