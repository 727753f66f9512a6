//! Areas that nobody needs are left out of a kept set beside a guest that writes them.

use crate::harness::{Control, Disk, serve_disk};
use rustix::process::Signal;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use uuid::Uuid;
use vhost_blk_wire::command::{AreasLeftOut, QueryVolumes, SnapshotSetLeaveOut};
use vhost_blk_wire::qmp::QmpError;
use vhost_blk_wire::types::{ByteRange, Method};

const MIB: u64 = 1 << 20;
const METHODS: [Method; 2] = [Method::Row, Method::Cow];

fn leave_out(
    control: &mut Control,
    set: Uuid,
    volume: &str,
    offset_bytes: u64,
    length_bytes: u64,
) -> Result<u64, QmpError> {
    let command = SnapshotSetLeaveOut {
        set,
        areas: vec![AreasLeftOut {
            volume: volume.to_owned(),
            ranges: vec![ByteRange {
                offset_bytes,
                length_bytes,
            }],
        }],
        limit_ms: None,
    };
    let left = control.run(&command)?;
    assert_eq!(left.volumes.len(), 1);
    Ok(left.volumes[0].left_out_bytes)
}

fn used(control: &mut Control) -> u64 {
    control.run(&QueryVolumes::default()).unwrap()[0].shadow_used_bytes
}

#[test]
fn what_is_left_out_reads_as_zeroes_and_costs_nothing_also_after_a_kill() {
    for method in METHODS {
        let mut served = serve_disk(16 * MIB, &[]);
        let mut control = Control::connect(&served.control);
        let mut disk = Disk::attach(&served.socket, 1);
        let old = vec![7; MIB as usize];
        for place in 0..16 {
            disk.first().write(place * MIB, &old).unwrap();
        }
        let committed = control.take_set(&["disk"], method);
        let snapshot = &committed.volumes[0].snapshot;
        let left = leave_out(&mut control, snapshot.set, "disk", 4 * MIB, 8 * MIB).unwrap();
        assert_eq!(left, 8 * MIB);
        let before = used(&mut control);
        for place in 4..12 {
            disk.first()
                .write(place * MIB, &vec![8; MIB as usize])
                .unwrap();
        }
        assert_eq!(used(&mut control), before, "{method:?}");
        disk.first().write(12 * MIB, &old).unwrap();
        assert!(used(&mut control) > before, "{method:?}: the rest is kept");
        let expected: Vec<u8> = (0..16 * MIB)
            .map(|at| u8::from(!(4 * MIB..12 * MIB).contains(&at)) * 7)
            .collect();
        assert!(control.read_snapshot(snapshot.snapshot) == expected);
        drop((disk, control));
        served.daemon.signal(Signal::KILL);
        served.daemon.wait();
        served.daemon = served.daemon.restart();
        let mut control = Control::connect(&served.control);
        assert!(control.read_snapshot(snapshot.snapshot) == expected);
        let mut disk = Disk::attach(&served.socket, 1);
        assert!(disk.first().read(4 * MIB, MIB as usize).unwrap() == vec![8; MIB as usize]);
    }
}

#[test]
fn writes_to_the_area_go_on_while_it_is_left_out() {
    for method in METHODS {
        let served = serve_disk(64 * MIB, &[]);
        let mut control = Control::connect(&served.control);
        let mut disk = Disk::attach(&served.socket, 1);
        disk.first().write(0, &[7; 4096]).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let writer = std::thread::spawn(move || {
            let (mut round, mut last) = (0_u64, vec![0_u8; 512]);
            while !stopped.load(Ordering::SeqCst) || round < 2_000 {
                let block = round * 37 % 512;
                let byte = (round % 250) as u8 + 1;
                disk.first()
                    .write(MIB + block * 4096, &[byte; 4096])
                    .unwrap();
                last[block as usize] = byte;
                round += 1;
            }
            (disk, last)
        });
        let mut left = 0;
        for _ in 0..5 {
            let committed = control.take_set(&["disk"], method);
            let snapshot = &committed.volumes[0].snapshot;
            left += leave_out(&mut control, snapshot.set, "disk", MIB, 62 * MIB).unwrap();
            let seen = control.read_snapshot(snapshot.snapshot);
            assert!(seen[..4096] == [7; 4096]);
        }
        stop.store(true, Ordering::SeqCst);
        let (mut disk, last) = writer.join().unwrap();
        assert!(left > 0, "{method:?}");
        let found = disk.first().read(MIB, 512 * 4096).unwrap();
        for (block, byte) in found.chunks(4096).zip(last) {
            assert!(block.iter().all(|found| *found == byte), "{method:?}");
        }
    }
}

#[test]
fn only_kept_sets_and_their_own_volumes_leave_anything_out() {
    let served = serve_disk(MIB, &[]);
    let mut control = Control::connect(&served.control);
    let set = Uuid::new_v4();
    let unknown = leave_out(&mut control, set, "disk", 0, MIB).unwrap_err();
    assert_eq!(unknown.class, "SetNotFound");
    control.prepare(set, &["disk"], Some(Method::Row)).unwrap();
    control.mark(set).unwrap();
    control.commit(set).unwrap();
    let open = leave_out(&mut control, set, "disk", 0, MIB).unwrap_err();
    assert_eq!(open.class, "InvalidState");
    control.keep(set).unwrap();
    let foreign = leave_out(&mut control, set, "other", 0, MIB).unwrap_err();
    assert_eq!(foreign.class, "DeviceNotFound");
    // Beyond the disk there is nothing, and no number is too large.
    assert_eq!(
        leave_out(&mut control, set, "disk", u64::MAX - 5, u64::MAX).unwrap(),
        0
    );
    assert_eq!(
        leave_out(&mut control, set, "disk", 0, u64::MAX).unwrap(),
        MIB
    );
    // An older set keeps what it has.
    control.take_set(&["disk"], Method::Cow);
    assert_eq!(leave_out(&mut control, set, "disk", 0, MIB).unwrap(), 0);
}

/// What a guest names must not keep a store busy for as long as the guest likes.
#[test]
fn leaving_out_ends_at_its_limit_and_keeps_the_rest() {
    let served = serve_disk(MIB, &[]);
    let mut control = Control::connect(&served.control);
    let committed = control.take_set(&["disk"], Method::Row);
    let set = committed.volumes[0].snapshot.set;
    let areas = vec![AreasLeftOut {
        volume: "disk".to_owned(),
        ranges: vec![ByteRange {
            offset_bytes: 0,
            length_bytes: MIB,
        }],
    }];
    for (limit_ms, left_out) in [(Some(0), 0), (None, MIB)] {
        let command = SnapshotSetLeaveOut {
            set,
            areas: areas.clone(),
            limit_ms,
        };
        let left = control.run(&command).unwrap();
        assert_eq!(left.volumes[0].left_out_bytes, left_out, "{limit_ms:?}");
    }
}
