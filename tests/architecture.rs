//! The house rules: who may import whom, which crate is named where, and that the pure core reads
//! no clock, disk, network or random source.
//!
//! It reads the sources as text, cut into words, with comments, literals and test code taken out.
//! Test code may import what it wants.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Each module of the crate's root, and those that it may name. `lib.rs` and `main.rs` may name
/// all.
const LAYERS: &[(&str, &[&str])] = &[
    ("types", &[]),
    ("blocking", &[]),
    ("mutants", &[]),
    ("rare", &[]),
    ("budget", &[]),
    ("error", &["types"]),
    ("telemetry", &["types"]),
    ("config", &["types", "sm"]),
    ("descriptors", &[]),
    ("metrics", &[]),
    ("supervisor", &[]),
    ("sm", &["mutants", "types"]),
    (
        "storage",
        &[
            "mutants",
            "rare",
            "blocking",
            "types",
            "error",
            "telemetry",
            "config",
            "supervisor",
            "descriptors",
            "sm",
        ],
    ),
    (
        "raft",
        &[
            "mutants",
            "rare",
            "blocking",
            "types",
            "budget",
            "error",
            "telemetry",
            "config",
            "supervisor",
            "descriptors",
            "sm",
            "storage",
        ],
    ),
    ("api", &["types", "budget", "sm"]),
    (
        "routing",
        &["blocking", "types", "budget", "descriptors", "sm", "api"],
    ),
    (
        "client",
        &["types", "budget", "telemetry", "sm", "api", "routing"],
    ),
    (
        "node",
        &[
            "mutants",
            "rare",
            "blocking",
            "types",
            "metrics",
            "budget",
            "error",
            "telemetry",
            "config",
            "supervisor",
            "descriptors",
            "sm",
            "storage",
            "raft",
            "api",
            "routing",
            "client",
        ],
    ),
    (
        "http",
        &[
            "blocking",
            "types",
            "metrics",
            "budget",
            "error",
            "telemetry",
            "config",
            "supervisor",
            "descriptors",
            "sm",
            "storage",
            "raft",
            "api",
            "routing",
            "client",
            "node",
        ],
    ),
    (
        "fuzzing",
        &[
            "supervisor",
            "sm",
            "storage",
            "raft",
            "api",
            "client",
            "http",
        ],
    ),
    (
        "cli",
        &[
            "types",
            "metrics",
            "budget",
            "error",
            "telemetry",
            "config",
            "supervisor",
            "sm",
            "storage",
            "raft",
            "api",
            "routing",
            "client",
            "node",
            "http",
        ],
    ),
];

/// Crates that only the files under these paths may name.
const CRATES: &[(&str, &[&str])] = &[
    ("openraft", &["raft/"]),
    ("sled", &["storage/"]),
    ("axum", &["http/"]),
    ("reqwest", &["routing/", "client/", "raft/transport/lanes"]),
    ("prometheus_client", &["metrics.rs"]),
];

/// What no file of `sm/` may name: it would make two replicas differ, or wait.
const IMPURE: &[&[&str]] = &[
    &["std", "time"],
    &["std", "fs"],
    &["std", "net"],
    &["std", "env"],
    &["std", "thread"],
    &["std", "process"],
    &["tokio"],
    &["rand"],
    &["futures"],
    &["HashMap"],
    &["HashSet"],
    &["Instant"],
    &["SystemTime"],
    &["RandomState"],
    &["async"],
];

/// How a doc comment begins that names a thing in place of saying what is returned or done.
const NOUN_CLAUSES: &[&str] = &[
    "What", "How", "Why", "Whether", "Where", "Who", "When", "Whom", "Whose", "Which",
];

/// A file past this wants to be two.
const LINES_MAX: usize = 1000;

/// As in `rustfmt.toml` and `.editorconfig`.
const COLUMNS_MAX: usize = 100;

/// How the names of files end that people write. Others are bytes, goldens, locked versions and
/// licences.
const WRITTEN: &[&str] = &[
    ".rs",
    ".sh",
    ".toml",
    ".yaml",
    ".md",
    ".ci/run",
    "Makefile",
    "Dockerfile",
    "Dockerfile.scratch",
];

