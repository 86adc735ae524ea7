//! Damaged files end in one message: no panic, no abort, no hang over 10 s, no memory over 1 GiB.
//!
//! `cargo test --test mutants` takes a few seconds per reader; `TRAINER_MUTANTS=20000 cargo test --test mutants` an hour.

#[path = "support/mutate.rs"]
mod mutate;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};

use mutate::{Reader, survives};
use trainer::data::{Dataset, RowsFingerprint, hub};

/// Every reader that is tested.
fn readers() -> Vec<Reader> {
    vec![json(), csv(), parquet(), arrow(), card(), hub_answers()]
}

#[test]
fn child() {
    mutate::child(&readers());
}

fn fixtures(names: &[&str]) -> Vec<(String, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/rows");
    let seed = |name: &&str| ((*name).to_string(), std::fs::read(folder.join(name)).unwrap());
    names.iter().map(seed).collect()
}

fn read_data(path: &Path) -> Result<(), String> {
    let dataset = Dataset::read(&[PathBuf::from(path)]).map_err(|e| e.to_string())?;
    let _ = dataset.require_sound(&["messages", "text", "prompt"]);
    let _ = RowsFingerprint::of(&dataset);
    Ok(())
}

fn json() -> Reader {
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
    Reader { name: "json", seeds, read: read_data, cost: 1 }
}

fn csv() -> Reader {
    let text = "prompt,n,ok,x\n\"a \"\"b\"\"\nc\",1,True,\nd,2.5,False,e\n";
    let seeds = vec![
        ("x.csv".into(), text.into()),
        ("x.tsv".into(), text.replace(',', "\t").into()),
        ("x.txt".into(), text.into()),
    ];
    Reader { name: "csv", seeds, read: read_data, cost: 1 }
}

fn parquet() -> Reader {
    let seeds = fixtures(&[
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
    ]);
    Reader { name: "parquet", seeds, read: read_data, cost: 1 }
}

fn arrow() -> Reader {
    let seeds = fixtures(&[
        "arrow_types.arrow",
        "tools.stream.arrow",
        "tools.file.arrow",
        "numbers.file.arrow",
        "saved/train/data-00000-of-00001.arrow",
    ]);
    Reader { name: "arrow", seeds, read: read_data, cost: 1 }
}

/// The files beside data that say which data there is.
fn card() -> Reader {
    let readme = "---\nconfigs:\n- config_name: en\n  default: true\n  data_files:\n  - split: train\n    path: a/*.jsonl\n---\n";
    let seeds = vec![
        ("a/README.md".into(), readme.into()),
        ("a/dataset_dict.json".into(), "{\"splits\": [\"train\", \"test\"]}".into()),
        ("a/state.json".into(), "{\"_data_files\": [{\"filename\": \"x.jsonl\"}], \"_split\": \"train\"}".into()),
    ];
    let read = |path: &Path| {
        let folder = path.parent().unwrap();
        std::fs::write(folder.join("x.jsonl"), "{\"text\": \"a\"}\n").unwrap();
        let found = load(folder);
        std::fs::remove_file(path).unwrap();
        found
    };
    Reader { name: "card", seeds, read, cost: 1 }
}

fn load(folder: &Path) -> Result<(), String> {
    let text = format!("model_name_or_path: m\noutput_dir: o\ndataset_name: {}\n", folder.display());
    let source = trainer::config::Source::new("a.yaml", text);
    let context = trainer::config::Context {
        world_size: 1,
        has_bf16: false,
        git_commit: None,
        ..trainer::config::Context::default()
    };
    let loaded = trainer::config::load_sft(&source, &[], &context).map_err(|e| e.to_string())?;
    trainer::data::load(&loaded.settings.data, 1, false, &mut |_| {}).map(|_| ()).map_err(|e| e.to_string())
}

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What a hub answers to the two requests of a download.
fn hub_answers() -> Reader {
    let listing = format!(
        "{{\"sha\": \"{COMMIT}\", \"siblings\": [{{\"rfilename\": \"train.jsonl\"}}, {{\"rfilename\": \"a/b\"}}]}}"
    );
    let ok = |body: &str, more: &str| {
        format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n{more}connection: close\r\n\r\n{body}", body.len())
    };
    let file = ok("{\"text\": \"a\"}\n", &format!("etag: \"abc\"\r\nx-repo-commit: {COMMIT}\r\n"));
    let redirect = "HTTP/1.1 302 Found\r\nlocation: /elsewhere\r\nx-linked-etag: \"abc\"\r\nx-linked-size: 14\r\ncontent-length: 0\r\n\r\n";
    // The first part answers the list, the second everything else.
    let seeds = vec![
        ("answers".into(), format!("{}\u{1}{file}", ok(&listing, "")).into()),
        ("answers".into(), format!("{}\u{1}{redirect}", ok(&listing, "")).into()),
    ];
    Reader { name: "hub_answers", seeds, read: fetch, cost: 10 }
}

/// Tells the server what to answer, and fetches.
fn fetch(path: &Path) -> Result<(), String> {
    let answers = std::fs::read(path).unwrap();
    let address = std::env::var("HF_ENDPOINT").unwrap();
    let mut stream = TcpStream::connect(address.trim_start_matches("http://")).unwrap();
    stream.write_all(format!("PUT {}\r\n\r\n", answers.len()).as_bytes()).unwrap();
    stream.write_all(&answers).unwrap();
    // The server closes when it has them.
    let _ = stream.read(&mut [0]);
    let cache = PathBuf::from(std::env::var("HF_HUB_CACHE").unwrap());
    let _ = std::fs::remove_dir_all(&cache);
    let found = hub::fetch("owner/set", hub::Kind::Dataset, "main", |_| true, &mut |_| {});
    let around: Vec<_> = std::fs::read_dir(cache.parent().unwrap()).unwrap().flatten().map(|e| e.file_name()).collect();
    assert!(around.iter().all(|name| name == "hub"), "files beside the cache: {around:?}");
    found.map(|_| ()).map_err(|e| e.to_string())
}

/// A hub that answers what it was told last; returns its address.
fn serve() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        let (mut listing, mut file) = (Vec::new(), Vec::new());
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            let mut first = String::new();
            let _ = reader.read_line(&mut first);
            let mut line = String::new();
            while reader.read_line(&mut line).is_ok_and(|count| count > 2) {
                line.clear();
            }
            if let Some(length) = first.strip_prefix("PUT ") {
                let mut answers = vec![0; length.trim().parse().unwrap()];
                reader.read_exact(&mut answers).unwrap();
                let at = answers.iter().position(|&b| b == 1).unwrap_or(answers.len());
                (listing, file) = (answers[..at].to_vec(), answers.get(at + 1..).unwrap_or_default().to_vec());
            } else {
                let _ = stream.write_all(if first.contains("/api/") { &listing } else { &file });
            }
        }
    });
    address
}

#[test]
fn json_survives() {
    survives(&json(), "child", &[]);
}

#[test]
fn csv_survives() {
    survives(&csv(), "child", &[]);
}

#[test]
fn parquet_survives() {
    survives(&parquet(), "child", &[]);
}

#[test]
fn arrow_survives() {
    survives(&arrow(), "child", &[]);
}

#[test]
fn card_survives() {
    survives(&card(), "child", &[]);
}

#[test]
fn hub_answers_survive() {
    let folder = tempfile::tempdir().unwrap();
    let cache = folder.path().join("hub").display().to_string();
    survives(&hub_answers(), "child", &[("HF_ENDPOINT", serve()), ("HF_HUB_CACHE", cache)]);
}
