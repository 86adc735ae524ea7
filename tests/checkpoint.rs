//! Checkpoints through their public face: whole or absent, whatever happens.

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::Path;

use serde_json::{Value, json};
use trainer::checkpoint::{self, Error, Part, PartsWriter, Place, Tensors, Writer};

#[path = "support/kill.rs"]
mod kill;

fn save(output_dir: &Path, step: u64, limit: Option<usize>) -> checkpoint::Committed {
    let mut writer = Writer::begin(output_dir, step, 2).unwrap();
    writer.add_json("state.json", &json!({"step": step, "seed": u64::MAX})).unwrap();
    let values: Vec<f32> = (0..6).map(|i| i as f32 + step as f32 / 3.0).collect();
    writer
        .add_tensors(
            "optimizer.safetensors",
            [
                ("b.second_moment".to_string(), &values[..], vec![2, 3]),
                ("a.first_moment".to_string(), &values[..2], vec![2]),
                ("empty".to_string(), &[][..], vec![0, 4]),
            ],
        )
        .unwrap();
    std::fs::create_dir(writer.path().join("adapter")).unwrap();
    std::fs::write(writer.path().join("adapter/adapter_config.json"), "{}").unwrap();
    writer.commit(limit).unwrap()
}

fn names(folder: &Path) -> BTreeSet<String> {
    std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
}

fn set(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(ToString::to_string).collect()
}

#[test]
fn what_is_saved_comes_back_bit_for_bit() {
    let folder = tempfile::tempdir().unwrap();
    let saved = save(folder.path(), 7, None);
    assert_eq!(saved.path, folder.path().join("checkpoint-7"));
    assert_eq!(names(&saved.path), set(&["adapter", "manifest.json", "optimizer.safetensors", "state.json"]));
    let opened = checkpoint::open(&saved.path).unwrap();
    assert_eq!((opened.step(), opened.manifest().world_size), (7, 2));
    assert_eq!(opened.json::<Value>("state.json").unwrap(), json!({"step": 7, "seed": u64::MAX}));
    assert!(opened.contains("adapter/adapter_config.json"));
    let tensors = opened.tensors(&strings(&["optimizer.safetensors"])).unwrap();
    let shapes: Vec<_> = tensors.names().map(|name| (name, tensors.shape(name).unwrap())).collect();
    assert_eq!(shapes, [("a.first_moment", &[2][..]), ("b.second_moment", &[2, 3]), ("empty", &[0, 4])]);
    let expected: Vec<u32> = (0..6).map(|i| (i as f32 + 7.0 / 3.0).to_bits()).collect();
    assert_eq!(bits(&tensors, "b.second_moment", 0..6), expected);
    assert_eq!(bits(&tensors, "b.second_moment", 2..5), expected[2..5]);
    assert!(matches!(opened.file("nothing"), Err(Error::NoFile { .. })));
}

/// The bits of some values of a tensor.
#[track_caller]
fn bits(tensors: &Tensors, name: &str, range: Range<usize>) -> Vec<u32> {
    let mut values = vec![f32::NAN; range.len()];
    assert!(tensors.read(name, range.start, &mut values).unwrap(), "{name} has no {range:?}");
    values.iter().map(|value| value.to_bits()).collect()
}

/// What each of some ranks has of `x` (`[50, 60]`) and `y` (`[7]`), where the first value is written as 0, the next as 1, and so on.
fn save_parts(output_dir: &Path, step: u64, shares: &[(Range<usize>, Range<usize>)]) -> Vec<String> {
    let mut writer = Writer::begin(output_dir, step, shares.len()).unwrap();
    let place = Place::of(output_dir, step, writer.place().partial()).unwrap();
    assert_eq!(place, writer.place());
    let mut files = Vec::new();
    for (rank, (x, y)) in shares.iter().enumerate() {
        let name = format!("rank-{rank}.safetensors");
        let all = [("x", vec![50, 60], x), ("y", vec![7], y)];
        let parts: Vec<Part> = all
            .into_iter()
            .filter(|(.., range)| !range.is_empty())
            .map(|(name, shape, range)| Part { name: name.into(), shape, range: range.clone() })
            .collect();
        let mut file = PartsWriter::create(&place, &name, &parts).unwrap();
        let values: Vec<f32> = x.clone().chain(y.clone()).map(|value| value as f32).collect();
        // As it comes: one part after the other, or in the middle of one.
        values.chunks(1001).for_each(|values| file.write(values).unwrap());
        writer.take(file.finish().unwrap()).unwrap();
        files.push(name);
    }
    writer.commit(None).unwrap();
    files
}

