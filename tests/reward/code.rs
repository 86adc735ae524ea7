//! Rewards that run code: open-r1's data and scores, and programs that try to get out.

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};
use trainer::config::settings::{CodeScoring, CodeSettings, RewardSettings, RewardSpec};
use trainer::reward::{Error, Rewards, Sample, check};

fn rewards(name: &str, parameters: Value, code: CodeSettings) -> Rewards {
    let spec = spec(name, parameters);
    let settings = RewardSettings { code, ..RewardSettings::default() };
    Rewards::start(&[spec], &settings, &|| false).unwrap_or_else(|error| panic!("{error}"))
}

fn spec(name: &str, parameters: Value) -> RewardSpec {
    let Value::Object(parameters) = parameters else { panic!("parameters are a map") };
    RewardSpec::Builtin { name: name.to_owned(), parameters }
}

fn try_score(rewards: &mut Rewards, rows: &[(Value, String)]) -> Result<Vec<Option<f64>>, Error> {
    let prompt = json!("p");
    let maps: Vec<Map<String, Value>> = rows.iter().map(|(row, _)| row.as_object().expect("a map").clone()).collect();
    let samples: Vec<Sample<'_>> = rows
        .iter()
        .zip(&maps)
        .map(|((_, completion), row)| Sample {
            prompt: &prompt,
            prompt_text: "p",
            completion,
            completion_ids: &[],
            completion_tokens: 1,
            max_completion_length: 1000,
            is_truncated: false,
            row,
        })
        .collect();
    Ok(rewards.score(&samples, &|| false)?.by_function.swap_remove(0))
}

fn score(rewards: &mut Rewards, rows: &[(Value, String)]) -> Vec<Option<f64>> {
    try_score(rewards, rows).unwrap_or_else(|error| panic!("{error}"))
}

fn block(language: &str, code: &str) -> String {
    format!("Let me see.\n```{language}\n{code}\n```\nThat is it.")
}

/// A row whose tests give each input and expect each output on the streams.
fn streams(cases: &[(&str, &str)]) -> Value {
    let cases: Vec<Value> =
        cases.iter().map(|(input, output)| json!({"input": input, "output": output, "type": "stdin_stdout"})).collect();
    json!({"verification_info": {"language": "python", "test_cases": cases}})
}

/// The score of one Python program that is to print what is expected.
fn score_of(program: &str, expected: &str) -> Option<f64> {
    score(
        &mut rewards("code", json!({"timeout_secs": 3}), CodeSettings::default()),
        &[(streams(&[("", expected)]), block("python", program))],
    )[0]
}

/// Whether a process has this in its command line.
fn is_running(mark: &str) -> bool {
    fs::read_dir("/proc").expect("a process table").any(|entry| {
        // Not every entry is a process, and a process may end while it is looked at.
        let command = fs::read(entry.expect("an entry").path().join("cmdline")).unwrap_or_default();
        let text = String::from_utf8_lossy(&command).into_owned();
        text.contains(mark) && !text.starts_with("trainer")
    })
}

#[test]
fn the_score_is_the_share_of_tests_that_pass() {
    let double = "n = int(input())\nprint(n * 2 if n < 10 else n)";
    let rows = [
        (streams(&[("1\n", "2\n"), ("3", "6"), ("10", "20"), ("11", "22\n")]), block("python", double)),
        (streams(&[("1", "2"), ("2", "4")]), block("py", double)),
        (streams(&[("1", "2")]), "no code at all".to_owned()),
        (streams(&[("1", "2")]), block("python", "print(2) if")),
        (streams(&[("1", "2")]), block("python", "print(2); exit(1)")),
        (streams(&[("", "a\nb")]), block("python", "print('a')")),
        (streams(&[("", " a \n\nb\n")]), block("python", "print('a\\n\\n  b  \\n')")),
        (streams(&[("", "2")]), format!("{}\n{}", block("python", "print(1)"), block("python", "print(2)"))),
        (streams(&[("é", "é\u{1f600}")]), block("python", "print(input() + '\\U0001f600')")),
    ];
    let expected = [0.5, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0].map(Some);
    assert_eq!(score(&mut rewards("code", json!({}), CodeSettings::default()), &rows), expected);
    let expected = [0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0].map(Some);
    assert_eq!(score(&mut rewards("binary_code_reward", json!({}), CodeSettings::default()), &rows), expected);
    // The same on one thread, and as text.
    let text = json!({"verification_info": rows[0].0["verification_info"].to_string()});
    let one = CodeSettings { parallel: Some(1), ..CodeSettings::default() };
    assert_eq!(score(&mut rewards("code", json!({}), one), &[(text, rows[0].1.clone())]), [Some(0.5)]);
}

