//! FORMAT.md is normative: its tables and the program's numbers are compared row by row; and a volume written
//! by version 2 must be written, and read, the same for ever.
#![allow(clippy::unwrap_used, reason = "a test ends at the first surprise")]

mod harness;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use harness::{Methods, Model, Op, Verdict, World, memory_files, small_options};
use vhost_blk_store::layout::{FIELDS, KINDS, MAX_RECORD_BLOCKS, MAX_SET_MEMBERS, MAX_SNAPSHOTS};
use vhost_blk_store::sim::{FILE_NAMES, each_file, memory_volume};
use vhost_blk_store::{MAX_REQUEST_BYTES, Method, OpenOptions, StoreError, Volume, check, dump};

const FORMAT: &str = include_str!("../FORMAT.md");

/// Cells of the tables' rows.
fn rows() -> impl Iterator<Item = Vec<&'static str>> {
    FORMAT
        .lines()
        .filter(|line| line.starts_with('|'))
        .map(|line| line.trim_matches('|').split('|').map(str::trim).collect())
}

#[test]
fn byte_tables_of_the_document_are_the_programs() {
    let structures: BTreeSet<&str> = FIELDS.iter().map(|field| field.0).collect();
    let documented: Vec<(String, String, usize, usize)> = rows()
        .filter(|cells| cells.len() == 5 && structures.contains(cells[0]))
        .map(|cells| {
            (
                cells[0].to_owned(),
                cells[1].to_owned(),
                cells[2].parse().unwrap(),
                cells[3].parse().unwrap(),
            )
        })
        .collect();
    let coded: Vec<(String, String, usize, usize)> = FIELDS
        .iter()
        .map(|field| (field.0.to_owned(), field.1.to_owned(), field.2, field.3))
        .collect();
    assert_eq!(documented, coded);
}

#[test]
fn fields_do_not_overlap() {
    for structure in ["slot", "run", "record", "page"] {
        let mut end = 0;
        let mut fields: Vec<_> = FIELDS.iter().filter(|field| field.0 == structure).collect();
        fields.sort_by_key(|field| field.2);
        for (_, name, offset, length) in fields {
            assert!(*offset >= end, "{structure}.{name}");
            end = offset + length;
        }
    }
}

#[test]
fn record_kinds_of_the_document_are_the_programs() {
    let names: BTreeSet<&str> = KINDS.iter().map(|kind| kind.0).collect();
    let documented: Vec<(&str, u8)> = rows()
        .filter(|cells| cells.len() == 3 && names.contains(cells[0]))
        .map(|cells| (cells[0], cells[1].parse().unwrap()))
        .collect();
    assert_eq!(documented, KINDS);
}

#[test]
fn limits_of_the_document_are_the_programs() {
    let limit = |name: &str| -> u64 {
        let row = rows()
            .find(|cells| cells[0] == name)
            .unwrap_or_else(|| panic!("no row {name}"));
        row[1].parse().unwrap()
    };
    assert_eq!(limit("snapshots of one volume"), MAX_SNAPSHOTS as u64);
    assert_eq!(limit("volumes of one set"), MAX_SET_MEMBERS as u64);
    assert_eq!(limit("bytes of one request"), MAX_REQUEST_BYTES);
    assert_eq!(limit("blocks of one record"), u64::from(MAX_RECORD_BLOCKS));
    assert_eq!(limit("bytes of a volume"), 1 << 62);
    assert_eq!(limit("blocks of a log"), 1 << 50);
}

/// A fixed history that uses every record kind, an index of several records, and both journals.
fn golden_world() -> World {
    let model = Model::new(67);
    let mut world = World::new(memory_files(model.bytes()), small_options(1), model);
    let snapshot = |method, verdict| Op::Snapshot { method, verdict };
    let history = [
        Op::Write {
            sector: 0,
            count: 67,
        },
        snapshot(Method::RedirectOnWrite, Verdict::Keep),
        Op::Write {
            sector: 3,
            count: 20,
        },
        Op::Zero {
            sector: 40,
            count: 8,
            may_unmap: true,
        },
        snapshot(Method::CopyOnWrite, Verdict::Keep),
        Op::Write {
            sector: 8,
            count: 30,
        },
        Op::CloseReopen,
        Op::Write {
            sector: 60,
            count: 7,
        },
        snapshot(Method::RedirectOnWrite, Verdict::Discard),
        snapshot(Method::RedirectOnWrite, Verdict::Leave),
        Op::Write {
            sector: 0,
            count: 24,
        },
        Op::Delete { which: 0 },
        Op::KillReopen,
        Op::Write {
            sector: 24,
            count: 9,
        },
        Op::Flush,
    ];
    for op in history {
        world.apply(&op);
    }
    world
}

/// Bytes with runs of zeroes folded, so that the golden files stay small: (u32 zeroes, u32 length, bytes)*.
fn fold(bytes: &[u8]) -> Vec<u8> {
    let mut folded = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        let zeroes = bytes[at..].iter().take_while(|byte| **byte == 0).count();
        at += zeroes;
        let rest = &bytes[at..];
        let length = rest
            .windows(16)
            .position(|window| window.iter().all(|byte| *byte == 0))
            .unwrap_or(rest.len());
        folded.extend_from_slice(&u32::try_from(zeroes).unwrap().to_le_bytes());
        folded.extend_from_slice(&u32::try_from(length).unwrap().to_le_bytes());
        folded.extend_from_slice(&rest[..length]);
        at += length;
    }
    folded
}

