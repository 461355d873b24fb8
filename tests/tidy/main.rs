//! The rules of the house as tests: who may depend on whom, how long things may be, what may not be written.
//! Reads the sources as text and never compiles them. Each rule is shown a bad sample, so that it is known to fail.

mod circles;
mod documents;
mod text;

use std::{
    fs,
    ops::Range,
    path::{Path, PathBuf},
};

use text::{Source, behind_block, blank, body, skip_blanks, test_regions, text, word_at, words};

/// Every module of the library and what it may use, outermost first (`docs/design.md`, "Layout"). An entry may name a module inside a module.
/// `telemetry` owns nothing but names and may be used by all that are not pure.
#[rustfmt::skip] // one line each
const DEPENDENCIES: &[(&str, &[&str])] = &[
    ("dev", &["config", "pki", "control", "https", "node", "cluster", "storage", "telemetry"]),
    ("host", &["config", "control", "join", "node", "storage", "cluster"]),
    ("recover", &["found", "config", "events", "pki", "storage", "cluster"]),
    ("cli", &["config", "console", "control", "defender::wire", "events", "https", "admin", "backup", "node", "pki", "service", "storage", "cluster"]),
    (
        "supervisor",
        &["clients", "descriptors", "workload", "service", "guard", "admin", "node", "storage", "cluster", "telemetry"],
    ),
    ("workload", &["clients", "console", "admin", "descriptors", "node", "service", "storage", "telemetry"]),
    (
        "console",
        &["clients", "control", "admin", "ask", "backup", "defender::wire", "events", "health", "http", "join", "node", "pki", "service", "storage", "cluster", "telemetry"] ,
    ),
    ("service", &["config", "descriptors", "guard", "telemetry"]),
    ("guard", &["node::lease", "node::Lease", "telemetry"]),
    ("control", &["descriptors", "node", "telemetry"]),
    ("health", &["clients", "config", "descriptors", "node", "pki", "cluster", "telemetry"]),
    ("backup", &["config", "admin", "ask", "events", "node", "storage", "cluster", "telemetry"]),
    ("ask", &["admin", "peer", "cluster"]),
    ("admin", &["clients", "certificates", "node", "meeting", "join", "pki", "cluster", "telemetry"]),
    ("certificates", &["node", "peer", "pki", "storage", "cluster", "telemetry"]),
    ("snapshot", &["events", "node", "peer", "storage", "cluster", "telemetry"]),
    ("events", &["descriptors", "node", "pki", "cluster", "telemetry"]),
    ("node", &["peer", "pki", "storage", "cluster", "telemetry"]),
    ("heal", &["found", "storage", "pki", "config", "cluster", "telemetry"]),
    ("found", &["storage", "pki", "cluster", "config", "telemetry"]),
    ("meeting", &["clients", "join", "pki", "cluster"]),
    ("defender", &["https", "join::Token", "pki", "cluster"]),
    ("join", &["https", "storage", "pki", "config", "cluster", "telemetry"]),
    ("peer", &["clients", "descriptors", "pki", "cluster", "telemetry"]),
    ("storage", &["descriptors", "cluster", "telemetry"]),
    ("https", &["pki"]),
    ("pki", &["cluster"]),
    ("descriptors", &["clients", "telemetry"]),
    ("clients", &["telemetry"]),
    ("config", &[]),
    ("http", &[]),
    ("telemetry", &[]),
    ("clock", &[]),
    ("mutex", &[]),
    ("scheduling", &[]),
    ("little_endian", &[]),
    ("cluster", &[]),
];
/// What knows nothing, and may be used by all that are not pure.
const GROUND: &[&str] = &["clock", "mutex", "scheduling", "little_endian"];
/// Modules without clocks, threads and files.
const PURE: &[&str] = &["cluster"];
/// What the programs (and the files that belong to them alone) may use of the library; `None`: anything.
const PROGRAMS: &[(&str, Option<&[&str]>)] = &[
    ("src/main.rs", None),
    ("src/daemon.rs", None),
    ("src/daemon/administration.rs", None),
    ("src/daemon/damage.rs", None),
    ("src/daemon/folder.rs", None),
    ("src/daemon/memory.rs", None),
    ("src/daemon/service.rs", None),
    ("src/daemon/signals.rs", None),
    ("src/daemon/start.rs", None),
    ("src/daemon/systemd.rs", None),
    ("src/daemon/tasks.rs", None),
    ("src/joining.rs", None),
    ("src/waiting.rs", None),
    ("src/waiting/front.rs", None),
    ("src/bin/twistcli.rs", Some(&["cli"])),
    ("src/bin/defender.rs", Some(&["defender"])),
];
/// Lines of a file outside its tests.
const MAX_FILE_LINES: usize = 700;
/// Lines of a function, its signature included.
const MAX_FUNCTION_LINES: usize = 70;
/// The only place for unsafe code.
const UNSAFE_HOME: [&str; 2] = ["src/storage/vfs.rs", "src/storage/vfs/"];
/// What is written in one place only: how it is told, where it may stand, and what to use elsewhere.
const FACTS: &[(&str, &[&str], &str)] = &[
    ("CARGO_PKG_VERSION", &["src/cluster/level.rs"], "the version of the program is cluster::program_version()"),
    ("!(\"twistlock_", &["src/telemetry/"], "the names of metrics are constants of telemetry"),
    ("SystemTime::now()", &["src/clock.rs"], "the time of day comes from clock"),
    (".lock().unwrap_or_else(PoisonError", &["src/mutex.rs"], "mutex::locked takes a mutex"),
    (":02x}", &[], "data_encoding writes hexadecimal digits"),
    ("from_le_bytes([", &["src/little_endian.rs"], "little_endian reads numbers"),
    ("].try_into().expect(", &["src/little_endian.rs"], "little_endian reads numbers"),
];
/// How documentation begins that refers to what a reader may not see.
const EMPTY_STARTS: &[&str] = &["The same", "See the module"];
/// Columns of a comment.
const MAX_COLUMNS: usize = 120;
/// Names that say nothing about what a file owns.
const EMPTY_NAMES: &[&str] = &["util", "utils", "common", "types", "helpers", "misc"];
/// Functions in tests/ that wait for a condition or set a pace, and therefore may sleep, by the start of their names.
const MAY_SLEEP: &[&str] = &["wait_", "poll_", "sample_", "pace_"];

