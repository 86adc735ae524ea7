//! Files: whole-or-absent writes, reads of parts, checksums.
//!
//! Everything a run leaves is written through this module, so that a full disk or a kill never leaves half a file
//! under a final name. No file is mapped into memory: a mapped file that shrinks ends the process without a word, and one
//! that is written to changes weights under a run.

use std::fs::File;
use std::io::{self, Write};
use std::ops::{Deref, Range};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use rayon::prelude::*;

/// What went wrong with a file.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An operation of the system failed.
    #[error("cannot {action} `{}`: {source}{}", path.display(), hint(source))]
    Io {
        /// What was tried, e.g. `open`.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file is shorter than what should be in it.
    #[error("`{}` is cut short: bytes {}..{} were asked for, it has {length}; copy or download it again",
        path.display(), range.start, range.end)]
    Short {
        /// Which file.
        path: PathBuf,
        /// What was asked for.
        range: Range<usize>,
        /// What it has.
        length: usize,
    },
    /// A file changed while it was read.
    #[error("`{}` was changed while it was read ({before} bytes before, {after} after); start again once it is whole",
        path.display())]
    Changed {
        /// Which file.
        path: PathBuf,
        /// Its length when it was opened.
        before: u64,
        /// Its length now.
        after: u64,
    },
    /// A file that would be written is a link, or has a second name.
    #[error("`{}` is {what}, and a run writes only into its own folder; remove it, or choose another `output_dir`", path.display())]
    Link {
        /// Which file.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// A file is larger than anything of its kind, or no ordinary file.
    #[error("`{}` is {what}; a file of at most {most} bytes was expected", path.display())]
    NotOrdinary {
        /// Which file.
        path: PathBuf,
        /// What it is.
        what: String,
        /// The largest that is read.
        most: u64,
    },
}

fn hint(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "; free some space there or choose another `output_dir`: earlier checkpoints are untouched"
        }
        io::ErrorKind::FileTooLarge => {
            "; raise the limit on file sizes (`ulimit -f`): earlier checkpoints are untouched"
        }
        io::ErrorKind::PermissionDenied => "; check who owns it",
        _ => "",
    }
}

/// Attaches the action and the path to an [`io::Error`].
pub fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_path_buf();
    move |source| Error::Io { action, path, source }
}

/// A stretch of bytes that many owners share.
#[derive(Clone)]
pub struct Bytes {
    owner: Arc<Vec<u8>>,
    range: Range<usize>,
}

impl Bytes {
    /// The bytes `range` of these bytes, sharing the same memory; `None` if they are not all there.
    pub fn slice(&self, range: Range<usize>) -> Option<Self> {
        if range.start > range.end || range.end > self.range.len() {
            return None;
        }
        let start = self.range.start + range.start;
        Some(Self { owner: self.owner.clone(), range: start..start + range.len() })
    }

    /// Whether others hold the same memory.
    pub fn is_shared(&self) -> bool {
        Arc::strong_count(&self.owner) > 1
    }
}

impl Deref for Bytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.owner[self.range.clone()]
    }
}

impl From<Vec<u8>> for Bytes {
    fn from(bytes: Vec<u8>) -> Self {
        let range = 0..bytes.len();
        Self { owner: Arc::new(bytes), range }
    }
}

impl std::fmt::Debug for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Bytes({})", self.range.len())
    }
}

/// Reads a whole file.
///
/// # Errors
/// If it cannot be opened or read.
pub fn read(path: &Path) -> Result<Bytes, Error> {
    Region::open(path)?.read()
}

/// A part of an open file, which is read when it is asked for.
#[derive(Clone, Debug)]
pub struct Region {
    file: Arc<OpenFile>,
    range: Range<usize>,
}

#[derive(Debug)]
struct OpenFile {
    file: File,
    path: PathBuf,
    /// Length and time of the last change when it was opened.
    state: (u64, Option<SystemTime>),
}

