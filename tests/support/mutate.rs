//! Damaged files for readers: a seeded mutator, and a child process in which a reader may do no harm.
//!
//! A [`Reader`] names seeds (good files) and how they are read. [`survives`] makes mutants of the seeds and reads them in
//! a child with 1 GiB of address space; a panic, an abort, a signal or 10 s without an end is a fault, and the mutant
//! that made it is kept. `TRAINER_MUTANTS=N` sets the number of mutants per reader, `TRAINER_MUTANTS_SEED=N` where the
//! series starts. The mutant of a number is always the same, so a fault can be repeated.

use std::io::{BufRead, BufReader};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

/// Mutants of each reader, unless `TRAINER_MUTANTS` says otherwise.
const MUTANTS: u64 = 250;
/// The longest that one mutant may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a child may take to start on a busy machine.
const START: Duration = Duration::from_secs(60);
/// Address space of a child, in KiB.
const ADDRESS_SPACE: u64 = 1 << 20;

/// Files that are good, and the reader of their like.
pub struct Reader {
    /// Name of the reader, and of the test that calls [`survives`].
    pub name: &'static str,
    /// Names and contents. The names tell a reader the format.
    pub seeds: Vec<(String, Vec<u8>)>,
    /// Reads a file; whatever it returns is right.
    pub read: fn(&Path) -> Result<(), String>,
    /// How many times fewer mutants a slow reader gets; 1 for most.
    pub cost: u64,
}

/// Numbers from a seed (`SplitMix64`, Steele et al. 2014).
pub struct Numbers(u64);

impl Numbers {
    /// Numbers that depend on `seed` only.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0xD134_2543_DE82_EF95) ^ 0x2545_F491_4F6C_DD1D)
    }

    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below `count`, or 0.
    pub fn below(&mut self, count: usize) -> usize {
        if count == 0 { 0 } else { (self.next() % count as u64) as usize }
    }

    fn range(&mut self, length: usize, most: usize) -> std::ops::Range<usize> {
        let start = self.below(length + 1);
        start..(start + 1 + self.below(most)).min(length).max(start)
    }
}

/// A damaged copy of `seed`; pieces of `others` may be in it.
pub fn mutant(seed: &[u8], others: &[&[u8]], numbers: &mut Numbers) -> Vec<u8> {
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

/// The name and content of a reader's mutant.
pub fn numbered(reader: &Reader, number: u64) -> (String, Vec<u8>) {
    let mut numbers = Numbers::new(number);
    let others: Vec<&[u8]> = reader.seeds.iter().map(|(_, bytes)| bytes.as_slice()).collect();
    let (name, seed) = &reader.seeds[numbers.below(reader.seeds.len())];
    (name.clone(), mutant(seed, &others, &mut numbers))
}

fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// Runs the part of a child, if this process is one: reads the mutants it was told to and says each one's number first.
///
/// # Panics
/// If the environment names a reader that is not there.
pub fn child(readers: &[Reader]) {
    let (Ok(name), Some(first), Some(last)) =
        (std::env::var("TRAINER_MUTANT_READER"), setting("TRAINER_MUTANT_FIRST"), setting("TRAINER_MUTANT_LAST"))
    else {
        return;
    };
    let reader = readers.iter().find(|reader| reader.name == name).expect("a reader of that name");
    let folder = tempfile::tempdir().unwrap();
    println!("mutants of {name}");
    for number in first..last {
        let (name, bytes) = numbered(reader, number);
        let path = folder.path().join(&name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, bytes).unwrap();
        println!("mutant {number}");
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| (reader.read)(&path))) {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string)).unwrap_or_default();
            println!("panic {number} {}", text.replace('\n', " "));
        }
    }
    println!("mutants done");
}

/// Reads mutants of a reader's seeds in child processes; `test` is the name of the test that calls [`child`].
///
/// # Panics
/// If a mutant makes the reader panic, abort, hang or use too much memory.
pub fn survives(reader: &Reader, test: &str, environment: &[(&str, String)]) {
    let first = setting("TRAINER_MUTANTS_SEED").unwrap_or(0);
    let last = first + setting("TRAINER_MUTANTS").unwrap_or(MUTANTS).div_ceil(reader.cost);
    let mut faults = Vec::new();
    let mut next = first;
    while next < last && faults.len() < 10 {
        let (reached, ended, problems) = run_child(reader, test, next..last, environment);
        for (number, what) in problems {
            faults.push(keep(reader, number, &what));
        }
        next = match (ended, reached) {
            (Ok(()), _) => last,
            (Err(what), Some(number)) => {
                faults.push(keep(reader, number, &what));
                number + 1
            }
            (Err(what), None) => panic!("the child of `{}` did not start: {what}", reader.name),
        };
    }
    assert!(faults.is_empty(), "{} mutants of `{}`:\n{}", faults.len(), reader.name, faults.join("\n"));
}

/// Writes a mutant where it can be looked at.
fn keep(reader: &Reader, number: u64, what: &str) -> String {
    let (name, bytes) = numbered(reader, number);
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("mutants");
    let path = folder.join(format!("{}-{number}-{}", reader.name, name.replace('/', "-")));
    let kept = std::fs::create_dir_all(&folder).and_then(|()| std::fs::write(&path, bytes));
    let place = kept.map_or_else(|e| format!("not kept: {e}"), |()| path.display().to_string());
    format!("  mutant {number}: {what} ({place})")
}

/// The last mutant that was begun, how the child ended, and the panics it caught.
type Outcome = (Option<u64>, Result<(), String>, Vec<(u64, String)>);

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
    let (mut reached, mut panics, mut ended) = (None, Vec::new(), false);
    let problem = loop {
        let patience = if reached.is_none() { START } else { PATIENCE };
        match receive.recv_timeout(patience) {
            Ok(line) => match line.split_once(' ') {
                // The test's own name may stand before the first line.
                Some(("mutant", number)) => reached = number.parse().ok(),
                Some(("panic", rest)) => {
                    let (number, text) = rest.split_once(' ').unwrap_or((rest, ""));
                    panics.push((number.parse().unwrap_or_default(), format!("panics: {text}")));
                }
                Some(("mutants", "done")) => ended = true,
                _ => {}
            },
            Err(mpsc::RecvTimeoutError::Timeout) => break Some(format!("no end after {} s", patience.as_secs())),
            Err(mpsc::RecvTimeoutError::Disconnected) => break None,
        }
    };
    let _ = child.kill();
    let status = child.wait().unwrap();
    let outcome = match problem {
        Some(what) => Err(what),
        None if ended => Ok(()),
        None => Err(format!("the process ends: {status}")),
    };
    (reached, outcome, panics)
}
