//! Models and data sets from the Hugging Face hub.
//!
//! [`fetch`] brings the wanted files of a repository into the shared cache (the layout of `huggingface_hub`) and returns
//! the snapshot's folder; what the cache already has is not downloaded again, and a warm cache works without a network.
//! Readers of data sets and the model's weight loader call it. Nothing a hub answers is believed: names of files, commits
//! and etags become paths only if they stay inside of the cache, and files have the size that was announced.
//! Environment: `HF_HOME`, `HF_HUB_CACHE`, `HF_HUB_OFFLINE`, `HF_ENDPOINT`, `HF_TOKEN`.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use hf_hub::{Cache, Repo, RepoType};

use super::Error;
use super::http::{Answer, Client, encoded};

/// What a repository holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Weights, tokenizer, configuration.
    Model,
    /// Rows.
    Dataset,
}

/// The state of a download.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Download<'a> {
    /// File in the repository.
    pub file: &'a str,
    /// Bytes here so far.
    pub done_bytes: u64,
    /// Bytes of the whole file.
    pub total_bytes: u64,
}

/// Called while files come in.
pub type Progress<'a> = dyn FnMut(Download<'_>) + 'a;

/// How long to wait for the list of files before the cache is tried.
const LISTING_TIMEOUT: Duration = Duration::from_secs(20);

/// Largest list of files that is read.
const MOST_LISTING_BYTES: u64 = 64 << 20;

/// Attempts to go on with a broken download.
const RETRIES: usize = 4;

/// Folders below a snapshot that are looked into.
const MOST_FOLDERS: usize = 16;

/// Where and how the hub is reached; [`Access::from_environment`] for all but tests.
#[derive(Clone, Debug)]
pub struct Access {
    cache: PathBuf,
    endpoint: String,
    token: Option<String>,
    is_offline: bool,
}

impl Access {
    /// Reads `HF_HOME`, `HF_HUB_CACHE`, `HF_HUB_OFFLINE`, `HF_ENDPOINT` and `HF_TOKEN`.
    pub fn from_environment() -> Self {
        Self::from_variables(|name| std::env::var(name).ok())
    }

    fn from_variables(variable: impl Fn(&str) -> Option<String>) -> Self {
        let set = |name: &str| variable(name).filter(|value| !value.trim().is_empty());
        let home = set("HF_HOME").map_or_else(
            || PathBuf::from(set("HOME").unwrap_or_else(|| ".".into())).join(".cache/huggingface"),
            PathBuf::from,
        );
        let token_file = || Cache::new(home.join("hub")).token();
        let is_yes = |value: String| matches!(value.to_lowercase().as_str(), "1" | "true" | "yes" | "on");
        Self {
            cache: set("HF_HUB_CACHE").map_or_else(|| home.join("hub"), PathBuf::from),
            endpoint: set("HF_ENDPOINT")
                .unwrap_or_else(|| "https://huggingface.co".into())
                .trim_end_matches('/')
                .into(),
            token: set("HF_TOKEN").or_else(token_file).map(|t| t.trim().to_string()).filter(|t| !t.is_empty()),
            is_offline: set("HF_HUB_OFFLINE").is_some_and(is_yes),
        }
    }

