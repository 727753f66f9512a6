//! Where files lie, in guests made of files; and calls that take too long.

use super::*;

/// A guest with `/` on disk `root`, `/data` on disk `data`, and `/run` on none.
fn guest() -> (tempfile::TempDir, Disks) {
    let guest = tempfile::tempdir().unwrap();
    let write = |path: &str, text: &str| {
        let path = guest.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    };
    // Paths are looked up on this machine: `/` is the one that is sure to be here, and `/proc`, which is a tmpfs there.
    let mounts = "1 1 254:0 / / rw - ext4 /dev/vda rw\n2 1 254:16 / /usr rw - ext4 /dev/vdb rw\n\
                  3 1 0:22 / /proc rw - tmpfs tmpfs rw\n";
    write("proc/1/mountinfo", mounts);
    for (device, serial) in [("254:0", "root"), ("254:16", "data")] {
        write(&format!("sys/dev/block/{device}/size"), "8\n");
        write(&format!("sys/dev/block/{device}/serial"), serial);
    }
    let disks = Disks::seen_by(Sources {
        proc: guest.path().join("proc"),
        sys: guest.path().join("sys"),
        only_under: None,
    });
    (guest, disks)
}

fn why(disks: &Disks, set: &[&str], path: &str) -> Option<String> {
    let set: Vec<String> = set.iter().map(|disk| (*disk).to_owned()).collect();
    disks.not_held(&set, &["/".into(), path.into()])
}

#[test]
fn a_set_holds_files_if_it_has_every_disk_that_they_lie_on() {
    let (_guest, disks) = guest();
    assert_eq!(why(&disks, &["root", "data"], "/usr/bin"), None);
    assert_eq!(why(&disks, &[], "/usr/bin"), None);
    let outside = why(&disks, &["root"], "/usr/bin").unwrap();
    assert!(outside.contains("disk data"), "{outside}");
}

#[test]
fn what_lies_on_no_disk_or_cannot_be_found_is_in_no_set() {
    let (_guest, disks) = guest();
    let nowhere = why(&disks, &["root"], "/proc").unwrap();
    assert!(nowhere.contains("no disk"), "{nowhere}");
    assert!(why(&disks, &["root"], "/no/such/file").is_some());
}

/// Looks until the hold is lost.
fn loss(watch: &Watch) -> String {
    let until = std::time::Instant::now() + Duration::from_secs(60);
    loop {
        match watch.still_holds() {
            Err(why) => return why,
            Ok(()) => assert!(std::time::Instant::now() < until, "not lost"),
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_loss_is_told_with_its_reason_and_a_watch_that_fails_is_one() {
    let calls = Calls::new().unwrap();
    let (lose, lost) = tokio::sync::oneshot::channel::<String>();
    let watch = calls.watch(async { lost.await.unwrap_or_default() });
    assert_eq!(watch.still_holds(), Ok(()));
    lose.send("killed".to_owned()).unwrap();
    assert_eq!(loss(&watch), "killed");
    let failing = calls.watch(async { panic!("a client's own bug") });
    assert_eq!(loss(&failing), "nobody looks after the hold");
}

#[test]
fn a_watch_that_is_dropped_ends_with_what_it_holds() {
    let calls = Calls::new().unwrap();
    let (connection, closed) = tokio::sync::oneshot::channel::<()>();
    let watch = calls.watch(async {
        let _connection = connection;
        std::future::pending().await
    });
    drop(watch);
    assert!(closed.blocking_recv().is_err());
}

#[test]
fn a_call_that_takes_too_long_is_given_up() {
    let calls = Calls::new().unwrap();
    let never = std::future::pending::<Result<(), String>>();
    let veto = calls
        .within(
            &Call::alone(Duration::from_millis(1)),
            "waiting",
            |_| WriterFailure::Retryable,
            never,
        )
        .unwrap_err();
    assert_eq!(veto.code, WriterFailure::Timeout);
    let refused = async { Err::<(), _>("no") };
    let veto = calls
        .within(
            &Call::alone(Duration::from_secs(60)),
            "asking",
            |_| WriterFailure::Nonretryable,
            refused,
        )
        .unwrap_err();
    assert_eq!(veto.code, WriterFailure::Nonretryable);
    assert_eq!(veto.message, "asking: no");
}
