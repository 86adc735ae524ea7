//! Reward programs: the example, and every way in which a program can fail.

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};
use trainer::config::settings::RewardSpec;
use trainer::reward::{Error, Reward, Sample, build, check};

fn start(command: &[&str], timeout_secs: f64) -> Result<Box<dyn Reward>, Error> {
    let command = command.iter().map(|c| (*c).to_owned()).collect();
    build(&RewardSpec::Command { name: "mine".to_owned(), command, timeout_secs })
}

fn shell(script: &str, timeout_secs: f64) -> Box<dyn Reward> {
    start(&["/bin/sh", "-c", script], timeout_secs).unwrap_or_else(|e| panic!("{e}"))
}

fn score(reward: &mut dyn Reward, completions: &[&str]) -> Result<Vec<Option<f64>>, Error> {
    let (prompt, row) = (json!([{"role": "user", "content": "hi"}]), Map::new());
    let samples: Vec<Sample<'_>> = completions
        .iter()
        .map(|completion| Sample {
            prompt: &prompt,
            prompt_text: "hi",
            completion,
            completion_ids: &[],
            completion_tokens: completion.len(),
            max_completion_length: 100,
            is_truncated: false,
            row: &row,
        })
        .collect();
    reward.score(&samples)
}

fn complaint(script: &str, timeout_secs: f64) -> String {
    score(&mut *shell(script, timeout_secs), &["a", "b"]).expect_err("a complaint").to_string()
}

fn is_running(pid: &str) -> bool {
    // A killed child of a killed parent is a zombie until init takes it.
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z"))
}

#[test]
fn the_example_program_scores_batch_after_batch() {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/rewards/brevity.py");
    let mut reward = start(&["python3", script.to_str().expect("utf-8"), "10"], 60.0).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(reward.name(), "mine");
    assert_eq!(
        score(&mut *reward, &["", "12345", "1234567890123"]).expect("scores"),
        [Some(1.0), Some(0.5), Some(0.0)]
    );
    assert_eq!(score(&mut *reward, &["1"]).expect("scores"), [Some(0.9)]);
    assert_eq!(score(&mut *reward, &[]).expect("scores"), []);
    let row: Map<String, Value> = [("brevity".to_owned(), json!(false))].into_iter().collect();
    let prompt = json!("p");
    let sample = Sample {
        prompt: &prompt,
        prompt_text: "p",
        completion: "line\nbreak \u{2028} \"quoted\"",
        completion_ids: &[],
        completion_tokens: 3,
        max_completion_length: 4,
        is_truncated: true,
        row: &row,
    };
    assert_eq!(reward.score(&[sample]).expect("scores"), [None]);
}

#[test]
fn a_request_is_one_line_with_all_there_is_to_know() {
    let folder = tempfile_folder("request");
    let log = folder.join("request");
    let script =
        format!("read -r line; printf '%s' \"$line\" > {}; echo '{{\"id\": 1, \"scores\": [null]}}'", log.display());
    let row: Map<String, Value> = [("answer".to_owned(), json!(4))].into_iter().collect();
    let prompt = json!([{"role": "user", "content": "2+2?"}]);
    let sample = Sample {
        prompt: &prompt,
        prompt_text: "<user>2+2?",
        completion: "it is\n\"4\"",
        completion_ids: &[],
        completion_tokens: 7,
        max_completion_length: 9,
        is_truncated: true,
        row: &row,
    };
    assert_eq!(shell(&script, 30.0).score(&[sample]).expect("scores"), [None]);
    let request: Value =
        serde_json::from_str(&std::fs::read_to_string(&log).expect("written")).expect("one line of JSON");
    let expected = json!({"id": 1, "samples": [{
        "prompt": [{"role": "user", "content": "2+2?"}], "prompt_text": "<user>2+2?", "completion": "it is\n\"4\"",
        "completion_tokens": 7, "max_completion_length": 9, "is_truncated": true, "row": {"answer": 4},
    }]});
    assert_eq!(request, expected);
    std::fs::remove_dir_all(folder).expect("removed");
}