impl OpenFile {
    fn state(file: &File) -> io::Result<(u64, Option<SystemTime>)> {
        let metadata = file.metadata()?;
        Ok((metadata.len(), metadata.modified().ok()))
    }
}

impl Region {
    /// Bytes read by one task.
    const PIECE: usize = 8 << 20;

    /// All of a file.
    ///
    /// # Errors
    /// If it cannot be opened.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let file = File::open(path).map_err(io_error("open", path))?;
        let state = OpenFile::state(&file).map_err(io_error("read", path))?;
        Ok(Self { file: Arc::new(OpenFile { file, path: path.into(), state }), range: 0..state.0 as usize })
    }

    /// Its length.
    pub fn len(&self) -> usize {
        self.range.len()
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    /// The bytes `range` of this part; `None` if they are not all there.
    pub fn slice(&self, range: Range<usize>) -> Option<Self> {
        if range.start > range.end || range.end > self.range.len() {
            return None;
        }
        let start = self.range.start + range.start;
        Some(Self { file: self.file.clone(), range: start..start + range.len() })
    }

    /// Reads it, on several cores where it is long.
    ///
    /// # Errors
    /// If it cannot be read, or the file was changed since it was opened.
    pub fn read(&self) -> Result<Bytes, Error> {
        let OpenFile { file, path, state } = &*self.file;
        // A length that is not backed by content must not end the process.
        if Vec::<u8>::new().try_reserve_exact(self.range.len()).is_err() {
            return Err(io_error("make room for", path)(io::ErrorKind::OutOfMemory.into()));
        }
        let mut bytes = vec![0; self.range.len()];
        let read = |(piece, bytes): (usize, &mut [u8])| {
            read_exact_at(file, bytes, (self.range.start + piece * Self::PIECE) as u64)
        };
        // Handing a short piece to other threads takes longer than reading it.
        let done = match bytes.len() {
            0..=Self::PIECE => read((0, &mut bytes)),
            _ => bytes.par_chunks_mut(Self::PIECE).enumerate().try_for_each(read),
        };
        let now = OpenFile::state(file).map_err(io_error("read", path))?;
        if now != *state {
            return Err(Error::Changed { path: path.clone(), before: state.0, after: now.0 });
        }
        done.map_err(io_error("read", path))?;
        Ok(Bytes::from(bytes))
    }
}

/// Whether an open file is the one at `path`; where that cannot be known open files are not removed, and it is.
pub(crate) fn is_at(file: &File, path: &Path) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt as _;
        let id = |metadata: std::fs::Metadata| (metadata.dev(), metadata.ino());
        let (own, there) = (file.metadata().map(id), std::fs::metadata(path).map(id));
        matches!((own, there), (Ok(own), Ok(there)) if own == there)
    }
    #[cfg(not(unix))]
    {
        let _ = (file, path);
        true
    }
}

/// Fills `bytes` from `offset` of a file on.
#[cfg(unix)]
pub(crate) fn read_exact_at(file: &File, bytes: &mut [u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, bytes, offset)
}

/// Writes all of `bytes` from `offset` of a file on.
#[cfg(unix)]
pub(crate) fn write_all_at(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, bytes, offset)
}

/// Fills `bytes` from `offset` of a file on.
#[cfg(windows)]
pub(crate) fn read_exact_at(file: &File, mut bytes: &mut [u8], mut offset: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        let count = std::os::windows::fs::FileExt::seek_read(file, bytes, offset)?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        (bytes, offset) = (&mut bytes[count..], offset + count as u64);
    }
    Ok(())
}

/// Writes all of `bytes` from `offset` of a file on.
#[cfg(windows)]
pub(crate) fn write_all_at(file: &File, mut bytes: &[u8], mut offset: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        let count = std::os::windows::fs::FileExt::seek_write(file, bytes, offset)?;
        (bytes, offset) = (&bytes[count..], offset + count as u64);
    }
    Ok(())
}

