//! Files in which parameters and the optimizer's state wait: one of each kind for each rank, in a folder that the settings name.
//!
//! A file is named by run, rank and kind and held locked by its process as long as anything lies in it; then it is removed. One
//! that nobody has locked was left by a run that was killed: whoever opens the folder next removes it. Two runs in one folder
//! have other names, and locks keep each from what is the other's. Threads read and write at places that never overlap, so
//! whoever computes goes on meanwhile ([`Extent`]).

mod extent;
mod threads;

use std::ffi::OsStr;
use std::fs::{File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::Error;
use crate::fs::{is_at, read_exact_at, write_all_at};
pub(super) use extent::{Extent, Memory, Reading};
use threads::{Thread, in_pieces};

/// What the names of these files end in.
const ENDING: &str = ".trainer-waiting";
/// Extents begin at its multiples.
const PAGE: u64 = 4096;

/// What lies in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Frozen weights, and trained values that come for a visit.
    Parameters,
    /// Moments, and the f32 values that the optimizer moves.
    Optimizer,
}

impl Kind {
    /// As it stands in a file's name.
    fn word(self) -> &'static str {
        match self {
            Self::Parameters => "parameters",
            Self::Optimizer => "optimizer",
        }
    }

    /// As it stands in messages.
    fn words(self) -> &'static str {
        match self {
            Self::Parameters => "the parameters",
            Self::Optimizer => "the optimizer's state",
        }
    }

    fn key(self) -> &'static str {
        match self {
            Self::Parameters => "offload_param_nvme_path",
            Self::Optimizer => "offload_optimizer_nvme_path",
        }
    }
}

/// Where what waits in files lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Files {
    /// The folder of the optimizer's; `None`: its state does not wait in files.
    pub optimizer: Option<PathBuf>,
    /// The folder of the parameters'; `None`: they do not wait in files.
    pub parameters: Option<PathBuf>,
    /// The name of the run, which no other has.
    pub run: String,
    /// Blocks of which something may be on its way at a time, with the one that is used.
    pub buffer_count: usize,
}

impl Default for Files {
    /// Nothing waits in files.
    fn default() -> Self {
        Self { optimizer: None, parameters: None, run: String::new(), buffer_count: 3 }
    }
}

/// A file of this rank.
#[derive(Debug)]
pub(super) struct Shelf {
    file: Arc<Shared>,
    /// Where the next extent begins.
    end: AtomicU64,
    reads: Thread,
    writes: Thread,
}

/// The file as its threads know it.
#[derive(Debug)]
struct Shared {
    file: File,
    path: PathBuf,
    kind: Kind,
    /// Writes that may be on their way while others go on; 0: none.
    writes_at_a_time: usize,
    /// What kept a write from its end.
    problem: Mutex<Option<(&'static str, Arc<io::Error>)>>,
}

impl Shelf {
    /// Makes this rank's file in `folder`, after files were removed that nobody has any more.
    /// The optimizer writes up to `writes_a_block` stretches of a block.
    pub(super) fn open(
        folder: &Path,
        kind: Kind,
        rank: usize,
        (files, writes_a_block): (&Files, usize),
    ) -> Result<Arc<Self>, Error> {
        let failed = |action, path: &Path| {
            let path = path.to_path_buf();
            move |source: io::Error| Error::of_file(action, &path, kind, Arc::new(source))
        };
        remove_left(folder).map_err(failed("use the folder", folder))?;
        let path = folder.join(format!("{}-rank-{rank}-{}{ENDING}", files.run, kind.word()));
        let file = loop {
            let mut options = File::options();
            options.read(true).write(true).create(true).truncate(false);
            let file = crate::fs::open_own(&path, &mut options).map_err(|error| match error {
                crate::fs::Error::Io { source, .. } => failed("create", &path)(source),
                other => failed("create", &path)(io::Error::other(other.to_string())),
            })?;
            take(&file, &path).map_err(failed("lock", &path))?;
            // Who looked for files that were left may have had it between the two.
            if is_at(&file, &path) {
                break file;
            }
        };
        file.set_len(0).map_err(failed("empty", &path))?;
        let ahead = files.buffer_count.saturating_sub(1);
        // Those of one block do not wait for each other.
        let writes_at_a_time = ahead / 2 * writes_a_block;
        let file = Arc::new(Shared { file, path, kind, writes_at_a_time, problem: Mutex::default() });
        let thread = |name, waiting| Thread::new(name, waiting).map_err(Error::Thread);
        let (reads, writes) = (thread("reading", usize::MAX)?, thread("writing", writes_at_a_time.saturating_sub(1))?);
        Ok(Arc::new(Self { file, end: AtomicU64::new(0), reads, writes }))
    }