#[test]
fn functions_are_called_and_their_results_compared() {
    let calls = |cases: Value| json!({"verification_info": {"language": "python", "test_cases": cases}});
    let add = json!([
        {"fn_name": "add", "input": [1, 2], "output": 3, "type": "function_call"},
        {"fn_name": "add", "input": [[1], [2]], "output": [[1, 2]], "type": "function_call"},
        {"fn_name": "add", "input": ["a", "b"], "output": "ab", "type": "function_call"},
        {"fn_name": "add", "input": [0.1, 0.2], "output": [0.3], "type": "function_call"},
    ]);
    for (code, expected) in [
        ("def add(a, b):\n    print('noise')\n    return a + b", 1.0),
        ("class Solution:\n    def add(self, a: List[int], b: Optional[int]) -> Any:\n        return a + b", 1.0),
        ("def add(a, b): return a + b if a == 1 else None", 0.25),
        ("def add(a, b): return {a: b, b: object}", 0.0),
        ("def plus(a, b): return a + b", 0.0),
        ("import os\ndef add(a, b): os._exit(0)", 0.0),
        ("def add(a, b):\n    while True: pass", 0.0),
    ] {
        let mut reward = rewards("code", json!({"timeout_secs": 1}), CodeSettings::default());
        let given = score(&mut reward, &[(calls(add.clone()), block("python", code))]);
        assert_eq!(given, [Some(expected)], "{code}");
    }
}

#[test]
fn rows_that_cannot_be_tested_have_no_score_and_other_columns_are_an_error() {
    let mut reward = rewards("code", json!({}), CodeSettings::default());
    let rows = [
        json!({"verification_info": null}),
        json!({"verification_info": {"language": "python", "test_cases": []}}),
        json!({"verification_info": {"language": "cobol", "test_cases": [{"input": "", "output": "1"}]}}),
    ];
    let rows: Vec<(Value, String)> = rows.into_iter().map(|row| (row, block("python", "print(1)"))).collect();
    assert_eq!(score(&mut reward, &rows), [None, None, None]);
    for (row, part) in [
        (json!({"tests": []}), "needs the column `verification_info`, sample 0 has `tests`"),
        (json!({"verification_info": "none"}), "which is \"none\" in sample 0, expected tests: {\"language\""),
        (json!({"verification_info": {"test_cases": [{"input": "1"}]}}), "expected tests"),
    ] {
        let message =
            try_score(&mut reward, &[(row.clone(), block("python", ""))]).expect_err("a complaint").to_string();
        assert!(message.contains(part), "{row}: {message}");
    }
    let mut reward = rewards("code", json!({"column": "tests"}), CodeSettings::default());
    let row = json!({"tests": {"inputs": ["1"], "outputs": ["1"]}});
    assert_eq!(score(&mut reward, &[(row, block("python", "print(input())"))]), [Some(1.0)]);
    for (parameters, part) in [
        (json!({"timeout": 3}), "has no parameter `timeout`"),
        (json!({"timeout_secs": 0}), "expected a number of seconds above 0"),
        (json!({"memory_mb": 1}), "at least 64"),
    ] {
        let message = check(&spec("code", parameters)).expect_err("a complaint");
        assert!(message.contains(part), "{message}");
    }
}

