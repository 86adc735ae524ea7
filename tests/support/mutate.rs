//! Damaged files for readers: a seeded mutator, and a child process in which a reader may do no harm.
//!
//! A [`Reader`] names seeds (good files) and how they are read. [`survives`] reads the seeds, which must go well, then
//! mutants of them in a child with 1 GiB of address space; a panic, an abort, a signal or 10 s without an end is a fault,
//! and the mutant that made it is kept. `TRAINER_MUTANTS=N` sets the number of mutants per reader, `TRAINER_MUTANTS_SEED=N`
//! where the series starts. The mutant of a number is always the same, so a fault can be repeated.

use std::io::{BufRead, BufReader};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// Mutants of each reader, unless `TRAINER_MUTANTS` says otherwise.
const MUTANTS: u64 = 250;
/// The longest that one mutant may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a child may take to start on a busy machine.
const START: Duration = Duration::from_mins(1);
/// Address space of a child, in KiB.
const ADDRESS_SPACE: u64 = 1 << 20;

/// Names and contents of good files.
pub(crate) type Seeds = Vec<(String, Vec<u8>)>;

/// Files that are good, and the reader of their like.
pub(crate) struct Reader {
    /// Name of the reader.
    pub(crate) name: &'static str,
    /// Fills a folder with good files, once.
    pub(crate) prepare: fn(&Path),
    /// Seeds, of that folder or elsewhere. The names tell a reader the format.
    pub(crate) seeds: fn(&Path) -> Seeds,
    /// Reads a mutant, which lies in a folder of its seed; the second path is the folder of good files. Whatever it returns
    /// is right, but for an undamaged seed.
    pub(crate) read: fn(&Path, &Path) -> Result<(), String>,
    /// How many times fewer mutants a slow reader gets; 1 for most.
    pub(crate) cost: u64,
}

/// The seeds of a reader that needs no folder.
pub(crate) fn no_files(_: &Path) {}

/// Copies a folder with all that is in it.
pub(crate) fn copy_all(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let (from, to) = (entry.path(), to.join(entry.file_name()));
        if from.is_dir() {
            copy_all(&from, &to);
        } else {
            std::fs::copy(from, to).unwrap();
        }
    }
}

/// Numbers from a seed (`SplitMix64`, Steele et al. 2014).
pub(crate) struct Numbers(u64);

impl Numbers {
    /// Numbers that depend on `seed` only.
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0xD134_2543_DE82_EF95) ^ 0x2545_F491_4F6C_DD1D)
    }

    /// The next number.
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below `count`, or 0.
    pub(crate) fn below(&mut self, count: usize) -> usize {
        if count == 0 { 0 } else { (self.next() % count as u64) as usize }
    }

    fn range(&mut self, length: usize, most: usize) -> std::ops::Range<usize> {
        let start = self.below(length + 1);
        start..(start + 1 + self.below(most)).min(length).max(start)
    }
}

/// A damaged copy of `seed`; pieces of `others` may be in it.
pub(crate) fn mutant(seed: &[u8], others: &[&[u8]], numbers: &mut Numbers) -> Vec<u8> {
    let mut bytes = seed.to_vec();
    for _ in 0..=numbers.below(4) {
        mutate(&mut bytes, others, numbers);
    }
    // Many small files find more than few large ones.
    bytes.truncate(1 << 20);
    bytes
}

