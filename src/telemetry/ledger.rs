//! The memory ledger: which long-lived buffers a run holds, how many bytes each, and the peak.
//!
//! Whoever makes a long-lived buffer registers it under its [`Kind`] and keeps the returned [`Allocation`] beside it; the
//! entry leaves the ledger when the allocation is dropped. The plan made before the run is set with [`Ledger::plan`], and
//! [`Ledger::section`] shows plan and measured peak side by side. Clones share one ledger; all methods take `&self`.

use std::sync::{Arc, Mutex, PoisonError};

use super::plan::Section;
use super::units;

/// What a long-lived buffer is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// Frozen or trained base weights, packed or not.
    Weights,
    /// Adapter weights.
    Adapters,
    /// Gradient buckets.
    Gradients,
    /// Master weights and moments.
    Optimizer,
    /// What forward keeps for backward.
    Activations,
    /// Keys and values of the rollout.
    KvCache,
    /// Scratch buffers that live longer than one operation.
    Workspace,
}

impl Kind {
    /// All kinds, in the order of the table.
    pub const ALL: [Self; 7] = [
        Self::Weights,
        Self::Adapters,
        Self::Gradients,
        Self::Optimizer,
        Self::Activations,
        Self::KvCache,
        Self::Workspace,
    ];

    /// As it stands in the table.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Weights => "weights",
            Self::Adapters => "adapters",
            Self::Gradients => "gradients",
            Self::Optimizer => "optimizer",
            Self::Activations => "activations",
            Self::KvCache => "kv cache",
            Self::Workspace => "workspace",
        }
    }

    /// The settings that make this kind smaller, for out-of-memory messages.
    #[must_use]
    pub const fn shrinks_with(self) -> &'static str {
        match self {
            Self::Weights => "`load_in_4bit: true` or a smaller model",
            Self::Adapters | Self::Gradients | Self::Optimizer => {
                "`use_peft: true`, a smaller `lora_r`, fewer `lora_target_modules`"
            }
            Self::Activations => {
                "`gradient_checkpointing: true`, a smaller `per_device_train_batch_size` or `max_length`"
            }
            Self::KvCache => "a smaller `max_num_seqs`, `max_completion_length` or `max_prompt_length`",
            Self::Workspace => "a smaller `per_device_train_batch_size`",
        }
    }
}

/// The bytes of every kind: planned, held now, held at most.
#[derive(Clone, Debug, Default)]
pub struct Ledger {
    book: Arc<Mutex<Book>>,
}

#[derive(Debug, Default)]
struct Book {
    entries: [Entry; Kind::ALL.len()],
    total: u64,
    total_peak: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Entry {
    planned: Option<u64>,
    current: u64,
    peak: u64,
}

/// One registered buffer; dropping it takes its bytes off the ledger.
#[derive(Debug)]
#[must_use = "the bytes leave the ledger when this is dropped; keep it beside the buffer"]
pub struct Allocation {
    ledger: Ledger,
    kind: Kind,
    bytes: u64,
}

impl Ledger {
    /// Sets the bytes that a kind is planned to need at its peak.
    pub fn plan(&self, kind: Kind, bytes: u64) {
        self.with(|book| book.entries[kind as usize].planned = Some(bytes));
    }

    /// Registers `bytes` of a kind.
    pub fn register(&self, kind: Kind, bytes: u64) -> Allocation {
        self.change(kind, 0, bytes);
        Allocation { ledger: self.clone(), kind, bytes }
    }

    /// Bytes of a kind held now.
    pub fn current(&self, kind: Kind) -> u64 {
        self.with(|book| book.entries[kind as usize].current)
    }

    /// The most bytes of a kind held at one time.
    pub fn peak(&self, kind: Kind) -> u64 {
        self.with(|book| book.entries[kind as usize].peak)
    }

    /// The most bytes of all kinds held at one time; at most the sum of the kinds' peaks.
    pub fn total_peak(&self) -> u64 {
        self.with(|book| book.total_peak)
    }

    /// The sum of the planned bytes.
    pub fn total_planned(&self) -> u64 {
        self.with(|book| book.entries.iter().filter_map(|entry| entry.planned).sum())
    }

    /// The kinds that hold bytes now, the largest first: what an out-of-memory message names.
    pub fn largest(&self) -> Vec<(Kind, u64)> {
        let mut held: Vec<(Kind, u64)> =
            Kind::ALL.iter().map(|&kind| (kind, self.current(kind))).filter(|&(_, bytes)| bytes > 0).collect();
        held.sort_by_key(|&(kind, bytes)| (std::cmp::Reverse(bytes), kind));
        held
    }