/// Writes a file so that it is whole or absent: written beside, synced, renamed.
///
/// # Errors
/// If any of that fails; the old file, if there was one, is then still there.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    write_atomic_with(path, |file| file.write_all(bytes))
}

/// As [`write_atomic`], with the content streamed by `fill`.
///
/// # Errors
/// If any of that fails; the old file, if there was one, is then still there.
pub fn write_atomic_with(
    path: &Path,
    fill: impl FnOnce(&mut io::BufWriter<&mut File>) -> io::Result<()>,
) -> Result<(), Error> {
    let folder = parent(path);
    std::fs::create_dir_all(folder).map_err(io_error("create the folder", folder))?;
    let mut builder = tempfile::Builder::new();
    let mut temporary = shared(&mut builder, 0o666)
        .prefix(".partial-")
        .tempfile_in(folder)
        .map_err(io_error("create a file in", folder))?;
    let mut writer = io::BufWriter::with_capacity(1 << 20, temporary.as_file_mut());
    fill(&mut writer).and_then(|()| writer.flush()).map_err(io_error("write", path))?;
    drop(writer);
    temporary.as_file().sync_all().map_err(io_error("sync", path))?;
    temporary.persist(path).map_err(|e| Error::Io { action: "rename to", path: path.into(), source: e.error })?;
    sync_folder(folder)
}

/// Makes the folder that a file is to be written into, and tries that one can be.
///
/// # Errors
/// If it cannot be made or written to.
pub fn check_folder_of(path: &Path) -> Result<(), Error> {
    let folder = parent(path);
    std::fs::create_dir_all(folder).map_err(io_error("create the folder", folder))?;
    let tried = tempfile::Builder::new().prefix(".partial-").tempfile_in(folder);
    tried.map(drop).map_err(io_error("create a file in", folder))
}

/// Copies a file so that the copy is whole or absent.
///
/// # Errors
/// If it cannot be read or written.
pub fn copy(from: &Path, to: &Path) -> Result<(), Error> {
    let mut source = File::open(from).map_err(io_error("open", from))?;
    write_atomic_with(to, |file| io::copy(&mut source, file).map(drop))
}

/// Reads a file that is small by its kind; `None` if there is none.
///
/// # Errors
/// If it is larger than `most` bytes or no ordinary file, or cannot be read.
pub fn read_bounded(path: &Path, most: u64) -> Result<Option<Vec<u8>>, Error> {
    let metadata = match std::fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        metadata => metadata.map_err(io_error("read", path))?,
    };
    let not_ordinary = |what: String| Err(Error::NotOrdinary { path: path.into(), what, most });
    if !metadata.is_file() {
        return not_ordinary("no ordinary file".into());
    }
    if metadata.len() > most {
        return not_ordinary(format!("a file of {} bytes", metadata.len()));
    }
    std::fs::read(path).map(Some).map_err(io_error("read", path))
}

/// Creates an empty file, in the place of what has its name: a link or a second name of another file is replaced, and
/// what it leads to stays as it is.
///
/// # Errors
/// If what is there cannot be removed or the file cannot be created.
pub fn create_anew(path: &Path) -> Result<File, Error> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(io_error("remove the old", path)(error)),
        _ => {}
    }
    File::options().write(true).create_new(true).open(path).map_err(io_error("create", path))
}

/// Opens a file of this program's own to write to, creating it if `options` say so.
///
/// # Errors
/// If it is a link or has a second name, through which something outside of its folder would be written; or if it cannot
/// be opened.
pub fn open_own(path: &Path, options: &mut std::fs::OpenOptions) -> Result<File, Error> {
    let link = |what| Error::Link { path: path.into(), what };
    if path.symlink_metadata().is_ok_and(|metadata| metadata.is_symlink()) {
        return Err(link("a symbolic link"));
    }
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::custom_flags(options, libc::O_NOFOLLOW);
    let file = options.open(path).map_err(io_error("open", path))?;
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt as _;
        let metadata = file.metadata().map_err(io_error("read", path))?;
        if metadata.is_file() && metadata.nlink() > 1 {
            return Err(link("a hard link"));
        }
    }
    Ok(file)
}