#[test]
fn codeforces_problems_are_scored_as_open_r1_does() {
    let tests = json!([{"input": "1", "output": "1"}, {"input": "2", "output": "2"}]);
    let row = |more: Value| {
        let mut row = json!({"official_tests": tests, "language": "python", "time_limit": 3.0, "memory_limit": 256.0});
        row.as_object_mut().expect("a map").extend(more.as_object().expect("a map").clone());
        row
    };
    let checker =
        "import sys\na, b, c = (open(p).read() for p in sys.argv[1:])\nprint(1 if abs(int(c)) == int(b) else 0)";
    let rows = [
        (row(json!({})), block("python", "print(input())")),
        (row(json!({})), block("python", "print(1)")),
        (row(json!({})), "no code".to_owned()),
        (row(json!({"generated_checker": checker})), block("python", "print(-int(input()))")),
        (row(json!({"generated_checker": checker})), block("python", "print('x')")),
        (row(json!({"official_tests": []})), block("python", "print(1)")),
        (row(json!({"input_mode": "file"})), block("python", "print(1)")),
    ];
    let scored = |scoring| {
        let code = CodeSettings { scoring, ..CodeSettings::default() };
        score(&mut rewards("cf_code", json!({}), code), &rows)
    };
    assert_eq!(scored(CodeScoring::WeightedSum), [Some(1.1), Some(0.05), Some(-1.0), Some(1.1), Some(0.0), None, None]);
    assert_eq!(scored(CodeScoring::PassFail), [Some(1.0), Some(0.0), Some(-1.0), Some(1.0), Some(0.0), None, None]);
    assert_eq!(scored(CodeScoring::Partial)[1], Some(0.5));
}

#[test]
fn other_languages_run_where_they_are_installed() {
    let row = |language: &str| json!({"verification_info": {"language": language, "test_cases": [{"input": "20 1\n", "output": "21\n"}]}});
    for (program, language, code) in [
        (
            "node",
            "javascript",
            "const [a, b] = require('fs').readFileSync(0, 'utf8').split(' ').map(Number);\nconsole.log(a + b)",
        ),
        (
            "gcc",
            "c",
            "#include <stdio.h>\nint main(void) { int a, b; scanf(\"%d %d\", &a, &b); printf(\"%d\\n\", a + b); }",
        ),
        ("g++", "cpp", "#include <bits/stdc++.h>\nint main() { int a, b; std::cin >> a >> b; std::cout << a + b; }"),
    ] {
        let is_there = Path::new("/usr/bin").join(program).is_file();
        let mut reward = rewards("code", json!({"timeout_secs": 20}), CodeSettings::default());
        let rows = [(row(language), block(language, code)), (row(language), block(language, "what is this"))];
        let expected = if is_there { [Some(1.0), Some(0.0)] } else { [None, None] };
        assert_eq!(score(&mut reward, &rows), expected, "{language}");
    }
    if Path::new("/usr/bin/g++").is_file() {
        let row = json!({"official_tests": [{"input": "", "output": "1"}], "language": "cpp"});
        let mut reward = rewards("cf_code", json!({}), CodeSettings::default());
        assert_eq!(score(&mut reward, &[(row, block("cpp", "int main( {"))]), [Some(-0.1)]);
        let row = json!({
            "id": "sum",
            "test_cases": [{"input": "1 2", "output": "3"}],
            "grader_files": [
                ["graders/sum.h", "int sum(int a, int b);"],
                ["graders/grader.cpp", "#include \"sum.h\"\n#include <iostream>\nint main() { int a, b; std::cin >> a >> b; std::cout << sum(a, b); }"],
                ["checker/checker.cpp", "nonsense"],
            ],
        });
        let mut reward = rewards("ioi_code", json!({}), CodeSettings::default());
        let rows = [
            (row.clone(), block("cpp", "int sum(int a, int b) { vector<int> v{a, b}; return v[0] + v[1]; }")),
            (row, block("cpp", "int sum(int a, int b) { return a; }")),
        ];
        assert_eq!(score(&mut reward, &rows), [Some(1.0), Some(0.0)]);
    }
}

