//! Writes one checkpoint: begin, put files in, commit.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use tempfile::TempDir;

use super::manifest::{FORMAT_VERSION, FileEntry, Manifest};
use super::parts::{Part, PartsWriter, Written};
use super::{Error, MANIFEST, PREFIX, folder, rotate, stays_inside};
use crate::fs::{self, io_error};

/// A checkpoint in the making. Dropping it without [`Writer::commit`] removes everything written.
#[derive(Debug)]
pub struct Writer {
    output_dir: PathBuf,
    partial: TempDir,
    step: u64,
    world_size: usize,
    best: Option<u64>,
    /// Files that are durable and of which the checksum is known.
    sealed: BTreeMap<String, FileEntry>,
}

/// Where the ranks of a run put files of a checkpoint in the making, which the first of them began.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    output_dir: PathBuf,
    /// The name of the folder inside `output_dir` until the commit.
    partial: String,
    step: u64,
}

/// A checkpoint that is now whole and durable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Committed {
    /// Its folder.
    pub path: PathBuf,
    /// Its size in bytes, without the manifest.
    pub bytes: u64,
    /// Older checkpoints that were deleted to keep to the limit.
    pub removed: Vec<PathBuf>,
}

impl Writer {
    /// Begins the checkpoint of `step` in `output_dir`, which will hold the state of `world_size` ranks.
    ///
    /// # Errors
    /// If the folder cannot be created.
    pub fn begin(output_dir: &Path, step: u64, world_size: usize) -> Result<Self, Error> {
        std::fs::create_dir_all(output_dir).map_err(io_error("create the folder", output_dir))?;
        let mut builder = tempfile::Builder::new();
        let partial = fs::shared(&mut builder, 0o777)
            .prefix(&format!(".{PREFIX}{step}.partial-"))
            .tempdir_in(output_dir)
            .map_err(io_error("create a checkpoint in", output_dir))?;
        Ok(Self { output_dir: output_dir.into(), partial, step, world_size, best: None, sealed: BTreeMap::new() })
    }

    /// Names the step of a checkpoint that [`Writer::commit`] does not delete, however old it is.
    #[must_use]
    pub fn keeping(mut self, best: Option<u64>) -> Self {
        self.best = best;
        self
    }

    /// The folder to put files into until [`Writer::commit`]; it has another name after.
    pub fn path(&self) -> &Path {
        self.partial.path()
    }

    /// The same for other ranks.
    pub fn place(&self) -> Place {
        let partial = self.path().file_name().map(|name| name.to_string_lossy().into_owned());
        Place { output_dir: self.output_dir.clone(), partial: partial.unwrap_or_default(), step: self.step }
    }

    /// Takes a file that a rank has written at [`Writer::place`] into the checkpoint.
    ///
    /// # Errors
    /// If it is not there, or of another length.
    pub fn take(&mut self, written: Written) -> Result<(), Error> {
        let Written { name, entry } = written;
        let path = self.place().file(&name)?;
        if !path.metadata().is_ok_and(|metadata| metadata.is_file() && metadata.len() == entry.bytes) {
            return Err(Error::NotShared { path: self.output_dir.clone(), missing: self.final_path(&name) });
        }
        self.sealed.insert(name, entry);
        Ok(())
    }

    /// Writes a value as a JSON file.
    ///
    /// # Errors
    /// If the value has no JSON form or the file cannot be written.
    pub fn add_json(&mut self, name: &str, value: &impl Serialize) -> Result<(), Error> {
        let path = self.file(name)?;
        let bytes =
            serde_json::to_vec_pretty(value).map_err(|source| Error::ToJson { path: self.final_path(name), source })?;
        let file = File::create(&path).map_err(io_error("create", &self.final_path(name)))?;
        let mut writer = BufWriter::new(file);
        writer.write_all(&bytes).and_then(|()| writer.flush()).map_err(io_error("write", &self.final_path(name)))?;
        Ok(())
    }

    /// Writes whole f32 tensors as a safetensors file.
    ///
    /// # Errors
    /// If a shape does not fit its values, a name comes twice, or the file cannot be written.
    pub fn add_tensors<'a>(
        &mut self,
        name: &str,
        tensors: impl IntoIterator<Item = (String, &'a [f32], Vec<usize>)>,
    ) -> Result<(), Error> {
        let (mut parts, mut all) = (Vec::new(), Vec::new());
        for (tensor, values, shape) in tensors {
            if shape.iter().product::<usize>() != values.len() {
                return Err(Error::Shape { name: tensor, values: values.len(), shape });
            }
            parts.push(Part::whole(tensor, shape));
            all.push(values);
        }
        let mut file = PartsWriter::create(&self.place(), name, &parts)?;
        all.into_iter().try_for_each(|values| file.write(values))?;
        self.take(file.finish()?)
    }