/// Adds the paths of the use tree (or plain path) at `at` to `out`, each below `prefix`.
fn paths_of(code: &str, at: usize, prefix: &[String], out: &mut Vec<Vec<String>>) {
    let at = skip_blanks(code, at);
    if code[at..].starts_with('{') {
        let end = behind_block(code, at);
        let mut i = at + 1;
        while i < end - 1 {
            paths_of(code, i, prefix, out);
            // To the next comma of this level.
            while i < end - 1 && code.as_bytes()[i] != b',' {
                i = if code.as_bytes()[i] == b'{' { behind_block(code, i) } else { i + 1 };
            }
            i += 1;
            if code[i.min(end - 1)..end - 1].trim().is_empty() {
                break;
            }
        }
        return;
    }
    let word = if code[at..].starts_with('*') { "*" } else { word_at(code, at) };
    if word.is_empty() || word == "self" {
        out.push(prefix.to_vec());
        return;
    }
    let path = [prefix, &[word.to_owned()]].concat();
    let next = skip_blanks(code, at + word.len());
    if code[next..].starts_with("::") && !code[next..].starts_with("::<") {
        paths_of(code, next + 2, &path, out);
    } else {
        out.push(path);
    }
}

/// The module that a file is: `src/peer/link.rs` is `peer::link`; the root for the library and the programs.
fn module_of(path: &str) -> Vec<String> {
    let inner = path.trim_start_matches("src/").trim_end_matches(".rs").trim_end_matches("/mod");
    if inner == "lib" || program(path) { vec![] } else { inner.split('/').map(str::to_owned).collect() }
}

fn program(path: &str) -> bool {
    path.starts_with("src/bin/") || PROGRAMS.iter().any(|(known, _)| *known == path)
}

/// The module around a position, inline modules included.
fn module_at(source: &Source, position: usize) -> Vec<String> {
    let mut module = module_of(&source.path);
    for at in words(&source.code, "mod").take_while(|at| *at < position) {
        let name = word_at(&source.code, skip_blanks(&source.code, at + 3));
        let inside =
            body(&source.code, at).is_some_and(|open| (open..behind_block(&source.code, open)).contains(&position));
        if inside {
            module.push(name.to_owned());
        }
    }
    module
}

