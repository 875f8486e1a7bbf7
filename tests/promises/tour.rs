//! The README's tour is true: every command in it is run, and prints what the README says.
//!
//! Between `<!-- tour:begin -->` and `<!-- tour:end -->` each ```` ```sh ```` block is given to
//! one bash, command by command. After a command, lines that begin with `# =>` are what it prints;
//! `...` in them stands for anything. Commands without them may print what they want, but must
//! succeed. The tour starts its own cluster with `./cluster.sh`, in a directory of its own.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use crate::common::cluster::{binary, take_turn};
use crate::common::say;

const BEGIN: &str = "<!-- tour:begin -->";
const END: &str = "<!-- tour:end -->";
const EXPECTED: &str = "# =>";

/// A command of the tour, and what it is said to print.
#[derive(Debug, PartialEq, Eq)]
struct Step {
    line: usize,
    command: String,
    expected: Option<Vec<String>>,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_tour_of_the_readme_is_true() {
    let _turn = take_turn().await;
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let readme = fs::read_to_string(root.join("README.md")).expect("README.md");
    let steps = steps(&readme);
    assert!(
        !steps.is_empty(),
        "README.md has no tour between {BEGIN} and {END}"
    );
    let place = tempfile::TempDir::with_prefix_in("tour-", env!("CARGO_TARGET_TMPDIR"))
        .expect("a directory");
    let mut shell = Shell::start(root, place.path());
    let (mut wrong, mut compared) = (Vec::new(), 0);
    for step in &steps {
        let (printed, status) = shell.run(&step.command);
        if let Some(expected) = &step.expected {
            compared += 1;
            if !matches(expected, &printed) {
                wrong.push(format!(
                    "README.md:{}: {}\n  says {expected:#?}\n  got  {printed:#?}",
                    step.line, step.command
                ));
            }
        } else if status != 0 {
            wrong.push(format!(
                "README.md:{}: {} ended with {status}: {printed:#?}",
                step.line, step.command
            ));
        }
    }
    drop(shell);
    assert!(
        wrong.is_empty(),
        "the README is wrong:\n{}",
        wrong.join("\n")
    );
    say(&format!(
        "tour: {} commands run, the output of {compared} compared",
        steps.len()
    ));
}

/// The commands of the tour. A command may span lines: with a backslash at the end, or a quote or
/// here-document that bash would not take yet.
fn steps(readme: &str) -> Vec<Step> {
    let mut steps: Vec<Step> = Vec::new();
    let (mut in_tour, mut in_block) = (false, false);
    let mut open: Option<(usize, String)> = None;
    for (number, line) in readme
        .lines()
        .enumerate()
        .map(|(number, line)| (number + 1, line))
    {
        match line.trim() {
            BEGIN => in_tour = true,
            END => in_tour = false,
            "```sh" if in_tour => in_block = true,
            "```" => in_block = false,
            trimmed if in_block => {
                if let Some(expected) = trimmed.strip_prefix(EXPECTED).filter(|_| open.is_none()) {
                    let step = steps.last_mut().unwrap_or_else(|| {
                        panic!("README.md:{number}: {EXPECTED} without a command")
                    });
                    step.expected
                        .get_or_insert_default()
                        .push(expected.trim().to_owned());
                } else if open.is_some() || !(trimmed.is_empty() || trimmed.starts_with('#')) {
                    let (start, text) = open
                        .take()
                        .map_or((number, line.to_owned()), |(start, text)| {
                            (start, format!("{text}\n{line}"))
                        });
                    if is_complete(&text) {
                        steps.push(Step {
                            line: start,
                            command: text,
                            expected: None,
                        });
                    } else {
                        open = Some((start, text));
                    }
                }
            }
            _ => {}
        }
    }
    assert!(
        open.is_none(),
        "README.md: a command of the tour never ends: {open:?}"
    );
    steps
}

fn is_complete(command: &str) -> bool {
    let checked = Command::new("bash")
        .args(["-n", "-c", command])
        .output()
        .expect("bash");
    checked.status.success() && checked.stderr.is_empty() && !command.ends_with('\\')
}

/// Whether the lines printed are those expected. `...` stands for any text within a line, and alone
/// for any lines.
fn matches(expected: &[String], printed: &[String]) -> bool {
    match (expected, printed) {
        ([], []) => true,
        ([any, rest @ ..], _) if any == "..." => {
            (0..=printed.len()).any(|skipped| matches(rest, &printed[skipped..]))
        }
        ([first, rest @ ..], [line, lines @ ..]) => {
            matches_line(first, line.trim()) && matches(rest, lines)
        }
        _ => false,
    }
}

fn matches_line(expected: &str, line: &str) -> bool {
    match expected.split_once("...") {
        None => expected == line,
        Some((start, rest)) => line.strip_prefix(start).is_some_and(|line| {
            let cuts = line.char_indices().map(|(at, _)| at).chain([line.len()]);
            cuts.into_iter().any(|at| matches_line(rest, &line[at..]))
        }),
    }
}

/// One bash for the whole tour, so that variables and directories live on.
struct Shell {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Shell {
    fn start(root: &Path, place: &Path) -> Self {
        let mut child = Command::new("bash")
            .args(["--noprofile", "--norc"])
            .current_dir(root)
            .env("QUORATE_BIN", binary())
            .env("QUORATE_CLUSTER_DIR", place)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("bash");
        let stdin = child.stdin.take().expect("piped");
        let stdout = BufReader::new(child.stdout.take().expect("piped"));
        Self {
            child,
            stdin,
            stdout,
        }
    }