    /// Brings all files of a repository that `wanted` accepts into the cache; returns the snapshot's folder.
    ///
    /// # Errors
    /// If the hub cannot be reached and the cache has none of the files, or no file is wanted, or a download fails.
    pub fn fetch(
        &mut self,
        repo: &str,
        kind: Kind,
        revision: &str,
        wanted: impl Fn(&str) -> bool,
        progress: &mut Progress<'_>,
    ) -> Result<PathBuf, Error> {
        let failed = |problem: String| kind.error(repo, revision, problem);
        match self.listing(repo, kind, revision) {
            Ok(listing) => {
                let files: Vec<&String> = listing.files.iter().filter(|file| wanted(file)).collect();
                if files.is_empty() {
                    return Err(failed("none of its files is of use here; check the id".into()));
                }
                let folder = self.repo_folder(repo, kind).join("snapshots").join(&listing.commit);
                for file in files {
                    if !folder.join(file).exists() {
                        self.download(repo, kind, &listing.commit, file, progress).map_err(&failed)?;
                    }
                }
                // So that the branch's or tag's name leads to this snapshot when there is no network.
                if revision != listing.commit {
                    let name = self.repo_folder(repo, kind).join("refs").join(revision);
                    create_parent(&name).map_err(&failed)?;
                    crate::fs::write_atomic(&name, listing.commit.as_bytes()).map_err(|e| failed(e.to_string()))?;
                }
                Ok(folder)
            }
            Err(reason) => {
                let folder = self.cached(repo, kind, revision).ok_or_else(|| failed(self.advice(&reason)))?;
                if list_snapshot(&folder).iter().any(|file| wanted(file)) {
                    self.go_offline(repo, &reason);
                    Ok(folder)
                } else {
                    Err(failed(format!(
                        "its snapshot in the cache has none of the files needed; {}",
                        self.advice(&reason)
                    )))
                }
            }
        }
    }

    /// Names of all files of a repository: from the hub, or from the cache where the hub cannot be reached.
    ///
    /// # Errors
    /// If neither has it.
    pub fn list(&mut self, repo: &str, kind: Kind, revision: &str) -> Result<Vec<String>, Error> {
        match self.listing(repo, kind, revision) {
            Ok(listing) => Ok(listing.files),
            Err(reason) => match self.cached(repo, kind, revision) {
                Some(folder) => {
                    self.go_offline(repo, &reason);
                    Ok(list_snapshot(&folder))
                }
                None => Err(kind.error(repo, revision, self.advice(&reason))),
            },
        }
    }

    /// Uses the cache from here on, so that an unreachable hub is waited for once only.
    fn go_offline(&mut self, repo: &str, reason: &str) {
        if !self.is_offline {
            tracing::warn!("hub: {reason}; using the copy of `{repo}` in the cache `{}`", self.cache.display());
            self.is_offline = true;
        }
    }

    fn advice(&self, reason: &str) -> String {
        format!(
            "not in the cache `{}`, and {reason}; check the id and revision, set `HF_TOKEN` for a gated repository, or \
             give a local path",
            self.cache.display()
        )
    }

    fn listing(&self, repo: &str, kind: Kind, revision: &str) -> Result<Listing, String> {
        if self.is_offline {
            return Err("`HF_HUB_OFFLINE` is set".into());
        }
        if !is_repo_id(repo) || !is_inside(revision) {
            return Err(format!("`{repo}` at `{revision}` is not an id and a revision"));
        }
        let path = format!("/api/{}/{repo}/revision/{}", kind.folder(), encoded(revision).replace('/', "%2F"));
        let answer = self.client().get(&path, None, Some(LISTING_TIMEOUT))?;
        let mut text = Vec::new();
        let read = answer.body.take(MOST_LISTING_BYTES + 1).read_to_end(&mut text);
        read.map_err(|e| format!("{} answers: {e}", self.endpoint))?;
        if text.len() as u64 > MOST_LISTING_BYTES {
            return Err(format!("{} answers with a list of more than {MOST_LISTING_BYTES} bytes", self.endpoint));
        }
        let info: serde_json::Value =
            serde_json::from_slice(&text).map_err(|e| format!("{} answers no JSON: {e}", self.endpoint))?;
        let files: Option<Vec<String>> = info
            .get("siblings")
            .and_then(|list| list.as_array())
            .map(|list| list.iter().filter_map(|entry| entry.get("rfilename")?.as_str().map(str::to_string)).collect());
        let commit = info.get("sha").and_then(|sha| sha.as_str()).map(str::to_string);
        let (Some(files), Some(commit)) = (files, commit) else {
            return Err(format!("{} answers without `siblings` and `sha`", self.endpoint));
        };
        if !is_commit(&commit) {
            return Err(format!("{} answers with the commit {commit:?}, which is none", self.endpoint));
        }
        if let Some(file) = files.iter().find(|file| !is_inside(file)) {
            return Err(format!("{} answers with the file name {file:?}, which leads out of the cache", self.endpoint));
        }
        Ok(Listing { files, commit })
    }

