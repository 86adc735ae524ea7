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
#[path = "hub_tests.rs"]
mod tests;