/// Gives a temporary file (`mode` 0o666) or folder (0o777) the permissions of any other new one: less the umask, not
/// private to its owner, since it will be renamed to something that a group may want to read.
pub fn shared<'a, 'p, 's>(builder: &'a mut tempfile::Builder<'p, 's>, mode: u32) -> &'a mut tempfile::Builder<'p, 's> {
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(mode));
    #[cfg(not(unix))]
    let _ = mode;
    builder
}

/// As [`shared`], for a file that a library made private: readers are those of its folder.
///
/// # Errors
/// If its permissions cannot be read or set.
#[cfg(unix)]
pub fn give_ordinary_permissions(path: &Path) -> Result<(), Error> {
    use std::os::unix::fs::PermissionsExt;
    let of = |path: &Path| std::fs::metadata(path).map(|metadata| metadata.permissions());
    let (file, folder) = (of(path), of(parent(path)));
    let (mut permissions, folder) = (file.map_err(io_error("read", path))?, folder.map_err(io_error("read", path))?);
    permissions.set_mode(permissions.mode() | (folder.mode() & 0o666));
    std::fs::set_permissions(path, permissions).map_err(io_error("set the permissions of", path))
}

/// Where files have no such permissions there is nothing to do.
///
/// # Errors
/// Never.
#[cfg(not(unix))]
pub fn give_ordinary_permissions(_path: &Path) -> Result<(), Error> {
    Ok(())
}

/// Makes earlier creations and renames inside `folder` durable.
///
/// # Errors
/// If the folder cannot be opened or synced.
pub fn sync_folder(folder: &Path) -> Result<(), Error> {
    File::open(folder).and_then(|f| f.sync_all()).map_err(io_error("sync the folder", folder))
}

/// The blake3 checksum of a file in hexadecimal, and its length in bytes.
///
/// # Errors
/// If it cannot be read.
pub fn checksum(path: &Path) -> Result<(String, u64), Error> {
    let mut hasher = blake3::Hasher::new();
    let file = File::open(path).map_err(io_error("open", path))?;
    let length =
        io::copy(&mut io::BufReader::with_capacity(1 << 20, file), &mut hasher).map_err(io_error("read", path))?;
    Ok((hasher.finalize().to_hex().to_string(), length))
}

/// A checksum of a file that is taken from all of a small one, and of a large one from its ends and from pieces at
/// equal distances: enough to tell whether a file is the one that it was, not to tell who changed it. And the length in
/// bytes.
///
/// # Errors
/// If it cannot be read.
pub fn sampled_checksum(path: &Path) -> Result<(String, u64), Error> {
    use std::io::{Read as _, Seek as _, SeekFrom};
    /// Up to here all of a file is read.
    const WHOLE: u64 = 64 << 20;
    const END: u64 = 1 << 20;
    const PIECE: u64 = 4 << 10;
    const MOST_PIECES: u64 = 4096;
    let mut file = File::open(path).map_err(io_error("open", path))?;
    let length = file.metadata().map_err(io_error("read", path))?.len();
    let mut ranges = vec![(0, length)];
    if length > WHOLE {
        let distance = (length / MOST_PIECES).max(END);
        ranges = vec![(0, END), (length - END, END)];
        ranges.extend((1..length / distance).map(|piece| (piece * distance, PIECE.min(length - piece * distance))));
    }
    let mut hasher = blake3::Hasher::new();
    hasher.update(&length.to_le_bytes());
    for (start, count) in ranges {
        file.seek(SeekFrom::Start(start))
            .and_then(|_| io::copy(&mut (&mut file).take(count), &mut hasher))
            .map_err(io_error("read", path))?;
    }
    Ok((hasher.finalize().to_hex().to_string(), length))
}

