//! From what agrees everywhere, one word is changed at a time: exactly one witness must object.

use super::*;
use guest_agent_wire::host::{Failure, FilesystemInfo, WriterInfo};
use guest_agent_wire::types::{Level as WriterLevel, WriterFailure, WriterState};
use serde_json::json;
use uuid::Uuid;
use vhost_blk_wire::command::VolumeCommitted;
use vhost_blk_wire::types::{ByteRange, Method, SnapshotInfo, SnapshotState, WriteCount};

/// Everything that was said, owned.
#[derive(Clone)]
struct Said {
    identified: Identified,
    prepared: Prepared,
    frozen: Frozen,
    thawed: Option<Thawed>,
    clock: HostClock,
    disturbances: Vec<String>,
    commits: Vec<DaemonCommit>,
}

fn extent(start_bytes: u64) -> DiskExtent {
    DiskExtent {
        serial: "s".to_owned(),
        disk: "vda".to_owned(),
        start_bytes,
        length_bytes: 1000,
    }
}

fn filesystem(result: FilesystemResult) -> FilesystemReport {
    FilesystemReport {
        mountpoint: "/m".to_owned(),
        fstype: "xfs".to_owned(),
        result,
        errno: 0,
        message: String::new(),
        extents: vec![extent(1000)],
        took_us: 1,
    }
}

fn writer(held: Option<bool>) -> WriterReport {
    WriterReport {
        instance_id: "i".to_owned(),
        name: "db".to_owned(),
        state: WriterState::WaitingForThaw,
        held,
        evidence: json!({"lsn": 7, "pid": 1}),
        components: Vec::new(),
        failure: None,
        took_ms: 1,
    }
}

fn info(mountpoint: &str) -> FilesystemInfo {
    FilesystemInfo {
        mountpoint: mountpoint.to_owned(),
        fstype: "xfs".to_owned(),
        device: "/dev/vda".to_owned(),
        read_only: false,
        freezable: true,
        why_not: None,
        extents: vec![extent(1000)],
    }
}

fn all_agree() -> Said {
    Said {
        identified: Identified {
            writers: vec![WriterInfo {
                class_id: "c".to_owned(),
                instance_id: "i".to_owned(),
                name: "db".to_owned(),
                level: WriterLevel::BackEnd,
                freeze_timeout_ms: 1,
                hold: Hold::App,
                state: WriterState::Stable,
                last_failure: None,
                metadata: None,
            }],
            filesystems: vec![info("/m")],
            exempt: Vec::new(),
        },
        prepared: Prepared {
            writers: vec![writer(None)],
            left_out: Vec::new(),
            sync_ms: 0,
        },
        frozen: Frozen {
            not_to_snapshot: None,
            generation: 1,
            writers: vec![writer(None)],
            filesystems: vec![filesystem(FilesystemResult::Frozen)],
            exempt: Vec::new(),
            writers_ms: 1,
            filesystems_ms: 1,
        },
        thawed: Some(Thawed {
            held: true,
            why_not: String::new(),
            writers: vec![writer(Some(true))],
            filesystems: vec![filesystem(FilesystemResult::Thawed)],
            hold_ms: 10,
        }),
        clock: HostClock {
            hold_ms: 10.0,
            writers_ms: 20.0,
            hold_limit_ms: 10_000,
            writer_limit_ms: 60_000,
        },
        disturbances: Vec::new(),
        commits: vec![DaemonCommit {
            control: "/c".to_owned(),
            volumes: vec!["root".to_owned()],
            committed: SnapshotSetCommitted {
                volumes: vec![VolumeCommitted {
                    snapshot: SnapshotInfo {
                        snapshot: Uuid::nil(),
                        set: Uuid::nil(),
                        volume: "root".to_owned(),
                        epoch: 1,
                        method: Method::Cow,
                        state: SnapshotState::Provisional,
                        created_unix_ms: 0,
                        size_bytes: 1,
                    },
                    writes_in_window: WriteCount::default(),
                }],
                drain_us: 1,
                record_us: 1,
                hold_us: 1,
                since_mark_us: 1,
            },
        }],
    }
}

fn judge(said: &Said) -> Witnesses {
    hear(&Observations {
        serials: vec!["s".to_owned()],
        identified: Some(&said.identified),
        prepared: Some(&said.prepared),
        frozen: Some(&said.frozen),
        thawed: said.thawed.as_ref(),
        thaw_failure: None,
        clock: Some(said.clock),
        disturbances: &said.disturbances,
        commits: &said.commits,
        stock: None,
        left_out: &[],
        excluded_writers: &[],
    })
}

