//! Files: whole-or-absent writes, read-only maps, checksums.
//!
//! Everything a run leaves is written through this module, so that a full disk or a kill never leaves half a file
//! under a final name. It is also the only place that maps files into memory.
#![expect(unsafe_code, reason = "mapping a file is unsafe; this is the one place that does it")]

use std::fs::File;
use std::io::{self, Write};
use std::ops::{Deref, Range};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;

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

/// A stretch of bytes that many owners share: a part of a mapped file, or memory.
#[derive(Clone)]
pub struct Bytes {
    owner: Owner,
    range: Range<usize>,
}

#[derive(Clone)]
enum Owner {
    Mapped(Arc<Mmap>),
    Memory(Arc<Vec<u8>>),
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

    /// Whether the bytes belong to a mapped file, which the system may drop from memory and read again.
    pub fn is_mapped(&self) -> bool {
        matches!(self.owner, Owner::Mapped(_))
    }
}

impl Deref for Bytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match &self.owner {
            Owner::Mapped(map) => &map[self.range.clone()],
            Owner::Memory(bytes) => &bytes[self.range.clone()],
        }
    }
}

impl From<Vec<u8>> for Bytes {
    fn from(bytes: Vec<u8>) -> Self {
        let range = 0..bytes.len();
        Self { owner: Owner::Memory(Arc::new(bytes)), range }
    }
}

impl std::fmt::Debug for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Bytes({})", self.range.len())
    }
}

/// Maps a whole file read-only.
///
/// # Errors
/// If it cannot be opened or mapped.
pub fn map(path: &Path) -> Result<Bytes, Error> {
    let file = File::open(path).map_err(io_error("open", path))?;
    let length = file.metadata().map_err(io_error("read", path))?.len();
    if length == 0 {
        return Ok(Bytes::from(Vec::new()));
    }
    // SAFETY: the map is read-only and private to this process. Nothing in this program writes to an input file in
    // place (all writes go to a new file that is renamed), so the mapped bytes do not change under a reader.
    let map = unsafe { Mmap::map(&file) }.map_err(io_error("map", path))?;
    let range = 0..map.len();
    Ok(Bytes { owner: Owner::Mapped(Arc::new(map)), range })
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

fn parent(path: &Path) -> &Path {
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
    fn a_map_has_the_bytes_of_its_file_and_slices_stay_inside() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, b"0123456789").unwrap();
        let bytes = map(&path).unwrap();
        let slice = bytes.slice(2..6).unwrap();
        assert_eq!(&*slice.slice(1..3).unwrap(), b"34");
        assert!(slice.is_mapped() && slice.slice(3..5).is_none() && bytes.slice(0..11).is_none());
        std::fs::write(&path, b"").unwrap();
        assert!(map(&path).unwrap().is_empty());
    }
}
