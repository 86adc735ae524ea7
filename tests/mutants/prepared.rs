//! What `trainer preprocess` leaves: the manifest, and files of sequences and prompts.

use std::path::{Path, PathBuf};

use serde_json::Value;
use trainer::data::prepared::{Fingerprint, Folder, FolderWriter, Manifest, SourceFile, SplitEntry};
use trainer::data::{
    Dataset, PromptOptions, Prompts, RowsFingerprint, Sequences, SftOptions, Tokenizer, prepare_prompts, prepare_sft,
};

use super::mutate::{Reader, Seeds, copy_all};

pub(crate) const PREPARED: Reader = Reader { name: "prepared", prepare, seeds, read, cost: 1 };

const TASKS: [&str; 2] = ["sft", "grpo"];
/// Bytes of the foot of a file, and its parts.
const FOOT: usize = 64;

/// A folder for each task.
fn prepare(good: &Path) {
    let tokenizer = Tokenizer::from_folder(&Path::new(env!("CARGO_MANIFEST_DIR")).join("data/tiny-qwen")).unwrap();
    let raw = good.join("rows.jsonl");
    let row = |n: u32| format!("{{\"prompt\": \"{n}+1=\", \"completion\": \"{}\", \"n\": [{n}, null]}}\n", n + 1);
    std::fs::write(&raw, (0..6).map(row).collect::<String>()).unwrap();
    let rows = Dataset::read(std::slice::from_ref(&raw)).unwrap();
    for task in TASKS {
        let writer = FolderWriter::begin(&good.join(task)).unwrap();
        let (file, summary) = if task == "sft" {
            let options = SftOptions { text_field: "text".into(), ..SftOptions::default() };
            let made = prepare_sft(&rows, &tokenizer, None, &options, &|_| {}).unwrap();
            let sequences = Sequences::new(made, Some((24, trainer::config::settings::PackingStrategy::Bfd))).unwrap();
            (writer.sequences(&sequences, false, &|_| true), sequences.summary().clone())
        } else {
            let made = prepare_prompts(&rows, &tokenizer, None, &PromptOptions::default(), &|_| {}).unwrap();
            let prompts = Prompts::new(made);
            (writer.prompts(&prompts, false, &|_| true), prompts.summary().clone())
        };
        let train = SplitEntry { file: file.unwrap().unwrap(), summary, rows: RowsFingerprint::of(&rows) };
        let fingerprint = Fingerprint::of(task, &[("seed", "1".into())].into(), false, &tokenizer, None).unwrap();
        let sources = vec![SourceFile::of(&raw).unwrap()];
        writer.finish(&Manifest::new(fingerprint, sources, vec![], train, None)).unwrap();
    }
}

fn seeds(good: &Path) -> Seeds {
    let seed = |task: &str, name: &str| {
        let name = format!("{task}/{name}");
        let bytes = std::fs::read(good.join(&name)).unwrap();
        (name, bytes)
    };
    TASKS.iter().flat_map(|task| [seed(task, "manifest.json"), seed(task, "train.bin")]).collect()
}

/// A copy of a folder with a mutant in the place of one of its files.
fn with_mutant(path: &Path, good: &Path) -> (PathBuf, &'static str) {
    let folder = path.parent().unwrap();
    let task = TASKS.into_iter().find(|task| folder.ends_with(task)).unwrap();
    let copy = folder.join("copy");
    let _ = std::fs::remove_dir_all(&copy);
    copy_all(&good.join(task), &copy);
    std::fs::copy(path, copy.join(path.file_name().unwrap())).unwrap();
    (copy, task)
}

/// Makes a manifest that is still JSON the one of its folder's file, with the right checksum.
fn seal(folder: &Path) {
    let path = folder.join("manifest.json");
    let Ok(mut manifest) = serde_json::from_slice::<Value>(&std::fs::read(&path).unwrap()) else { return };
    let foot = std::fs::read(folder.join("train.bin")).unwrap();
    if let (Some(file), Some(start)) = (manifest.pointer_mut("/train/file"), foot.len().checked_sub(FOOT))
        && let Some(fields) = file.as_object_mut()
    {
        let hash = foot[start + 16..start + 48].iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let records = u64::from_le_bytes(foot[start..start + 8].try_into().unwrap());
        fields.insert("bytes".into(), foot.len().into());
        fields.insert("blake3".into(), hash.into());
        fields.insert("records".into(), records.into());
    }
    if let Some(fields) = manifest.as_object_mut() {
        fields.shift_remove("blake3");
        let checksum = blake3::hash(manifest.to_string().as_bytes()).to_hex().to_string();
        manifest["blake3"] = checksum.into();
    }
    std::fs::write(path, manifest.to_string()).unwrap();
}

/// Gives the foot of a file the right checksum, so that what it says is believed.
fn seal_foot(folder: &Path) {
    let path = folder.join("train.bin");
    let mut bytes = std::fs::read(&path).unwrap();
    let Some(start) = bytes.len().checked_sub(FOOT) else { return };
    let checksum = blake3::hash(&bytes[start..start + 48]).as_bytes()[..8].to_vec();
    bytes[start + 48..start + 56].copy_from_slice(&checksum);
    std::fs::write(path, bytes).unwrap();
}

fn read(path: &Path, good: &Path) -> Result<(), String> {
    let (folder, task) = with_mutant(path, good);
    let as_it_is = read_all(&folder, task);
    seal_foot(&folder);
    seal(&folder);
    let _ = read_all(&folder, task);
    as_it_is
}

fn read_all(folder: &Path, task: &str) -> Result<(), String> {
    let opened = Folder::open(folder).map_err(|e| e.to_string())?;
    let _ = opened.check(&opened.manifest().fingerprint);
    let _ = opened.changed_sources();
    if task == "sft" {
        let (train, _) = opened.sequences().map_err(|e| e.to_string())?;
        (0..train.len()).try_for_each(|index| train.collate(&[index]).map(drop)).map_err(|e| e.to_string())
    } else {
        let (train, _) = opened.prompts().map_err(|e| e.to_string())?;
        (0..train.len()).try_for_each(|index| train.get(index).map(drop)).map_err(|e| e.to_string())
    }
}
