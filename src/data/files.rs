//! From the settings of a run to the rows it trains and evaluates on.

use super::Error;
use super::hub::{Access, Progress};
use super::message_text;
use super::mixture::{self, Part};
use super::rows::Dataset;
use super::source::{Source, Wanted};
use crate::config::settings::{DataSettings, MixtureSettings};

/// What a run trains and evaluates on.
#[derive(Clone, Debug)]
pub struct Splits {
    /// Rows to train on.
    pub train: Dataset,
    /// Rows to evaluate on: the test split, or rows held out.
    pub eval: Option<Dataset>,
    /// What was taken of which data set, if there are several.
    pub parts: Vec<Part>,
}

/// Reads the training rows and, where the run evaluates, the evaluation rows; `asked_by` is the key that says so.
///
/// # Errors
/// If a name leads to no file, a file is broken, a split is not there or has no rows, or there is nothing to evaluate on.
pub fn load(
    settings: &DataSettings,
    seed: u64,
    asked_by: Option<&str>,
    progress: &mut Progress<'_>,
) -> Result<Splits, Error> {
    let (mut splits, missing) = read(settings, seed, asked_by.is_some(), progress)?;
    match asked_by {
        None => splits.eval = None,
        Some(key) if splits.eval.is_none() => {
            return Err(Error::Setting(format!(
                "`{key}` asks for evaluation, but {missing}; name a split in `dataset_test_split`, hold rows out with \
                 `eval_fraction: 0.05`, or remove `{key}`"
            )));
        }
        Some(_) => {}
    }
    finish(settings, splits)
}

/// Reads the training rows, and the evaluation rows if there are some.
///
/// # Errors
/// As [`load`], but for rows to evaluate on that are not there.
pub fn load_all(settings: &DataSettings, seed: u64, progress: &mut Progress<'_>) -> Result<Splits, Error> {
    finish(settings, read(settings, seed, true, progress)?.0)
}

/// The rows of the splits as the files have them, and what to say if there are none to evaluate on.
fn read(
    settings: &DataSettings,
    seed: u64,
    evaluates: bool,
    progress: &mut Progress<'_>,
) -> Result<(Splits, String), Error> {
    let (mut splits, missing) = match &settings.mixture {
        Some(mixture) => load_mixture(mixture, progress)?,
        None => load_one(settings, evaluates, progress)?,
    };
    if let (None, Some(fraction)) = (&splits.eval, settings.eval_fraction) {
        let (rest, share) = std::mem::take(&mut splits.train).split_off(fraction, seed)?;
        (splits.train, splits.eval) = (rest, Some(share));
    }
    Ok((splits, missing))
}

/// As many rows as the settings say, with the columns that they name.
fn finish(settings: &DataSettings, mut splits: Splits) -> Result<Splits, Error> {
    if let Some(count) = settings.max_train_samples {
        splits.train.truncate(count);
    }
    if let (Some(eval), Some(count)) = (&mut splits.eval, settings.max_eval_samples) {
        eval.truncate(count);
    }
    for rows in std::iter::once(&mut splits.train).chain(splits.eval.as_mut()) {
        if !settings.dataset_columns.is_empty() {
            rows.rename_columns(&settings.dataset_columns)?;
        }
        message_text::parse(rows)?;
        if let Some(column) = &settings.dataset_prompt_column {
            rows.prompt_from(column)?;
        }
    }
    let empty = |what: &str| Err(Error::Empty { what: format!("`{}`: the {what} split", settings.dataset_name) });
    match &splits.eval {
        _ if splits.train.is_empty() => empty("training"),
        Some(eval) if eval.is_empty() => empty("evaluation"),
        _ => Ok(splits),
    }
}

/// One data set, and what to say if it has no rows to evaluate on.
fn load_one(settings: &DataSettings, evaluates: bool, progress: &mut Progress<'_>) -> Result<(Splits, String), Error> {
    let wanted = Wanted {
        name: &settings.dataset_name,
        config: settings.dataset_config.as_deref(),
        revision: &settings.dataset_revision,
        folder: None,
        data_files: &[],
        key: "dataset_name",
    };
    let mut source = Source::locate(wanted, Access::from_environment(), progress)?;
    let train = source.read(&settings.dataset_train_split, "dataset_train_split", progress)?;
    let test = &settings.dataset_test_split;
    let has_test = evaluates && source.has(test)?;
    let eval = if has_test { Some(source.read(test, "dataset_test_split", progress)?) } else { None };
    Ok((Splits { train, eval, parts: Vec::new() }, source.missing(test, "dataset_test_split")))
}