#[test]
fn checking_a_program_does_not_start_it() {
    let spec = |command: &[&str], timeout_secs| RewardSpec::Command {
        name: "mine".to_owned(),
        command: command.iter().map(|c| (*c).to_owned()).collect(),
        timeout_secs,
    };
    assert_eq!(check(&spec(&["/no/such/program"], 1.0)), Ok(()));
    assert!(check(&spec(&[], 1.0)).is_err_and(|m| m.contains("`command` is empty")));
    assert!(check(&spec(&["true"], -1.0)).is_err_and(|m| m.contains("-1 seconds")));
}

#[test]
fn a_large_batch_does_not_block_on_full_pipes() {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/rewards/brevity.py");
    let mut reward = start(&["python3", script.to_str().expect("utf-8")], 60.0).unwrap_or_else(|e| panic!("{e}"));
    let long = "x".repeat(200_000);
    let scores = score(&mut *reward, &[long.as_str(); 40]).expect("scores");
    assert_eq!(scores, vec![Some(0.0); 40]);
}

#[test]
fn a_program_that_hangs_is_killed_with_its_children() {
    let folder = tempfile_folder("hang");
    let pids = folder.join("pids");
    // The program and a child of its own, both of which would stay for a minute.
    let script = format!("echo loading >&2; sleep 61 & echo $! $$ > {}; wait", pids.display());
    let mut reward = shell(&script, 0.5);
    let begin = Instant::now();
    let message = score(&mut *reward, &["a"]).expect_err("a complaint").to_string();
    assert!(begin.elapsed() < Duration::from_secs(20), "{:?}", begin.elapsed());
    assert!(message.contains("reward program `mine` (`/bin/sh -c "), "{message}");
    assert!(message.contains("did not answer request 1 (1 samples) within 0.5 seconds and was killed"), "{message}");
    assert!(message.contains("timeout_secs") && message.ends_with("\n  loading"), "{message}");
    let written = std::fs::read_to_string(&pids).expect("the program wrote its ids");
    let deadline = Instant::now() + Duration::from_secs(5);
    while written.split_whitespace().any(is_running) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(!written.split_whitespace().any(is_running), "still running: {written}");
    let again = score(&mut *reward, &["a"]).expect_err("a complaint").to_string();
    assert!(again.contains("is not running any more"), "{again}");
    std::fs::remove_dir_all(folder).expect("removed");
}

#[test]
fn a_program_that_never_reads_runs_into_the_limit_as_well() {
    let mut reward = shell("exec sleep 61", 0.5);
    let long = "x".repeat(1_000_000);
    let message = score(&mut *reward, &[long.as_str()]).expect_err("a complaint").to_string();
    assert!(message.contains("within 0.5 seconds"), "{message}");
    assert!(message.ends_with("it wrote nothing to standard error"), "{message}");
}

#[test]
fn a_program_that_dies_is_reported_with_its_status_and_last_words() {
    let message = complaint("for i in $(seq 30); do echo line $i >&2; done; read x; echo no model >&2; exit 7", 30.0);
    assert!(message.contains("ended (exit status: 7) before it answered request 1"), "{message}");
    assert!(message.contains("run it by hand with one request line"), "{message}");
    assert!(message.ends_with("\n  line 30\n  no model"), "{message}");
    assert!(!message.contains("line 11\n"), "only the last lines: {message}");
    let message = complaint("read x; kill -9 $$", 30.0);
    assert!(message.contains("signal: 9"), "{message}");
    let message = complaint("exec >&-; cat > /dev/null", 30.0);
    assert!(message.contains("closed its standard output"), "{message}");
}