fn objectors(witnesses: &Witnesses) -> Vec<&'static str> {
    [
        ("filesystems", &witnesses.filesystems),
        ("writers", &witnesses.writers),
        ("time", &witnesses.time),
        ("host", &witnesses.host),
    ]
    .into_iter()
    .filter(|(_, testimony)| testimony.value != Word::Agrees)
    .map(|(name, _)| name)
    .collect()
}

fn thawed(said: &mut Said) -> &mut Thawed {
    said.thawed.as_mut().unwrap()
}

#[test]
fn all_agree_makes_application() {
    let witnesses = judge(&all_agree());
    assert_eq!(objectors(&witnesses), Vec::<&str>::new(), "{witnesses:?}");
    assert_eq!(level_reached(&witnesses, 1, true), Level::Application);
}

#[test]
fn each_changed_word_moves_exactly_one_witness() {
    type Change = fn(&mut Said);
    let changes: [(&str, &str, Change); 24] = [
        ("filesystems", "FITHAW failed", |s| {
            thawed(s).filesystems[0].result = FilesystemResult::Failed;
            thawed(s).filesystems[0].errno = 22;
        }),
        ("filesystems", "FITHAW with an errno", |s| {
            thawed(s).filesystems[0].errno = 22;
        }),
        ("filesystems", "no word of the thaw", |s| {
            thawed(s).filesystems.clear();
        }),
        ("filesystems", "two words of one thaw", |s| {
            let again = thawed(s).filesystems[0].clone();
            thawed(s).filesystems.push(again);
        }),
        ("filesystems", "freeze failed", |s| {
            s.frozen.filesystems[0].result = FilesystemResult::Failed;
        }),
        ("filesystems", "freeze with an errno", |s| {
            s.frozen.filesystems[0].errno = 16;
        }),
        ("filesystems", "nothing frozen", |s| {
            s.identified.filesystems.clear();
            s.frozen.filesystems.clear();
            thawed(s).filesystems.clear();
        }),
        ("filesystems", "a thaw of what was never frozen", |s| {
            let mut other = filesystem(FilesystemResult::Thawed);
            other.mountpoint = "/other".to_owned();
            thawed(s).filesystems.push(other);
        }),
        ("filesystems", "a writable one that nobody froze", |s| {
            s.identified.filesystems.push(info("/other"));
        }),
        (
            "filesystems",
            "one of unknown place that nobody froze",
            |s| {
                let mut other = info("/other");
                other.extents.clear();
                s.identified.filesystems.push(other);
            },
        ),
        ("writers", "not held", |s| {
            thawed(s).writers[0].held = Some(false);
        }),
        ("writers", "not said whether held", |s| {
            thawed(s).writers[0].held = None;
        }),
        ("writers", "no word at the thaw", |s| {
            thawed(s).writers.clear()
        }),
        ("writers", "no word at the freeze", |s| {
            s.frozen.writers.clear()
        }),
        ("writers", "two words of one writer", |s| {
            thawed(s).writers.push(writer(Some(true)));
        }),
        ("writers", "failed at the thaw", |s| {
            thawed(s).writers[0].failure = Some(Failure {
                code: WriterFailure::Timeout,
                message: "late".to_owned(),
            });
        }),
        ("writers", "its position moved", |s| {
            thawed(s).writers[0].evidence = json!({"lsn": 8, "pid": 1});
        }),
        ("writers", "one that nobody prepared was not thawed", |s| {
            let mut other = writer(None);
            other.instance_id = "new".to_owned();
            s.frozen.writers.push(other);
        }),
        ("time", "the guest's clock", |s| thawed(s).hold_ms = 10_001),
        ("time", "the guest says not held", |s| {
            thawed(s).held = false
        }),
        ("time", "the host's hold", |s| s.clock.hold_ms = 10_000.1),
        ("time", "the writers' window", |s| {
            s.clock.writers_ms = 60_001.0
        }),
        ("time", "an event", |s| {
            s.disturbances.push("QEMU event STOP".to_owned());
        }),
        ("time", "the daemon's clock", |s| {
            s.commits[0].committed.since_mark_us = 10_000_001;
        }),
    ];
    for (witness, what, change) in changes {
        let mut said = all_agree();
        change(&mut said);
        let witnesses = judge(&said);
        assert_eq!(objectors(&witnesses), [witness], "{what}: {witnesses:#?}");
        assert!(
            level_reached(&witnesses, 1, true) < Level::Application,
            "{what}"
        );
    }
}

