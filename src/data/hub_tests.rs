//! Downloads from hubs on this machine: what is kept, what is refused, how the environment is read.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::sync::{Arc, Mutex};

use super::*;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A hub of one data set on this machine; counts the requests per path.
struct FakeHub {
    address: String,
    requests: Arc<Mutex<BTreeMap<String, usize>>>,
}

impl FakeHub {
    fn start(files: &'static [(&'static str, &'static [u8])]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let requests = Arc::new(Mutex::new(BTreeMap::new()));
        let counts = Arc::clone(&requests);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
                let Some(Ok(first)) = lines.next() else { continue };
                let path = first.split(' ').nth(1).unwrap().to_string();
                let headers: Vec<String> = lines.map_while(Result::ok).take_while(|l| !l.is_empty()).collect();
                *counts.lock().unwrap().entry(path.clone()).or_insert(0) += 1;
                let _ = stream.write_all(&answer(files, &path, &headers));
            }
        });
        Self { address, requests }
    }

    fn access(&self, cache: &Path) -> Access {
        let token = Some("secret".to_string());
        Access { cache: cache.into(), endpoint: self.address.clone(), token, is_offline: false }
    }

    fn downloads(&self) -> usize {
        let requests = self.requests.lock().unwrap();
        requests.iter().filter(|(path, _)| path.contains("/resolve/")).map(|(_, count)| count).sum()
    }
}

fn answer(files: &[(&str, &[u8])], path: &str, headers: &[String]) -> Vec<u8> {
    let not_found = b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n".to_vec();
    let has = |start: &str| headers.iter().find_map(|h| h.to_lowercase().strip_prefix(start).map(str::to_string));
    if has("authorization: bearer secret").is_none() {
        return not_found;
    }
    if path == "/api/datasets/owner/set/revision/main" {
        let siblings: Vec<String> = files.iter().map(|(name, _)| format!("{{\"rfilename\": \"{name}\"}}")).collect();
        let body = format!("{{\"sha\": \"{COMMIT}\", \"siblings\": [{}]}}", siblings.join(","));
        return format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}", body.len()).into();
    }
    let prefix = format!("/datasets/owner/set/resolve/{COMMIT}/");
    let Some((name, bytes)) = path.strip_prefix(&prefix).and_then(|name| files.iter().find(|(n, _)| *n == name)) else {
        return not_found;
    };
    let range = has("range: bytes=").unwrap();
    let (start, end) = range.split_once('-').unwrap();
    let start: usize = start.parse().unwrap();
    let end = end.parse().map_or(bytes.len(), |end: usize| end + 1);
    let head = format!(
        "HTTP/1.1 206 Partial Content\r\nx-repo-commit: {COMMIT}\r\netag: \"{}\"\r\ncontent-range: bytes {start}-{}/{}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
        name.replace('/', "-"),
        end - 1,
        bytes.len(),
        end - start
    );
    [head.as_bytes(), &bytes[start..end]].concat()
}

#[test]
fn wanted_files_are_downloaded_once_and_served_from_the_cache_without_a_network() {
    let hub = FakeHub::start(&[("data/train.jsonl", b"{\"x\": 1}\n{\"x\": 2}\n"), ("README.md", b"no")]);
    let cache = tempfile::tempdir().unwrap();
    let wanted = |file: &str| file.ends_with(".jsonl");
    let mut access = hub.access(cache.path());
    assert_eq!(access.list("owner/set", Kind::Dataset, "main").unwrap(), ["data/train.jsonl", "README.md"]);
    let mut seen = Vec::new();
    let mut note = |d: Download<'_>| seen.push((d.file.to_string(), d.done_bytes, d.total_bytes));
    let folder = access.fetch("owner/set", Kind::Dataset, "main", wanted, &mut note).unwrap();
    assert_eq!(std::fs::read(folder.join("data/train.jsonl")).unwrap(), b"{\"x\": 1}\n{\"x\": 2}\n");
    assert!(!folder.join("README.md").exists());
    assert_eq!(seen.last(), Some(&("data/train.jsonl".to_string(), 18, 18)));
    let downloads = hub.downloads();
    assert_eq!(access.fetch("owner/set", Kind::Dataset, "main", wanted, &mut |_| {}).unwrap(), folder);
    assert_eq!(hub.downloads(), downloads, "a second fetch must not download again");

    // By name and by commit, offline and with a hub that is not there.
    let offline = Access { is_offline: true, ..access.clone() };
    let unreachable = Access { endpoint: "http://127.0.0.1:9".into(), ..access };
    for mut access in [offline, unreachable] {
        for revision in ["main", COMMIT] {
            let found = access.fetch("owner/set", Kind::Dataset, revision, wanted, &mut |_| {}).unwrap();
            assert_eq!(found, folder);
        }
        assert_eq!(access.list("owner/set", Kind::Dataset, "main").unwrap(), ["data/train.jsonl"]);
    }
}

