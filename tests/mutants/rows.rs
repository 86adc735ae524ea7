//! Readers of rows, and of the files beside them that say which rows there are.

use std::io::Write;
use std::path::{Path, PathBuf};

use trainer::data::{Dataset, RowsFingerprint};

use super::mutate::{Reader, Seeds, copy_all, no_files};

pub(crate) const JSON: Reader = Reader { name: "json", prepare: no_files, seeds: json, read: read_data, cost: 1 };
pub(crate) const CSV: Reader = Reader { name: "csv", prepare: no_files, seeds: csv, read: read_data, cost: 1 };
pub(crate) const PARQUET: Reader =
    Reader { name: "parquet", prepare: no_files, seeds: parquet, read: read_data, cost: 1 };
pub(crate) const ARROW: Reader = Reader { name: "arrow", prepare: no_files, seeds: arrow, read: read_data, cost: 1 };
pub(crate) const CARD: Reader = Reader { name: "card", prepare: prepare_cards, seeds: card, read: read_card, cost: 1 };

fn fixtures(names: &[&str]) -> Seeds {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/rows");
    let seed = |name: &&str| ((*name).to_string(), std::fs::read(folder.join(name)).unwrap());
    names.iter().map(seed).collect()
}

fn read_data(path: &Path, _: &Path) -> Result<(), String> {
    let dataset = Dataset::read(&[PathBuf::from(path)]).map_err(|e| e.to_string())?;
    let _ = dataset.require_sound(&["messages", "text", "prompt"]);
    let _ = RowsFingerprint::of(&dataset);
    Ok(())
}

fn json(_: &Path) -> Seeds {
    let mut seeds = fixtures(&["tools.jsonl", "nulls.jsonl", "numbers.jsonl", "types.jsonl"]);
    for text in [
        "[{\"text\": \"a\"},\n {\"text\": \"b\", \"x\": [1, {\"y\": null}]}]",
        "{\"data\": [{\"prompt\": \"a\"}, {\"prompt\": \"b\"}], \"version\": 1}",
        "{\"prompt\": {\"0\": \"a\", \"1\": \"b\"}, \"n\": {\"0\": 1, \"1\": 2}}",
        "{\"columns\": [\"a\", \"b\"], \"index\": [0], \"data\": [[1, 2]]}",
    ] {
        seeds.push(("x.json".into(), text.into()));
    }
    let lines = seeds[0].1.clone();
    seeds.push(("x.jsonl.zst".into(), zstd::stream::encode_all(&*lines, 3).unwrap()));
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    gzip.write_all(&lines).unwrap();
    seeds.push(("x.jsonl.gz".into(), gzip.finish().unwrap()));
    let wide: Vec<u8> = String::from_utf8(lines).unwrap().encode_utf16().flat_map(u16::to_le_bytes).collect();
    seeds.push(("x.jsonl".into(), wide));
    seeds
}

fn csv(_: &Path) -> Seeds {
    let text = "prompt,n,ok,x\n\"a \"\"b\"\"\nc\",1,True,\nd,2.5,False,e\n";
    vec![("x.csv".into(), text.into()), ("x.tsv".into(), text.replace(',', "\t").into()), ("x.txt".into(), text.into())]
}

fn parquet(_: &Path) -> Seeds {
    fixtures(&[
        "tools.json.parquet",
        "tools.pyarrow.parquet",
        "numbers.datasets.parquet",
        "types.none.parquet",
        "types.snappy.parquet",
        "types.gzip.parquet",
        "types.brotli.parquet",
        "types.lz4.parquet",
        "types.zstd.parquet",
        "types.v2.parquet",
    ])
}

fn arrow(_: &Path) -> Seeds {
    fixtures(&[
        "arrow_types.arrow",
        "tools.stream.arrow",
        "tools.file.arrow",
        "numbers.file.arrow",
        "saved/train/data-00000-of-00001.arrow",
    ])
}

/// A folder with a card, and one that `save_to_disk` wrote.
fn prepare_cards(good: &Path) {
    std::fs::create_dir(good.join("card")).unwrap();
    std::fs::write(good.join("card/x.jsonl"), "{\"text\": \"a\"}\n").unwrap();
    copy_all(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/rows/saved"), &good.join("saved"));
}

fn card(good: &Path) -> Seeds {
    let readme = "---\nconfigs:\n- config_name: en\n  default: true\n  data_files:\n  - split: train\n    path: '*.jsonl'\n---\n";
    let saved = |name: &str| (format!("saved/{name}"), std::fs::read(good.join("saved").join(name)).unwrap());
    vec![("card/README.md".into(), readme.into()), saved("dataset_dict.json"), saved("train/state.json")]
}

fn read_card(path: &Path, good: &Path) -> Result<(), String> {
    let is_set = |folder: &&Path| folder.ends_with("card") || folder.ends_with("saved");
    let folder = path.ancestors().find(is_set).unwrap();
    let mutant = std::fs::read(path).unwrap();
    copy_all(&good.join(folder.file_name().unwrap()), folder);
    std::fs::write(path, mutant).unwrap();
    load(folder)
}

fn load(folder: &Path) -> Result<(), String> {
    let text = format!("model_name_or_path: m\noutput_dir: o\ndataset_name: {}\n", folder.display());
    let source = trainer::config::Source::new("a.yaml", text);
    let context = trainer::config::Context::default();
    let loaded = trainer::config::load_sft(&source, &[], &context).map_err(|e| e.to_string())?;
    trainer::data::load(&loaded.settings.data, 1, None, &mut |_| {}).map(|_| ()).map_err(|e| e.to_string())
}