#[test]
fn what_ranks_have_written_is_read_in_any_other_parts() {
    let folder = tempfile::tempdir().unwrap();
    let cuts: [&[(Range<usize>, Range<usize>)]; 3] = [
        &[(0..3000, 0..7)],
        &[(0..1, 0..7), (1..3000, 7..7)],
        &[(0..999, 0..0), (2000..3000, 0..3), (999..2000, 3..7)],
    ];
    for (step, shares) in (1..).zip(cuts) {
        let files = save_parts(folder.path(), step, shares);
        let opened = checkpoint::open(&folder.path().join(format!("checkpoint-{step}"))).unwrap();
        let tensors = opened.tensors(&files).unwrap();
        assert_eq!(tensors.names().collect::<Vec<_>>(), ["x", "y"]);
        assert_eq!(
            (tensors.shape("x"), tensors.shape("y"), tensors.shape("z")),
            (Some(&[50, 60][..]), Some(&[7][..]), None)
        );
        for (name, range) in [("x", 0..3000), ("x", 998..2001), ("x", 1500..1500), ("y", 2..6), ("y", 6..7)] {
            let expected: Vec<u32> = range.clone().map(|value| (value as f32).to_bits()).collect();
            assert_eq!(bits(&tensors, name, range), expected);
        }
        let mut beyond = [0.0; 2];
        assert!(!tensors.read("y", 6, &mut beyond).unwrap() && !tensors.read("z", 0, &mut beyond).unwrap());
        assert!(!tensors.read("y", usize::MAX, &mut beyond).unwrap());
    }
    // Written as one, it is what other programs expect.
    let whole = std::fs::read(folder.path().join("checkpoint-1/rank-0.safetensors")).unwrap();
    let whole = safetensors::SafeTensors::deserialize(&whole).unwrap();
    assert_eq!(whole.tensor("x").unwrap().shape(), [50, 60]);
}

#[test]
fn parts_that_do_not_make_a_whole_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let cuts: [(&[(Range<usize>, Range<usize>)], &str); 4] = [
        (&[(0..999, 0..7), (1000..3000, 0..0)], "`x` goes on with value 1000 after 999"),
        (&[(0..1001, 0..7), (1000..3000, 0..0)], "`x` goes on with value 1000 after 1001"),
        (&[(0..2999, 0..7)], "`x` ends with value 2999 of 3000"),
        (&[(0..3000, 1..7)], "`y` goes on with value 1 after 0"),
    ];
    for (step, (shares, problem)) in (1..).zip(cuts) {
        let files = save_parts(folder.path(), step, shares);
        let opened = checkpoint::open(&folder.path().join(format!("checkpoint-{step}"))).unwrap();
        let message = opened.tensors(&files).unwrap_err().to_string();
        assert!(message.contains(problem), "{message}");
        assert!(matches!(opened.tensors(&strings(&["other.safetensors"])), Err(Error::NoFile { .. })));
    }
}