#[test]
fn programs_that_use_too_much_are_stopped() {
    let begin = Instant::now();
    for (name, program) in [
        ("an endless loop", "while True: pass"),
        ("an endless sleep", "import time; time.sleep(1000)"),
        ("endless output", "while True: print('1' * 1000)"),
        ("memory", "x = bytearray(3 << 30)\nprint(1)"),
        (
            "memory in many processes",
            "import os\nfor _ in range(6): os.fork()\nx = bytearray(100 << 20)\nfor i in range(0, len(x), 4096): x[i] = 1\nimport time; time.sleep(1)\nprint(1)",
        ),
        (
            "shared memory",
            "import mmap\nm = mmap.mmap(-1, 3 << 30)\nfor i in range(0, 3 << 30, 4096): m[i] = 1\nprint(1)",
        ),
        ("a file", "f = open('f', 'wb')\nfor _ in range(3000): f.write(b'x' * (1 << 20))\nprint(1)"),
        ("many files", "for n in range(100000): open(f'f{n}', 'w').close()\nprint(1)"),
        ("open files", "fs = [open('/dev/null') for _ in range(2000)]\nprint(1)"),
        ("a fork bomb", "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"),
        (
            "threads",
            "import threading, time\nfor _ in range(500): threading.Thread(target=time.sleep, args=(9,)).start()\nprint(1)",
        ),
        ("a deep recursion", "import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()"),
        ("a core dump", "import os; os.abort()"),
    ] {
        let started = Instant::now();
        assert_eq!(score_of(program, "1"), Some(0.0), "{name}");
        assert!(started.elapsed() < Duration::from_secs(20), "{name}: {:?}", started.elapsed());
    }
    // The machine is still well.
    assert_eq!(score_of("print(1)", "1"), Some(1.0), "after {:?}", begin.elapsed());
}

#[test]
fn processes_that_programs_leave_behind_are_gone() {
    let leave = "import os, sys, time
for detach in (False, True):
    if os.fork() == 0:
        if detach: os.setsid()
        if os.fork() == 0:
            os.close(0); os.close(1); os.close(2)
            os.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(987)', 'LEFT-BEHIND'])
        os._exit(0)
time.sleep(0.3)
";
    for ending in ["print(1)", "time.sleep(900)", "os.kill(os.getpid(), 9)"] {
        score_of(&format!("{leave}{ending}"), "1");
        let until = Instant::now() + Duration::from_secs(3);
        while is_running("LEFT-BEHIND") && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(10));
        }
        assert!(!is_running("LEFT-BEHIND"), "{ending}");
    }
}