    /// Its path.
    pub(super) fn path(&self) -> &Path {
        &self.file.path
    }

    /// Bytes in it.
    pub(super) fn len(&self) -> u64 {
        self.end.load(Ordering::Relaxed)
    }

    /// A place for so many bytes, in which nothing lies yet.
    fn reserve(&self, len: usize) -> u64 {
        self.end.fetch_add((len as u64).next_multiple_of(PAGE), Ordering::Relaxed)
    }
}

impl Drop for Shelf {
    fn drop(&mut self) {
        // Nothing is written once the file is gone.
        self.reads.end();
        self.writes.end();
        if let Err(error) = std::fs::remove_file(&self.file.path) {
            tracing::warn!("cannot remove `{}`: {error}", self.file.path.display());
        }
    }
}

impl Shared {
    fn read(&self, memory: &mut impl Memory, start: u64) -> Result<(), Error> {
        let done = memory
            .with_bytes(&mut |parts| in_pieces(parts, start, |piece, at| read_exact_at(&self.file, piece, at)))?;
        done.map_err(|source| self.failed("read", Arc::new(source)))
    }

    fn write(&self, memory: &mut impl Memory, start: u64) -> Result<(), Error> {
        let done =
            memory.with_bytes(&mut |parts| in_pieces(parts, start, |piece, at| write_all_at(&self.file, piece, at)))?;
        done.map_err(|source| {
            let source = Arc::new(source);
            *lock(&self.problem) = Some(("write", source.clone()));
            self.failed("write", source)
        })
    }

    fn failed(&self, action: &'static str, source: Arc<io::Error>) -> Error {
        Error::of_file(action, &self.path, self.kind, source)
    }

    /// Why a write was given up.
    fn problem(&self, otherwise: crate::device::Error) -> Error {
        match &*lock(&self.problem) {
            Some((action, source)) => self.failed(action, source.clone()),
            None => otherwise.into(),
        }
    }
}

impl Error {
    /// What the system said of a file or its folder, with what to do.
    fn of_file(action: &'static str, path: &Path, kind: Kind, source: Arc<io::Error>) -> Self {
        let key = kind.key();
        let help = match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                format!("free some space there, or name another folder with `{key}`; checkpoints are untouched")
            }
            io::ErrorKind::FileTooLarge => {
                format!("raise the limit on file sizes (`ulimit -f`), or name a folder without with `{key}`")
            }
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => {
                format!("make the folder, or name another with `{key}`")
            }
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                format!("let this user write there, or name another folder with `{key}`")
            }
            io::ErrorKind::UnexpectedEof => {
                "the file was cut short, and only this run may write to it: go on from the last checkpoint".into()
            }
            _ => format!("name another folder with `{key}` if it stays so"),
        };
        Self::File { action, path: path.into(), kind: kind.words(), source, help }
    }
}

/// Locks a file, for which who looks for files that were left may have the lock for a moment.
fn take(file: &File, path: &Path) -> io::Result<()> {
    const PAUSE: Duration = Duration::from_millis(10);
    for _ in 0..500 {
        match file.try_lock() {
            Ok(()) => return Ok(()),
            Err(TryLockError::WouldBlock) => std::thread::sleep(PAUSE),
            Err(TryLockError::Error(error)) => {
                let path = path.display();
                tracing::warn!("`{path}` cannot be locked here ({error}); remove it by hand should this run be killed");
                return Ok(());
            }
        }
    }
    Err(io::Error::new(io::ErrorKind::ResourceBusy, "another process has it"))
}