#[test]
fn a_part_that_is_not_what_was_announced_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut writer = Writer::begin(folder.path(), 1, 2).unwrap();
    let part = |range| Part { name: "x".into(), shape: vec![4], range };
    let create = |parts: &[Part]| PartsWriter::create(&writer.place(), "x.safetensors", parts);
    assert!(matches!(create(&[part(2..5)]), Err(Error::Shape { .. })));
    assert!(create(&[part(0..2), part(2..4)]).unwrap_err().to_string().contains("comes twice"));
    let mut file = create(&[part(1..3)]).unwrap();
    file.write(&[1.0]).unwrap();
    assert!(file.write(&[1.0, 2.0]).unwrap_err().to_string().contains("2 values were given where 1 were to come"));
    assert!(file.finish().unwrap_err().to_string().contains("0 values were given where 1 were to come"));
    let mut file = create(&[part(1..3)]).unwrap();
    file.write(&[1.0, 2.0]).unwrap();
    let written = file.finish().unwrap();
    // What a rank wrote into a folder of its own is not in the first rank's.
    std::fs::remove_file(writer.path().join("x.safetensors")).unwrap();
    let message = writer.take(written).unwrap_err().to_string();
    assert!(message.contains("all nodes share") && message.contains("checkpoint-1/x.safetensors"), "{message}");
    let partial = writer.place().partial().to_string();
    drop(writer);
    for partial in [partial.as_str(), "../elsewhere", "a/b", "", "."] {
        let place = Place::of(folder.path(), 1, partial);
        assert!(matches!(place, Err(Error::NotShared { .. } | Error::Name { .. })), "{place:?}");
    }
    assert_eq!(names(folder.path()), set(&[]));
}