/// Every path of our own that a file names, with its position, from the root of the library.
fn own_paths(source: &Source) -> Vec<(usize, Vec<String>)> {
    let code = &source.code;
    let mut found = Vec::new();
    for start in ["crate", "super", "twistlock_ha"] {
        for at in words(code, start) {
            let follows = code[skip_blanks(code, at + start.len())..].starts_with("::");
            let continues = code[..at].trim_end().ends_with("::");
            if !follows || continues || (start == "crate" && program(&source.path)) {
                continue;
            }
            let mut base = if start == "super" { module_at(source, at) } else { vec![] };
            let mut i = at;
            while word_at(code, i) == "super" && code[skip_blanks(code, i + 5)..].starts_with("::") {
                base.pop();
                i = skip_blanks(code, skip_blanks(code, i + 5) + 2);
            }
            if start != "super" {
                i = skip_blanks(code, i + start.len()) + 2;
            }
            let mut paths = Vec::new();
            paths_of(code, i, &base, &mut paths);
            found.extend(paths.into_iter().map(|path| (at, path)));
        }
    }
    found
}

fn permitted(entries: &[&str], path: &[String]) -> bool {
    entries.iter().any(|entry| entry.split("::").enumerate().all(|(i, part)| path.get(i).is_some_and(|p| p == part)))
}

/// Rule: modules use only what the table of dependencies allows.
fn dependencies(source: &Source) -> Vec<String> {
    let source = &source.without_tests();
    if !source.path.starts_with("src/") || source.path == "src/lib.rs" || is_test_file(&source.path) {
        return vec![];
    }
    let (name, allowed) = if program(&source.path) {
        match PROGRAMS.iter().find(|(path, _)| *path == source.path) {
            Some((_, None)) => return vec![],
            Some((path, Some(allowed))) => ((*path).to_owned(), *allowed),
            None => return vec![format!("{}: this program is not in the table of tests/tidy", source.path)],
        }
    } else {
        let name = module_of(&source.path).swap_remove(0);
        match DEPENDENCIES.iter().find(|(module, _)| *module == name) {
            Some((_, allowed)) => (name, *allowed),
            None => return vec![format!("{}: module {name} is not in the table of tests/tidy", source.path)],
        }
    };
    let foreign = own_paths(source).into_iter().filter(|(_, path)| {
        let inside = path.first().is_some_and(|first| *first == name);
        let ground = !PURE.contains(&name.as_str()) && permitted(GROUND, path);
        !inside && !ground && !permitted(allowed, path)
    });
    foreign.map(|(at, path)| source.at(at, &format!("{name} may not use crate::{}", path.join("::")))).collect()
}

fn is_test_file(path: &str) -> bool {
    path.ends_with("/tests.rs") || path.contains("/tests/")
}

/// Rule: a file says first what it owns.
fn opens_with_its_purpose(source: &Source) -> Vec<String> {
    if source.raw.starts_with("//! ") { vec![] } else { vec![source.at(0, "does not open with //!")] }
}

/// Rule: files stay short. Tests inside a file do not count.
fn file_size(source: &Source) -> Vec<String> {
    let inside_tests: usize = test_regions(&source.code).iter().map(|r| source.raw[r.clone()].lines().count()).sum();
    let lines = source.raw.lines().count() - inside_tests;
    let long = lines > MAX_FILE_LINES && !is_test_file(&source.path);
    if long { vec![source.at(0, &format!("{lines} lines, at most {MAX_FILE_LINES}"))] } else { vec![] }
}

/// Every function with a body: its name and where it stands.
fn functions(code: &str) -> Vec<(&str, Range<usize>)> {
    let all = words(code, "fn").filter_map(|at| {
        let name = word_at(code, skip_blanks(code, at + 2));
        let open = (!name.is_empty()).then(|| body(code, at)).flatten()?;
        Some((name, at..behind_block(code, open)))
    });
    all.collect()
}