    /// The plan alone, for the opening of a run.
    pub fn planned_section(&self) -> Section {
        let mut section = Section::new("Memory");
        for kind in Kind::ALL {
            if let Some(bytes) = self.with(|book| book.entries[kind as usize].planned) {
                section.push(kind.name(), units::bytes(bytes));
            }
        }
        section.row("total planned", units::bytes(self.total_planned()))
    }

    /// Plan and measured peak of every kind that has either, their totals, and the peak of the whole process.
    pub fn section(&self) -> Section {
        let mut section = Section::new("Memory");
        for kind in Kind::ALL {
            let Entry { planned, peak, .. } = self.with(|book| book.entries[kind as usize]);
            if planned.is_some() || peak > 0 {
                section.push(kind.name(), compare(planned, peak));
            }
        }
        section.push("total", compare(Some(self.total_planned()).filter(|&bytes| bytes > 0), self.total_peak()));
        if let Some(bytes) = peak_resident_bytes() {
            section.push("process peak", format!("{} resident", units::bytes(bytes)));
        }
        section
    }

    fn change(&self, kind: Kind, old: u64, new: u64) {
        self.with(|book| {
            let entry = &mut book.entries[kind as usize];
            entry.current = entry.current - old + new;
            entry.peak = entry.peak.max(entry.current);
            book.total = book.total - old + new;
            book.total_peak = book.total_peak.max(book.total);
        });
    }

    fn with<T>(&self, read: impl FnOnce(&mut Book) -> T) -> T {
        read(&mut self.book.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Allocation {
    /// Records that the buffer has grown or shrunk.
    pub fn resize(&mut self, bytes: u64) {
        self.ledger.change(self.kind, self.bytes, bytes);
        self.bytes = bytes;
    }

    /// Bytes registered.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        self.ledger.change(self.kind, self.bytes, 0);
    }
}

/// Planned, measured and their ratio.
fn compare(planned: Option<u64>, peak: u64) -> String {
    let measured = format!("{:>10} peak", units::bytes(peak));
    match planned {
        Some(planned) if planned > 0 => {
            let share = peak as f64 / planned as f64 * 100.0;
            format!("{measured}  {:>10} planned  ({share:.0} %)", units::bytes(planned))
        }
        Some(_) => format!("{measured}  {:>10} planned", "0 B"),
        None => measured,
    }
}

/// The most memory this process ever had resident, in bytes (`VmHWM` of /proc/self/status); `None` where the system
/// does not say. Mapped files count as far as they are resident.
pub fn peak_resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::Terminal;
    use crate::telemetry::plan::render;

    #[test]
    fn the_peak_of_all_is_the_peak_of_their_sum_and_not_the_sum_of_their_peaks() {
        let ledger = Ledger::default();
        let weights = ledger.register(Kind::Weights, 100);
        let cache = ledger.clone().register(Kind::KvCache, 50);
        drop(cache);
        let mut activations = ledger.register(Kind::Activations, 10);
        activations.resize(40);
        assert_eq!(ledger.total_peak(), 150);
        assert_eq!((ledger.current(Kind::KvCache), ledger.peak(Kind::KvCache)), (0, 50));
        assert_eq!(ledger.largest(), [(Kind::Weights, 100), (Kind::Activations, 40)]);
        activations.resize(5);
        assert_eq!((ledger.current(Kind::Activations), ledger.peak(Kind::Activations)), (5, 40));
        drop((weights, activations));
        assert!(ledger.largest().is_empty());
    }

    #[test]
    fn the_table_sets_the_plan_beside_the_measured_peak() {
        let ledger = Ledger::default();
        ledger.plan(Kind::Weights, 4 << 20);
        let _held = ledger.register(Kind::Weights, 3 << 20);
        let _more = ledger.register(Kind::Workspace, 1 << 10);
        let text = render(&[ledger.section()], &Terminal::memory(100));
        assert!(text.contains("weights         3.00 MiB peak    4.00 MiB planned  (75 %)"), "{text}");
        assert!(text.contains("workspace       1.00 KiB peak\n"), "{text}");
        assert!(!text.contains("kv cache"), "{text}");
    }

    #[test]
    fn the_process_peak_grows_with_what_is_touched() {
        let before = peak_resident_bytes().expect("Linux reports VmHWM");
        let block = vec![1u8; 64 << 20];
        assert!(block.iter().step_by(4096).all(|&b| b == 1));
        let after = peak_resident_bytes().expect("Linux reports VmHWM");
        assert!(after >= before.max(64 << 20), "{before} {after}");
    }
}
