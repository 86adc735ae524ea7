//! The rules of the house that no compiler checks: imports point down, `unsafe` stays in its rooms, nothing is left
//! undone, files stay short. Each rule is a function over source text and is itself tested on a text that breaks it.

use std::path::{Path, PathBuf};

/// The floor of each room; a room may name itself and rooms on lower floors.
const FLOORS: &[(&str, u32)] = &[
    ("error", 0),
    ("fs", 0),
    ("rng", 0),
    ("config", 1),
    ("device", 1),
    ("telemetry", 1),
    ("data", 2),
    ("kernels", 2),
    ("ranks", 2),
    ("reward", 2),
    ("ops", 3),
    ("quant", 3),
    ("algo", 4),
    ("model", 4),
    ("optim", 4),
    ("zero", 5),
    ("checkpoint", 6),
    ("engine", 6),
    ("rollout", 6),
    ("train", 7),
    ("cli", 8),
];
/// What the floors alone do not say: the first room does not name the second.
const FORBIDDEN: &[(&str, &str)] =
    &[("algo", "ranks"), ("algo", "kernels"), ("model", "ranks"), ("reward", "ranks"), ("reward", "kernels")];
/// Rooms of one floor of which the first may name the second.
const SAME_FLOOR: &[(&str, &str)] = &[("telemetry", "config"), ("ops", "quant"), ("rollout", "engine")];
/// Files, or folders ending in `/`, that may contain `unsafe`.
const UNSAFE: &[&str] = &["src/device/", "src/ranks/nccl.rs", "src/kernels/"];
/// Names that say nothing about what is in a file.
const EMPTY_NAMES: &[&str] = &["common.rs", "helpers.rs", "misc.rs", "types.rs", "utils.rs"];
/// Lines of a file, without its tests, beyond which it is split.
const MOST_LINES: usize = 600;

#[test]
fn the_parameter_store_knows_named_parameters_and_no_layer() {
    for file in sources().iter().filter(|file| room_of(&file.name) == "zero") {
        let text = without_tests(&bare(&file.text));
        let names: Vec<&str> = text.split("crate::model::").skip(1).collect();
        assert!(
            names.iter().all(|rest| rest.starts_with("params::")),
            "{} names more of `model` than `params`",
            file.name
        );
        assert!(!text.contains("model::{"), "{} names more of `model` than `params`", file.name);
    }
}

#[test]
fn imports_point_down() {
    let broken: Vec<String> = sources()
        .iter()
        .flat_map(|file| {
            let room = room_of(&file.name).to_string();
            let names = rooms_named(&without_tests(&bare(&file.text)));
            names.into_iter().filter_map(move |named| Some(format!("{}: {}", file.name, wrong_import(&room, &named)?)))
        })
        .collect();
    assert!(broken.is_empty(), "\n{}", broken.join("\n"));
}

#[test]
fn every_room_has_a_floor() {
    let rooms: Vec<String> = sources().iter().map(|file| room_of(&file.name).to_string()).collect();
    let unknown: Vec<&String> =
        rooms.iter().filter(|room| !["lib", "main"].contains(&room.as_str()) && floor(room).is_none()).collect();
    assert!(unknown.is_empty(), "give these rooms a floor in FLOORS and in docs/DESIGN.md: {unknown:?}");
}

#[test]
fn unsafe_stays_in_its_rooms_and_says_why_it_is_sound() {
    let broken: Vec<String> = sources().iter().flat_map(|file| unsafe_problems(&file.name, &file.text)).collect();
    assert!(broken.is_empty(), "\n{}", broken.join("\n"));
}

#[test]
fn only_one_file_names_nccl() {
    let broken: Vec<String> = sources()
        .iter()
        .filter(|file| file.name != "src/ranks/nccl.rs" && bare(&file.text).contains("cudarc::nccl"))
        .map(|file| format!("{} names NCCL, which is for src/ranks/nccl.rs", file.name))
        .collect();
    assert!(broken.is_empty(), "\n{}", broken.join("\n"));
}

#[test]
fn nothing_is_left_undone() {
    let broken: Vec<String> = sources()
        .iter()
        .flat_map(|file| {
            let text = bare(&file.text);
            ["todo!", "unimplemented!"]
                .into_iter()
                .filter(move |word| text.contains(word))
                .map(|word| format!("{} contains `{word}`", file.name))
        })
        .collect();
    assert!(broken.is_empty(), "\n{}", broken.join("\n"));
}

#[test]
fn files_are_short_and_named_for_what_is_in_them() {
    let mut broken = Vec::new();
    for file in sources() {
        let lines = code_lines(&file.text);
        if lines > MOST_LINES && !is_test(&file.name) {
            broken.push(format!("{} has {lines} lines without tests; split it by concept", file.name));
        }
        if EMPTY_NAMES.iter().any(|name| file.name.ends_with(&format!("/{name}"))) {
            broken.push(format!("{}: name it for what is in it", file.name));
        }
    }
    assert!(broken.is_empty(), "\n{}", broken.join("\n"));
}