#[test]
fn answers_that_are_wrong_are_explained() {
    for (answer, part) in [
        ("{\"scores\": [1, 2]}", "it has no `id`"),
        ("{\"id\": 9, \"scores\": [1, 2]}", "its `id` is 9;"),
        ("{\"id\": 0, \"scores\": [1, 2]}", "its `id` is 0, an answer to an earlier request;"),
        ("{\"id\": 1}", "it has no list `scores`"),
        ("{\"id\": 1, \"scores\": 1}", "it has no list `scores`"),
        ("{\"id\": 1, \"scores\": [1, 2", "it is not JSON"),
        ("{\"id\": 1, \"scores\": [1, Infinity]}", "gave sample 1 of request 1 the score Infinity"),
        ("{\"id\": 1, \"scores\": [1e999, 1]}", "gave sample 0 of request 1 the score 1e999"),
        ("{\"id\": 1, \"scores\": [1]}", "with 1 scores for 2 samples; write one score per sample"),
        ("{\"id\": 1, \"scores\": []}", "with 0 scores for 2 samples"),
        ("{\"id\": 1, \"scores\": [1, \"high\"]}", "gave sample 1 of request 1 the score \"high\""),
        ("{\"id\": 1, \"error\": \"no GPU\"}", "refused request 1: no GPU"),
    ] {
        let message = complaint(&format!("read x; echo '{answer}'; read x"), 30.0);
        assert!(message.contains(part), "{answer}: {message}");
    }
}

#[test]
fn what_programs_print_and_how_they_write_numbers_ends_nothing() {
    for (printed, scores, expected) in [
        ("echo hello; echo", "[true, false]", [Some(1.0), Some(0.0)]),
        ("echo '[1, 2]'; echo '{\"step\": 1}'", "[1, 2]", [Some(1.0), Some(2.0)]),
        ("printf 'no line break: '", "[NaN, 2.5]", [None, Some(2.5)]),
        ("printf '\\377\\000\\033[31m\\r50%%\\n'", "[null, \"0.5\"]", [None, Some(0.5)]),
        ("seq 100000", "[-1e-3, nan]", [Some(-1e-3), None]),
        ("head -c 3000000 /dev/zero; echo", "[\"np.float64(0.25)\", 1]", [Some(0.25), Some(1.0)]),
    ] {
        let script = format!(
            "n=0; while read -r x; do n=$((n + 1)); {printed}; echo '{{\"id\": '$n', \"scores\": {scores}}}'; done"
        );
        let mut reward = shell(&script, 30.0);
        for _ in 0..3 {
            let given = score(&mut *reward, &["a", "b"]).unwrap_or_else(|e| panic!("{printed}: {e}"));
            assert_eq!(given, expected, "{printed}");
        }
    }
}

#[test]
fn a_program_that_only_prints_is_shown_what_it_wrote() {
    for (script, part) in [
        ("echo hello; sleep 61", "within 0.5 seconds and was killed"),
        ("echo hello; sleep 61", "the last it wrote to standard output is `hello`, expected a whole line {\"id\": 1,"),
        ("printf '{\"id\": 1, \"sco'; sleep 61", "is `{\"id\": 1, \"sco`, expected a whole line"),
        ("while :; do echo hello; done", "within 0.5 seconds and was killed"),
        ("echo hello; exit 3", "ended (exit status: 3) before it answered"),
        ("echo hello; exit 3", "standard output is `hello`"),
    ] {
        let message = complaint(&format!("read x; {script}"), 0.5);
        assert!(message.contains(part), "{script}: {message}");
    }
}

#[test]
fn programs_that_do_not_start_are_explained() {
    let message = |r: Result<Box<dyn Reward>, Error>| match r {
        Ok(_) => panic!("it started"),
        Err(error) => error.to_string(),
    };
    let text = message(start(&["/no/such/program", "x"], 1.0));
    assert!(text.contains("`mine` (`/no/such/program x`) could not be started: No such file"), "{text}");
    assert!(message(start(&[], 1.0)).contains("`command` is empty"));
    assert!(message(start(&["true"], 0.0)).contains("time limit of 0 seconds"));
    assert!(message(start(&["true"], f64::NAN)).contains("time limit of NaN seconds"));
}