    /// What the command printed, and its status.
    fn run(&mut self, command: &str) -> (Vec<String>, i32) {
        const MARK: &str = "--- end of the command, with status ";
        writeln!(
            self.stdin,
            "{{ {command}\n}} 2>&1 </dev/null\necho; echo \"{MARK}$?\""
        )
        .expect("bash lives");
        let mut printed = Vec::new();
        loop {
            let mut line = String::new();
            let read = self.stdout.read_line(&mut line).expect("readable output");
            assert!(read > 0, "bash ended during {command}: {printed:#?}");
            match line.trim_end().strip_prefix(MARK) {
                Some(status) => {
                    while printed.last().is_some_and(String::is_empty) {
                        printed.pop();
                    }
                    return (printed, status.parse().expect("a status"));
                }
                None => printed.push(line.trim_end().to_owned()),
            }
        }
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        let _ = writeln!(self.stdin, "./cluster.sh stop >/dev/null 2>&1; exit");
        let _ = self.child.wait();
    }
}

#[test]
fn a_tour_is_read_as_it_is_written() {
    let readme = "
        x
        ```sh
        not in the tour
        ```
        <!-- tour:begin -->
        ```sh
        # a comment
        echo one   # with a remark
        # => one
        for i in 1 2; do
          echo $i
        done
        # => 1
        # => ...
        ```
        ```json
        {}
        ```
        <!-- tour:end -->
    ";
    let read = steps(readme);
    let texts: Vec<&str> = read.iter().map(|step| step.command.trim()).collect();
    assert_eq!(texts.len(), 2, "{texts:?}");
    assert_eq!(texts[0], "echo one   # with a remark");
    assert!(texts[1].starts_with("for i") && texts[1].ends_with("done"));
    assert_eq!(read[0].expected, Some(vec!["one".to_owned()]));
    assert_eq!(
        read[1].expected,
        Some(vec!["1".to_owned(), "...".to_owned()])
    );
}

#[test]
fn dots_stand_for_anything() {
    let lines = |text: &[&str]| {
        text.iter()
            .map(|line| (*line).to_owned())
            .collect::<Vec<_>>()
    };
    let fits = |expected: &[&str], printed: &[&str]| matches(&lines(expected), &lines(printed));
    assert!(
        fits(&["a ... c"], &["a b c"]) && fits(&["a...c...e"], &["abcde"]) && fits(&["..."], &[])
    );
    assert!(fits(&["a", "...", "d"], &["a", "b", "c", "d"]) && fits(&["..."], &["x", "y"]));
    assert!(
        !fits(&["a ... c"], &["a b"])
            && !fits(&["a"], &["a", "b"])
            && !fits(&["a", "b"], &["a"])
            && !fits(&["...b"], &["abc"])
    );
}
