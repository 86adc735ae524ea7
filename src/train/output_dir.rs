//! The folder of a run: claimed before anything is loaded, and kept to one course.
//!
//! A run that starts anew moves an older one out of reach before it does anything else; a run that goes on from a
//! checkpoint moves what lies beyond it aside. Either becomes final when the run begins; if it fails before, all is put
//! back, and if it is killed, the next start carries it out.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::bail;

use super::lock::Lock;
use super::results::{self, StartsFrom, is_same_place};
use crate::checkpoint::{self, Aside, Checkpoint, Fate};
use crate::config::settings::{DataSettings, ModelSettings, Resume, TrainingSettings, ZeroStage};
use crate::fs;
use crate::ranks::{self, Ranks};
use crate::telemetry::read_rows;

const METRICS: &str = "metrics.jsonl";
/// Files that a run appends to and the folder it adds to: what they would lead to, if they are links, is not its own.
const APPENDED: &[&str] = &[METRICS, "completions.jsonl", "runs"];

/// An `output_dir` that is this run's until the value is dropped.
#[derive(Debug)]
pub(super) struct OutputDir {
    path: PathBuf,
    starts_from: StartsFrom,
    /// Key and path of what the run reads.
    inputs: Vec<(&'static str, PathBuf)>,
    // Before the lock: what is put back is put back while the folder is still this run's.
    aside: Option<Aside>,
    /// A course whose records this run goes on with.
    records_from: Option<PathBuf>,
    note: Option<String>,
    _lock: Lock,
}

/// Makes sure, before anything is loaded, that the output folder can be used, and takes it for this run. The first rank does;
/// the others write there only their parts of checkpoints, and look whether they see the same folder.
pub(super) fn claim(
    settings: &TrainingSettings,
    model: &ModelSettings,
    data: &DataSettings,
    ranks: &dyn Ranks,
) -> anyhow::Result<Option<OutputDir>> {
    let claimed = ranks.is_first().then(|| take(settings, model, data)).transpose()?;
    // What `auto` comes to is known when the model is.
    let may_share = settings.ranks.stage != ZeroStage::Replicated || settings.ranks.is_stage_auto;
    let writes_parts = may_share && !settings.save_only_model;
    if ranks.world_size() > 1 && writes_parts {
        check_shared(&settings.output_dir, ranks)?;
    }
    Ok(claimed)
}

/// Refuses an `output_dir` that ranks do not share.
fn check_shared(folder: &Path, ranks: &dyn Ranks) -> anyhow::Result<()> {
    let sign = || tempfile::Builder::new().prefix(".partial-sign-").tempfile_in(folder);
    let sign = ranks.is_first().then(sign).transpose().map_err(fs::io_error("create a file in", folder))?;
    let name = sign.as_ref().and_then(|sign| sign.path().file_name());
    let mut name = name.map(|name| name.to_string_lossy().into_owned().into_bytes()).unwrap_or_default();
    ranks.broadcast(&mut name, 0)?;
    let path = folder.join(String::from_utf8_lossy(&name).as_ref());
    let is_there = comes_into_view(&path);
    let own = serde_json::to_vec(&(is_there, ranks::host_name()))?;
    let all = ranks.all_gather_bytes(&own)?;
    let all: Vec<(bool, String)> =
        all.iter().map(|message| serde_json::from_slice(message)).collect::<Result<_, _>>()?;
    let blind = all.iter().enumerate().filter(|(_, (is_there, _))| !is_there);
    let blind: Vec<String> = blind.map(|(rank, (_, host))| format!("{rank} (on {host})")).collect();
    if !blind.is_empty() {
        // Who ends before all know the reason is taken for it.
        let _ = ranks.barrier();
        bail!(
            "`output_dir: {}` of rank 0 (on {}) is not what rank {} sees there: every rank writes its part of a checkpoint and \
             reads it again, so `output_dir` must be a folder on a file system that all nodes share; set it to one, or use \
             `zero_stage: 0`, where the first rank writes everything",
            folder.display(),
            all[0].1,
            blind.join(", ")
        );
    }
    Ok(())
}

/// Whether something that another rank has made is there, for which a folder of a network may take some time.
pub(super) fn comes_into_view(path: &Path) -> bool {
    const LOOKS: u32 = 50;
    const PAUSE: Duration = Duration::from_millis(100);
    (0..LOOKS).any(|look| {
        if look > 0 {
            std::thread::sleep(PAUSE);
        }
        path.exists()
    })
}

/// The first rank's.
fn take(settings: &TrainingSettings, model: &ModelSettings, data: &DataSettings) -> anyhow::Result<OutputDir> {
    let folder = &settings.output_dir;
    if model.lora.is_none() && is_same_place(folder, Path::new(&model.model_name_or_path)) {
        bail!(
            "`output_dir: {}` is the folder of `model_name_or_path`, and full fine-tuning would write over the model it \
             starts from; choose another `output_dir`, or train an adapter (`use_peft: true`)",
            folder.display()
        );
    }
    std::fs::create_dir_all(folder).map_err(fs::io_error("create the folder", folder))?;
    // First of all: what follows looks at what another run may be writing, and removes what looks left over.
    let lock = Lock::take(folder)?;
    if let Some(kept) = checkpoint::settle_earlier(folder)? {
        tracing::warn!(
            "a run that was stopped while it began had left a course of `{}`; it is kept in `{}`",
            folder.display(),
            kept.display()
        );
    }
    checkpoint::clean_up(folder)?;
    let mut claimed = OutputDir {
        path: folder.clone(),
        starts_from: StartsFrom::of(folder, model),
        inputs: inputs(model, data),
        aside: None,
        records_from: None,
        note: None,
        _lock: lock,
    };
    match settings.resume_from_checkpoint {
        Resume::No => claimed.start_anew(settings.overwrite_output_dir)?,
        // Rows of a run that was killed before its first checkpoint are nothing to go on from, and nothing to keep.
        Resume::Auto if checkpoint::newest_step(folder).is_none() => {
            let has_model = !results::final_model(folder, claimed.starts_from).is_empty();
            claimed.start_anew(settings.overwrite_output_dir || !has_model)?;
        }
        Resume::Auto | Resume::Latest | Resume::Path(_) => {}
    }
    for name in APPENDED {
        let path = folder.join(name);
        if path.symlink_metadata().is_ok_and(|metadata| metadata.is_symlink()) {
            return Err(fs::Error::Link { path, what: "a symbolic link" }.into());
        }
    }
    Ok(claimed)
}

/// What a run reads, by key, where it lies on this machine.
fn inputs(model: &ModelSettings, data: &DataSettings) -> Vec<(&'static str, PathBuf)> {
    let named = [
        ("model_name_or_path", Some(PathBuf::from(&model.model_name_or_path))),
        ("tokenizer_name_or_path", model.tokenizer_name_or_path.as_ref().map(PathBuf::from)),
        ("adapter_name_or_path", model.adapter_name_or_path.clone()),
        ("chat_template_path", model.chat_template_path.clone()),
        ("dataset_name", Some(PathBuf::from(&data.dataset_name))),
        ("preprocessed", data.preprocessed.clone()),
    ];
    let parts = data.mixture.iter().flat_map(|mixture| &mixture.parts);
    let parts = parts.map(|part| ("datasets", Some(PathBuf::from(&part.path))));
    named.into_iter().chain(parts).filter_map(|(key, path)| Some((key, path?))).collect()
}

impl OutputDir {
    /// Moves an older run out of reach.
    fn start_anew(&mut self, may_overwrite: bool) -> anyhow::Result<()> {
        let folder = &self.path;
        let model = results::final_model(folder, self.starts_from);
        // A run that ended before its first row and checkpoint left nothing to lose.
        let has_rows = folder.join(METRICS).metadata().is_ok_and(|metadata| metadata.len() > 0);
        let holds_a_run = has_rows || !model.is_empty() || checkpoint::newest_step(folder).is_some();
        if holds_a_run && !may_overwrite {
            let found = match model.first() {
                Some(name) if !has_rows => format!("already holds a trained model (`{name}`)"),
                _ => "already holds a run".into(),
            };
            bail!(
                "`output_dir: {}` {found}; set `resume_from_checkpoint: true` (or `--resume`) to go on, \
                 `overwrite_output_dir: true` to start anew, or choose another folder",
                folder.display()
            );
        }
        let mut moved = results::checkpoints(folder, |_, _| true)?;
        moved.extend(results::left_courses(folder));
        moved.extend(model);
        moved.extend(self.curves());
        moved.extend(results::records(folder));
        self.set_aside(Fate::Deleted, moved, vec![])
    }