/// Rule: functions stay short.
fn function_size(source: &Source) -> Vec<String> {
    let source = &source.without_tests();
    let mut bad = vec![];
    for (name, range) in functions(&source.code) {
        let lines = source.code[range.clone()].lines().count();
        if lines > MAX_FUNCTION_LINES && !is_test_file(&source.path) {
            bad.push(source.at(range.start, &format!("fn {name} has {lines} lines, at most {MAX_FUNCTION_LINES}")));
        }
    }
    bad
}

/// Rule: unsafe code has one home. (A test that calls SQLite itself must allow the lint, and is seen by that.)
fn unsafe_at_home(source: &Source) -> Vec<String> {
    if !source.path.starts_with("src/") || UNSAFE_HOME.iter().any(|home| source.path.starts_with(home)) {
        return vec![];
    }
    let what = "unsafe code belongs into src/storage/vfs.rs";
    words(&source.code, "unsafe").map(|at| source.at(at, what)).collect()
}

/// Rule: nothing is left for later. The marks are put together here so that this file does not contain them.
fn nothing_unfinished(source: &Source) -> Vec<String> {
    let marks = [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("X", "XX")];
    let macros = [concat!("to", "do!"), concat!("unimpl", "emented!"), concat!("#[ig", "nore")];
    let mut bad = vec![];
    for mark in marks {
        bad.extend(words(&source.raw, mark).map(|at| source.at(at, &format!("{mark} is left"))));
    }
    for mark in macros {
        bad.extend(source.code.match_indices(mark).map(|(at, _)| source.at(at, &format!("{mark} is left"))));
    }
    bad
}

/// Rule: tests wait for conditions. Only the functions that do the waiting may sleep.
fn no_sleep(source: &Source) -> Vec<String> {
    let code = &source.code;
    if !source.path.starts_with("tests/") {
        return vec![];
    }
    let homes: Vec<_> =
        functions(code).into_iter().filter(|(name, _)| MAY_SLEEP.iter().any(|start| name.starts_with(start))).collect();
    words(code, "sleep")
        .filter(|at| code[skip_blanks(code, at + 5)..].starts_with('('))
        .filter(|at| !code[..*at].trim_end().ends_with("fn"))
        .filter(|at| !homes.iter().any(|(_, range)| range.contains(at)))
        .map(|at| source.at(at, &format!("sleep outside a function whose name starts with {}", MAY_SLEEP.join(" or "))))
        .collect()
}

/// Rule: every queue has a bound. Tests may do without.
fn bounded_queues(source: &Source) -> Vec<String> {
    let source = &source.without_tests();
    let code = &source.code;
    if !source.path.starts_with("src/") || is_test_file(&source.path) {
        return vec![];
    }
    let empty_call = |at: &usize| {
        let behind = &code[at + "channel".len()..];
        let arguments = behind.find('(').map_or("", |open| &behind[open..]);
        let called = behind.starts_with('(') || behind.starts_with("::<");
        // A oneshot channel holds one value.
        let one = code[..*at].ends_with("oneshot::");
        called && !one && arguments[1..].trim_start().starts_with(')')
    };
    let unbounded = words(code, "unbounded_channel").chain(words(code, "channel").filter(empty_call));
    unbounded.map(|at| source.at(at, "a queue without a bound")).collect()
}

/// Rule: one fact stands in one place. Tests may write it out.
fn one_home(source: &Source) -> Vec<String> {
    let source = &source.without_tests();
    if !source.path.starts_with("src/") || is_test_file(&source.path) {
        return vec![];
    }
    let elsewhere = FACTS.iter().filter(|(_, homes, _)| !homes.iter().any(|home| source.path.starts_with(home)));
    elsewhere.flat_map(|(mark, _, what)| source.raw.match_indices(mark).map(|(at, _)| source.at(at, what))).collect()
}