struct Source {
    /// Path from the repository's root, with `/`.
    name: String,
    text: String,
}

/// All Rust files under `src`, sorted.
fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    let mut folders: Vec<PathBuf> = vec![root.join("src")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let name = path.strip_prefix(root).unwrap().to_string_lossy().replace('\\', "/");
                files.push(Source { name, text: std::fs::read_to_string(&path).unwrap() });
            }
        }
    }
    files.sort_by(|left, right| left.name.cmp(&right.name));
    assert!(files.len() > 20, "the sources were not found");
    files
}

/// `src/zero/partition.rs` and `src/zero.rs` belong to `zero`.
fn room_of(name: &str) -> &str {
    let inside = name.strip_prefix("src/").unwrap_or(name);
    inside.split('/').next().unwrap_or(inside).trim_end_matches(".rs")
}

fn is_test(name: &str) -> bool {
    name.contains("/tests/") || name.ends_with("/tests.rs") || name.ends_with("_tests.rs")
}

fn floor(room: &str) -> Option<u32> {
    FLOORS.iter().find(|(name, _)| *name == room).map(|(_, floor)| *floor)
}

/// What is wrong with `room` naming `named`, if anything.
fn wrong_import(room: &str, named: &str) -> Option<String> {
    if room == named || room == "lib" || room == "main" {
        return None;
    }
    if FORBIDDEN.contains(&(room, named)) {
        return Some(format!("`{room}` does not name `{named}`"));
    }
    let (from, to) = (floor(room)?, floor(named)?);
    if to < from || SAME_FLOOR.contains(&(room, named)) {
        return None;
    }
    Some(format!("`{room}` (floor {from}) names `{named}` (floor {to}); imports point down"))
}

/// The rooms that a text without comments names by `crate::`, in groups as well.
fn rooms_named(text: &str) -> Vec<String> {
    let mut rooms = Vec::new();
    for (start, _) in text.match_indices("crate::") {
        let follows_a_name = text[..start].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == '$');
        if follows_a_name {
            continue;
        }
        let rest = text[start + "crate::".len()..].trim_start();
        match rest.strip_prefix('{') {
            Some(group) => rooms.extend(heads_of_group(group)),
            None => rooms.extend(identifier(rest)),
        }
    }
    rooms.retain(|room| floor(room).is_some());
    rooms.sort();
    rooms.dedup();
    rooms
}

/// The first segment of every path of a `use` group, whose opening brace is already gone.
fn heads_of_group(group: &str) -> Vec<String> {
    let (mut depth, mut heads, mut is_start) = (1, Vec::new(), true);
    for (index, character) in group.char_indices() {
        match character {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 1 => is_start = true,
            c if is_start && depth == 1 && !c.is_whitespace() => {
                heads.extend(identifier(&group[index..]));
                is_start = false;
            }
            _ => {}
        }
        if depth == 0 {
            break;
        }
    }
    heads
}

fn identifier(text: &str) -> Option<String> {
    let name: String = text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
    (!name.is_empty()).then_some(name)
}

/// Where a text breaks the rules of `unsafe`.
fn unsafe_problems(name: &str, text: &str) -> Vec<String> {
    let is_allowed =
        UNSAFE.iter().any(|place| if place.ends_with('/') { name.starts_with(place) } else { name == *place });
    let raw: Vec<&str> = text.lines().collect();
    let mut problems = Vec::new();
    for (index, line) in bare(text).lines().enumerate() {
        let is_unsafe = line.split(|c: char| !c.is_alphanumeric() && c != '_').any(|word| word == "unsafe");
        if !is_unsafe {
            continue;
        }
        let place = format!("{name}:{}", index + 1);
        if !is_allowed {
            problems.push(format!("{place}: `unsafe` is for {}", UNSAFE.join(", ")));
        } else if !line.contains("unsafe fn") && !is_explained(&raw, index) {
            problems.push(format!("{place}: `unsafe` without a `// SAFETY:` comment above it"));
        }
    }
    problems
}

/// Whether the comment above a line, or above the statement it belongs to, says why it is sound.
fn is_explained(lines: &[&str], index: usize) -> bool {
    if lines[index].contains("SAFETY:") {
        return true;
    }
    let mut above = index;
    while above > 0 {
        above -= 1;
        let line = lines[above].trim();
        if line.starts_with("//") {
            if line.contains("SAFETY:") {
                return true;
            }
        } else if line.is_empty() || line.ends_with([';', '}']) || index - above > 12 {
            return false;
        }
    }
    false
}

/// Lines before the first test module.
fn code_lines(text: &str) -> usize {
    text.lines().position(|line| line.trim() == "#[cfg(test)]").unwrap_or_else(|| text.lines().count())
}

/// The text up to its first item that is compiled for tests only; test modules stand last.
fn without_tests(text: &str) -> String {
    text.lines().take(code_lines(text)).collect::<Vec<_>>().join("\n")
}