#[test]
fn ranks_that_read_after_the_first_compare_what_is_quick_to_compare() {
    let (folder, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let place = save(folder.path(), 1, None).path;
    let identity = checkpoint::open(&place).unwrap().identity().to_string();
    assert_eq!(checkpoint::open_compared(&place, &identity).unwrap().step(), 1);
    // Another machine's folder of the same name.
    let elsewhere = save(other.path(), 1, None).path;
    assert!(matches!(checkpoint::open_compared(&elsewhere, &identity), Err(Error::Other { .. })));
    let path = place.join("optimizer.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    assert!(matches!(checkpoint::open_compared(&place, &identity), Err(Error::Damaged { .. })));
}

#[test]
fn a_writer_that_is_dropped_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    save(folder.path(), 1, None);
    let mut writer = Writer::begin(folder.path(), 2, 1).unwrap();
    writer.add_json("state.json", &1).unwrap();
    drop(writer);
    assert_eq!(names(folder.path()), set(&["checkpoint-1"]));
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_loses_no_earlier_checkpoint_and_says_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    save(folder.path(), 1, Some(1));
    let mut writer = Writer::begin(folder.path(), 2, 1).unwrap();
    // Every write through this link fails as on a full disk.
    std::os::unix::fs::symlink("/dev/full", writer.path().join("state.json")).unwrap();
    let message = writer.add_json("state.json", &json!({"step": 2})).unwrap_err().to_string();
    let place = folder.path().join("checkpoint-2/state.json");
    assert!(message.contains(&format!("cannot write `{}`", place.display())), "{message}");
    assert!(message.contains("free some space there or choose another `output_dir`"), "{message}");
    drop(writer);
    assert_eq!(names(folder.path()), set(&["checkpoint-1"]));
    checkpoint::open(&folder.path().join("checkpoint-1")).unwrap();
}

/// As above for tensors, in a child process (this test again) whose files may not grow beyond 256 KiB.
#[cfg(target_os = "linux")]
#[test]
fn tensors_that_do_not_fit_lose_no_earlier_checkpoint() {
    const CHILD: &str = "TRAINER_TEST_OUTPUT_DIR";
    if let Some(output_dir) = std::env::var_os(CHILD) {
        let mut writer = Writer::begin(Path::new(&output_dir), 2, 1).unwrap();
        let values = vec![1.0; 1 << 20];
        let tensors = [("x".to_string(), &values[..], vec![1 << 20])];
        // The message is the child's result, read by its parent below.
        panic!("{}", writer.add_tensors("optimizer.safetensors", tensors).unwrap_err());
    }
    let folder = tempfile::tempdir().unwrap();
    save(folder.path(), 1, Some(1));
    let test = "tensors_that_do_not_fit_lose_no_earlier_checkpoint";
    let output = std::process::Command::new("bash")
        .args(["-c", "trap '' XFSZ; ulimit -f 256; exec \"$0\" --exact \"$1\" --nocapture"])
        .arg(std::env::current_exe().unwrap())
        .arg(test)
        .env(CHILD, folder.path())
        .output()
        .unwrap();
    let message = String::from_utf8_lossy(&output.stderr);
    let place = folder.path().join("checkpoint-2/optimizer.safetensors");
    assert!(message.contains(&format!("cannot write `{}`", place.display())), "{message}");
    assert!(message.contains("earlier checkpoints are untouched"), "{message}");
    assert_eq!(names(folder.path()), set(&["checkpoint-1"]));
    checkpoint::open(&folder.path().join("checkpoint-1")).unwrap();
}

#[test]
fn the_oldest_go_when_there_are_more_than_the_limit() {
    let folder = tempfile::tempdir().unwrap();
    for step in [9, 10, 100] {
        save(folder.path(), step, Some(2));
    }
    assert_eq!(names(folder.path()), set(&["checkpoint-10", "checkpoint-100"]));
    // A run resumed from an earlier step: its new checkpoint is not the one that goes.
    let saved = save(folder.path(), 5, Some(2));
    assert_eq!(saved.removed, [folder.path().join("checkpoint-10")]);
    assert_eq!(names(folder.path()), set(&["checkpoint-5", "checkpoint-100"]));
    save(folder.path(), 6, Some(0));
    assert_eq!(names(folder.path()), set(&["checkpoint-6"]), "at least the new one stays");
}

#[test]
fn a_checkpoint_of_the_same_step_is_replaced() {
    let folder = tempfile::tempdir().unwrap();
    save(folder.path(), 3, None);
    let mut writer = Writer::begin(folder.path(), 3, 1).unwrap();
    writer.add_json("other.json", &true).unwrap();
    writer.commit(None).unwrap();
    assert_eq!(names(folder.path()), set(&["checkpoint-3"]));
    assert_eq!(names(&folder.path().join("checkpoint-3")), set(&["manifest.json", "other.json"]));
}

/// A damage, its description, and what the message must contain.
type Damage = (&'static str, fn(&Path), &'static str);

#[test]
fn a_damaged_checkpoint_is_refused_by_name_and_passed_over() {
    let damages: &[Damage] = &[
        ("a file is gone", |p| std::fs::remove_file(p.join("state.json")).unwrap(), "`state.json` is missing"),
        ("a file is cut short", |p| cut(&p.join("optimizer.safetensors")), "`optimizer.safetensors` has "),
        ("a bit is flipped", |p| flip(&p.join("optimizer.safetensors")), "`optimizer.safetensors` has other content"),
        (
            "a file in a folder changed",
            |p| flip(&p.join("adapter/adapter_config.json")),
            "`adapter/adapter_config.json`",
        ),
        ("no manifest", |p| std::fs::remove_file(p.join("manifest.json")).unwrap(), "it has no manifest.json"),
        ("half a manifest", |p| cut(&p.join("manifest.json")), "cannot be read as JSON"),
        ("a newer format", newer, "has checkpoint format 999, this program reads 1"),
    ];
    for (name, damage, expected) in damages {
        let folder = tempfile::tempdir().unwrap();
        save(folder.path(), 10, None);
        let newest = save(folder.path(), 20, None).path;
        damage(&newest);
        let message = checkpoint::open(&newest).unwrap_err().to_string();
        assert!(message.contains(expected), "{name}: {message}");
        assert!(message.contains(&newest.display().to_string()), "{name}: {message}");
        let found = checkpoint::find_latest(folder.path()).unwrap();
        assert_eq!(found.checkpoint.unwrap().step(), 10, "{name}");
        assert_eq!(found.skipped.len(), 1, "{name}");
        assert_eq!(found.skipped[0].path, newest, "{name}");
    }
}

fn cut(path: &Path) {
    let bytes = std::fs::read(path).unwrap();
    std::fs::write(path, &bytes[..bytes.len() / 2]).unwrap();
}

fn flip(path: &Path) {
    let mut bytes = std::fs::read(path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(path, bytes).unwrap();
}

fn newer(path: &Path) {
    let manifest = path.join("manifest.json");
    let mut value: Value = serde_json::from_slice(&std::fs::read(&manifest).unwrap()).unwrap();
    value["format_version"] = json!(999);
    value["unknown_to_this_version"] = json!(true);
    std::fs::write(manifest, value.to_string()).unwrap();
}

#[test]
fn leftovers_of_killed_runs_are_removed_and_a_set_aside_checkpoint_returns() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    save(dir, 4, None);
    save(dir, 5, None);
    // Killed while writing 6, while deleting 3, after setting aside 5, and after replacing 4.
    std::fs::create_dir(dir.join(".checkpoint-6.partial-abc")).unwrap();
    std::fs::write(dir.join(".checkpoint-6.partial-abc/state.json"), "{").unwrap();
    std::fs::create_dir(dir.join(".checkpoint-3.removed")).unwrap();
    std::fs::rename(dir.join("checkpoint-5"), dir.join(".checkpoint-5.replaced")).unwrap();
    std::fs::create_dir(dir.join(".checkpoint-4.replaced")).unwrap();
    std::fs::create_dir(dir.join(".checkpoint-notes")).unwrap();

    let cleaned = checkpoint::clean_up(dir).unwrap();
    assert_eq!(cleaned.restored, [dir.join("checkpoint-5")]);
    assert_eq!(cleaned.removed.len(), 3);
    assert_eq!(names(dir), set(&["checkpoint-4", "checkpoint-5", ".checkpoint-notes"]));
    assert_eq!(checkpoint::find_latest(dir).unwrap().checkpoint.unwrap().step(), 5);
    assert_eq!(checkpoint::clean_up(dir).unwrap(), checkpoint::CleanedUp::default());
}

#[test]
fn leftovers_at_the_top_are_removed_and_links_as_links() {
    let folder = tempfile::tempdir().unwrap();
    let (dir, outside) = (folder.path().join("out"), folder.path().join("outside"));
    for place in [".partial-dir/inside", ".replaced-run/checkpoint-1", ".partialnot"] {
        std::fs::create_dir_all(dir.join(place)).unwrap();
    }
    std::fs::create_dir(&outside).unwrap();
    for file in [dir.join(".partial-abc"), dir.join(".checkpoint-2.replaced"), outside.join("precious")] {
        std::fs::write(file, "x").unwrap();
    }
    #[cfg(unix)]
    for (link, target) in
        [(".partial-link", "precious"), (".checkpoint-3.removed", "."), (".checkpoint-4.removed", "no")]
    {
        std::os::unix::fs::symlink(outside.join(target), dir.join(link)).unwrap();
    }
    checkpoint::clean_up(&dir).unwrap();
    assert_eq!(names(&dir), set(&[".partialnot"]));
    assert_eq!(names(&outside), set(&["precious"]));
}

#[test]
fn the_best_checkpoint_and_folders_of_others_are_never_deleted() {
    let folder = tempfile::tempdir().unwrap();
    for foreign in ["checkpoint-1", "checkpoint-07", "checkpoint-+8", "checkpoint-best"] {
        std::fs::create_dir(folder.path().join(foreign)).unwrap();
        std::fs::write(folder.path().join(foreign).join("model.bin"), "mine").unwrap();
    }
    let save = |step: u64, best: u64, limit: usize| {
        let mut writer = Writer::begin(folder.path(), step, 1).unwrap().keeping(Some(best));
        writer.add_json("state.json", &step).unwrap();
        writer.commit(Some(limit)).unwrap();
        let foreign = ["checkpoint-1", "checkpoint-07", "checkpoint-+8", "checkpoint-best"];
        names(folder.path()).into_iter().filter(|name| !foreign.contains(&name.as_str())).collect::<BTreeSet<_>>()
    };
    save(10, 10, 2);
    save(20, 10, 2);
    assert_eq!(save(30, 10, 2), set(&["checkpoint-10", "checkpoint-30"]));
    // As transformers: the newest and the best are two, whatever the limit.
    assert_eq!(save(40, 10, 1), set(&["checkpoint-10", "checkpoint-40"]));
    assert_eq!(save(50, 50, 1), set(&["checkpoint-50"]));
    assert_eq!(names(folder.path()).len(), 5);
}

/// What a folder holds, files with their content.
fn contents(folder: &Path) -> BTreeSet<(String, String)> {
    let mut found = BTreeSet::new();
    for name in names(folder) {
        let path = folder.join(&name);
        if path.is_dir() {
            found.extend(contents(&path).into_iter().map(|(inside, text)| (format!("{name}/{inside}"), text)));
        } else {
            found.insert((name, String::from_utf8_lossy(&std::fs::read(path).unwrap()).into_owned()));
        }
    }
    found
}

/// Three checkpoints, a log, an event file, and something of the user's.
fn an_older_run(dir: &Path) {
    for step in [1, 2, 3] {
        save(dir, step, None);
    }
    std::fs::create_dir_all(dir.join("runs")).unwrap();
    for (name, text) in [("metrics.jsonl", "{}"), ("runs/events", "e"), ("notes.txt", "mine")] {
        std::fs::write(dir.join(name), text).unwrap();
    }
}

fn strings(names: &[&str]) -> Vec<String> {
    names.iter().map(ToString::to_string).collect()
}

#[test]
fn what_is_moved_aside_is_kept_deleted_or_put_back() {
    use checkpoint::{Aside, Fate};
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    an_older_run(dir);
    let before = contents(dir);
    let moved = || strings(&["checkpoint-2", "checkpoint-3", "runs/events", "absent"]);
    let begin = |fate| Aside::begin(dir, fate, moved(), strings(&["metrics.jsonl"])).unwrap();
    let aside = begin(Fate::Kept);
    assert_eq!(aside.place(), dir.join("abandoned-course-1"));
    assert!(dir.join("checkpoint-1").is_dir() && !dir.join("checkpoint-2").exists() && !dir.join("runs").exists());
    drop(aside);
    assert_eq!(contents(dir), before, "not everything was put back");

    begin(Fate::Kept).settle().unwrap();
    let kept = dir.join("abandoned-course-1");
    assert_eq!(names(&kept), set(&["checkpoint-2", "checkpoint-3", "metrics.jsonl", "runs"]));
    assert_eq!(names(dir), set(&["abandoned-course-1", "checkpoint-1", "metrics.jsonl", "notes.txt"]));
    assert_eq!(checkpoint::find_latest(dir).unwrap().checkpoint.unwrap().step(), 1);
    assert!(checkpoint::is_left_course("abandoned-course-12") && !checkpoint::is_left_course("abandoned-course-"));

    save(dir, 5, None);
    let names_now = strings(&["checkpoint-1", "checkpoint-5", "abandoned-course-1"]);
    Aside::begin(dir, Fate::Deleted, names_now, vec![]).unwrap().settle().unwrap();
    assert_eq!(names(dir), set(&["metrics.jsonl", "notes.txt"]));
    assert_eq!(checkpoint::settle_earlier(dir).unwrap(), None);
}

/// In a child process (this test again) that is killed just before each of its changes: once something was moved, what was
/// to go is out of reach after the next start, whole where it is kept, and nothing else was touched.
#[cfg(target_os = "linux")]
#[test]
fn a_kill_at_any_change_neither_mixes_nor_loses_anything() {
    use checkpoint::{Aside, Fate};
    const CHILD: &str = "TRAINER_TEST_ASIDE";
    let moved = || strings(&["checkpoint-2", "checkpoint-3", "runs/events"]);
    if let Some(child) = std::env::var_os(CHILD) {
        let child = child.into_string().unwrap();
        let (fate, dir) = child.split_once(' ').unwrap();
        let fate = if fate == "kept" { Fate::Kept } else { Fate::Deleted };
        Aside::begin(Path::new(dir), fate, moved(), strings(&["metrics.jsonl"])).unwrap().settle().unwrap();
        return;
    }
    for fate in ["kept", "deleted"] {
        let (mut num_before, mut num_after) = (0, 0);
        for at in 1.. {
            let folder = tempfile::tempdir().unwrap();
            let dir = folder.path();
            an_older_run(dir);
            let before = contents(dir);
            let test = "a_kill_at_any_change_neither_mixes_nor_loses_anything";
            let mut command = std::process::Command::new(std::env::current_exe().unwrap());
            command.args(["--exact", test]).env(CHILD, format!("{fate} {}", dir.display()));
            let status = kill::kill_at(&mut command, dir, at).output().unwrap().status;
            let is_begun = dir.join(".moving-aside.json").exists() || !dir.join("checkpoint-3").exists();
            checkpoint::settle_earlier(dir).unwrap();
            checkpoint::clean_up(dir).unwrap();
            let newest = checkpoint::find_latest(dir).unwrap().checkpoint.unwrap().step();
            assert_eq!(newest, if is_begun { 1 } else { 3 }, "{fate}, killed at change {at}");
            let mut now = contents(dir);
            if is_begun && fate == "kept" {
                // All of it, in two places, and the log in both.
                let prefix = "abandoned-course-1/";
                let kept =
                    |(name, text): &(String, String)| Some((name.strip_prefix(prefix)?.to_string(), text.clone()));
                now = now.iter().map(|entry| kept(entry).unwrap_or_else(|| entry.clone())).collect();
            }
            if is_begun && fate == "deleted" {
                let goes = |name: &str| moved().iter().any(|moved| name.starts_with(moved.as_str()));
                let stays: BTreeSet<_> = before.into_iter().filter(|(name, _)| !goes(name)).collect();
                assert_eq!(now, stays, "{fate}, killed at change {at}");
            } else {
                assert_eq!(now, before, "{fate}, killed at change {at}");
            }
            *(if is_begun { &mut num_after } else { &mut num_before }) += 1;
            if status.success() {
                break;
            }
        }
        assert!(num_before > 1 && num_after > 8, "{num_before} kills before and {num_after} after");
    }
}

#[test]
fn a_journal_that_names_something_else_moves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("out");
    an_older_run(&dir);
    std::fs::write(folder.path().join("precious"), "x").unwrap();
    let before = contents(folder.path());
    for (place, moved) in [
        ("abandoned-course-1", "../precious"),
        ("abandoned-course-1", "/etc/hosts"),
        ("abandoned-course-1", ""),
        ("../elsewhere", "checkpoint-1"),
        ("checkpoint-2", "checkpoint-1"),
        (".replaced-run", "checkpoint-1"),
    ] {
        let journal = json!({"fate": "kept", "place": place, "moved": [moved], "copied": []});
        let path = dir.join(".moving-aside.json");
        std::fs::write(&path, journal.to_string()).unwrap();
        let message = checkpoint::settle_earlier(&dir).unwrap_err().to_string();
        assert!(message.contains(".moving-aside.json"), "{message}");
        std::fs::remove_file(path).unwrap();
        assert_eq!(contents(folder.path()), before);
    }
    let moved = strings(&["../precious"]);
    assert!(checkpoint::Aside::begin(&dir, checkpoint::Fate::Deleted, moved, vec![]).is_err());
    assert_eq!(contents(folder.path()), before);
}

