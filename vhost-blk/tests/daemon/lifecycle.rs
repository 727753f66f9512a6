//! How the daemon starts, takes front ends and stops.

use crate::harness::{Control, Daemon, Disk, PATIENCE, Served, serve, wait_until};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::time::Duration;

#[test]
fn sigterm_drains_closes_and_exits_with_zero() {
    let served = serve(&[]);
    let mut disk = Disk::attach(&served.socket, 1);
    disk.first().write(0, &[5; 4096]).unwrap();
    assert_eq!(served.daemon.terminate().code(), Some(0));
    assert!(!served.socket.exists(), "its sockets are gone");
    assert!(!served.control.exists());
    assert_eq!(
        std::fs::read(served.scratch.path("disk.raw")).unwrap()[..4096],
        [5; 4096]
    );
}

#[test]
fn sigterm_under_load_leaves_a_clean_volume() {
    let served = serve(&[]);
    let mut disk = Disk::attach(&served.socket, 2);
    for queue in &mut disk.queues {
        for request in 0..32 {
            queue.start_write(request as u64 * 65536, request * 65536, 65536, request);
        }
        queue.complete_within(0, Duration::ZERO);
    }
    assert_eq!(served.daemon.terminate().code(), Some(0));
    let base = served.scratch.path("disk.raw");
    let shadow_storage = served.scratch.path("disk.raw.shadow");
    let options = vhost_blk_store::OpenOptions::default();
    let (_, report) = vhost_blk_store::Volume::adopt(&base, &shadow_storage, &options).unwrap();
    assert!(report.clean && !report.created, "{report:?}");
}

#[test]
fn a_front_end_that_is_quiet_costs_no_processor_time() {
    let served = serve(&[]);
    let mut disk = Disk::attach(&served.socket, 2);
    for queue in &mut disk.queues {
        for _ in 0..200 {
            queue.write(0, &[1; 512]).unwrap();
        }
    }
    // Maintenance may have something to do after the writes; the threads of the queues have not.
    let ticks = || queue_ticks(served.daemon.id());
    let mut last = ticks();
    wait_until("the queues' threads asleep", || {
        std::thread::sleep(Duration::from_millis(200));
        let now = ticks();
        std::mem::replace(&mut last, now.clone()) == now
    });
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(ticks(), last, "ticks of 10 ms within a second");
}

/// Processor time of the threads of the queues, in ticks.
fn queue_ticks(process: u32) -> Vec<(String, u64)> {
    let mut found = Vec::new();
    for task in std::fs::read_dir(format!("/proc/{process}/task")).unwrap() {
        let task = task.unwrap().path();
        let stat = std::fs::read_to_string(task.join("stat")).unwrap();
        let (name, rest) = stat.rsplit_once(')').unwrap();
        if !name.contains("(queue") {
            continue;
        }
        let fields: Vec<&str> = rest.split_whitespace().collect();
        let ticks = [fields[11], fields[12]].map(|field| field.parse::<u64>().unwrap());
        found.push((task.display().to_string(), ticks[0] + ticks[1]));
    }
    assert!(!found.is_empty(), "the threads have other names");
    found.sort();
    found
}