/// The text with comments and the insides of strings blanked out, line for line.
fn bare(text: &str) -> String {
    let bytes: Vec<char> = text.chars().collect();
    let mut out = String::with_capacity(text.len());
    let mut at = 0;
    let blank = |out: &mut String, from: usize, to: usize| {
        out.extend(bytes[from..to.min(bytes.len())].iter().map(|c| if *c == '\n' { '\n' } else { ' ' }));
    };
    while at < bytes.len() {
        let end = match bytes[at..] {
            ['/', '/', ..] => bytes[at..].iter().position(|c| *c == '\n').map_or(bytes.len(), |length| at + length),
            ['/', '*', ..] => block_comment_end(&bytes, at),
            ['"', ..] => string_end(&bytes, at + 1),
            ['r', '#' | '"', ..] if at == 0 || !(bytes[at - 1].is_alphanumeric() || bytes[at - 1] == '_') => {
                raw_string_end(&bytes, at)
            }
            ['\'', '\\', _, ..] => {
                bytes[at + 3..].iter().position(|c| *c == '\'').map_or(at + 1, |length| at + 4 + length)
            }
            ['\'', _, '\'', ..] => at + 3,
            _ => at,
        };
        if end > at {
            blank(&mut out, at, end);
            at = end;
        } else {
            out.push(bytes[at]);
            at += 1;
        }
    }
    out
}

fn block_comment_end(text: &[char], start: usize) -> usize {
    let (mut depth, mut at) = (0, start);
    while at < text.len() {
        match text[at..] {
            ['/', '*', ..] => (depth, at) = (depth + 1, at + 2),
            ['*', '/', ..] => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
        if depth == 0 {
            break;
        }
    }
    at
}

fn string_end(text: &[char], mut at: usize) -> usize {
    while at < text.len() && text[at] != '"' {
        at += if text[at] == '\\' { 2 } else { 1 };
    }
    at + 1
}

/// The end of `r"..."` or `r#"..."#`; `start` itself where it is a raw identifier.
fn raw_string_end(text: &[char], start: usize) -> usize {
    let hashes = text[start + 1..].iter().take_while(|c| **c == '#').count();
    let open = start + 1 + hashes;
    if text.get(open) != Some(&'"') {
        return start;
    }
    let closing: Vec<char> = std::iter::once('"').chain(std::iter::repeat_n('#', hashes)).collect();
    let inside = open + 1;
    text[inside..]
        .windows(closing.len())
        .position(|w| w == closing)
        .map_or(text.len(), |at| inside + at + closing.len())
}

#[test]
fn the_rules_find_what_breaks_them() {
    let named = rooms_named(&bare(
        "use crate::fs::{self, io_error};\nuse crate::{config::settings::{A, data}, /* crate::zero */ rng::Stream,\n model};\n\
         // crate::train::sft\nlet x = \"crate::cli\"; my_crate::engine::y(); crate :: ranks; crate::ops::z(r#\"crate::reward\"#);",
    ));
    assert_eq!(named, ["config", "fs", "model", "ops", "rng"]);
    assert!(wrong_import("model", "engine").is_some());
    assert!(wrong_import("model", "optim").is_some(), "rooms of one floor do not name each other");
    assert!(wrong_import("model", "ranks").is_some());
    assert!(wrong_import("telemetry", "kernels").is_some());
    for fine in [("model", "ops"), ("telemetry", "config"), ("telemetry", "telemetry"), ("main", "cli")] {
        assert_eq!(wrong_import(fine.0, fine.1), None);
    }

    let block = "fn f() {\n    let x = unsafe { g() };\n}\n";
    assert_eq!(
        unsafe_problems("src/model/a.rs", block),
        ["src/model/a.rs:2: `unsafe` is for src/device/, src/ranks/nccl.rs, src/kernels/"]
    );
    assert_eq!(unsafe_problems("src/kernels/a.rs", block).len(), 1);
    let explained = "fn f() {\n    // SAFETY: g has no conditions.\n    let x =\n        unsafe { g() };\n}\n";
    assert!(unsafe_problems("src/kernels/a.rs", explained).is_empty());
    let elsewhere = "// SAFETY: for another one.\nlet y = 1;\nlet x = unsafe { g() };\n";
    assert_eq!(unsafe_problems("src/kernels/a.rs", elsewhere).len(), 1);
    assert!(unsafe_problems("src/model/a.rs", "// unsafe\n#![deny(unsafe_code)]\nlet x = \"unsafe\";\n").is_empty());

    assert_eq!(bare("a '\"' b \"x\\\"y\" c '\\'' d r#e"), "a     b        c      d r#e");
    assert_eq!(code_lines("a\nb\n#[cfg(test)]\nmod tests {}\n"), 2);
    assert_eq!(room_of("src/zero/a/b.rs"), "zero");
    assert_eq!(room_of("src/fs.rs"), "fs");
}