/// Rule: an error that says its cause does not offer it as its source as well, or whoever prints the chain says it twice.
/// A text is whole by itself; `#[error(transparent)]` passes the whole error on.
fn causes_said_once(source: &Source) -> Vec<String> {
    let source = &source.without_tests();
    let mut bad = vec![];
    for (at, attribute) in source.code.match_indices("#[error(") {
        let behind = behind_block(&source.code, at + 1);
        let format = &source.raw[at + attribute.len()..behind];
        let says =
            |field: &str| [format!("{{{field}}}"), format!("{{{field}:")].iter().any(|mark| format.contains(mark));
        // The fields of the variant or of the structure.
        let Some(open) = source.code[behind..].find(['(', '{', ',', ';', '}']).map(|length| behind + length) else {
            continue;
        };
        let fields = match source.code.as_bytes()[open] {
            b'(' | b'{' => &source.code[open + 1..behind_block(&source.code, open) - 1],
            _ => continue,
        };
        let twice = fields.split(',').enumerate().any(|(number, field)| {
            let marked = field.contains("#[from]") || field.contains("#[source]");
            let name =
                field.rsplit_once("::").map_or(field, |(before, _)| before).split(':').next().unwrap_or_default();
            let name = name.rsplit([' ', ']', '\n']).find(|word| !word.is_empty()).unwrap_or_default();
            (marked && says(&number.to_string())) || ((marked || name == "source") && says(name))
        });
        if twice {
            bad.push(source.at(at, "the text says the cause, and the source of the error is that cause as well"));
        }
    }
    bad
}

/// Rule: names say what is owned.
fn speaking_name(source: &Source) -> Vec<String> {
    let parts = source.path.trim_end_matches(".rs").split('/');
    let bad = parts.filter(|part| EMPTY_NAMES.contains(part));
    bad.map(|part| format!("{}: the name {part} does not say what is owned", source.path)).collect()
}

/// Rule: a comment says something where it stands alone, and is as wide as code. Lists, tables and links may be wider.
fn comments_stand_alone(source: &Source) -> Vec<String> {
    let lines = source.raw.lines().enumerate().map(|(number, line)| (number + 1, line));
    let comments = lines.filter_map(|(number, line)| Some((number, line, line.trim_start().strip_prefix("//")?)));
    let mut bad = vec![];
    for (number, line, text) in comments.filter(|_| source.path.starts_with("src/")) {
        let documents = text.starts_with(['/', '!']);
        let text = text.strip_prefix(['/', '!']).unwrap_or(text);
        let text = text.strip_prefix(' ').unwrap_or(text);
        if documents && EMPTY_STARTS.iter().any(|start| text.starts_with(start)) {
            bad.push(format!("{}:{number}: says nothing where it stands alone: {text}", source.path));
        }
        if line.chars().count() > MAX_COLUMNS && text.starts_with(char::is_alphabetic) {
            bad.push(format!("{}:{number}: wider than {MAX_COLUMNS} columns", source.path));
        }
    }
    bad
}

/// Rule: public types and functions of a module are explained (constants, fields and methods may speak for themselves).
fn public_items_have_docs(source: &Source) -> Vec<String> {
    const ITEMS: &[&str] = &["fn", "async", "unsafe", "struct", "enum", "trait", "type", "union"];
    let source = &source.without_tests();
    if !source.path.starts_with("src/") || is_test_file(&source.path) {
        return vec![];
    }
    let mut code = source.code.clone().into_bytes();
    for (at, _) in source.code.match_indices("#[") {
        blank(&mut code, at..behind_block(&source.code, at + 1));
    }
    let code = text(code);
    let lines: Vec<(&str, &str)> = source.raw.lines().map(str::trim).zip(code.lines().map(str::trim_end)).collect();
    let mut bad = vec![];
    for (number, (_, code)) in lines.iter().enumerate() {
        let item = code.strip_prefix("pub ").map(|rest| word_at(rest, 0));
        if !item.is_some_and(|item| ITEMS.contains(&item)) {
            continue;
        }
        // Upwards over attributes to the doc comment.
        let above = lines[..number].iter().rev().find(|(raw, code)| {
            let documented = raw.starts_with("///") || raw.ends_with("*/") || raw.starts_with("#[doc");
            documented || !code.is_empty() || raw.is_empty()
        });
        if !above.is_some_and(|(raw, code)| code.is_empty() && !raw.is_empty()) {
            bad.push(format!("{}:{}: no doc comment: {code}", source.path, number + 1));
        }
    }
    bad
}

type Rule = fn(&Source) -> Vec<String>;

fn root() -> PathBuf {
    let set = std::env::var_os("CARGO_MANIFEST_DIR").map(PathBuf::from);
    set.unwrap_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")))
}