    /// Moves what lies beyond a checkpoint that the run goes on from aside; `is_changed` if it goes on with other settings
    /// than those that led there.
    pub(super) fn leave_other_courses(&mut self, from: &Checkpoint, is_changed: bool) -> anyhow::Result<()> {
        let folder = self.path.clone();
        let (step, path) = (from.step(), from.path());
        // By its name, which may be a link's, or by where it really lies: `.` and a bare name have no parent to compare.
        let real = path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
        let is_own =
            [path, &real].iter().any(|path| path.parent().is_some_and(|parent| is_same_place(parent, &folder)));
        let is_beyond = |other: u64, place: &Path| (!is_own || other > step) && !is_same_place(place, path);
        let checkpoints = results::checkpoints(&folder, is_beyond)?;
        let records = results::records(&folder);
        let has_later_rows = || {
            let rows = read_rows(&folder.join(METRICS)).unwrap_or_default();
            rows.iter().any(|row| row.get("step").and_then(serde_json::Value::as_u64).is_some_and(|row| row > step))
        };
        let what = match checkpoints.as_slice() {
            [] if is_own && is_changed && has_later_rows() => format!("its rows after step {step}"),
            [] if is_own || !folder.join(METRICS).exists() => return Ok(()),
            [] => "its rows".into(),
            [one] => one.clone(),
            [first, .., last] => format!("{first} to {last}"),
        };
        self.records_from = real.parent().filter(|parent| self.is_left_course(parent)).map(Path::to_path_buf);
        let (mut moved, mut copied) = (checkpoints, vec![]);
        if !moved.is_empty() || !is_own {
            moved.extend(results::final_model(&folder, self.starts_from));
            moved.extend(self.curves());
        }
        if is_own {
            copied.extend(records);
        } else {
            moved.extend(records);
        }
        self.set_aside(Fate::Kept, moved, copied)?;
        self.note = self.aside.as_ref().map(|aside| {
            format!(
                "going on from {}; {what} of the course that is left are kept in {}",
                path.display(),
                aside.place().display()
            )
        });
        Ok(())
    }