#[test]
fn what_is_not_there_is_an_error_that_says_what_to_do() {
    let hub = FakeHub::start(&[("model.bin", b"x")]);
    let cache = tempfile::tempdir().unwrap();
    let mut access = hub.access(cache.path());
    let mut message = |repo: &str, revision: &str| {
        access.fetch(repo, Kind::Dataset, revision, |f| f == "a.jsonl", &mut |_| {}).unwrap_err().to_string()
    };
    let text = message("owner/absent", "main");
    assert!(text.contains("hub data set `owner/absent` at `main`: not in the cache") && text.contains("404"), "{text}");
    let text = message("owner/set", "main");
    assert!(text.contains("none of its files is of use here"), "{text}");
    let mut offline = Access { is_offline: true, ..access };
    let text = offline.fetch("o/m", Kind::Model, "v1", |_| true, &mut |_| {}).unwrap_err().to_string();
    assert!(text.contains("hub model `o/m` at `v1`") && text.contains("`HF_HUB_OFFLINE` is set"), "{text}");
}

/// A server that answers as `answer` says; it gets the path and the headers.
fn server(answer: impl Fn(&str, &[String]) -> Vec<u8> + Send + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
            let Some(Ok(first)) = lines.next() else { continue };
            let headers: Vec<String> = lines.map_while(Result::ok).take_while(|l| !l.is_empty()).collect();
            let _ = stream.write_all(&answer(first.split(' ').nth(1).unwrap_or(""), &headers));
        }
    });
    address
}

fn ok(headers: &str, body: &str) -> Vec<u8> {
    format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n{headers}connection: close\r\n\r\n{body}", body.len()).into()
}

fn listing_of(file: &str) -> Vec<u8> {
    ok("", &format!("{{\"sha\": \"{COMMIT}\", \"siblings\": [{{\"rfilename\": {file:?}}}]}}"))
}

/// Fetches everything of a hub; also returns the names beside the cache.
fn fetch_all(endpoint: &str, folder: &Path) -> (Result<PathBuf, String>, Vec<String>) {
    let token = Some("secret".to_string());
    let mut access = Access { cache: folder.join("cache"), endpoint: endpoint.into(), token, is_offline: false };
    let found = access.fetch("owner/set", Kind::Dataset, "main", |_| true, &mut |_| {}).map_err(|e| e.to_string());
    let names = std::fs::read_dir(folder).unwrap().flatten();
    (found, names.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect())
}

#[test]
fn names_commits_and_etags_that_lead_out_of_the_cache_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let refused = |endpoint: &str, words: &str| {
        let (found, names) = fetch_all(endpoint, folder.path());
        let text = found.unwrap_err();
        assert!(text.contains(words), "{text}");
        assert!(names.iter().all(|name| name == "cache"), "{names:?}");
    };
    for file in ["../../../../evil", "/tmp/evil", "a/../../b", "a\\..\\b", "C:/evil", "./a", "a//b", ".."] {
        refused(&server(move |_, _| listing_of(file)), "leads out of the cache");
    }
    for sha in ["../../evil", "main", "", "0123456789abcdef0123456789abcdef0123456/"] {
        let body = format!("{{\"sha\": \"{sha}\", \"siblings\": [{{\"rfilename\": \"a\"}}]}}");
        refused(&server(move |_, _| ok("", &body)), "which is none");
    }
    let with = |headers: &'static str| {
        server(move |path, _| if path.starts_with("/api/") { listing_of("a.jsonl") } else { ok(headers, "evil") })
    };
    for etag in ["etag: \"../../evil\"\r\n", "x-linked-etag: \"/evil\"\r\n", "etag: \"\"\r\n", "etag: \".\"\r\n"] {
        refused(&with(etag), "the etag");
    }
    refused(&with(""), "without an etag");
    refused(&with("etag: \"a\"\r\nx-repo-commit: ../../evil\r\n"), "answers for the commit");
    refused(&with("etag: \"a\"\r\nx-linked-size: 5\r\n"), "5 and 4 bytes");
}