fn load_mixture(settings: &MixtureSettings, progress: &mut Progress<'_>) -> Result<(Splits, String), Error> {
    let (mut train, parts) = mixture::load(settings, progress)?;
    let mut eval = None;
    if let Some(size) = settings.test_split_size {
        let count = if size < 1.0 { (size * train.len() as f64).ceil() } else { size } as usize;
        let (rest, share) = train.hold_out(count, settings.seed, "test_split_size")?;
        (train, eval) = (rest, Some(share));
    }
    Ok((Splits { train, eval, parts }, "the mixture has no `test_split_size`".into()))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn settings(name: &Path) -> DataSettings {
        DataSettings {
            dataset_name: name.to_string_lossy().into_owned(),
            mixture: None,
            dataset_config: None,
            dataset_revision: "main".into(),
            dataset_train_split: "train".into(),
            dataset_test_split: "test".into(),
            dataset_text_field: "text".into(),
            dataset_prompt_column: None,
            dataset_columns: Vec::new(),
            eval_fraction: None,
            max_train_samples: None,
            max_eval_samples: None,
            preprocessed: None,
            chat_template_kwargs: serde_json::Map::new(),
            system_prompt: None,
        }
    }

    fn load_with(settings: &DataSettings, evaluates: bool) -> Result<(usize, Option<usize>), String> {
        let splits = load(settings, 1, evaluates.then_some("eval_strategy"), &mut |_| {}).map_err(|e| e.to_string())?;
        Ok((splits.train.len(), splits.eval.map(|eval| eval.len())))
    }

    fn load_from(settings: &DataSettings) -> Result<(usize, Option<usize>), String> {
        load_with(settings, false)
    }

    fn write(folder: &Path, name: &str, text: &str) -> std::path::PathBuf {
        let path = folder.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
        path
    }

    #[test]
    fn a_file_a_folder_and_a_folder_without_split_names_are_loaded() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, rows: usize| write(folder.path(), name, &"{\"x\": 1}\n".repeat(rows));
        let file = write("both/train.jsonl", 10);
        write("both/test.jsonl", 4);
        write("both/.hidden/train.jsonl", 100);
        write("both/dataset_info.json", 1);
        write("parts/b/2.jsonl", 3);
        write("parts/a/1.jsonl", 2);
        let both = folder.path().join("both");
        assert_eq!(load_from(&settings(&file)), Ok((10, None)));
        assert_eq!(load_from(&settings(&both)), Ok((10, None)), "nothing is evaluated, so nothing is read for it");
        assert_eq!(load_with(&settings(&both), true), Ok((10, Some(4))));
        assert_eq!(load_from(&settings(&folder.path().join("parts"))), Ok((5, None)));
        let mut limited = settings(&both);
        (limited.max_train_samples, limited.max_eval_samples) = (Some(3), Some(2));
        assert_eq!(load_with(&limited, true), Ok((3, Some(2))));
        let mut held_out = settings(&file);
        held_out.eval_fraction = Some(0.2);
        assert_eq!(load_with(&held_out, true), Ok((8, Some(2))));
        let mut sub = settings(&folder.path().join("parts"));
        sub.dataset_config = Some("a".into());
        assert_eq!(load_from(&sub), Ok((2, None)));

        let mut zero = settings(&file);
        zero.max_train_samples = Some(0);
        assert!(load_from(&zero).unwrap_err().contains("the training split has no rows"));
        std::fs::remove_file(&file).unwrap();
        let text = load_from(&settings(&both)).unwrap_err();
        assert!(text.contains("has no split `train` (`dataset_train_split`); its splits are `test`"), "{text}");
        assert!(load_from(&settings(&file)).unwrap_err().contains("no such file or folder"));
        sub.dataset_config = Some("c".into());
        assert!(load_from(&sub).unwrap_err().contains("no folder or files of `dataset_config: c`; it has a, b"));
        let empty = folder.path().join("empty");
        std::fs::create_dir(&empty).unwrap();
        assert!(load_from(&settings(&empty)).unwrap_err().contains("has no data file; expected .jsonl"));
    }

    #[test]
    fn evaluation_that_is_asked_for_needs_rows() {
        let folder = tempfile::tempdir().unwrap();
        let file = write(folder.path(), "d/train.jsonl", &"{\"x\": 1}\n".repeat(5));
        for name in [file.as_path(), &folder.path().join("d")] {
            let text = load_with(&settings(name), true).unwrap_err();
            assert!(
                text.contains("`eval_strategy` asks for evaluation, but") && text.contains("`eval_fraction: 0.05`"),
                "{text}"
            );
            assert!(text.contains("has no split `test` (`dataset_test_split`)"), "{text}");
        }
        // The key that asked is the one that is named.
        let text = load(&settings(&file), 1, Some("eval_on_start"), &mut |_| {}).unwrap_err().to_string();
        assert!(text.contains("`eval_on_start` asks for evaluation") && !text.contains("eval_strategy"), "{text}");
    }

    #[test]
    fn a_split_is_never_another_one_and_can_be_cut_and_added() {
        let folder = tempfile::tempdir().unwrap();
        for (name, rows) in [("train_sft", 4), ("train_gen", 7), ("test_sft", 2)] {
            write(folder.path(), &format!("data/{name}-00000-of-00001.jsonl"), &"{\"x\": 1}\n".repeat(rows));
        }
        let mut own = settings(folder.path());
        let text = load_from(&own).unwrap_err();
        assert!(
            text.contains("no split `train`") && text.contains("its splits are `test_sft`, `train_gen`, `train_sft`"),
            "{text}"
        );
        for (spec, rows) in
            [("train_sft", 4), ("train_sft+train_gen", 11), ("train_gen[:50%]", 4), ("train_gen[-2:]+test_sft", 4)]
        {
            own.dataset_train_split = spec.into();
            assert_eq!(load_from(&own), Ok((rows, None)), "{spec}");
        }
        own.dataset_train_split = "train_sft[5".into();
        assert!(load_from(&own).unwrap_err().contains("`train_sft[5` is no split"));
    }

    #[test]
    fn configurations_of_the_readme_and_what_save_to_disk_left_are_honoured() {
        let folder = tempfile::tempdir().unwrap();
        let readme = "---\nconfigs:\n- config_name: main\n  default: true\n  data_files:\n  - split: train\n    path: m/*.jsonl\n  - split: test\n    path: held/a.jsonl\n- config_name: socratic\n  data_dir: s\n---\n";
        write(folder.path(), "README.md", readme);
        for (name, rows) in
            [("m/test.jsonl", 3), ("m/b.jsonl", 1), ("held/a.jsonl", 2), ("s/train.jsonl", 5), ("s/test.jsonl", 1)]
        {
            write(folder.path(), name, &"{\"x\": 1}\n".repeat(rows));
        }
        let mut own = settings(folder.path());
        assert_eq!(load_with(&own, true), Ok((4, Some(2))));
        own.dataset_config = Some("socratic".into());
        assert_eq!(load_with(&own, true), Ok((5, Some(1))));
        own.dataset_config = Some("other".into());
        assert!(load_from(&own).unwrap_err().contains("no configuration `other`; it has main, socratic"));

        let saved = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/rows/saved");
        assert_eq!(load_with(&settings(&saved), true), Ok((3, Some(2))));
        assert_eq!(load_from(&settings(&saved.join("train"))), Ok((3, None)));
        let mut absent = settings(&saved);
        absent.dataset_train_split = "validation".into();
        assert!(load_from(&absent).unwrap_err().contains("its splits are `train`, `test`"));
    }

    #[test]
    fn one_format_of_a_split_is_read() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), "train.jsonl", "{\"x\": 1}\n");
        write(folder.path(), "train.csv", "x\n1\n2\n");
        write(folder.path(), "license.txt", "all rights\n");
        write(folder.path(), "train-notes.txt", "words\n");
        assert_eq!(load_from(&settings(folder.path())), Ok((1, None)));
        std::fs::remove_file(folder.path().join("train.jsonl")).unwrap();
        assert_eq!(load_from(&settings(folder.path())), Ok((2, None)));
    }

    #[test]
    fn a_prompt_column_becomes_a_conversation_and_columns_get_other_names() {
        let folder = tempfile::tempdir().unwrap();
        let file = write(folder.path(), "d.jsonl", "{\"problem\": \"1+1\", \"prompt\": \"old\", \"a\": 2}\n");
        let mut own = settings(&file);
        own.dataset_prompt_column = Some("problem".into());
        own.dataset_columns = vec![("a".into(), "solution".into())];
        let splits = load(&own, 1, None, &mut |_| {}).unwrap();
        let expected =
            serde_json::json!({"problem": "1+1", "prompt": [{"role": "user", "content": "1+1"}], "solution": 2});
        assert_eq!(serde_json::Value::Object(splits.train.rows()[0].clone()), expected);
        own.dataset_prompt_column = Some("question".into());
        assert!(load_from(&own).unwrap_err().contains("column `question` (`dataset_prompt_column`) not found"));
    }

    #[test]
    fn a_mixture_holds_rows_out_for_evaluation() {
        let folder = tempfile::tempdir().unwrap();
        let file = write(folder.path(), "d.jsonl", &"{\"text\": \"a\"}\n".repeat(21));
        let part = crate::config::settings::MixturePart {
            path: file.to_string_lossy().into_owned(),
            split: "train".into(),
            ..Default::default()
        };
        let mut mixture = MixtureSettings {
            parts: vec![part.clone(), part],
            seed: 1,
            is_shuffled: true,
            test_split_size: Some(0.1),
            text: ("dataset_mixture", String::new()),
        };
        let mut own = settings(Path::new(""));
        own.mixture = Some(mixture.clone());
        assert_eq!(load_with(&own, true), Ok((37, Some(5))));
        mixture.test_split_size = Some(7.0);
        own.mixture = Some(mixture.clone());
        assert_eq!(load_with(&own, true), Ok((35, Some(7))));
        mixture.test_split_size = None;
        own.mixture = Some(mixture);
        assert!(load_with(&own, true).unwrap_err().contains("the mixture has no `test_split_size`"));
    }
}