    fn client(&self) -> Client<'_> {
        Client { endpoint: &self.endpoint, token: self.token.as_deref() }
    }

    fn repo_folder(&self, repo: &str, kind: Kind) -> PathBuf {
        self.cache.join(Repo::new(repo.into(), kind.repo_type()).folder_name())
    }

    /// Brings one file into the cache: its content under `blobs`, a link to it under `snapshots`.
    fn download(
        &self,
        repo: &str,
        kind: Kind,
        commit: &str,
        file: &str,
        progress: &mut Progress<'_>,
    ) -> Result<(), String> {
        let prefix = if kind == Kind::Dataset { "/datasets" } else { "" };
        let path = format!("{prefix}/{repo}/resolve/{commit}/{}", encoded(file));
        let folder = self.repo_folder(repo, kind);
        let mut problem = String::new();
        for attempt in 0..=RETRIES {
            if attempt > 0 {
                std::thread::sleep(Duration::from_millis(100 << attempt));
            }
            match self.attempt(&path, commit, &folder, file, progress) {
                Ok(blob) => return link(&folder, commit, file, &blob),
                Err(Failure::Final(what)) => return Err(format!("cannot download `{file}`: {what}")),
                Err(Failure::Passing(what)) => problem = what,
            }
        }
        Err(format!("cannot download `{file}`: {problem}; run again to go on with it"))
    }

    /// Goes on with a download; returns the name of the blob once it is whole.
    fn attempt(
        &self,
        path: &str,
        commit: &str,
        folder: &Path,
        file: &str,
        progress: &mut Progress<'_>,
    ) -> Result<String, Failure> {
        let mut answer = self.client().get(path, Some(0), None).map_err(Failure::Passing)?;
        if let Some(other) = answer.own_header("x-repo-commit").filter(|&other| other != commit) {
            return Err(Failure::Final(format!("the hub answers for the commit {other:?}, not {commit}")));
        }
        let etag = etag(&answer).map_err(Failure::Final)?;
        let total = size(&answer).map_err(Failure::Final)?;
        let blob = folder.join("blobs").join(&etag);
        let write = |what: &str, e: std::io::Error| Failure::Final(format!("cannot {what} `{}`: {e}", blob.display()));
        if blob.metadata().is_ok_and(|blob| blob.len() == total) {
            return Ok(etag);
        }
        create_parent(&blob).map_err(Failure::Final)?;
        let partial = folder.join("blobs").join(format!("{etag}.incomplete"));
        let mut out = OpenOptions::new().append(true).create(true).open(&partial).map_err(|e| write("open", e))?;
        // Another process may be at the same file.
        out.lock().map_err(|e| write("lock", e))?;
        let mut done = out.metadata().map_err(|e| write("read", e))?.len();
        if done > total {
            out.set_len(0).map_err(|e| write("shorten", e))?;
            done = 0;
        }
        if done > 0 && done < total {
            answer = self.client().get(path, Some(done), None).map_err(Failure::Passing)?;
            if answer.status != 206 || range_start(&answer) != Some(done) {
                out.set_len(0).map_err(|e| write("shorten", e))?;
                return Err(Failure::Passing("the hub does not go on where the download broke off".into()));
            }
        }
        if done < total {
            copy(answer.body, &mut out, file, done, total, progress)?;
        } else {
            progress(Download { file, done_bytes: total, total_bytes: total });
        }
        out.sync_all().map_err(|e| write("write", e))?;
        std::fs::rename(&partial, &blob).map_err(|e| write("write", e))?;
        Ok(etag)
    }

    /// The folder of the snapshot that a branch, tag or commit leads to in the cache.
    fn cached(&self, repo: &str, kind: Kind, revision: &str) -> Option<PathBuf> {
        if !is_repo_id(repo) || !is_inside(revision) {
            return None;
        }
        let folder = self.repo_folder(repo, kind);
        let commit = std::fs::read_to_string(folder.join("refs").join(revision));
        let commit = commit.map_or_else(|_| revision.to_string(), |text| text.trim().to_string());
        let snapshot = folder.join("snapshots").join(&commit);
        (is_inside(&commit) && snapshot.is_dir()).then_some(snapshot)
    }
}

