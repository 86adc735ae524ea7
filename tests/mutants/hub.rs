//! What a hub answers.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};

use trainer::data::hub;

use super::mutate::{Reader, Seeds, no_files};

pub(crate) const ANSWERS: Reader =
    Reader { name: "hub_answers", prepare: no_files, seeds: answers, read: fetch, cost: 10 };

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What a hub answers to the two requests of a download.
fn answers(_: &Path) -> Seeds {
    let listing = format!(
        "{{\"sha\": \"{COMMIT}\", \"siblings\": [{{\"rfilename\": \"train.jsonl\"}}, {{\"rfilename\": \"a/b\"}}]}}"
    );
    let ok = |body: &str, more: &str| {
        format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n{more}connection: close\r\n\r\n{body}", body.len())
    };
    let file = ok("{\"text\": \"a\"}\n", &format!("etag: \"abc\"\r\nx-repo-commit: {COMMIT}\r\n"));
    let redirect = "HTTP/1.1 302 Found\r\nlocation: /elsewhere\r\nx-linked-etag: \"abc\"\r\nx-linked-size: 14\r\ncontent-length: 0\r\n\r\n";
    // The first part answers the list, the second everything else.
    vec![
        ("answers".into(), format!("{}\u{1}{file}", ok(&listing, "")).into()),
        ("answers".into(), format!("{}\u{1}{redirect}", ok(&listing, "")).into()),
    ]
}

/// Tells the server what to answer, and fetches.
fn fetch(path: &Path, _: &Path) -> Result<(), String> {
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
pub(crate) fn serve() -> String {
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
                let elsewhere =
                    b"HTTP/1.1 200 OK\r\ncontent-length: 14\r\nconnection: close\r\n\r\n{\"text\": \"a\"}\n";
                let _ = stream.write_all(match &first {
                    first if first.contains("/api/") => &listing,
                    first if first.contains("/elsewhere") => elsewhere,
                    _ => &file,
                });
            }
        }
    });
    address
}
