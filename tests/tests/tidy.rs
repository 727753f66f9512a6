//! Rules of the repository that no compiler checks, as tests.
//!
//! Rooms: data flows one way, and a room names only rooms to its right; crate edges hold that between crates,
//! the table below holds it inside them.

#![allow(
    clippy::unwrap_used,
    reason = "a test may panic; clippy sees only its #[test] functions as one"
)]

use std::fs;
use std::path::{Path, PathBuf};

use vmshadow_tests::harness::image::project;

/// Per crate: its rooms from left to right. A room may name rooms after it, never one before it.
/// Rooms not listed (`error`, `units` and the like) are the vocabulary of all.
const ROOMS: &[(&str, &[&str])] = &[
    (
        "vhost-blk",
        &[
            "daemon", "handover", "config", "control", "frontend", "engine",
        ],
    ),
    (
        "guest-agent",
        &[
            "qga",
            "native",
            "quiesce",
            "writer",
            "hold",
            "filesystem",
            "transport",
            "clock",
            "journal",
        ],
    ),
    (
        "qmp-bridge",
        &[
            "cli", "daemon", "sets", "snapshot", "vm", "guest", "storage", "qmp", "link",
        ],
    ),
    ("tests", &["bench", "harness", "guest_protocol"]),
];

/// Edges to the left that stand for now, each with its reason.
const EXCEPTIONS: &[(&str, &str)] = &[
    // A writer's connection that closes must reach the state machine, which in turn sends through writers.
    ("guest-agent/src/writer/socket.rs", "quiesce"),
];

/// The crates of the workspace, whose `src` is under the rules.
const CRATES: &[&str] = &[
    "vhost-blk",
    "vhost-blk/store",
    "vhost-blk/wire",
    "guest-agent",
    "guest-agent/wire",
    "guest-agent/writers/database",
    "guest-agent/writers/etcd",
    "guest-agent/writers/mariadb",
    "guest-agent/writers/mysql",
    "guest-agent/writers/mysql-family",
    "guest-agent/writers/postgresql",
    "guest-agent/writers/redis",
    "guest-agent/writers/sqlite",
    "guest-agent/writers/unit",
    "guest-agent/writers/writer-tests",
    "qmp-bridge",
    "tests",
];