/// Why a download did not end well.
enum Failure {
    /// Trying again may help.
    Passing(String),
    Final(String),
}

/// Copies what comes until a file has its size; neither more nor less.
fn copy(
    mut body: Box<dyn Read>,
    out: &mut File,
    file: &str,
    mut done: u64,
    total: u64,
    progress: &mut Progress<'_>,
) -> Result<(), Failure> {
    let mut chunk = vec![0; 1 << 16];
    progress(Download { file, done_bytes: done, total_bytes: total });
    loop {
        let count = body.read(&mut chunk).map_err(|e| Failure::Passing(e.to_string()))?;
        if count == 0 {
            break;
        }
        done += count as u64;
        if done > total {
            // What was written may be anybody's.
            out.set_len(0).map_err(|e| Failure::Final(e.to_string()))?;
            return Err(Failure::Final(format!("the hub sends more than the {total} bytes it announced")));
        }
        out.write_all(&chunk[..count]).map_err(|e| Failure::Final(e.to_string()))?;
        progress(Download { file, done_bytes: done, total_bytes: total });
    }
    if done < total {
        return Err(Failure::Passing(format!("the hub sent {done} of {total} bytes")));
    }
    Ok(())
}

/// The name of a file's content.
fn etag(answer: &Answer) -> Result<String, String> {
    let etag = answer.own_header("x-linked-etag").or_else(|| answer.own_header("etag"));
    let etag = etag.ok_or("the hub answers without an etag")?;
    let name = etag.trim_start_matches("W/").trim_matches('"');
    let is_name = (1..=128).contains(&name.len())
        && !name.starts_with('.')
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
    if is_name { Ok(name.to_string()) } else { Err(format!("the hub answers with the etag {etag:?}, which is none")) }
}

/// The size of the whole file, on which all headers must agree.
fn size(answer: &Answer) -> Result<u64, String> {
    let number = |text: &str| text.trim().parse::<u64>().ok();
    let linked = answer.own_header("x-linked-size").and_then(number);
    let range = answer.header("content-range").and_then(|range| number(range.rsplit_once('/')?.1));
    let length = answer.header("content-length").and_then(number);
    let sizes: Vec<u64> = [linked, range, length].into_iter().flatten().collect();
    match sizes.as_slice() {
        [] => Err("the hub does not say how large the file is".into()),
        [first, others @ ..] if others.iter().all(|size| size == first) => Ok(*first),
        _ => Err(format!(
            "the hub says of one file that it has {} bytes",
            sizes.iter().map(u64::to_string).collect::<Vec<_>>().join(" and ")
        )),
    }
}

fn range_start(answer: &Answer) -> Option<u64> {
    answer.header("content-range")?.trim().strip_prefix("bytes ")?.split_once('-')?.0.parse().ok()
}

fn create_parent(path: &Path) -> Result<(), String> {
    let parent = path.parent().ok_or("no folder")?;
    std::fs::create_dir_all(parent).map_err(|e| format!("cannot create the folder `{}`: {e}", parent.display()))
}

/// Makes a snapshot's file lead to its blob.
fn link(folder: &Path, commit: &str, file: &str, etag: &str) -> Result<(), String> {
    let pointer = folder.join("snapshots").join(commit).join(file);
    create_parent(&pointer)?;
    let up = "../".repeat(file.split('/').count() + 1);
    let made = link_or_copy(&format!("{up}blobs/{etag}"), &folder.join("blobs").join(etag), &pointer);
    match made {
        Err(_) if pointer.exists() => Ok(()),
        other => other.map_err(|e| format!("cannot write `{}`: {e}", pointer.display())),
    }
}