fn unfold(mut folded: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    while !folded.is_empty() {
        let (head, rest) = folded.split_at(8);
        let zeroes = u32::from_le_bytes(head[..4].try_into().unwrap());
        let length = u32::from_le_bytes(head[4..].try_into().unwrap());
        bytes.resize(bytes.len() + usize::try_from(zeroes).unwrap(), 0);
        let (data, rest) = rest.split_at(usize::try_from(length).unwrap());
        bytes.extend_from_slice(data);
        folded = rest;
    }
    bytes
}

/// The same with sizes: a snapshot in the table, one in the journal, a growth that was only begun.
fn grown_world() -> World {
    let mut world = golden_world();
    let grow = |by| Op::Grow {
        by,
        prepared: false,
    };
    let write = |sector, count| Op::Write { sector, count };
    let snapshot = Op::Snapshot {
        method: Method::CopyOnWrite,
        verdict: Verdict::Keep,
    };
    for op in [
        grow(2),
        write(64, 5),
        snapshot.clone(),
        grow(20),
        write(60, 20),
        snapshot,
        write(80, 9),
        Op::PrepareGrow { by: 8 },
        Op::Flush,
    ] {
        world.apply(&op);
    }
    world
}

/// The same with parts left out: in the index, and in the journal.
fn left_out_world() -> World {
    let mut world = golden_world();
    let snapshot = Op::Snapshot {
        method: Method::CopyOnWrite,
        verdict: Verdict::Keep,
    };
    let leave_out = |sector, count| Op::LeaveOut { sector, count };
    let write = |sector, count| Op::Write { sector, count };
    for op in [
        write(0, 67),
        snapshot.clone(),
        leave_out(8, 24),
        write(0, 24),
        Op::CloseReopen,
        snapshot,
        leave_out(8, 12),
        write(8, 4),
        Op::Flush,
    ] {
        world.apply(&op);
    }
    world
}

/// Where a volume of this version is kept, and what makes it.
type Golden = (&'static str, fn() -> World);

const GOLDEN: [Golden; 3] = [
    ("version-2", golden_world),
    ("version-2-grown", grown_world),
    ("version-2-left-out", left_out_world),
];

fn golden_path(volume: &str, name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(volume)
        .join(name)
}

#[test]
fn golden_volumes_are_written_byte_for_byte() {
    for (volume, world) in GOLDEN {
        is_written_byte_for_byte(volume, &world());
    }
}

fn is_written_byte_for_byte(volume: &str, world: &World) {
    for (name, file) in FILE_NAMES.iter().zip(each_file(&world.files)) {
        let mut bytes = vec![0; usize::try_from(file.len_bytes().unwrap()).unwrap()];
        file.read_at(&mut bytes, 0).unwrap();
        if std::env::var_os("VMSHADOW_WRITE_GOLDEN").is_some() {
            std::fs::create_dir_all(golden_path(volume, "")).unwrap();
            std::fs::write(golden_path(volume, name), fold(&bytes)).unwrap();
        }
        let golden = unfold(&std::fs::read(golden_path(volume, name)).unwrap());
        assert!(golden == bytes, "{name} is not what {volume} was");
    }
}

#[test]
fn golden_volumes_read_as_they_were() {
    let plain = [
        "Restart",
        "Delete",
        "Discard",
        "Kept",
        "Commit",
        "Snap ",
        "until epoch",
        "now: log",
    ];
    let grown = ["34304 bytes", "35328 bytes", "45568 bytes"];
    let left_out = ["LeaveOut"];
    for ((volume, world), words) in GOLDEN.into_iter().zip([&plain[..], &grown, &left_out]) {
        reads_as_it_was(volume, world().model, words);
    }
}

fn reads_as_it_was(volume: &str, expected: Model, words: &[&str]) {
    let file = |name| unfold(&std::fs::read(golden_path(volume, name)).unwrap()).into();
    let files = memory_volume(FILE_NAMES.into_iter().map(file).collect());
    assert_eq!(check(&files), []);
    let text = dump(&files).unwrap().to_string();
    for word in words {
        assert!(
            text.contains(word),
            "the golden volume does not show {word}: {text}"
        );
    }
    let mut options = small_options(2);
    options.volume_id = None;
    let (volume, report) = vhost_blk_store::Volume::open_files(files.clone(), &options).unwrap();
    assert!(!report.created && report.dropped_records == 0);
    let members = vec![volume.id()];
    let mut world = World {
        files,
        options,
        volume: Some(volume),
        open_plans: Vec::new(),
        model: expected,
        members,
    };
    world.compare();
    for op in harness::history(1, Methods::Mixed, 20, 67) {
        world.apply(&op);
        world.compare();
    }
}

/// The files of a version 1 volume as they were on disk.
const FIRST_VERSION: [&str; 7] = [
    "base",
    "superblock",
    "log",
    "journal.0",
    "journal.1",
    "index.0",
    "index.1",
];

#[test]
fn first_version_is_refused_and_left_as_it_is() {
    let place = tempfile::tempdir().unwrap();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/version-1");
    for name in FIRST_VERSION {
        let bytes = unfold(&std::fs::read(golden.join(name)).unwrap());
        std::fs::write(place.path().join(name), bytes).unwrap();
    }
    let contents = || -> BTreeMap<String, Vec<u8>> {
        std::fs::read_dir(place.path())
            .unwrap()
            .map(|entry| {
                let path = entry.unwrap().path();
                let name = path.file_name().unwrap().to_str().unwrap().to_owned();
                (name, std::fs::read(path).unwrap())
            })
            .collect()
    };
    let before = contents();
    let options = OpenOptions {
        direct: false,
        ..OpenOptions::default()
    };
    let error = Volume::adopt(&place.path().join("base"), place.path(), &options).unwrap_err();
    assert!(matches!(error, StoreError::Unsupported { version: 1, .. }));
    assert!(error.to_string().contains("format version 1"), "{error}");
    assert!(
        before == contents(),
        "a volume that was refused has changed"
    );
}