#[test]
fn sockets_are_for_their_owner_only() {
    let served = serve(&[]);
    for socket in [&served.socket, &served.control] {
        let mode = std::fs::metadata(socket).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}

#[test]
fn a_living_daemons_socket_is_not_taken_and_a_dead_ones_is() {
    let served = serve(&[]);
    let other = served.scratch.disk("other.raw", 1 << 20);
    let arguments = [
        "--disk",
        other.to_str().unwrap(),
        "--socket",
        served.socket.to_str().unwrap(),
    ];
    let (code, told) = Daemon::refused(&arguments);
    assert_eq!(code, Some(1));
    assert!(told.contains("another process is listening"), "{told}");
    Disk::attach(&served.socket, 1)
        .first()
        .write(0, &[1; 512])
        .unwrap();
    served.daemon.kill();
    assert!(served.socket.exists(), "a killed daemon leaves its socket");
    let again = Daemon::start(&arguments);
    Disk::attach(&served.socket, 1)
        .first()
        .write(0, &[1; 512])
        .unwrap();
    assert!(again.terminate().success());
}

#[test]
fn one_disk_is_not_served_by_two_daemons() {
    let served = serve(&[]);
    let disk = served.scratch.path("disk.raw");
    std::thread::scope(|scope| {
        for shadow in ["disk.raw.shadow", "another.shadow"] {
            let (shadow, disk) = (served.scratch.path(shadow), &disk);
            let elsewhere = shadow.with_extension("socket");
            scope.spawn(move || {
                let (code, told) = Daemon::refused(&[
                    "--disk",
                    disk.to_str().unwrap(),
                    "--socket",
                    elsewhere.to_str().unwrap(),
                    "--shadow-storage",
                    shadow.to_str().unwrap(),
                ]);
                assert_eq!(code, Some(1), "{told}");
                assert!(told.contains("in use by another process"), "{told}");
            });
        }
    });
}

#[test]
fn a_second_front_end_is_turned_away_at_once_and_the_first_goes_on() {
    let served = serve(&[]);
    let mut control = Control::connect(&served.control);
    let mut first = Disk::attach(&served.socket, 1);
    let second = UnixStream::connect(&served.socket).unwrap();
    second.set_read_timeout(Some(PATIENCE)).unwrap();
    // Until the end, so that a signal to this process does not end it.
    let read = std::io::Read::read_to_end(&mut &second, &mut Vec::new());
    assert!(matches!(read, Ok(0)), "closed by the daemon: {read:?}");
    let told = control.wait_for_event("FRONT_END_REFUSED");
    assert_eq!(told["volume"], "disk");
    first.first().write(0, &[1; 512]).unwrap();
}

#[test]
fn front_ends_come_and_go_without_leaking_descriptors() {
    let served = serve(&[]);
    let mut control = Control::connect(&served.control);
    let mut connect = || {
        Disk::attach(&served.socket, 4)
            .first()
            .write(0, &[1; 4096])
            .unwrap();
        control.wait_for_event("VOLUME_DISCONNECTED");
    };
    connect();
    // What the connection held is given back a moment after the event.
    let mut before = 0;
    wait_until("a quiet daemon", || {
        let now = served.daemon.descriptors();
        std::mem::replace(&mut before, now) == now
    });
    for _ in 0..5 {
        connect();
    }
    wait_until("no more descriptors than before", || {
        served.daemon.descriptors() <= before
    });
}

#[test]
fn requests_in_flight_of_a_front_end_that_vanishes_do_not_hurt_the_next() {
    let served = serve(&[]);
    for round in 0..5 {
        let mut disk = Disk::attach(&served.socket, 2);
        for queue in &mut disk.queues {
            for request in 0..32 {
                queue.start_write(request as u64 * 65536, request * 65536, 65536, request);
            }
            // Told to the daemon, not waited for.
            queue.complete_within(0, Duration::ZERO);
        }
        drop(disk);
        let mut disk = Disk::attach(&served.socket, 1);
        disk.first().write(8 << 20, &[round + 1; 4096]).unwrap();
        assert_eq!(
            disk.first().read(8 << 20, 4096).unwrap(),
            vec![round + 1; 4096]
        );
    }
}

#[test]
fn a_killed_daemon_has_kept_every_acknowledged_write() {
    for method in ["row", "cow"] {
        let Served {
            scratch: _scratch,
            daemon,
            socket,
            control,
        } = serve(&["--method", method]);
        let mut disk = Disk::attach(&socket, 1);
        disk.first().write(0, &[1; 1 << 20]).unwrap();
        // With a snapshot, so that acknowledged writes live in mappings which nobody has flushed.
        let mut client = Control::connect(&control);
        let set = uuid::Uuid::new_v4();
        client.prepare(set, &["disk"], None).unwrap();
        let committed = client.commit(set).unwrap();
        client.keep(set).unwrap();
        for block in 0..64_u64 {
            disk.first()
                .write(block * 8192, &[block as u8 + 2; 4096])
                .unwrap();
        }
        let arguments = daemon.kill();
        drop(disk);
        let daemon = Daemon::start(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
        let mut disk = Disk::attach(&socket, 1);
        let read = disk.first().read(0, 1 << 20).unwrap();
        for block in 0..256_usize {
            let expected = if block.is_multiple_of(2) && block < 128 {
                block / 2 + 2
            } else {
                1
            };
            let found = &read[block * 4096..][..4096];
            assert!(
                found.iter().all(|byte| usize::from(*byte) == expected),
                "{method}: block {block}"
            );
        }
        let mut client = Control::connect(&control);
        let image = client.read_snapshot(committed.volumes[0].snapshot.snapshot);
        assert!(
            image[..1 << 20].iter().all(|byte| *byte == 1),
            "{method}: the snapshot"
        );
        drop(disk);
        assert!(daemon.terminate().success());
    }
}

#[test]
fn command_lines_that_make_no_sense_exit_with_two_and_missing_disks_with_one() {
    for (arguments, code) in [
        (vec![], 2),
        (vec!["--disk", "x"], 2),
        (vec!["--colour", "red"], 2),
        (
            vec!["--disk", "/nonexistent/disk", "--socket", "/tmp/never-made"],
            1,
        ),
    ] {
        let (found, told) = Daemon::refused(&arguments);
        assert_eq!(found, Some(code), "{arguments:?}: {told}");
        assert!(!told.is_empty());
    }
}