#[test]
fn a_manifest_does_not_lead_outside() {
    let folder = tempfile::tempdir().unwrap();
    let place = save(folder.path(), 1, None).path;
    std::fs::write(folder.path().join("outside"), "x").unwrap();
    let manifest = place.join("manifest.json");
    let text = std::fs::read(&manifest).unwrap();
    let absolute = folder.path().join("outside").display().to_string();
    for name in ["../outside", &absolute, "adapter/../../outside", "", ".", "..", "a\\b", "a\0b"] {
        let mut value: Value = serde_json::from_slice(&text).unwrap();
        value["files"][name] = json!({"bytes": 1, "blake3": blake3::hash(b"x").to_hex().to_string()});
        std::fs::write(&manifest, value.to_string()).unwrap();
        let error = checkpoint::open(&place).unwrap_err();
        assert!(matches!(error, Error::Outside { .. }), "{name:?}: {error}");
    }
    // A folder in the place of a file, and a manifest of absurd size.
    let mut value: Value = serde_json::from_slice(&text).unwrap();
    value["files"]["adapter"] = json!({"bytes": 4096, "blake3": ""});
    std::fs::write(&manifest, value.to_string()).unwrap();
    assert!(checkpoint::open(&place).unwrap_err().to_string().contains("no ordinary file"));
    std::fs::File::create(&manifest).unwrap().set_len(1 << 40).unwrap();
    let message = checkpoint::open(&place).unwrap_err().to_string();
    assert!(message.contains("a file of 1099511627776 bytes"), "{message}");
}