fn collect(folder: &Path, root: &Path, out: &mut Vec<Source>) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries {
        let path = entry.expect("read a folder").path();
        if path.is_dir() {
            collect(&path, root, out);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let relative = path.strip_prefix(root).expect("below the root").to_string_lossy().into_owned();
            out.push(Source::new(&relative, &fs::read_to_string(&path).expect("read a source file")));
        }
    }
}

fn all_sources() -> Vec<Source> {
    let root = root();
    let mut sources = vec![];
    for folder in ["src", "tests", "benches"] {
        collect(&root.join(folder), &root, &mut sources);
    }
    assert!(sources.iter().any(|source| source.path == "src/lib.rs"), "the sources were not found");
    sources.sort_by(|a, b| a.path.cmp(&b.path));
    sources
}

#[track_caller]
fn holds_everywhere(rule: Rule) {
    let bad: Vec<String> = all_sources().iter().flat_map(rule).collect();
    assert!(bad.is_empty(), "{} findings:\n{}", bad.len(), bad.join("\n"));
}

/// Shows a rule a file that it must object to, and returns what it says.
#[track_caller]
fn objects(rule: Rule, path: &str, raw: &str) -> String {
    let bad = rule(&Source::new(path, raw));
    assert_eq!(bad.len(), 1, "{path}: {raw:?} gives {bad:?}");
    bad.concat()
}

/// Shows a rule a file that it must let pass.
#[track_caller]
fn accepts(rule: Rule, path: &str, raw: &str) {
    assert_eq!(rule(&Source::new(path, raw)), Vec::<String>::new(), "{path}: {raw:?}");
}

#[test]
fn modules_use_only_what_they_may() {
    holds_everywhere(dependencies);
    let rule: Rule = dependencies;
    let message = objects(rule, "src/node/mod.rs", "//! x\n\nuse crate::supervisor::Supervisor;\n");
    assert_eq!(message, "src/node/mod.rs:3: node may not use crate::supervisor::Supervisor");
    objects(rule, "src/cluster/role.rs", "fn a() { crate::storage::read(); }");
    objects(rule, "src/cluster/role.rs", "use super::super::storage::A;");
    objects(rule, "src/cluster/mod.rs", "use super::{storage};");
    objects(rule, "src/storage/raft_log.rs", "use crate::{cluster::{Role, NodeId}, node::Status};");
    objects(rule, "src/storage/raft_log.rs", "use crate::*;");
    objects(rule, "src/guard.rs", "use crate::node::{Lease, lease::boottime, Status};");
    objects(rule, "src/guard.rs", "use crate::node;");
    objects(rule, "src/bin/twistcli.rs", "fn main() { twistlock_ha::node::run(); }");
    objects(rule, "src/bin/other.rs", "fn main() {}");
    objects(rule, "src/surprise.rs", "//! A module that nobody put into the table.");
    accepts(rule, "src/main.rs", "use twistlock_ha::{config, node, supervisor};");
    accepts(rule, "src/guard.rs", "use crate::node::{Lease, lease::boottime};");
    accepts(rule, "src/node/loop.rs", "use super::{Lease, status::Status}; use crate::{peer, storage::{self, A}};");
    objects(rule, "src/cluster/role.rs", "use crate::clock::unix_time;");
    accepts(rule, "src/guard.rs", "use crate::clock::unix_time;");
    accepts(
        rule,
        "src/cluster/role.rs",
        "// crate::storage\nconst A: &str = \"crate::storage\";\npub(super) fn a() {}",
    );
    accepts(rule, "src/cluster/role.rs", "mod inner { use super::NodeId; use super::super::Role; }");
    accepts(rule, "src/cluster/role.rs", "#[cfg(test)]\nmod tests { use crate::storage::A; }");
}

#[test]
fn the_table_has_no_cycle() {
    // A module may use only what stands below it, and so no two can use each other.
    for (index, (name, allowed)) in DEPENDENCIES.iter().enumerate() {
        for entry in *allowed {
            let module = entry.split("::").next().expect("a first part");
            let below = DEPENDENCIES[index + 1..].iter().any(|(other, _)| *other == module);
            assert!(below, "{name} stands above {module} in the table");
        }
    }
}