/// Bytes that may be written where a folder is, if the system says so.
#[cfg(unix)]
pub fn free_bytes(folder: &Path) -> Option<u64> {
    // Of some systems these are 32 bits.
    #[expect(clippy::useless_conversion, reason = "their types differ by system")]
    nix::sys::statvfs::statvfs(folder)
        .ok()
        .map(|all| u64::from(all.blocks_available()).saturating_mul(u64::from(all.fragment_size())))
}

/// Bytes that may be written where a folder is: not asked for here.
#[cfg(not(unix))]
pub fn free_bytes(_folder: &Path) -> Option<u64> {
    None
}

/// The folder that a path lies in.
pub(crate) fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_write_leaves_the_old_file_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new/file");
        write_atomic(&path, b"old").unwrap();
        let failed = write_atomic_with(&path, |file| {
            file.write_all(b"half")?;
            Err(io::Error::from(io::ErrorKind::StorageFull))
        });
        let message = failed.unwrap_err().to_string();
        assert!(message.contains(&path.display().to_string()) && message.contains("free some space"), "{message}");
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        assert_eq!(std::fs::read_dir(folder.path().join("new")).unwrap().count(), 1);
        let (checksum, length) = checksum(&path).unwrap();
        assert_eq!((checksum, length), (blake3::hash(b"old").to_hex().to_string(), 3));
    }

    #[cfg(unix)]
    #[test]
    fn a_written_file_has_the_permissions_of_an_ordinary_one() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let mode = |name: &str| std::fs::metadata(folder.path().join(name)).unwrap().permissions().mode();
        write_atomic(&folder.path().join("atomic"), b"x").unwrap();
        std::fs::write(folder.path().join("ordinary"), b"x").unwrap();
        assert_eq!(mode("atomic"), mode("ordinary"));
    }

    #[test]
    fn parts_have_the_bytes_of_their_file_and_stay_inside() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        // Longer than one piece, and no whole number of them.
        let content: Vec<u8> = (0..Region::PIECE * 2 + 5).map(|at| (at % 251) as u8).collect();
        std::fs::write(&path, &content).unwrap();
        let all = Region::open(&path).unwrap();
        let part = all.slice(3..Region::PIECE + 9).unwrap();
        assert!(*part.read().unwrap() == content[3..Region::PIECE + 9] && *read(&path).unwrap() == content);
        let bytes = part.slice(1..5).unwrap().read().unwrap();
        assert_eq!(&*bytes.slice(1..3).unwrap(), &content[5..7]);
        assert!(part.slice(0..part.len() + 1).is_none() && bytes.slice(3..5).is_none());
        std::fs::write(&path, b"").unwrap();
        assert!(read(&path).unwrap().is_empty() && Region::open(&path).unwrap().is_empty());
    }

    #[test]
    fn a_file_that_changes_while_it_is_read_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let change = |by: fn(&Path)| {
            std::fs::write(&path, b"0123456789").unwrap();
            let long_ago = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1);
            File::options().write(true).open(&path).unwrap().set_modified(long_ago).unwrap();
            let region = Region::open(&path).unwrap().slice(2..9).unwrap();
            by(&path);
            region.read().map(|bytes| bytes.to_vec()).map_err(|error| error.to_string())
        };
        let shorter = change(|path| std::fs::write(path, b"0123").unwrap()).unwrap_err();
        assert!(shorter.contains("10 bytes before, 4 after"), "{shorter}");
        let other = change(|path| std::fs::write(path, b"9876543210").unwrap()).unwrap_err();
        assert!(other.contains("was changed while it was read"), "{other}");
        // One that is replaced is still the one that was opened.
        let replaced = change(|path| write_atomic(path, b"x").unwrap());
        assert_eq!(replaced, Ok(b"2345678".to_vec()));
    }
}