#[test]
fn tensors_that_are_not_all_there_are_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let place = save(folder.path(), 1, None).path;
    let path = place.join("optimizer.safetensors");
    let whole = std::fs::read(&path).unwrap();
    let length = u64::from_le_bytes(whole[..8].try_into().unwrap());
    let with_length = |length: u64| [&length.to_le_bytes()[..], &whole[8..]].concat();
    let opened = checkpoint::open(&place).unwrap();
    for bytes in [
        vec![],
        whole[..7].to_vec(),
        whole[..whole.len() - 1].to_vec(),
        with_length(u64::MAX),
        with_length(length + 1_000_000),
        with_length(0),
        with_length(length - 1),
    ] {
        std::fs::write(&path, &bytes).unwrap();
        let error = opened.tensors(&strings(&["optimizer.safetensors"])).unwrap_err();
        assert!(error.to_string().contains("optimizer.safetensors"), "{error}");
    }
}

#[test]
fn a_run_without_checkpoints_has_no_latest() {
    let folder = tempfile::tempdir().unwrap();
    for dir in [folder.path().to_path_buf(), folder.path().join("missing")] {
        let found = checkpoint::find_latest(&dir).unwrap();
        assert!(found.checkpoint.is_none() && found.skipped.is_empty());
        assert_eq!(checkpoint::clean_up(&dir).unwrap(), checkpoint::CleanedUp::default());
    }
}