#[test]
fn files_open_with_their_purpose() {
    holds_everywhere(opens_with_its_purpose);
    objects(opens_with_its_purpose, "src/a.rs", "use std::fs;\n//! late\n");
    accepts(opens_with_its_purpose, "src/a.rs", "//! Owns a.\n");
}

#[test]
fn files_stay_short() {
    holds_everywhere(file_size);
    let lines = "const A: u8 = 1;\n".repeat(MAX_FILE_LINES);
    accepts(file_size, "src/a.rs", &lines);
    accepts(file_size, "src/a.rs", &format!("{lines}#[cfg(test)]\nmod tests {{\n\n\n\n}}\n"));
    let message = objects(file_size, "src/a.rs", &format!("{lines}//\n#[cfg(test)]\nmod tests {{\n}}\n"));
    assert_eq!(message, "src/a.rs:1: 701 lines, at most 700");
}

#[test]
fn functions_stay_short() {
    holds_everywhere(function_size);
    let sample =
        |lines: usize| format!("fn a(b: [u8; 3]) -> u8 {{\n{}}}\n", "    f(\"}\", '}', '{');\n".repeat(lines - 2));
    accepts(function_size, "src/a.rs", &sample(MAX_FUNCTION_LINES));
    accepts(function_size, "src/a.rs", &format!("#[cfg(test)]\nmod tests {{\n{}}}\n", sample(100)));
    let message = objects(function_size, "src/a.rs", &format!("\n{}", sample(MAX_FUNCTION_LINES + 1)));
    assert_eq!(message, "src/a.rs:2: fn a has 71 lines, at most 70");
}

#[test]
fn unsafe_stays_at_home() {
    holds_everywhere(unsafe_at_home);
    objects(unsafe_at_home, "src/guard.rs", "fn a() { unsafe { b() } }");
    objects(unsafe_at_home, "src/storage/vfs_other.rs", "unsafe fn a() {}");
    accepts(unsafe_at_home, "src/storage/vfs.rs", "unsafe fn a() {}");
    accepts(unsafe_at_home, "src/storage/vfs/file.rs", "unsafe fn a() {}");
    accepts(
        unsafe_at_home,
        "src/guard.rs",
        "#![deny(unsafe_code)] // nothing unsafe here\nconst A: &str = \"unsafe\";",
    );
}

#[test]
fn nothing_is_left_for_later() {
    holds_everywhere(nothing_unfinished);
    objects(nothing_unfinished, "src/a.rs", concat!("// TO", "DO: more"));
    objects(nothing_unfinished, "src/a.rs", concat!("// X", "XX"));
    objects(nothing_unfinished, "src/a.rs", concat!("fn a() { to", "do!() }"));
    objects(nothing_unfinished, "tests/a.rs", concat!("#[ig", "nore = \"slow\"]\nfn a() {}"));
    accepts(nothing_unfinished, "src/a.rs", "// the mkstemp pattern is a.XXXXXX");
}

#[test]
fn tests_wait_for_conditions() {
    holds_everywhere(no_sleep);
    objects(no_sleep, "tests/e2e.rs", "fn a() { std::thread::sleep(SECOND); }");
    objects(no_sleep, "tests/e2e.rs", "async fn a() { tokio::time::sleep(SECOND).await; }");
    objects(no_sleep, "tests/e2e.rs", "use std::thread::sleep;\nfn a() { sleep(SECOND); }");
    accepts(no_sleep, "tests/e2e.rs", "fn wait_for(c: impl Fn() -> bool) { while !c() { std::thread::sleep(STEP); } }");
    accepts(no_sleep, "src/a.rs", "fn a() { std::thread::sleep(SECOND); }");
}

#[test]
fn queues_have_bounds() {
    holds_everywhere(bounded_queues);
    objects(bounded_queues, "src/a.rs", "fn a() { let (b, c) = std::sync::mpsc::channel(); }");
    objects(bounded_queues, "src/a.rs", "fn a() { let (b, c) = mpsc::channel::<Vec<u8>>(); }");
    objects(bounded_queues, "src/a.rs", "fn a() { tokio::sync::mpsc::unbounded_channel::<u8>(); }");
    accepts(
        bounded_queues,
        "src/a.rs",
        "fn a() { mpsc::channel(8); mpsc::sync_channel::<u8>(0); oneshot::channel::<()>(); }",
    );
    accepts(bounded_queues, "tests/a.rs", "fn a() { std::sync::mpsc::channel(); }");
}