#[cfg(unix)]
fn link_or_copy(relative: &str, _blob: &Path, pointer: &Path) -> std::io::Result<()> {
    std::os::unix::fs::symlink(relative, pointer)
}

#[cfg(not(unix))]
fn link_or_copy(_relative: &str, blob: &Path, pointer: &Path) -> std::io::Result<()> {
    std::fs::copy(blob, pointer).map(|_| ())
}

/// Whether a name is 40 hexadecimal digits, as git's commits are.
fn is_commit(name: &str) -> bool {
    name.len() == 40 && name.bytes().all(|b| b.is_ascii_hexdigit())
}

/// Whether a relative path stays below where it starts, on any system.
fn is_inside(path: &str) -> bool {
    let is_plain = |part: Component<'_>| matches!(part, Component::Normal(_));
    !path.is_empty()
        && path.len() <= 1024
        && !path.chars().any(|c| c == '\\' || c.is_control())
        && !path.split('/').any(|part| part.is_empty() || part == "." || part == ".." || part.ends_with(':'))
        && Path::new(path).components().all(is_plain)
}

/// As [`Access::fetch`], with the access that the environment describes.
///
/// # Errors
/// As [`Access::fetch`].
pub fn fetch(
    repo: &str,
    kind: Kind,
    revision: &str,
    wanted: impl Fn(&str) -> bool,
    progress: &mut Progress<'_>,
) -> Result<PathBuf, Error> {
    Access::from_environment().fetch(repo, kind, revision, wanted, progress)
}

/// Whether a name has the form of a hub id: `name` or `owner/name` of letters, digits, `-`, `_` and `.`.
pub fn is_repo_id(name: &str) -> bool {
    let is_part = |part: &str| {
        !part.is_empty()
            && part.len() <= 96
            && !part.starts_with(['.', '-'])
            && part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
    };
    let mut parts = name.split('/');
    parts.next().is_some_and(is_part) && parts.next().is_none_or(is_part) && parts.next().is_none()
}

struct Listing {
    files: Vec<String>,
    commit: String,
}

impl Kind {
    fn repo_type(self) -> RepoType {
        match self {
            Self::Model => RepoType::Model,
            Self::Dataset => RepoType::Dataset,
        }
    }

    /// The name of the hub's lists.
    fn folder(self) -> &'static str {
        match self {
            Self::Model => "models",
            Self::Dataset => "datasets",
        }
    }

    fn error(self, repo: &str, revision: &str, problem: String) -> Error {
        let kind = match self {
            Self::Model => "model",
            Self::Dataset => "data set",
        };
        Error::Hub { kind, repo: repo.into(), revision: revision.into(), problem }
    }
}

/// Names of all files below a snapshot's folder, sorted.
fn list_snapshot(folder: &Path) -> Vec<String> {
    let mut files = Vec::new();
    let mut pending = vec![(folder.to_path_buf(), 0)];
    while let Some((current, level)) = pending.pop() {
        for entry in std::fs::read_dir(&current).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() {
                if level < MOST_FOLDERS {
                    pending.push((path, level + 1));
                }
            } else if let Ok(relative) = path.strip_prefix(folder) {
                files.push(relative.to_string_lossy().into_owned());
            }
        }
    }
    files.sort();
    files
}

#[cfg(test)]
mod tests {
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
            let siblings: Vec<String> =
                files.iter().map(|(name, _)| format!("{{\"rfilename\": \"{name}\"}}")).collect();
            let body = format!("{{\"sha\": \"{COMMIT}\", \"siblings\": [{}]}}", siblings.join(","));
            return format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}", body.len())
                .into();
        }
        let prefix = format!("/datasets/owner/set/resolve/{COMMIT}/");
        let Some((name, bytes)) = path.strip_prefix(&prefix).and_then(|name| files.iter().find(|(n, _)| *n == name))
        else {
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
        assert!(
            text.contains("hub data set `owner/absent` at `main`: not in the cache") && text.contains("404"),
            "{text}"
        );
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
                let range =
                    headers.iter().find_map(|h| h.to_lowercase().strip_prefix("range: bytes=").map(str::to_string));
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
}