#[test]
fn names_and_shapes_that_cannot_be_right_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut writer = Writer::begin(folder.path(), 1, 1).unwrap();
    for name in ["", "../x.json", "/tmp/x.json", "manifest.json"] {
        assert!(matches!(writer.add_json(name, &1), Err(Error::Name { .. })), "{name}");
    }
    let values = [1.0, 2.0];
    let wrong = writer.add_tensors("x.safetensors", [("x".to_string(), &values[..], vec![3])]);
    assert!(matches!(wrong, Err(Error::Shape { .. })));
    let twice = [("x".to_string(), &values[..], vec![2]), ("x".to_string(), &values[..], vec![2])];
    let message = writer.add_tensors("x.safetensors", twice).unwrap_err().to_string();
    assert!(message.contains("the name `x` comes twice"), "{message}");
}

#[cfg(unix)]
#[test]
fn a_checkpoint_has_the_permissions_of_ordinary_files_and_folders() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode();
    let saved = save(folder.path(), 1, None).path;
    let ordinary = folder.path().join("ordinary");
    std::fs::create_dir(&ordinary).unwrap();
    std::fs::write(ordinary.join("file"), "").unwrap();
    assert_eq!(mode(&saved), mode(&ordinary));
    for name in ["manifest.json", "optimizer.safetensors", "state.json"] {
        assert_eq!(mode(&saved.join(name)), mode(&ordinary.join("file")), "{name}");
    }
}
