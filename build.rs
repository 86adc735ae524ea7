//! Notes the commit that the program is built from.

use std::process::Command;

fn main() {
    let commit = Command::new("git").args(["rev-parse", "--short=12", "HEAD"]).output();
    if let Some(commit) = commit.ok().filter(|o| o.status.success()).and_then(|o| String::from_utf8(o.stdout).ok()) {
        println!("cargo::rustc-env=TRAINER_GIT_COMMIT={}", commit.trim());
        println!("cargo::rerun-if-changed=.git/HEAD");
        println!("cargo::rerun-if-changed=.git/logs/HEAD");
    }
    println!("cargo::rerun-if-changed=build.rs");
}