#[test]
fn the_token_stays_at_the_hub_s_own_address() {
    let folder = tempfile::tempdir().unwrap();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let notes = Arc::clone(&seen);
    let elsewhere = server(move |_, headers| {
        notes.lock().unwrap().extend(headers.iter().cloned());
        ok("", "far away")
    });
    let hub = server(move |path, headers| {
        assert!(headers.iter().any(|header| header.to_lowercase() == "authorization: bearer secret"));
        if path.starts_with("/api/") {
            return listing_of("a.jsonl");
        }
        let head = "HTTP/1.1 302 Found\r\netag: \"hop\"\r\nx-linked-etag: \"abc\"\r\nx-linked-size: 8\r\ncontent-length: 0\r\n";
        format!("{head}location: {elsewhere}/blob\r\nconnection: close\r\n\r\n").into()
    });
    let (found, _) = fetch_all(&hub, folder.path());
    let found = found.unwrap();
    assert_eq!(std::fs::read_to_string(found.join("a.jsonl")).unwrap(), "far away");
    assert!(folder.path().join("cache/datasets--owner--set/blobs/abc").is_file());
    let seen = seen.lock().unwrap();
    assert!(!seen.is_empty() && !seen.iter().any(|header| header.to_lowercase().contains("secret")), "{seen:?}");
}

#[test]
fn a_file_has_the_size_that_was_announced_and_a_broken_download_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let hub = |range_of: fn(usize) -> (usize, usize)| {
        server(move |path, headers| {
            if path.starts_with("/api/") {
                return listing_of("a.jsonl");
            }
            let range = headers.iter().find_map(|h| h.to_lowercase().strip_prefix("range: bytes=").map(str::to_string));
            let start: usize = range.unwrap().trim_end_matches('-').parse().unwrap();
            let (from, to) = range_of(start);
            let text = &"0123456789 and more"[from..to];
            let head = format!("content-range: bytes {start}-9/10\r\netag: \"abc\"\r\n");
            let head = format!(
                "HTTP/1.1 206 Partial Content\r\n{head}content-length: {}\r\nconnection: close\r\n\r\n",
                10 - start
            );
            [head.as_bytes(), text.as_bytes()].concat()
        })
    };
    // Four bytes at a time, and never all that was announced.
    let (found, _) = fetch_all(&hub(|start| (start, (start + 4).min(10))), folder.path());
    assert_eq!(std::fs::read_to_string(found.unwrap().join("a.jsonl")).unwrap(), "0123456789");
    let stuck = tempfile::tempdir().unwrap();
    let text = fetch_all(&hub(|start| (start, start.max(3))), stuck.path()).0.unwrap_err();
    assert!(text.contains("cannot download `a.jsonl`") && text.contains("run again to go on"), "{text}");
    assert!(!stuck.path().join("cache/datasets--owner--set/blobs/abc").exists());
}

#[test]
fn the_environment_is_read_as_huggingface_hub_reads_it() {
    let access = |pairs: &[(&str, &str)]| {
        let pairs: BTreeMap<String, String> = pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        Access::from_variables(|name| pairs.get(name).cloned())
    };
    let plain = access(&[("HOME", "/h")]);
    assert_eq!(plain.cache, Path::new("/h/.cache/huggingface/hub"));
    assert_eq!((plain.endpoint.as_str(), plain.token, plain.is_offline), ("https://huggingface.co", None, false));
    assert_eq!(access(&[("HF_HOME", "/hf")]).cache, Path::new("/hf/hub"));
    let set = access(&[
        ("HF_HOME", "/hf"),
        ("HF_HUB_CACHE", "/c"),
        ("HF_ENDPOINT", "http://mirror/"),
        ("HF_TOKEN", " t\n"),
        ("HF_HUB_OFFLINE", "1"),
    ]);
    assert_eq!(set.cache, Path::new("/c"));
    assert_eq!((set.endpoint.as_str(), set.token.as_deref(), set.is_offline), ("http://mirror", Some("t"), true));
}

#[test]
fn hub_ids_are_told_from_paths() {
    for id in ["openai/gsm8k", "gpt2", "Qwen/Qwen2.5-0.5B_x"] {
        assert!(is_repo_id(id), "{id}");
    }
    for path in ["./x", "/a/b", "a/b/c", "", "a b", "../up", "a/", "/a"] {
        assert!(!is_repo_id(path), "{path}");
    }
}