fn mutate(bytes: &mut Vec<u8>, others: &[&[u8]], numbers: &mut Numbers) {
    const BYTES: [u8; 16] = *b"\0\x01\x7f\x80\xff\"\\{}[],:\n 0";
    const WIDE: [u64; 10] =
        [0, 1, 0x7F, 0x80, 0xFFFF, 0x7FFF_FFFF, 0x8000_0000, u32::MAX as u64, i64::MAX as u64, u64::MAX];
    const WORDS: [&str; 14] = [
        "NaN",
        "-Infinity",
        "1e400",
        "-0",
        "99999999999999999999",
        "-1",
        "2147483648",
        "null",
        "\\ud800",
        "true",
        "{}",
        "[]",
        "\"",
        "{{ x }}",
    ];
    let length = bytes.len();
    match numbers.below(12) {
        0 if length > 0 => {
            let at = numbers.below(length);
            bytes[at] ^= 1 << numbers.below(8);
        }
        1 if length > 0 => {
            let at = numbers.below(length);
            bytes[at] = BYTES[numbers.below(BYTES.len())];
        }
        2 => bytes.truncate(numbers.below(length + 1)),
        3 => {
            bytes.drain(numbers.range(length, 64));
        }
        4 => {
            let range = numbers.range(length, 256);
            let piece = bytes[range.clone()].to_vec();
            bytes.splice(range.start..range.start, piece);
        }
        5 => {
            let at = numbers.below(length + 1);
            let new: Vec<u8> = (0..=numbers.below(16)).map(|_| numbers.next() as u8).collect();
            bytes.splice(at..at, new);
        }
        6 | 7 => {
            let wide = WIDE[numbers.below(WIDE.len())];
            let width = [2, 4, 8][numbers.below(3)];
            let mut number = wide.to_le_bytes()[..width].to_vec();
            if numbers.below(4) == 0 {
                number.reverse();
            }
            let at = numbers.below(length + 1);
            let end = (at + width).min(length);
            bytes.splice(at..end, number);
        }
        8 => {
            // A run of digits becomes another number.
            let start = numbers.below(length + 1);
            let word = WORDS[numbers.below(WORDS.len())].as_bytes().to_vec();
            let from = bytes[start..].iter().position(u8::is_ascii_digit).map_or(start, |at| start + at);
            let to = bytes[from..].iter().position(|b| !b.is_ascii_digit()).map_or(length, |at| from + at);
            bytes.splice(from..to, word);
        }
        9 => {
            let other = others.get(numbers.below(others.len())).copied().unwrap_or_default();
            let piece = other[numbers.range(other.len(), 512)].to_vec();
            let range = numbers.range(length, 512);
            bytes.splice(range, piece);
        }
        10 => {
            let piece = bytes[numbers.range(length, 32)].to_vec();
            let count = 1 << numbers.below(12);
            let at = numbers.below(length + 1);
            bytes.splice(at..at, piece.repeat(count));
        }
        _ => {
            let at = numbers.below(length + 1);
            let word = WORDS[numbers.below(WORDS.len())].bytes();
            bytes.splice(at..at, word);
        }
    }
}

/// The seed, its place among the seeds, and the mutant of a number.
fn numbered(seeds: &Seeds, number: u64) -> (usize, &str, Vec<u8>) {
    let mut numbers = Numbers::new(number);
    let others: Vec<&[u8]> = seeds.iter().map(|(_, bytes)| bytes.as_slice()).collect();
    let place = numbers.below(seeds.len());
    let (name, seed) = &seeds[place];
    (place, name, mutant(seed, &others, &mut numbers))
}

fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// Runs the part of a child, if this process is one: reads the mutants it was told to and says each one's number first.
///
/// # Panics
/// If the environment names a reader that is not there, or a seed is not read.
pub(crate) fn child<'a>(mut readers: impl Iterator<Item = &'a Reader>) {
    let (Ok(name), Some(first), Some(last)) =
        (std::env::var("TRAINER_MUTANT_READER"), setting("TRAINER_MUTANT_FIRST"), setting("TRAINER_MUTANT_LAST"))
    else {
        return;
    };
    let reader = readers.find(|reader| reader.name == name).expect("a reader of that name");
    let good = PathBuf::from(std::env::var("TRAINER_MUTANT_GOOD").unwrap());
    let seeds = (reader.seeds)(&good);
    let folder = tempfile::tempdir().unwrap();
    let place = |place: usize, name: &str| folder.path().join(place.to_string()).join(name);
    println!("mutants of {name}");
    for (at, (name, bytes)) in seeds.iter().enumerate() {
        let path = place(at, name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, bytes).unwrap();
        if let Err(error) = (reader.read)(&path, &good) {
            println!("bad seed {at} ({name}): {}", error.replace('\n', " "));
        }
    }
    let mut accepted = 0;
    for number in first..last {
        let (at, name, bytes) = numbered(&seeds, number);
        let path = place(at, name);
        std::fs::write(&path, bytes).unwrap();
        println!("mutant {number}");
        match catch_unwind(AssertUnwindSafe(|| (reader.read)(&path, &good))) {
            Ok(outcome) => accepted += u64::from(outcome.is_ok()),
            Err(panic) => {
                let text = panic.downcast_ref::<String>().cloned();
                let text = text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string)).unwrap_or_default();
                println!("panic {number} {}", text.replace('\n', " "));
            }
        }
    }
    println!("mutants done {accepted}");
}