#[test]
fn facts_stand_in_one_place() {
    holds_everywhere(one_home);
    objects(one_home, "src/console/system.rs", "const A: &str = env!(\"CARGO_PKG_VERSION\");");
    objects(one_home, "src/peer/links.rs", "fn a() { metrics::counter!(\"twistlock_deaths_total\"); }");
    objects(one_home, "src/admin/mod.rs", "fn a() { std::time::SystemTime::now(); }");
    objects(one_home, "src/join/mod.rs", "fn a(b: u8) -> String { format!(\"{b:02x}\") }");
    accepts(one_home, "src/clock.rs", "fn a() { std::time::SystemTime::now(); }");
    accepts(one_home, "src/a.rs", "#[cfg(test)]\nmod tests { fn a() { std::time::SystemTime::now(); } }");
}

#[test]
fn errors_say_their_cause_once() {
    holds_everywhere(causes_said_once);
    let rule: Rule = causes_said_once;
    let message =
        objects(rule, "src/a.rs", "enum A {\n    #[error(\"cannot {b}: {source}\")]\n    C { b: u8, source: D },\n}");
    assert_eq!(message, "src/a.rs:2: the text says the cause, and the source of the error is that cause as well");
    objects(rule, "src/a.rs", "enum A { #[error(\"cannot: {0}\")] C(#[from] std::io::Error) }");
    objects(rule, "src/a.rs", "enum A { #[error(\"cannot: {1:?}\")] C(u8, #[source] std::io::Error) }");
    objects(rule, "src/a.rs", "enum A { #[error(\"cannot: {why}\")] C { #[source] why: std::io::Error } }");
    objects(rule, "src/a.rs", "#[error(\"cannot: {source}\")]\npub struct A { pub source: std::io::Error }");
    accepts(rule, "src/a.rs", "enum A { #[error(\"cannot\")] C { source: D }, #[error(transparent)] E(#[from] F) }");
    accepts(rule, "src/a.rs", "enum A { #[error(\"{0}: {error}\")] C { b: u8, error: D }, #[error(\"{0}\")] E(F), G }");
}

#[test]
fn names_say_what_is_owned() {
    holds_everywhere(speaking_name);
    objects(speaking_name, "src/utils.rs", "");
    objects(speaking_name, "src/console/types.rs", "");
    objects(speaking_name, "tests/common/mod.rs", "");
    accepts(speaking_name, "src/storage/vfs.rs", "");
}

#[test]
fn comments_say_something() {
    holds_everywhere(comments_stand_alone);
    let rule: Rule = comments_stand_alone;
    let message = objects(rule, "src/a.rs", "fn a() {}\n    /// The same for b.\n");
    assert_eq!(message, "src/a.rs:2: says nothing where it stands alone: The same for b.");
    objects(rule, "src/a.rs", "/// See the module.\nstruct A;");
    objects(rule, "src/a.rs", &format!("// {}", "w".repeat(MAX_COLUMNS)));
    accepts(rule, "src/a.rs", &format!("//! | {} |\n/// For the same reason.", "w".repeat(MAX_COLUMNS)));
}

#[test]
fn public_items_are_explained() {
    holds_everywhere(public_items_have_docs);
    objects(public_items_have_docs, "src/a.rs", "//! a\npub fn a() {}\n");
    objects(public_items_have_docs, "src/a.rs", "//! a\n\n#[derive(\n    Debug\n)]\npub struct A;\n");
    objects(public_items_have_docs, "src/a.rs", "/// A.\npub struct A;\n\npub async fn b() {}\n");
    accepts(
        public_items_have_docs,
        "src/a.rs",
        "/// A.\n#[derive(\n    Debug\n)]\n// why\npub struct A { pub b: u8 }\n",
    );
    accepts(public_items_have_docs, "src/a.rs", "//! a\npub mod b;\npub use b::C;\npub(crate) fn d() {}\nfn e() {}\n");
}