    fn is_left_course(&self, folder: &Path) -> bool {
        let is_here = folder.parent().is_some_and(|parent| is_same_place(parent, &self.path));
        is_here && folder.file_name().is_some_and(|name| checkpoint::is_left_course(&name.to_string_lossy()))
    }

    fn curves(&self) -> Option<String> {
        self.path.join(results::CURVES).symlink_metadata().is_ok().then(|| results::CURVES.to_string())
    }

    fn set_aside(&mut self, fate: Fate, moved: Vec<String>, copied: Vec<String>) -> anyhow::Result<()> {
        if moved.is_empty() && copied.is_empty() {
            return Ok(());
        }
        for (key, input) in &self.inputs {
            let Ok(input_place) = input.canonicalize() else { continue };
            let is_in =
                |name: &&String| self.path.join(name).canonicalize().is_ok_and(|place| input_place.starts_with(place));
            if moved.iter().any(|name| is_in(&name)) {
                bail!(
                    "`{key}: {}` is part of the run in `output_dir: {}`, which this run would clear; choose another \
                     `output_dir`",
                    input.display(),
                    self.path.display()
                );
            }
        }
        self.aside = Some(Aside::begin(&self.path, fate, moved, copied)?);
        Ok(())
    }

    /// Makes final what was moved aside, as the run begins; returns what there is to say of it.
    pub(super) fn settle(&mut self) -> anyhow::Result<Option<String>> {
        if let Some(aside) = self.aside.take() {
            aside.settle()?;
        }
        if let Some(from) = self.records_from.take() {
            results::take_records(&from, &self.path)?;
        }
        Ok(self.note.take())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ranks::local::Threads;

    #[test]
    fn ranks_that_have_folders_of_their_own_are_told_so_at_the_start() {
        let (shared, own) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let seen = |folders: [&Path; 3]| -> Vec<Result<(), String>> {
            let group = Threads::group(3, Duration::from_mins(1)).unwrap();
            std::thread::scope(|scope| {
                let look = |(ranks, folder): (Threads, &Path)| {
                    let folder = folder.to_path_buf();
                    scope.spawn(move || check_shared(&folder, &ranks).map_err(|error| error.to_string()))
                };
                let all: Vec<_> = group.into_iter().zip(folders).map(look).collect();
                all.into_iter().map(|rank| rank.join().unwrap()).collect()
            })
        };
        assert_eq!(seen([shared.path(); 3]), [const { Ok(()) }; 3]);
        for told in seen([shared.path(), own.path(), shared.path()]) {
            let told = told.unwrap_err();
            assert!(told.contains("rank 1 (on ") && told.contains("all nodes share"), "{told}");
        }
        assert_eq!(std::fs::read_dir(shared.path()).unwrap().count(), 0);
    }
}