/// Directories with nothing in them that belongs to the repository.
const UNWRITTEN: &[&str] = &["target", ".git", ".cluster", "quorate-data"];

/// Rooms in which others decide what is logged, or each round of a loop logs it again.
const PROVOKED: &[&str] = &[
    "node/controllers/",
    "http/",
    "routing/",
    "client/",
    "raft/transport/lanes/",
    "raft/transport/network.rs",
    "raft/transport/peer_client.rs",
    "raft/transport/append_stream.rs",
];

#[test]
fn layers_import_only_those_below() {
    let mut wrong = Vec::new();
    for source in sources() {
        let Some(layer) = source.module.first() else {
            continue;
        };
        let Some((_, allowed)) = LAYERS.iter().find(|(name, _)| name == layer) else {
            wrong.push(format!(
                "{}: the layer '{layer}' is not in LAYERS of tests/architecture.rs",
                source.path
            ));
            continue;
        };
        for named in root_modules(&source.words, &source.module) {
            let known = LAYERS.iter().any(|(name, _)| *name == named);
            if known && named != *layer && !allowed.contains(&named.as_str()) {
                wrong.push(format!("{} ({layer}) names crate::{named}", source.path));
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "imports against the layers:\n{}",
        wrong.join("\n")
    );
}

#[test]
fn crates_are_named_only_where_they_belong() {
    let mut wrong = Vec::new();
    for source in sources() {
        for (name, places) in CRATES {
            if names_crate(&source.words, name)
                && !places.iter().any(|place| source.path.starts_with(place))
            {
                wrong.push(format!(
                    "{} names {name}, which belongs in {}",
                    source.path,
                    places.join(" and ")
                ));
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "crates out of their place:\n{}",
        wrong.join("\n")
    );
}

/// Where a thread or task may be started that the supervisor does not see, how often, and why its
/// panic leaves nothing half dead. All that lives as long as a node or a replica is started by the
/// supervisor.
const SPAWNS: &[(&str, usize, &str)] = &[
    (
        "supervisor.rs",
        4,
        "it supervises them; and the thread of the last line",
    ),
    (
        "blocking.rs",
        1,
        "blocking work of a simulation, whose caller sees its panic",
    ),
    (
        "raft/runtime.rs",
        1,
        "the tasks of openraft, which inherit their supervisor",
    ),
    (
        "http/server/listener.rs",
        1,
        "one connection, which ends with it",
    ),
    ("http/body.rs", 1, "reads away the rest of one body"),
    ("http/native/view.rs", 1, "one request, which awaits it"),
    (
        "http/dialects/kvs/view_change.rs",
        1,
        "one request, which awaits it",
    ),
    (
        "client/wire.rs",
        1,
        "one connection of a client, whose callers see it end",
    ),
    (
        "node/controllers/group_tasks.rs",
        1,
        "one step of a view change, which is told and taken again",
    ),
    (
        "node/controllers/disk_watch.rs",
        1,
        "one report to a node, which has a deadline; its panic goes on in its loop",
    ),
    (
        "node/controllers/scrub.rs",
        1,
        "one scrub, which inherits its supervisor and is awaited",
    ),
    (
        "node/controllers/replica_opener.rs",
        1,
        "one replica to be opened or forgotten, which is tried again",
    ),
    (
        "storage/background.rs",
        1,
        "joined at once; its panic goes on in its caller",
    ),
    (
        "storage/sled_database.rs",
        1,
        "an attempt to open a database, which has a deadline",
    ),
    (
        "storage/sled_tree.rs",
        2,
        "drops a tree; walks one, and its reader sees it end",
    ),
    (
        "cli/signals.rs",
        1,
        "its end is awaited, and ends the process as a signal does",
    ),
    ("cli/bench/mod.rs", 4, "no node"),
];

#[test]
fn long_lived_threads_and_tasks_are_started_by_the_supervisor() {
    let starts = |words: &[String]| {
        let is_start = |at: &usize| {
            matches!(
                words[*at].as_str(),
                "spawn" | "spawn_scoped" | "spawn_local"
            )
        };
        let is_called = |at: usize| {
            words
                .get(at + 1)
                .is_some_and(|word| word == "(" || word == "::")
        };
        let is_defined = |at: usize| at > 0 && words[at - 1] == "fn";
        (0..words.len())
            .filter(is_start)
            .filter(|at| is_called(*at) && !is_defined(*at))
            .count()
    };
    let mut wrong = Vec::new();
    for source in sources() {
        let (allowed, why) = SPAWNS
            .iter()
            .find(|(path, ..)| *path == source.path)
            .map_or((0, "nothing is known of one there"), |(_, count, why)| {
                (*count, *why)
            });
        let found = starts(&source.words);
        if found != allowed {
            wrong.push(format!(
                "{} starts {found} threads or tasks by itself, not {allowed} ({why})",
                source.path
            ));
        }
    }
    assert!(
        wrong.is_empty(),
        "start them by `supervisor`, or say why not:\n{}",
        wrong.join("\n")
    );
}

#[test]
fn the_core_is_pure() {
    let mut wrong = Vec::new();
    for source in sources()
        .iter()
        .filter(|source| source.path.starts_with("sm/"))
    {
        for path in IMPURE.iter().filter(|path| names_path(&source.words, path)) {
            wrong.push(format!("{} names {}", source.path, path.join("::")));
        }
    }
    assert!(
        wrong.is_empty(),
        "the pure core reaches out:\n{}",
        wrong.join("\n")
    );
}

/// Tests and doubles too: they are read as often.
#[test]
fn every_file_says_what_lives_in_it_and_is_of_a_size() {
    let mut wrong = Vec::new();
    for source in sources() {
        if !source.text.starts_with("//!") && source.text.lines().count() > 1 {
            wrong.push(format!("{} does not open with //!", source.path));
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for file in written_files(root) {
        if file.extension().is_none_or(|extension| extension != "rs") {
            continue;
        }
        let name = file.strip_prefix(root).expect("below the root").display();
        let lines = fs::read_to_string(&file)
            .unwrap_or_else(|error| panic!("{name}: {error}"))
            .lines()
            .count();
        if lines > LINES_MAX {
            wrong.push(format!("{name} has {lines} lines, more than {LINES_MAX}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Who searches for a type should find one.
#[test]
fn no_two_types_share_a_name() {
    let mut homes: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for source in sources() {
        for name in types(&source.words) {
            homes.entry(name).or_default().push(source.path.clone());
        }
    }
    homes.retain(|_, files| files.len() > 1);
    assert!(homes.is_empty(), "types that share their name:\n{homes:#?}");
}

#[test]
fn types_are_found_wherever_they_stand() {
    let text = "pub struct A; trait B { type Item; } impl B for A { type Item = u8; } type C = A; \
                fn f() { enum D {} } #[cfg(test)] mod tests { struct E; }";
    assert_eq!(types(&without_tests(words(text)).0), ["A", "B", "C", "D"]);
}

/// A doc comment says what is returned or done. "What a node needs" names a thing and says nothing.
#[test]
fn doc_comments_begin_with_no_noun_clause() {
    let mut wrong = Vec::new();
    for source in sources() {
        let lines: Vec<&str> = source.text.lines().map(str::trim).collect();
        for (at, line) in lines.iter().enumerate() {
            let goes_on = at > 0 && lines[at - 1].starts_with("///");
            let begins = |clause: &&str| line.starts_with(&format!("/// {clause} "));
            if !goes_on && NOUN_CLAUSES.iter().any(begins) {
                wrong.push(format!("{}:{}: {line}", source.path, at + 1));
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "say what is returned or done, verb first:\n{}",
        wrong.join("\n")
    );
}

/// rustfmt breaks code, but neither comments nor literals; nothing else looks at the other files.
/// Free are what can't be broken: rows of tables and fenced blocks in Markdown.
#[test]
fn no_line_is_wider_than_100_columns() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut wrong = Vec::new();
    for file in written_files(root) {
        let text =
            fs::read_to_string(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        let name = file.strip_prefix(root).expect("below the root").display();
        let is_markdown = file.extension().is_some_and(|extension| extension == "md");
        for number in too_wide(&text, is_markdown) {
            wrong.push(format!("{name}:{number}"));
        }
    }
    assert!(
        wrong.is_empty(),
        "these lines are wider than {COLUMNS_MAX} columns:\n{}",
        wrong.join("\n")
    );
}

#[test]
fn a_line_that_is_too_wide_is_found() {
    let (fits, wide) = ("é".repeat(COLUMNS_MAX), "é".repeat(COLUMNS_MAX + 1));
    let text = format!("{fits}\n{wide}\n| {wide} |\n```sh\n{wide}\n```\n{wide}");
    assert_eq!(too_wide(&text, false), [2, 3, 5, 7]);
    assert_eq!(too_wide(&text, true), [2, 7]);
}

/// Requests and peers come as often as others like, and rounds of controllers several times a
/// second: a line for each would fill the log.
#[test]
fn what_can_be_logged_again_and_again_is_said_rarely() {
    let mut wrong = Vec::new();
    for source in sources()
        .iter()
        .filter(|source| PROVOKED.iter().any(|room| source.path.starts_with(room)))
    {
        let lines: Vec<&str> = source.text.lines().collect();
        let indent = |line: &str| line.len() - line.trim_start().len();
        for (at, line) in lines.iter().enumerate() {
            if !["tracing::warn!(", "tracing::error!("]
                .iter()
                .any(|macro_| line.contains(macro_))
            {
                continue;
            }
            let is_counted = lines[at + 1..]
                .iter()
                .take_while(|argument| indent(argument) > indent(line))
                .chain([line])
                .any(|line| line.contains("left_out"));
            let is_once = lines[at.saturating_sub(3)..at]
                .iter()
                .any(|line| line.contains("// Said once"));
            if !is_counted && !is_once {
                wrong.push(format!("{}:{}: {}", source.path, at + 1, line.trim()));
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "these can fill the log; use telemetry::rarely!, or tell above them why they can't in a \
         comment that begins with \"Said once\":\n{}",
        wrong.join("\n")
    );
}

/// A source file, without its test code.
struct Source {
    /// Below `src/`.
    path: String,
    text: String,
    /// The path of its module from the crate's root; empty for `lib.rs` and `main.rs`.
    module: Vec<String>,
    words: Vec<String>,
}

/// Every file of `src/`, without those that are compiled for tests alone.
fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    walk(&root, &mut files);
    let mut sources = Vec::new();
    let mut test_modules = BTreeSet::new();
    for file in files {
        let text =
            fs::read_to_string(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        let path = file
            .strip_prefix(&root)
            .expect("below src")
            .to_str()
            .expect("a readable name")
            .to_owned();
        let module = module_of(&path);
        let (words, tests) = without_tests(words(&text));
        test_modules.extend(
            tests
                .into_iter()
                .map(|name| [&module[..], &[name]].concat()),
        );
        sources.push(Source {
            path,
            text,
            module,
            words,
        });
    }
    sources.retain(|source| {
        !test_modules
            .iter()
            .any(|test: &Vec<String>| source.module.starts_with(test))
    });
    assert!(!sources.is_empty(), "no sources found");
    sources
}

/// Returns the names of the types that are declared: all but those associated with a trait.
fn types(words: &[String]) -> Vec<String> {
    let mut names = Vec::new();
    let mut depth = 0usize;
    for (at, word) in words.iter().enumerate() {
        match word.as_str() {
            "{" => depth += 1,
            "}" => depth = depth.saturating_sub(1),
            "struct" | "enum" | "union" | "trait" => names.extend(words.get(at + 1).cloned()),
            "type" if depth == 0 => names.extend(words.get(at + 1).cloned()),
            _ => {}
        }
    }
    names.retain(|name| name.starts_with(|first: char| first.is_ascii_uppercase()));
    names
}

/// Returns the numbers of the lines that are wider than [`COLUMNS_MAX`] characters.
fn too_wide(text: &str, is_markdown: bool) -> Vec<usize> {
    let mut numbers = Vec::new();
    let mut is_fenced = false;
    for (number, line) in (1..).zip(text.lines()) {
        if is_markdown && line.trim_start().starts_with("```") {
            is_fenced = !is_fenced;
        }
        let is_free = is_markdown && (is_fenced || line.starts_with('|'));
        if !is_free && line.chars().count() > COLUMNS_MAX {
            numbers.push(number);
        }
    }
    numbers
}

/// Returns every file in the repository that people write, whatever its kind.
fn written_files(root: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut directories = vec![root.to_owned()];
    while let Some(directory) = directories.pop() {
        let entries = fs::read_dir(&directory)
            .unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
        for entry in entries {
            let path = entry.expect("a directory entry").path();
            let name = path.to_str().expect("a readable name");
            if path.is_symlink() {
                continue;
            } else if path.is_dir() {
                if !UNWRITTEN.iter().any(|unwritten| path.ends_with(unwritten)) {
                    directories.push(path);
                }
            } else if WRITTEN.iter().any(|end| name.ends_with(end)) {
                files.push(path);
            }
        }
    }
    files.sort();
    assert!(!files.is_empty(), "no files found");
    files
}

fn walk(directory: &Path, files: &mut Vec<PathBuf>) {
    let entries =
        fs::read_dir(directory).unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
    for entry in entries {
        let path = entry.expect("a directory entry").path();
        if path.is_dir() {
            walk(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files.sort();
}

fn module_of(path: &str) -> Vec<String> {
    let mut module: Vec<String> = path
        .trim_end_matches(".rs")
        .split('/')
        .map(str::to_owned)
        .collect();
    if matches!(
        module.last().map(String::as_str),
        Some("mod" | "lib" | "main")
    ) {
        module.pop();
    }
    module
}

/// The words of a source: identifiers, `::`, and single characters. Comments and literals are left
/// out.
fn words(text: &str) -> Vec<String> {
    let chars: Vec<char> = text.chars().collect();
    let mut words = Vec::new();
    let mut at = 0;
    while at < chars.len() {
        let next = chars.get(at + 1).copied();
        match chars[at] {
            c if c.is_whitespace() => at += 1,
            '/' if next == Some('/') => at = position(&chars, at, |c| c == '\n'),
            '/' if next == Some('*') => at = block_comment_end(&chars, at),
            '"' => at = string_end(&chars, at),
            'r' | 'b' if raw_string(&chars, at).is_some() => {
                at = raw_string(&chars, at).expect("looked")
            }
            'b' if next == Some('"') => at = string_end(&chars, at + 1),
            '\'' => at = quote_end(&chars, at),
            c if c.is_alphanumeric() || c == '_' => {
                let end = position(&chars, at, |c| !(c.is_alphanumeric() || c == '_'));
                words.push(chars[at..end].iter().collect());
                at = end;
            }
            ':' if next == Some(':') => {
                words.push("::".to_owned());
                at += 2;
            }
            c => {
                words.push(c.to_string());
                at += 1;
            }
        }
    }
    words
}

fn position(chars: &[char], from: usize, stop: impl Fn(char) -> bool) -> usize {
    chars[from..]
        .iter()
        .position(|c| stop(*c))
        .map_or(chars.len(), |offset| from + offset)
}

fn block_comment_end(chars: &[char], from: usize) -> usize {
    let mut depth = 0;
    let mut at = from;
    while at < chars.len() {
        match (chars[at], chars.get(at + 1)) {
            ('/', Some('*')) => (depth, at) = (depth + 1, at + 2),
            ('*', Some('/')) => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
        if depth == 0 {
            return at;
        }
    }
    at
}

fn string_end(chars: &[char], from: usize) -> usize {
    let mut at = from + 1;
    while at < chars.len() && chars[at] != '"' {
        at += if chars[at] == '\\' { 2 } else { 1 };
    }
    at + 1
}

/// The end of `r"..."`, `r#"..."#`, `br"..."`, if one begins here.
fn raw_string(chars: &[char], from: usize) -> Option<usize> {
    let at = if chars[from] == 'b' { from + 1 } else { from };
    if chars.get(at) != Some(&'r') {
        return None;
    }
    let hashes = chars[at + 1..].iter().take_while(|c| **c == '#').count();
    let open = at + 1 + hashes;
    if chars.get(open) != Some(&'"') {
        return None;
    }
    let closes = |end: &usize| {
        chars[*end] == '"'
            && chars[*end + 1..]
                .iter()
                .take(hashes)
                .filter(|c| **c == '#')
                .count()
                == hashes
    };
    let end = (open + 1..chars.len())
        .find(closes)
        .unwrap_or(chars.len() - 1);
    Some(end + 1 + hashes)
}

/// Past a character literal or a lifetime's quote.
fn quote_end(chars: &[char], from: usize) -> usize {
    match (chars.get(from + 1), chars.get(from + 2)) {
        (Some('\\'), _) => position(chars, from + 3, |c| c == '\'') + 1,
        (Some(_), Some('\'')) => from + 3,
        _ => from + 1,
    }
}

/// Leaves out every item under `#[cfg(test)]`. Returns also the names of the modules in other files
/// that were so marked.
fn without_tests(words: Vec<String>) -> (Vec<String>, Vec<String>) {
    const MARK: [&str; 7] = ["#", "[", "cfg", "(", "test", ")", "]"];
    let mut kept = Vec::new();
    let mut modules = Vec::new();
    let mut at = 0;
    while at < words.len() {
        if !words[at..]
            .iter()
            .map(String::as_str)
            .take(MARK.len())
            .eq(MARK)
        {
            kept.push(words[at].clone());
            at += 1;
            continue;
        }
        at += MARK.len();
        let end = item_end(&words, at);
        let item = &words[at..end];
        if let Some(position) = item.iter().position(|word| word == "mod")
            && item.get(position + 2).is_some_and(|word| word == ";")
        {
            modules.push(item[position + 1].clone());
        }
        at = end;
    }
    (kept, modules)
}

/// Past the item that begins here: its `;`, or its block.
fn item_end(words: &[String], from: usize) -> usize {
    let mut depth = 0_usize;
    for (offset, word) in words[from..].iter().enumerate() {
        match word.as_str() {
            "{" | "(" | "[" => depth += 1,
            "}" | ")" | "]" => {
                depth = depth.saturating_sub(1);
                if depth == 0 && word == "}" {
                    return from + offset + 1;
                }
            }
            ";" | "," if depth == 0 => return from + offset + 1,
            _ => {}
        }
    }
    words.len()
}

/// The modules of the crate's root that are named by a path from `crate` or up through `super`.
fn root_modules(words: &[String], module: &[String]) -> BTreeSet<String> {
    let mut named = BTreeSet::new();
    for at in 0..words.len() {
        let inside_path = at > 0 && words[at - 1] == "::";
        let after = match words[at].as_str() {
            "crate" if !inside_path => at + 1,
            "super" if !inside_path => {
                let ups = words[at..]
                    .chunks(2)
                    .take_while(|pair| {
                        pair[0] == "super" && pair.get(1).is_some_and(|word| word == "::")
                    })
                    .count();
                if ups != module.len() {
                    continue;
                }
                at + 2 * ups - 1
            }
            _ => continue,
        };
        if words.get(after).is_none_or(|word| word != "::") {
            continue;
        }
        match words.get(after + 1).map(String::as_str) {
            Some("{") => named.extend(group_heads(words, after + 1)),
            Some(name) => named.extend([name.to_owned()]),
            None => {}
        }
    }
    named
}

/// The first words of the paths in `{a::b, c::{d}, e}`.
fn group_heads(words: &[String], open: usize) -> Vec<String> {
    let mut heads = Vec::new();
    let mut depth = 0_usize;
    for at in open..words.len() {
        match words[at].as_str() {
            "{" => depth += 1,
            "}" => depth -= 1,
            word if depth == 1 && matches!(words[at - 1].as_str(), "{" | ",") => {
                heads.push(word.to_owned())
            }
            _ => {}
        }
        if depth == 0 {
            break;
        }
    }
    heads
}

fn names_crate(words: &[String], name: &str) -> bool {
    (0..words.len()).any(|at| {
        let starts_path = at == 0 || words[at - 1] != "::" || at < 2 || !is_name(&words[at - 2]);
        let used = at > 0 && words[at - 1] == "use";
        let path = words.get(at + 1).is_some_and(|word| word == "::");
        words[at] == name && starts_path && (used || path)
    })
}

fn is_name(word: &str) -> bool {
    word.starts_with(|c: char| c.is_alphanumeric() || c == '_')
}

/// Whether a path is named, at once (`a::b`) or in a group (`a::{b, ..}`).
fn names_path(words: &[String], path: &[&str]) -> bool {
    let [first, rest @ ..] = path else {
        return true;
    };
    (0..words.len())
        .filter(|at| words[*at] == *first)
        .any(|at| match rest {
            [] => true,
            [second, ..] => {
                let joined = words.get(at + 1).is_some_and(|word| word == "::");
                match words.get(at + 2).map(String::as_str) {
                    Some("{") => {
                        joined && group_heads(words, at + 2).iter().any(|head| head == second)
                    }
                    Some(word) => joined && word == *second,
                    None => false,
                }
            }
        })
}

#[test]
fn the_scanner_sees_what_it_should() {
    let scan = |text: &str| without_tests(words(text)).0;
    let roots = |text: &str, module: &[&str]| -> Vec<String> {
        let module: Vec<String> = module.iter().map(|name| (*name).to_owned()).collect();
        root_modules(&scan(text), &module).into_iter().collect()
    };
    assert_eq!(roots("use crate::node::Node;", &["sm"]), ["node"]);
    assert_eq!(
        roots("use crate::{http::x, sm::{kv, view}, types};", &["sm"]),
        ["http", "sm", "types"]
    );
    assert_eq!(roots("fn f() { crate::raft::go() }", &["sm"]), ["raft"]);
    assert_eq!(
        roots("use super::super::cli::x; use super::other;", &["sm", "kv"]),
        ["cli"]
    );
    assert_eq!(
        roots(
            "// crate::raft\n/* crate::a /* crate::b */ */ let s = \"crate::c\"; r#\"crate::d\"#;",
            &["sm"]
        ),
        [""; 0]
    );
    assert_eq!(
        roots(
            "fn f<'a>(c: char) -> &'a str { if c == '\"' { crate::raft::x } else { '\\'' } }",
            &["sm"]
        ),
        ["raft"]
    );
    assert_eq!(
        roots(
            "#[cfg(test)] mod tests { use crate::raft::x; } use crate::sm;",
            &["sm"]
        ),
        ["sm"]
    );
    assert_eq!(
        roots(
            "#[cfg(test)]\n#[allow(x)]\nuse crate::raft::{x, y};\nuse crate::sm;",
            &["sm"]
        ),
        ["sm"]
    );
    assert_eq!(
        without_tests(words("#[cfg(test)] mod doubles; mod real;")).1,
        ["doubles"]
    );

    assert!(
        names_crate(&scan("use sled::Db;"), "sled")
            && names_crate(&scan("let x: ::sled::Db;"), "sled")
    );
    assert!(
        names_crate(&scan("use sled as s;"), "sled")
            && !names_crate(&scan("use crate::storage::sled::Tree;"), "sled")
    );
    assert!(!names_crate(&scan("let sled = 1; sledge::x()"), "sled"));

    assert!(names_path(
        &scan("use std::time::Duration;"),
        &["std", "time"]
    ));
    assert!(names_path(
        &scan("use std::{fmt, time::Instant};"),
        &["std", "time"]
    ));
    assert!(!names_path(
        &scan("use std::{fmt, collections::BTreeMap};"),
        &["std", "time"]
    ));
    assert!(names_path(
        &scan("use std::collections::HashMap;"),
        &["HashMap"]
    ));
}
