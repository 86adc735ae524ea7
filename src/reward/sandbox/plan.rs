//! What a warden and its cell are told: the protection to build and the program to run in it.

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{FIRST_USER, NOBODY};

/// Everything about one run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Plan {
    pub(super) layers: Layers,
    pub(super) limits: Limits,
    /// What the program may read besides its own folder.
    pub(super) readable: Vec<PathBuf>,
    /// What it must not see even if it lies in one of those.
    pub(super) hidden: Vec<PathBuf>,
    /// A folder with `files`, which the program finds in its working directory, and `root`, which is empty.
    pub(super) folder: PathBuf,
    /// Program and arguments.
    pub(super) program: Vec<String>,
}

impl Plan {
    pub(super) fn to_text(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }

    /// Where the program's files lie.
    pub(super) fn files(&self) -> PathBuf {
        self.folder.join("files")
    }

    /// Where its root is built.
    pub(super) fn root(&self) -> PathBuf {
        self.folder.join("root")
    }
}

/// Limits of one program.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(in crate::reward) struct Limits {
    /// Seconds on the clock.
    pub(in crate::reward) wall_secs: f64,
    /// Memory of all its processes together.
    pub(in crate::reward) memory_bytes: u64,
    /// Processes and threads.
    pub(in crate::reward) processes: u64,
    /// Largest file, and all files in its folder together.
    pub(in crate::reward) file_bytes: u64,
}

/// Which protection is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Layers {
    pub(super) namespaces: Namespaces,
    /// Restrict file access by Landlock (where there are no namespaces).
    pub(super) landlock: bool,
    /// Filter system calls.
    pub(super) filter: bool,
    /// The user that programs run as, if the trainer is root.
    pub(super) user: User,
}

/// Namespaces of mounts, processes, network, host name and inter-process communication.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Namespaces {
    /// None.
    None,
    /// Taken with a user namespace, which everybody may have.
    User,
    /// Taken by root.
    Root,
}

/// The user that programs run as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum User {
    /// The trainer's.
    Same,
    /// One that nothing else on the machine has.
    Own,
    /// `nobody`.
    Nobody,
}

impl User {
    /// Its id for a sandbox whose warden has the process id `warden`.
    pub(super) fn id(self, warden: u32) -> Option<u32> {
        match self {
            Self::Same => None,
            Self::Own => Some(FIRST_USER + warden),
            Self::Nobody => Some(NOBODY),
        }
    }
}

impl Layers {
    /// What to try, strongest first.
    pub(super) fn candidates() -> Vec<Self> {
        let is_root = nix::unistd::geteuid().is_root();
        let users = if is_root { vec![User::Own, User::Nobody] } else { Vec::new() };
        let mut all = Vec::new();
        for &user in &users {
            all.push(Self { namespaces: Namespaces::Root, landlock: false, filter: true, user });
        }
        all.push(Self { namespaces: Namespaces::User, landlock: false, filter: true, user: User::Same });
        for (landlock, filter) in [(true, true), (false, true), (true, false), (false, false)] {
            for &user in users.iter().chain(&[User::Same]) {
                all.push(Self { namespaces: Namespaces::None, landlock, filter, user });
            }
        }
        all
    }

    /// What is missing.
    pub(super) fn gaps(self) -> Vec<String> {
        let mut gaps = Vec::new();
        if self.namespaces == Namespaces::None {
            if !self.landlock {
                gaps.push("programs can read the files of this machine that their user may read".to_owned());
            }
            if !self.filter {
                gaps.push("programs can use the network".to_owned());
            }
            gaps.push("programs see the machine's processes".to_owned());
            gaps.push("their disk use is bounded by file only".to_owned());
        } else if !self.filter {
            gaps.push("system calls are not filtered".to_owned());
        }
        gaps
    }
}

impl fmt::Display for Layers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (files, network, processes) = match (self.namespaces, self.landlock) {
            (Namespaces::None, true) => ("system folders read-only (Landlock)", "by system call filter", "shared"),
            (Namespaces::None, false) => ("not protected", "by system call filter", "shared"),
            _ => ("own root, system folders read-only", "own, empty", "own namespace"),
        };
        let network = if self.namespaces == Namespaces::None && !self.filter { "not protected" } else { network };
        let user = match (self.user, self.namespaces) {
            (User::Own, _) => "one of its own",
            (User::Nobody, _) => "nobody",
            (User::Same, Namespaces::User) => "the trainer's, without rights (user namespace)",
            (User::Same, _) => "the trainer's",
        };
        let filter = if self.filter { "filtered" } else { "not filtered" };
        write!(f, "files: {files}; network: {network}; processes: {processes}; user: {user}; system calls: {filter}")
    }
}