/// Removes files of runs that are gone.
fn remove_left(folder: &Path) -> io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        let is_one = path.file_name().and_then(OsStr::to_str).is_some_and(|name| name.ends_with(ENDING));
        if !is_one || !path.symlink_metadata().is_ok_and(|metadata| metadata.is_file()) {
            continue;
        }
        // Another user's cannot be opened, and one that has just gone neither. For writing: some file systems lock no other.
        let Ok(file) = File::options().read(true).write(true).open(&path) else { continue };
        match file.try_lock() {
            Ok(()) if is_at(&file, &path) => {
                let bytes = file.metadata().map_or(0, |metadata| metadata.len());
                match std::fs::remove_file(&path) {
                    Ok(()) => tracing::warn!(
                        "removed `{}` ({bytes} bytes), which a run that was killed had left",
                        path.display()
                    ),
                    Err(error) => tracing::warn!("cannot remove `{}`, which a run left: {error}", path.display()),
                }
            }
            Ok(()) | Err(TryLockError::WouldBlock) => {}
            Err(TryLockError::Error(error)) => {
                tracing::debug!("whether `{}` is in use is not known: {error}", path.display());
            }
        }
    }
    Ok(())
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(run: &str, buffer_count: usize) -> Files {
        Files { run: run.into(), buffer_count, ..Files::default() }
    }

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn what_is_written_is_read_again_in_any_order() {
        let folder = tempfile::tempdir().unwrap();
        for buffers in [1, 2, 3, 6] {
            let shelf = Shelf::open(folder.path(), Kind::Parameters, 0, (&files("a", buffers), 1)).unwrap();
            let bytes = |seed: usize, len: usize| (0..len).map(|i| (i * 7 + seed) as u8).collect::<Vec<u8>>();
            let lengths = [0, 1, 5000, 40 << 20, 4096];
            let extents: Vec<Extent> =
                lengths.iter().enumerate().map(|(seed, &len)| shelf.put(bytes(seed, len)).unwrap()).collect();
            let readings: Vec<_> = extents.iter().rev().map(|extent| extent.read(vec![0u8; extent.len()])).collect();
            for (reading, (seed, &len)) in readings.into_iter().zip(lengths.iter().enumerate().rev()) {
                assert!(reading.wait().unwrap() == bytes(seed, len), "{buffers} {len}");
            }
            // A read that is asked for after a write sees it, whichever thread is faster.
            for round in 0..20 {
                extents[2].write(bytes(round, 5000), drop).unwrap();
                assert!(extents[2].read(vec![0u8; 5000]).wait().unwrap() == bytes(round, 5000));
            }
            assert_eq!(names(folder.path()), ["a-rank-0-parameters.trainer-waiting"]);
            drop((shelf, extents));
            assert_eq!(names(folder.path()), Vec::<String>::new());
        }
    }

    #[test]
    fn only_files_that_nobody_has_are_removed() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("old-rank-3-optimizer.trainer-waiting"), "left").unwrap();
        std::fs::write(folder.path().join("notes.txt"), "mine").unwrap();
        let first = Shelf::open(folder.path(), Kind::Optimizer, 0, (&files("a", 3), 1)).unwrap();
        let second = Shelf::open(folder.path(), Kind::Optimizer, 1, (&files("a", 3), 1)).unwrap();
        let other = Shelf::open(folder.path(), Kind::Optimizer, 0, (&files("b", 3), 1)).unwrap();
        let all = [
            "a-rank-0-optimizer.trainer-waiting",
            "a-rank-1-optimizer.trainer-waiting",
            "b-rank-0-optimizer.trainer-waiting",
            "notes.txt",
        ];
        assert_eq!(names(folder.path()), all);
        let (left, right) = (first.put(vec![1u8; 100]).unwrap(), other.put(vec![2u8; 100]).unwrap());
        assert!(left.read(vec![0u8; 100]).wait().unwrap() == [1; 100]);
        assert!(right.read(vec![0u8; 100]).wait().unwrap() == [2; 100]);
        let taken = Shelf::open(folder.path(), Kind::Optimizer, 0, (&files("b", 3), 1)).unwrap_err().to_string();
        assert!(taken.contains("cannot lock") && taken.contains("another process has it"), "{taken}");
        drop((first, second, other, left, right));
        assert_eq!(names(folder.path()), ["notes.txt"]);
    }

    /// Memory that cannot be written anywhere.
    struct Full;

    impl Memory for Full {
        fn with_bytes(
            &mut self,
            _visit: &mut dyn FnMut(Vec<&mut [u8]>) -> io::Result<()>,
        ) -> Result<io::Result<()>, Error> {
            Ok(Err(io::ErrorKind::StorageFull.into()))
        }
    }

    #[test]
    fn a_write_that_failed_meanwhile_is_told_by_what_comes_after_it() {
        let folder = tempfile::tempdir().unwrap();
        for buffers in [1, 3] {
            let shelf = Shelf::open(folder.path(), Kind::Optimizer, 0, (&files("a", buffers), 1)).unwrap();
            let extent = shelf.put(vec![1u8; 100]).unwrap();
            let first = extent.write(Full, drop);
            assert_eq!(first.is_err(), buffers == 1);
            for told in [extent.read(vec![0u8; 100]).wait().map(drop), extent.write(vec![2u8; 100], drop)] {
                let error = told.unwrap_err().to_string();
                assert!(error.contains("cannot write") && error.contains("free some space there"), "{error}");
            }
            assert!(shelf.put(Full).is_err());
        }
    }

    /// Memory whose writing waits until it is told to go on.
    struct Slow(std::sync::mpsc::Receiver<()>);

    impl Memory for Slow {
        fn with_bytes(
            &mut self,
            _visit: &mut dyn FnMut(Vec<&mut [u8]>) -> io::Result<()>,
        ) -> Result<io::Result<()>, Error> {
            self.0.recv().unwrap();
            Ok(Ok(()))
        }
    }

    #[test]
    fn what_is_written_of_one_block_does_not_wait_for_each_other() {
        let folder = tempfile::tempdir().unwrap();
        let shelf = Shelf::open(folder.path(), Kind::Optimizer, 0, (&files("a", 3), 3)).unwrap();
        let extents = [1u8, 2, 3, 4].map(|value| shelf.put(vec![value; 100]).unwrap());
        let [state, values, rounded, next] = &extents;
        let (go_on, told) = std::sync::mpsc::channel();
        // Nobody tells it to go on before the others are asked for.
        state.write(Slow(told), drop).unwrap();
        values.write(vec![20u8; 100], drop).unwrap();
        rounded.write(vec![30u8; 100], drop).unwrap();
        std::thread::scope(|scope| {
            let (done, is_done) = std::sync::mpsc::channel();
            scope.spawn(move || {
                next.write(vec![40u8; 100], drop).unwrap();
                done.send(()).unwrap();
            });
            // That of another block does.
            assert!(is_done.recv_timeout(Duration::from_millis(50)).is_err());
            go_on.send(()).unwrap();
            is_done.recv().unwrap();
        });
        for (extent, value) in extents.iter().zip([1u8, 20, 30, 40]) {
            assert!(extent.read(vec![0u8; 100]).wait().unwrap() == [value; 100]);
        }
    }

    #[test]
    fn what_cannot_be_used_is_named_with_what_to_do() {
        let folder = tempfile::tempdir().unwrap();
        let missing = folder.path().join("nothing");
        let error = Shelf::open(&missing, Kind::Parameters, 0, (&files("a", 3), 1)).unwrap_err().to_string();
        assert!(error.contains("nothing") && error.contains("make the folder") && error.contains("_param_nvme_path"));
        let file = folder.path().join("file");
        std::fs::write(&file, "").unwrap();
        let error = Shelf::open(&file, Kind::Optimizer, 0, (&files("a", 3), 1)).unwrap_err().to_string();
        assert!(error.contains("make the folder") && error.contains("offload_optimizer_nvme_path"), "{error}");
        // Somebody cuts the file short.
        let shelf = Shelf::open(folder.path(), Kind::Parameters, 0, (&files("a", 3), 1)).unwrap();
        let extent = shelf.put(vec![3u8; 10_000]).unwrap();
        File::options().write(true).open(shelf.path()).unwrap().set_len(5000).unwrap();
        let error = extent.read(vec![0u8; 10_000]).wait().unwrap_err().to_string();
        assert!(error.contains("cannot read") && error.contains("cut short"), "{error}");
    }
}