fn rust_files(directory: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() && path.file_name().is_some_and(|name| name != "target") {
            rust_files(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}

fn files_of(name: &str, below: &str) -> Vec<PathBuf> {
    let mut files = Vec::new();
    rust_files(&project().join(name).join(below), &mut files);
    files
}

fn all_files() -> Vec<PathBuf> {
    let mut files: Vec<_> = CRATES
        .iter()
        .flat_map(|name| ["src", "tests", "benches"].map(|b| files_of(name, b)))
        .flatten()
        .collect();
    files.sort();
    files.dedup();
    assert!(
        files.len() > 20,
        "the walk found only {} files",
        files.len()
    );
    files
}

fn shown(path: &Path) -> String {
    path.strip_prefix(project())
        .unwrap_or(path)
        .display()
        .to_string()
}

#[test]
fn every_crate_of_the_workspace_is_under_the_rules() {
    let manifest = fs::read_to_string(project().join("Cargo.toml")).unwrap();
    let members = manifest
        .split("members = [")
        .nth(1)
        .and_then(|rest| rest.split(']').next());
    let members: Vec<_> = members
        .unwrap()
        .split(',')
        .map(|word| word.trim().trim_matches('"'))
        .filter(|w| !w.is_empty())
        .collect();
    assert_eq!(members, CRATES);
}

#[test]
fn every_file_says_what_it_is() {
    let silent: Vec<_> = all_files()
        .into_iter()
        .filter(|path| !fs::read_to_string(path).unwrap().starts_with("//!"))
        .map(|path| shown(&path))
        .collect();
    assert!(
        silent.is_empty(),
        "these do not begin with `//!`: {silent:#?}"
    );
}

#[test]
fn nothing_is_left_for_later_in_a_comment() {
    // Put together here, so that this file does not find itself.
    let marks = [
        concat!("FIX", "ME"),
        concat!("TO", "DO"),
        concat!("XX", "X"),
        concat!("todo", "!("),
        concat!("unimplemented", "!("),
    ];
    let mut found = Vec::new();
    for path in all_files() {
        for (number, line) in fs::read_to_string(&path).unwrap().lines().enumerate() {
            if marks.iter().any(|mark| line.contains(mark)) {
                found.push(format!("{}:{}: {}", shown(&path), number + 1, line.trim()));
            }
        }
    }
    assert!(
        found.is_empty(),
        "write an issue or a test instead: {found:#?}"
    );
}

/// `crate::ROOM` and `super::super::...` are how a room is named; only the first is allowed across rooms.
fn rooms_named(text: &str) -> Vec<String> {
    text.match_indices("crate::")
        .filter(|(at, _)| !text[..*at].ends_with(|c: char| c.is_alphanumeric() || c == '_'))
        .flat_map(|(at, word)| {
            let rest = &text[at + word.len()..];
            // `use crate::{a::B, c::D}` names several.
            let list = rest
                .strip_prefix('{')
                .and_then(|rest| rest.split("};").next());
            list.map_or_else(|| vec![rest], |list| list.split(',').collect())
                .into_iter()
                .map(|path| {
                    path.trim()
                        .chars()
                        .take_while(|c| c.is_alphanumeric() || *c == '_')
                        .collect()
                })
                .collect::<Vec<String>>()
        })
        .collect()
}

fn edges_to_the_left(rooms: &[&str], room: &str, text: &str) -> Vec<String> {
    let Some(here) = rooms.iter().position(|name| *name == room) else {
        return Vec::new();
    };
    rooms_named(text)
        .into_iter()
        .filter(|named| {
            rooms
                .iter()
                .position(|name| name == named)
                .is_some_and(|there| there < here)
        })
        .collect()
}

#[test]
fn a_room_names_only_rooms_to_its_right() {
    let mut wrong = Vec::new();
    for (name, rooms) in ROOMS {
        let source = project().join(name).join("src");
        for path in files_of(name, "src") {
            let inside = path.strip_prefix(&source).unwrap();
            let first = inside
                .components()
                .next()
                .unwrap()
                .as_os_str()
                .to_string_lossy();
            let room = first.trim_end_matches(".rs");
            let text = fs::read_to_string(&path).unwrap();
            for named in edges_to_the_left(rooms, room, &text) {
                if EXCEPTIONS.contains(&(shown(&path).as_str(), named.as_str())) {
                    continue;
                }
                wrong.push(format!(
                    "{} names {named}, which is to the left of {room}",
                    shown(&path)
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn the_search_for_edges_sees_every_way_to_name_a_room() {
    let rooms = ["control", "frontend", "engine"];
    let left = |text| edges_to_the_left(&rooms, "engine", text);
    assert_eq!(left("use crate::frontend::Device;"), ["frontend"]);
    assert_eq!(
        left("use crate::{\n    control::Server,\n    engine::Op,\n};"),
        ["control"]
    );
    assert_eq!(left("let x = crate::control::start();"), ["control"]);
    assert!(left("use crate::engine::Op; use other_crate::control::X;").is_empty());
    assert!(edges_to_the_left(&rooms, "control", "use crate::engine::Op;").is_empty());
}

#[test]
fn every_wire_crate_freezes_its_bytes() {
    for name in CRATES.iter().filter(|name| name.ends_with("/wire")) {
        let tests = project().join(name).join("tests");
        assert!(
            tests.join("golden.rs").is_file(),
            "{name} has no tests/golden.rs"
        );
        let files = fs::read_dir(tests.join("golden"))
            .into_iter()
            .flatten()
            .count();
        assert!(files > 0, "{name} has no golden messages");
    }
}

/// Where the tests are that `FAILURES.md` names by their file alone.
fn file_of_test(file: &str) -> PathBuf {
    if file.ends_with(".rs") {
        return project().join(file);
    }
    let room = if file == "sets" {
        "qmp-bridge"
    } else {
        "guest-agent"
    };
    project()
        .join(room)
        .join("tests")
        .join(file)
        .with_extension("rs")
}

#[test]
fn every_failure_names_tests_that_exist() {
    let table = fs::read_to_string(project().join("guest-agent/FAILURES.md")).unwrap();
    let (mut named, mut missing) = (0, Vec::new());
    for (file, function) in table.split('`').filter_map(|word| word.split_once("::")) {
        if file == "file" {
            continue;
        }
        named += 1;
        let text = fs::read_to_string(file_of_test(file)).unwrap_or_default();
        let head = format!("fn {function}(");
        let attributes = text.split_once(&head).map(|(before, _)| {
            let attributes = before.rsplit("\n\n").next().unwrap_or_default();
            attributes.lines().map(str::trim).collect::<Vec<_>>()
        });
        let attributes = attributes.unwrap_or_default();
        let is_test = attributes
            .iter()
            .any(|line| line.starts_with("#[test]") || line.starts_with("#[tokio::test"));
        // One that `make test` passes over says beside its name what runs it.
        let is_run = !attributes.iter().any(|line| line.starts_with("#[ignore"))
            || table.contains(&format!("{function}` (`make "));
        let is_test = is_test && is_run;
        if !is_test {
            missing.push(format!("{file}::{function}"));
        }
    }
    assert!(named > 30, "the table names only {named} tests");
    assert!(missing.is_empty(), "not a test: {missing:#?}");
    // Each of the rows that were asked for is there, once.
    for row in 1..=26 {
        assert_eq!(
            table.matches(&format!("\n| {row} |")).count(),
            1,
            "row {row}"
        );
    }
}