/// Reads mutants of a reader's seeds in child processes; `test` is the name of the test that calls [`child`].
///
/// # Panics
/// If a mutant makes the reader panic, abort, hang or use too much memory, or a seed is not read.
pub(crate) fn survives(reader: &Reader, test: &str, environment: &[(&str, String)]) {
    let good = tempfile::tempdir().unwrap();
    (reader.prepare)(good.path());
    let seeds = (reader.seeds)(good.path());
    let mut environment: Vec<_> = environment.to_vec();
    environment.push(("TRAINER_MUTANT_GOOD", good.path().display().to_string()));
    let first = setting("TRAINER_MUTANTS_SEED").unwrap_or(0);
    let last = first + setting("TRAINER_MUTANTS").unwrap_or(MUTANTS).div_ceil(reader.cost);
    let (mut faults, mut accepted, started) = (Vec::new(), 0, Instant::now());
    let mut next = first;
    while next < last && faults.len() < 10 {
        let outcome = run_child(reader, test, next..last, &environment);
        accepted += outcome.accepted;
        faults.extend(outcome.bad_seeds);
        for (number, what) in outcome.panics {
            faults.push(keep(reader, &seeds, number, &what));
        }
        next = match (outcome.ended, outcome.reached) {
            (Ok(()), _) => last,
            (Err(what), Some(number)) => {
                faults.push(keep(reader, &seeds, number, &what));
                number + 1
            }
            (Err(what), None) => panic!("the child of `{}` did not start: {what}", reader.name),
        };
    }
    println!(
        "{:<16} {:>7} mutants of {:>2} seeds, {accepted} of them read, {:.1} s",
        reader.name,
        next - first,
        seeds.len(),
        started.elapsed().as_secs_f64()
    );
    assert!(faults.is_empty(), "{} faults of `{}`:\n{}", faults.len(), reader.name, faults.join("\n"));
}

/// Writes a mutant where it can be looked at.
fn keep(reader: &Reader, seeds: &Seeds, number: u64, what: &str) -> String {
    let (_, name, bytes) = numbered(seeds, number);
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("mutants");
    let path = folder.join(format!("{}-{number}-{}", reader.name, name.replace('/', "-")));
    let kept = std::fs::create_dir_all(&folder).and_then(|()| std::fs::write(&path, bytes));
    let place = kept.map_or_else(|e| format!("not kept: {e}"), |()| path.display().to_string());
    format!("  mutant {number}: {what} ({place})")
}

/// What a child came to.
struct Outcome {
    /// The last mutant that was begun.
    reached: Option<u64>,
    /// Mutants that were read without a complaint.
    accepted: u64,
    /// Seeds that were not.
    bad_seeds: Vec<String>,
    /// The panics that it caught.
    panics: Vec<(u64, String)>,
    /// How it ended.
    ended: Result<(), String>,
}

fn run_child(reader: &Reader, test: &str, range: std::ops::Range<u64>, environment: &[(&str, String)]) -> Outcome {
    let mut child = Command::new("sh")
        .args(["-c", &format!("ulimit -v {ADDRESS_SPACE}; exec \"$0\" \"$@\"")])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env("TRAINER_MUTANT_READER", reader.name)
        .env("TRAINER_MUTANT_FIRST", range.start.to_string())
        .env("TRAINER_MUTANT_LAST", range.end.to_string())
        .env("RAYON_NUM_THREADS", "2")
        .env("MALLOC_ARENA_MAX", "2")
        .envs(environment.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let (send, receive) = mpsc::channel();
    std::thread::spawn(move || lines.map_while(Result::ok).try_for_each(|line| send.send(line)));
    let mut outcome = Outcome { reached: None, accepted: 0, bad_seeds: Vec::new(), panics: Vec::new(), ended: Ok(()) };
    let mut is_done = false;
    let problem = loop {
        let patience = if outcome.reached.is_none() { START } else { PATIENCE };
        match receive.recv_timeout(patience) {
            Ok(line) => match line.split_once(' ') {
                // The test's own name may stand before the first line.
                Some(("mutant", number)) => outcome.reached = number.parse().ok(),
                Some(("panic", rest)) => {
                    let (number, text) = rest.split_once(' ').unwrap_or((rest, ""));
                    outcome.panics.push((number.parse().unwrap_or_default(), format!("panics: {text}")));
                }
                Some(("bad", seed)) => outcome.bad_seeds.push(format!("  not read: {seed}")),
                Some(("mutants", rest)) if rest.starts_with("done ") => {
                    is_done = true;
                    outcome.accepted = rest.trim_start_matches("done ").parse().unwrap_or_default();
                }
                _ => {}
            },
            Err(mpsc::RecvTimeoutError::Timeout) => break Some(format!("no end after {} s", patience.as_secs())),
            Err(mpsc::RecvTimeoutError::Disconnected) => break None,
        }
    };
    let _ = child.kill();
    let status = child.wait().unwrap();
    outcome.ended = match problem {
        Some(what) => Err(what),
        None if is_done => Ok(()),
        None => Err(format!("the process ends: {status}")),
    };
    outcome
}