/// Each program prints 1 if it gets at something that it should not.
#[test]
fn nothing_of_the_machine_is_in_reach() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
    let secret = folder.path().join("secret");
    fs::write(&secret, "hidden").expect("written");
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("an address").port();
    let secret_text = secret.display().to_string();
    let me = std::process::id();
    let reads = |path: &str| format!("print(len(open({path:?}, 'rb').read()) > 0 and 1)");
    let link = format!("import os\nos.symlink({secret_text:?}, 'link')\nprint(len(open('link').read()) > 0 and 1)");
    let home = std::env::var("HOME").unwrap_or_else(|_| "/root".into());
    for (name, program) in [
        ("the password file", reads("/etc/passwd")),
        ("the shadow file", reads("/etc/shadow")),
        ("a file of the user's", reads(&secret_text)),
        ("the same through a link", link),
        ("the same from the root of process 1", reads(&format!("/proc/1/root{secret_text}"))),
        ("the environment of process 1", reads("/proc/1/environ")),
        ("the memory of process 1", reads("/proc/1/mem")),
        ("the environment of the trainer", reads(&format!("/proc/{me}/environ"))),
        ("the home folder", format!("import os\nprint(1 if [n for n in os.listdir({home:?}) if n != '.pyenv'] else 0)")),
        ("writing beside it", format!("open({:?}, 'w').write('x')\nprint(1)", folder.path().join("written").display().to_string())),
        ("writing into /usr", "open('/usr/written', 'w').write('x')\nprint(1)".into()),
        ("writing into the root", "open('/written', 'w').write('x')\nprint(1)".into()),
        ("removing the interpreter", "import os, sys\nos.unlink(sys.executable)\nprint(1)".into()),
        ("the network", format!("import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)\nprint(1)")),
        ("a name server", "import socket\nprint(len(socket.getaddrinfo('example.com', 80)) > 0 and 1)".into()),
        ("raw sockets", "import socket\nsocket.socket(socket.AF_PACKET, socket.SOCK_RAW)\nprint(1)".into()),
        ("killing the trainer", format!("import os\nos.kill({me}, 9)\nprint(1)")),
        ("killing its parents", "import os\nos.kill(os.getppid(), 9)\nimport time; time.sleep(0.2)\nprint(os.getppid() != 1 and 1)".into()),
        ("stopping everything", "import os, signal\nos.kill(-1, signal.SIGKILL)\nprint(0)".into()),
        ("becoming root", "import os\nos.setuid(0)\nprint(os.getuid() == 0 and 1)".into()),
        ("rights of its own", "import os\nos.unshare(os.CLONE_NEWUSER) if hasattr(os, 'unshare') else __import__('ctypes').CDLL(None).unshare(0x10000000) and 1 / 0\nprint(1)".into()),
        ("rights by clone", "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\npid = libc.syscall(56, 0x10000000 | 17, 0, 0, 0, 0)\nif pid == 0: os._exit(0)\nprint(pid > 0 and 1)".into()),
        ("mounting", "import ctypes\nprint(ctypes.CDLL(None).mount(b'tmpfs', b'/tmp', b'tmpfs', 0, None) == 0 and 1)".into()),
        ("tracing", "import ctypes, os\nprint(ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0 and 1)".into()),
        ("devices", "import os\nos.mknod('sda', 0o60666, os.makedev(8, 0))\nprint(1)".into()),
        ("the kernel's settings", "open('/proc/sys/kernel/core_pattern', 'w').write('x')\nprint(1)".into()),
        ("environment variables", "import os\nprint(1 if any(k in os.environ for k in ('CARGO', 'USER', 'SECRET_TOKEN')) else 0)".into()),
        ("other processes", "import os\nprint(1 if [p for p in os.listdir('/proc') if p.isdigit() and int(p) != os.getpid()] else 0)".into()),
        ("more time", "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (1000, 1000))\nprint(1)".into()),
    ] {
        assert_eq!(score_of(&program, "1"), Some(0.0), "{name}");
    }
    assert_eq!(fs::read_to_string(&secret).expect("still there"), "hidden");
    assert_eq!(fs::read_dir(folder.path()).expect("still there").count(), 1);
}

#[test]
fn what_is_expected_is_nowhere_in_the_program_s_reach() {
    // Unlikely to be guessed, and looked for in everything the program can see.
    let expected = "7391-expected-4482";
    let search = "
import gc, glob, os, sys
seen = [repr(dict(os.environ)), repr(sys.argv), sys.stdin.read()]
for frame in sys._current_frames().values():
    while frame: seen.append(repr(frame.f_locals) + repr(frame.f_globals)); frame = frame.f_back
for path in glob.glob('/tmp/*') + glob.glob('/proc/*/cmdline') + glob.glob('/proc/*/environ') + glob.glob('/proc/self/fd/*'):
    try: seen.append(open(path, errors='replace').read(100000)) if path[-2:] not in ('/1', '/2') else None
    except OSError: pass
seen += [repr(o)[:100000] for o in gc.get_objects() if isinstance(o, (list, dict)) and o is not seen]
needle = ''.join(['expec', 'ted-'])
hits = [text for text in seen if needle in text]
print(hits[0][hits[0].index(needle) - 5:][:len('7391-') + len(needle) + 4] if hits else 'nothing')
";
    let found = |expected: &str| {
        let rows = [(streams(&[("", expected)]), block("python", search))];
        score(&mut rewards("code", json!({"timeout_secs": 20}), CodeSettings::default()), &rows)[0]
    };
    assert_eq!(found(expected), Some(0.0));
    assert_eq!(found("nothing"), Some(1.0), "the search itself runs");
    for program in ["import os\nos._exit(0)", "raise SystemExit", "", "print('')", "import sys\nsys.stdout.close()"] {
        assert_eq!(score_of(program, expected), Some(0.0), "{program}");
    }
    // A result that claims to be equal to everything is a text by the time it is compared.
    let claim = "class E(str):\n    def __eq__(self, other): return True\n    __hash__ = str.__hash__\ndef f(x): return E('all')";
    let row = json!({"verification_info": {"language": "python", "test_cases": [
        {"fn_name": "f", "input": [1], "output": expected, "type": "function_call"}]}});
    let mut reward = rewards("code", json!({}), CodeSettings::default());
    assert_eq!(score(&mut reward, &[(row, block("python", claim))]), [Some(0.0)]);
}

