//! Readers with a fault: what the other tests look for is seen when it is there.

use std::panic::catch_unwind;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::mutate::{Reader, Seeds, no_files, survives};

/// With each, a part of what must be said of it.
pub(crate) const PLANTED: [(Reader, &str); 4] = [
    (faulty("panic", |_, _| harm(|| panic!("planted"))), "panics: planted"),
    (faulty("abort", |_, _| harm(|| std::process::abort())), "the process ends: signal"),
    (faulty("memory", |_, _| harm(|| drop(std::hint::black_box(vec![1u8; 2 << 30])))), "the process ends: signal"),
    (faulty("hang", |_, _| harm(|| std::thread::sleep(Duration::from_mins(2)))), "no end after 10 s"),
];

/// A reader of one mutant.
const fn faulty(name: &'static str, read: fn(&Path, &Path) -> Result<(), String>) -> Reader {
    Reader { name, prepare: no_files, seeds, read, cost: u64::MAX }
}

fn seeds(_: &Path) -> Seeds {
    vec![("x".into(), b"some text".to_vec())]
}

/// Does harm with all but the first file, which is the seed.
fn harm(harm: impl Fn()) -> Result<(), String> {
    static IS_SEED_READ: AtomicBool = AtomicBool::new(false);
    if IS_SEED_READ.swap(true, Ordering::Relaxed) {
        harm();
    }
    Ok(())
}

#[test]
fn each_outcome_is_seen() {
    for (reader, said) in &PLANTED {
        let panic = catch_unwind(|| survives(reader, "child", &[])).expect_err(reader.name);
        let text = panic.downcast::<String>().unwrap();
        assert!(text.contains(said), "{}: {text}", reader.name);
    }
}