#[test]
fn the_host_objects_to_any_write_discard_or_zeroing_and_says_where() {
    let first = Some(ByteRange {
        offset_bytes: 4096,
        length_bytes: 512,
    });
    for count in [
        WriteCount {
            writes: 1,
            first,
            ..WriteCount::default()
        },
        WriteCount {
            discards: 1,
            first,
            ..WriteCount::default()
        },
        WriteCount {
            write_zeroes: 1,
            first,
            ..WriteCount::default()
        },
    ] {
        let mut said = all_agree();
        said.commits[0].committed.volumes[0].writes_in_window = count;
        let witnesses = judge(&said);
        assert_eq!(objectors(&witnesses), ["host"]);
        assert!(witnesses.host.evidence[0].contains("512 bytes at byte 4096"));
        assert_eq!(level_reached(&witnesses, 1, true), Level::Crash);
    }
}

#[test]
fn the_host_objects_to_a_volume_without_an_answer_and_to_no_commit() {
    let mut said = all_agree();
    said.commits[0].committed.volumes.clear();
    assert_eq!(objectors(&judge(&said)), ["host"]);
    said.commits.clear();
    assert_eq!(objectors(&judge(&said)), ["host"]);
}

#[test]
fn the_guest_cannot_hide_a_frozen_file_system_from_the_host() {
    let mut said = all_agree();
    said.frozen.exempt = vec![extent(0)];
    assert_eq!(objectors(&judge(&said)), Vec::<&str>::new());
    for start in [1, 1000, 1999] {
        said.frozen.exempt = vec![extent(start)];
        assert_eq!(objectors(&judge(&said)), ["host"], "{start}");
    }
    said.frozen.exempt = vec![extent(2000)];
    assert_eq!(objectors(&judge(&said)), Vec::<&str>::new());
}

#[test]
fn silence_at_the_thaw_is_no_agreement() {
    let mut said = all_agree();
    said.thawed = None;
    assert_eq!(objectors(&judge(&said)), ["filesystems", "writers", "time"]);
}

#[test]
fn an_unread_clock_is_no_agreement() {
    let said = all_agree();
    let witnesses = hear(&Observations {
        frozen: Some(&said.frozen),
        thawed: said.thawed.as_ref(),
        prepared: Some(&said.prepared),
        commits: &said.commits,
        ..Observations::default()
    });
    assert_eq!(objectors(&witnesses), ["time"]);
}

#[test]
fn a_writer_that_leans_on_the_file_system_may_move_until_it_is_frozen() {
    let mut said = all_agree();
    said.identified.writers[0].hold = Hold::Filesystem;
    thawed(&mut said).writers[0].evidence = json!({"lsn": 8, "pid": 1});
    assert_eq!(objectors(&judge(&said)), Vec::<&str>::new());
}

#[test]
fn left_out_and_read_only_file_systems_do_not_object() {
    for result in [FilesystemResult::LeftOut, FilesystemResult::ReadOnly] {
        let mut said = all_agree();
        let mut other = filesystem(result);
        other.mountpoint = "/other".to_owned();
        said.frozen.filesystems.push(other);
        said.identified.filesystems.push(info("/other"));
        assert_eq!(objectors(&judge(&said)), Vec::<&str>::new());
    }
    let mut said = all_agree();
    let mut elsewhere = info("/elsewhere");
    elsewhere.extents[0].serial = "another disk".to_owned();
    said.identified.filesystems.push(elsewhere);
    assert_eq!(objectors(&judge(&said)), Vec::<&str>::new());
}

#[test]
fn a_file_system_on_a_disk_without_a_serial_must_be_mentioned() {
    let mut said = all_agree();
    let mut other = info("/other");
    let nameless = DiskExtent {
        serial: String::new(),
        ..extent(0)
    };
    other.extents = vec![nameless];
    said.identified.filesystems.push(other);
    assert_eq!(objectors(&judge(&said)), ["filesystems"]);
}

#[test]
fn nothing_frozen_is_nothing_heard() {
    let witnesses = hear(&Observations::default());
    assert_eq!(witnesses.host.value, Word::NotHeard);
    assert_eq!(level_reached(&witnesses, 0, true), Level::Crash);
}

#[test]
fn levels_follow_from_the_witnesses_alone() {
    let testimony = |agrees: bool| Testimony {
        value: if agrees {
            Word::Agrees
        } else {
            Word::Disagrees
        },
        evidence: Vec::new(),
    };
    for bits in 0..16_u8 {
        let witnesses = Witnesses {
            filesystems: testimony(bits & 1 != 0),
            writers: testimony(bits & 2 != 0),
            time: testimony(bits & 4 != 0),
            host: testimony(bits & 8 != 0),
        };
        let level = level_reached(&witnesses, 1, true);
        let expected = match bits {
            15 => Level::Application,
            13 => Level::Filesystem,
            _ => Level::Crash,
        };
        assert_eq!(level, expected, "{bits:04b}");
        assert!(level_reached(&witnesses, 0, true) < Level::Application);
        assert!(level_reached(&witnesses, 1, false) < Level::Application);
    }
}