#[test]
fn what_a_program_leaves_behind_ends_with_it() {
    // A child, one in a session of its own, and one whose parent is gone.
    let leave = "sleep 61 & echo $! >> PIDS; setsid sleep 61 & echo $! >> PIDS; (sleep 61 & echo $! >> PIDS)";
    for (name, ending) in [
        ("exits", "read x; exit 0"),
        ("answers", "read x; echo '{\"id\": 1, \"scores\": [1, 1]}'; read x"),
        ("stays", "read x; echo '{\"id\": 1, \"scores\": [1, 1]}'; exec sleep 61"),
        ("ignores", "trap '' TERM HUP INT; read x; echo '{\"id\": 1, \"scores\": [1, 1]}'; while :; do sleep 1; done"),
    ] {
        let folder = tempfile_folder(name);
        let pids = folder.join("pids");
        let script = format!("{}; {ending}", leave.replace("PIDS", &pids.display().to_string()));
        let mut reward = shell(&script, 30.0);
        let _ = score(&mut *reward, &["a", "b"]);
        drop(reward);
        let written = std::fs::read_to_string(&pids).expect("the program wrote its ids");
        assert_eq!(written.split_whitespace().count(), 3, "{name}");
        assert!(!written.split_whitespace().any(is_running), "{name}: still running: {written}");
        std::fs::remove_dir_all(folder).expect("removed");
    }
}

#[test]
fn the_program_ends_when_the_reward_is_dropped() {
    let folder = tempfile_folder("drop");
    let log = folder.join("log");
    // Ends by itself at the end of its input.
    drop(shell(&format!("echo $$ > {0}; cat > /dev/null; echo done >> {0}", log.display()), 5.0));
    let written = std::fs::read_to_string(&log).expect("written");
    assert!(written.ends_with("done\n"), "{written}");
    // Ignores it, and is killed.
    let begin = Instant::now();
    drop(shell(&format!("echo $$ > {0}; exec sleep 61", log.display()), 5.0));
    assert!(begin.elapsed() < Duration::from_secs(20));
    assert!(!is_running(std::fs::read_to_string(&log).expect("written").trim()));
    std::fs::remove_dir_all(folder).expect("removed");
}

fn tempfile_folder(name: &str) -> std::path::PathBuf {
    let folder = std::env::temp_dir().join(format!("trainer-reward-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("created");
    folder
}

#[test]
fn a_wait_for_an_answer_is_given_up_when_the_run_is_to_stop_and_the_group_is_killed() {
    let folder = tempfile_folder("interrupted");
    let pid_file = folder.join("pid");
    let script = format!("sleep 300 & echo $! > {}; cat > /dev/null; wait", pid_file.display());
    let mut reward = shell(&script, 3600.0);
    let (prompt, row) = (json!("p"), Map::new());
    let sample = Sample {
        prompt: &prompt,
        prompt_text: "p",
        completion: "c",
        completion_ids: &[],
        completion_tokens: 1,
        max_completion_length: 4,
        is_truncated: false,
        row: &row,
    };
    let started = Instant::now();
    let is_interrupted = || started.elapsed() > Duration::from_millis(300);
    let error = reward.score_unless(&[sample], &is_interrupted).expect_err("given up");
    assert!(matches!(&error, Error::Interrupted { name } if name == "mine"), "{error}");
    assert!(started.elapsed() < Duration::from_secs(3), "took {:?}", started.elapsed());
    let pid = std::fs::read_to_string(pid_file).expect("a process id");
    let deadline = Instant::now() + Duration::from_secs(2);
    while is_running(pid.trim()) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(!is_running(pid.trim()), "the program's child is still there");
    // Rewards that compute do not ask.
    let mut builtin = build(&RewardSpec::Builtin { name: "format".to_owned(), parameters: Map::new() })
        .unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(builtin.score_unless(&[sample], &|| true).expect("scores"), [Some(0.0)]);
}
