//! Writes one checkpoint: begin, put files in, commit.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensorError, View};
use serde::Serialize;
use tempfile::TempDir;

use super::manifest::{FORMAT_VERSION, FileEntry, Manifest};
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
        Ok(Self { output_dir: output_dir.into(), partial, step, world_size, best: None })
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

    /// Writes named f32 tensors as a safetensors file, one tensor at a time: beside the tensors themselves at most one
    /// of them is held in memory again.
    ///
    /// # Errors
    /// If a shape does not fit its values, or the file cannot be written.
    pub fn add_tensors<'a>(
        &mut self,
        name: &str,
        tensors: impl IntoIterator<Item = (String, &'a [f32], Vec<usize>)>,
    ) -> Result<(), Error> {
        let path = self.file(name)?;
        let mut views = Vec::new();
        for (tensor, values, shape) in tensors {
            if shape.iter().product::<usize>() != values.len() {
                return Err(Error::Shape { name: tensor, values: values.len(), shape });
            }
            views.push((tensor, F32View { values, shape }));
        }
        views.sort_by(|left, right| left.0.cmp(&right.0));
        if let Some(twice) = views.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            let reason = format!("the name `{}` comes twice", twice[0].0);
            return Err(Error::Tensors { action: "write", path: self.final_path(name), reason });
        }
        let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
        safetensors::serialize_to_file(views, Some(metadata), &path).map_err(|error| match error {
            SafeTensorError::IoError(source) => io_error("write", &self.final_path(name))(source).into(),
            other => Error::Tensors { action: "write", path: self.final_path(name), reason: other.to_string() },
        })
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
        let mut files = BTreeMap::new();
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
                fs::give_ordinary_permissions(&path)?;
                File::open(&path).and_then(|file| file.sync_all()).map_err(io_error("sync", &path))?;
                let (blake3, bytes) = fs::checksum(&path)?;
                files.insert(inside.to_string_lossy().replace('\\', "/"), FileEntry { bytes, blake3 });
            }
            fs::sync_folder(&folder)?;
        }
        Ok(files)
    }

    /// The path to write a file of the checkpoint to.
    fn file(&self, name: &str) -> Result<PathBuf, Error> {
        if !stays_inside(name) {
            return Err(Error::Name { name: name.into(), reason: "it leaves the folder" });
        }
        if name == MANIFEST {
            return Err(Error::Name { name: name.into(), reason: "the manifest is written by `commit`" });
        }
        let path = self.path().join(name);
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).map_err(io_error("create the folder", parent))?;
        }
        Ok(path)
    }

    /// Where the file will be after the commit: the path that messages name.
    fn final_path(&self, name: &str) -> PathBuf {
        folder(&self.output_dir, self.step).join(name)
    }
}

/// An f32 slice as safetensors wants to see it.
struct F32View<'a> {
    values: &'a [f32],
    shape: Vec<usize>,
}

impl View for F32View<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        self.values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>().into()
    }

    fn data_len(&self) -> usize {
        size_of_val(self.values)
    }
}