#[test]
fn paths_that_are_hidden_are_so_within_what_is_shown() {
    // A folder below /usr is shown unless it is named.
    let inside = "/usr/lib";
    let program = format!("import os\nprint(len(os.listdir({inside:?})) > 0 and 1)");
    assert_eq!(score_of(&program, "1"), Some(1.0));
    let Some(hidden) = fs::read_dir("/usr/share").ok().and_then(|mut entries| {
        entries.find_map(|entry| entry.ok().map(|entry| entry.path()).filter(|path| path.is_dir()))
    }) else {
        return;
    };
    let program = format!("import os\nprint(len(os.listdir({:?})))", hidden.display().to_string());
    let code = CodeSettings { hidden: vec![hidden], ..CodeSettings::default() };
    let rows = [(streams(&[("", "0")]), block("python", &program))];
    assert_eq!(score(&mut rewards("code", json!({}), code), &rows), [Some(1.0)]);
}

#[test]
fn a_run_that_is_stopped_waits_for_no_program() {
    let mut reward = rewards("code", json!({"timeout_secs": 60, "total_timeout_secs": 60}), CodeSettings::default());
    let row = streams(&[("", "1")]);
    let (prompt, row) = (json!("p"), row.as_object().expect("a map").clone());
    let completion = block("python", "import time; time.sleep(61)");
    let sample = Sample {
        prompt: &prompt,
        prompt_text: "p",
        completion: &completion,
        completion_ids: &[],
        completion_tokens: 1,
        max_completion_length: 1,
        is_truncated: false,
        row: &row,
    };
    let begin = Instant::now();
    let result = reward.score(&[sample; 3], &|| begin.elapsed() > Duration::from_millis(500));
    assert!(matches!(&result, Err(Error::Interrupted { name }) if name == "code"), "{result:?}");
    assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
}

#[test]
fn a_completion_has_a_limit_for_all_its_tests_together() {
    let cases: Vec<(&str, &str)> = vec![("", "1"); 40];
    let parameters = json!({"timeout_secs": 4, "total_timeout_secs": 4});
    let begin = Instant::now();
    let rows = [(streams(&cases), block("python", "import time; time.sleep(1); print(1)"))];
    let score = score(&mut rewards("code", parameters, CodeSettings::default()), &rows)[0].expect("a score");
    assert!(score > 0.0 && score < 0.2, "{score}");
    assert!(begin.elapsed() < Duration::from_secs(20), "{:?}", begin.elapsed());
}

#[test]
fn the_protection_is_said() {
    let reward = rewards("code", json!({}), CodeSettings::default());
    let surroundings = reward.surroundings();
    let [("code", text)] = surroundings.as_slice() else { panic!("{surroundings:?}") };
    for part in ["files: ", "network: ", "processes: ", "user: ", "system calls: ", " at once"] {
        assert!(text.contains(part), "{text}");
    }
}
