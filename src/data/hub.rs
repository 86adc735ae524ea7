//! Models and data sets from the Hugging Face hub.
//!
//! [`fetch`] brings the wanted files of a repository into the shared cache (the layout of `huggingface_hub`) and returns
//! the snapshot's folder; what the cache already has is not downloaded again, and a warm cache works without a network.
//! Readers of data sets and the model's weight loader call it. Environment: `HF_HOME`, `HF_HUB_CACHE`, `HF_HUB_OFFLINE`,
//! `HF_ENDPOINT`, `HF_TOKEN`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use hf_hub::api::sync::{ApiBuilder, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};

use super::Error;

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

/// Attempts to go on with a broken download.
const RETRIES: usize = 4;

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
        let token_file = || std::fs::read_to_string(home.join("token")).ok();
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
                let (api, cache) = self.open(repo, kind, &listing.commit).map_err(&failed)?;
                let folder = cache.pointer_path(&listing.commit);
                for file in files {
                    if !folder.join(file).exists() {
                        let adapter = ProgressAdapter { report: progress, file, done_bytes: 0, total_bytes: 0 };
                        api.download_with_progress(file, adapter).map_err(|e| {
                            failed(format!("cannot download `{file}`: {e}; run again to go on with it"))
                        })?;
                    }
                }
                // So that the branch's or tag's name leads to this snapshot when there is no network.
                let named = Cache::new(self.cache.clone()).repo(kind.repo(repo, revision));
                named.create_ref(&listing.commit).map_err(|e| failed(format!("cannot write into the cache: {e}")))?;
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
        let (api, _) = self.open(repo, kind, revision)?;
        let request = api.info_request().config().timeout_global(Some(LISTING_TIMEOUT)).build();
        let mut response = request.call().map_err(|e| format!("{} answers: {e}", self.endpoint))?;
        let text = response.body_mut().read_to_string().map_err(|e| format!("{} answers: {e}", self.endpoint))?;
        let info: serde_json::Value =
            serde_json::from_str(&text).map_err(|e| format!("{} answers no JSON: {e}", self.endpoint))?;
        let files = info
            .get("siblings")
            .and_then(|list| list.as_array())
            .map(|list| list.iter().filter_map(|entry| entry.get("rfilename")?.as_str().map(str::to_string)).collect());
        let commit = info.get("sha").and_then(|sha| sha.as_str()).map(str::to_string);
        match (files, commit) {
            (Some(files), Some(commit)) => Ok(Listing { files, commit }),
            _ => Err(format!("{} answers without `siblings` and `sha`", self.endpoint)),
        }
    }

    fn open(&self, repo: &str, kind: Kind, revision: &str) -> Result<(ApiRepo, hf_hub::CacheRepo), String> {
        let cache = Cache::new(self.cache.clone());
        let repo = kind.repo(repo, revision);
        let api = ApiBuilder::from_cache(cache.clone())
            .with_endpoint(self.endpoint.clone())
            .with_token(self.token.clone())
            .with_retries(RETRIES)
            .with_progress(false)
            .build()
            .map_err(|e| e.to_string())?;
        Ok((api.repo(repo.clone()), cache.repo(repo)))
    }

    /// The folder of the snapshot that a branch, tag or commit leads to in the cache.
    fn cached(&self, repo: &str, kind: Kind, revision: &str) -> Option<PathBuf> {
        let folder = self.cache.join(kind.repo(repo, revision).folder_name());
        let commit = std::fs::read_to_string(folder.join("refs").join(revision));
        let commit = commit.map_or_else(|_| revision.to_string(), |text| text.trim().to_string());
        let snapshot = folder.join("snapshots").join(commit);
        snapshot.is_dir().then_some(snapshot)
    }
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
    fn repo(self, repo: &str, revision: &str) -> Repo {
        let kind = match self {
            Self::Model => RepoType::Model,
            Self::Dataset => RepoType::Dataset,
        };
        Repo::with_revision(repo.into(), kind, revision.into())
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
    let mut pending = vec![folder.to_path_buf()];
    while let Some(current) = pending.pop() {
        for entry in std::fs::read_dir(&current).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() {
                pending.push(path);
            } else if let Ok(relative) = path.strip_prefix(folder) {
                files.push(relative.to_string_lossy().into_owned());
            }
        }
    }
    files.sort();
    files
}

struct ProgressAdapter<'a, 'b> {
    report: &'a mut Progress<'b>,
    file: &'a str,
    done_bytes: u64,
    total_bytes: u64,
}

impl hf_hub::api::Progress for ProgressAdapter<'_, '_> {
    fn init(&mut self, size: usize, _filename: &str) {
        (self.done_bytes, self.total_bytes) = (0, size as u64);
        self.update(0);
    }

    fn update(&mut self, size: usize) {
        self.done_bytes += size as u64;
        (self.report)(Download { file: self.file, done_bytes: self.done_bytes, total_bytes: self.total_bytes });
    }

    fn finish(&mut self) {}
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