    /// Makes the checkpoint whole: syncs every file, writes the manifest, moves the folder into its place and makes that
    /// durable. A checkpoint of the same step is replaced. Then deletes the oldest ones beyond `save_total_limit`
    /// (`None`: keeps all), never the new one and never that of [`Writer::keeping`].
    ///
    /// # Errors
    /// If anything up to the move fails; the earlier checkpoints are then as they were. A failure to delete an old one
    /// is a warning, since nothing is lost.
    pub fn commit(self, save_total_limit: Option<usize>) -> Result<Committed, Error> {
        let files = self.seal_files()?;
        let bytes = files.values().map(|file| file.bytes).sum();
        let manifest = Manifest {
            format_version: FORMAT_VERSION,
            trainer_version: env!("CARGO_PKG_VERSION").into(),
            created: jiff::Timestamp::now().to_string(),
            step: self.step,
            world_size: self.world_size,
            files,
        };
        let text = serde_json::to_vec_pretty(&manifest)
            .map_err(|source| Error::ToJson { path: self.final_path(MANIFEST), source })?;
        fs::write_atomic(&self.path().join(MANIFEST), &text)?;

        let path = folder(&self.output_dir, self.step);
        let replaced = rotate::set_aside(&path)?;
        std::fs::rename(self.path(), &path).map_err(io_error("rename the finished checkpoint to", &path))?;
        // The folder has moved: nothing is left to remove.
        let _moved = self.partial.keep();
        fs::sync_folder(&self.output_dir)?;
        if let Some(replaced) = replaced {
            rotate::discard(&replaced);
        }
        let mut kept = vec![path.clone()];
        kept.extend(self.best.map(|best| folder(&self.output_dir, best)).filter(|best| *best != path));
        let removed = rotate::keep_newest(&self.output_dir, save_total_limit, &kept);
        Ok(Committed { path, bytes, removed })
    }

    /// Syncs every file and folder and takes their sizes and checksums.
    fn seal_files(&self) -> Result<BTreeMap<String, FileEntry>, Error> {
        // From what ranks say and not from the listing, which on a folder of a network may be behind what other machines wrote.
        let mut files = self.sealed.clone();
        let mut folders = vec![PathBuf::new()];
        while let Some(inside) = folders.pop() {
            let folder = self.path().join(&inside);
            for entry in std::fs::read_dir(&folder).map_err(io_error("list", &folder))? {
                let entry = entry.map_err(io_error("list", &folder))?;
                let (path, inside) = (entry.path(), inside.join(entry.file_name()));
                if path.is_dir() {
                    folders.push(inside);
                    continue;
                }
                let name = inside.to_string_lossy().replace('\\', "/");
                if files.contains_key(&name) {
                    continue;
                }
                fs::give_ordinary_permissions(&path)?;
                File::open(&path).and_then(|file| file.sync_all()).map_err(io_error("sync", &path))?;
                let (blake3, bytes) = fs::checksum(&path)?;
                files.insert(name, FileEntry { bytes, blake3 });
            }
            fs::sync_folder(&folder)?;
        }
        Ok(files)
    }

    /// The path to write a file of the checkpoint to.
    fn file(&self, name: &str) -> Result<PathBuf, Error> {
        self.place().file(name)
    }

    /// Where the file will be after the commit: the path that messages name.
    fn final_path(&self, name: &str) -> PathBuf {
        folder(&self.output_dir, self.step).join(name)
    }
}

impl Place {
    /// The place of the checkpoint of `step` in `output_dir`, of which the first rank says that its folder is called `partial`.
    ///
    /// # Errors
    /// If the folder is not there: every rank must have the same `output_dir`.
    pub fn of(output_dir: &Path, step: u64, partial: &str) -> Result<Self, Error> {
        let place = Self { output_dir: output_dir.into(), partial: partial.into(), step };
        let is_name = stays_inside(partial) && !partial.contains('/');
        if !is_name {
            return Err(Error::Name { name: partial.into(), reason: "it is no folder of a checkpoint in the making" });
        }
        if !place.folder().is_dir() {
            return Err(Error::NotShared { path: output_dir.into(), missing: place.folder() });
        }
        Ok(place)
    }

    /// The name of the folder.
    pub fn partial(&self) -> &str {
        &self.partial
    }

    fn folder(&self) -> PathBuf {
        self.output_dir.join(&self.partial)
    }

    /// The path to write a file to.
    pub(super) fn file(&self, name: &str) -> Result<PathBuf, Error> {
        if !stays_inside(name) {
            return Err(Error::Name { name: name.into(), reason: "it leaves the folder" });
        }
        if name == MANIFEST {
            return Err(Error::Name { name: name.into(), reason: "the manifest is written by `commit`" });
        }
        let path = self.folder().join(name);
        // Not the folder itself: who finds that gone is not to bring it back.
        if let Some(parent) = path.parent().filter(|parent| *parent != self.folder()) {
            std::fs::create_dir_all(parent).map_err(io_error("create the folder", parent))?;
        }
        Ok(path)
    }

    /// Where the file will be after the commit: the path that messages name.
    pub(super) fn final_path(&self, name: &str) -> PathBuf {
        folder(&self.output_dir, self.step).join(name)
    }
}
