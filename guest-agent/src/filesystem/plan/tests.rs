//! Order and choice of file systems, from text.

use super::*;
use std::fs;
use std::os::unix::fs::symlink;

/// A `/sys` with disks 254:0..=254:9 and loop devices 7:0..=7:9 whose backing files are `/img/N`.
fn sys() -> tempfile::TempDir {
    let sys = tempfile::tempdir().unwrap();
    fs::create_dir_all(sys.path().join("dev/block")).unwrap();
    for (major, name) in [(254, "vd"), (7, "loop")] {
        for minor in 0..10 {
            let node = sys.path().join(format!("devices/{name}{minor}"));
            fs::create_dir_all(&node).unwrap();
            fs::write(node.join("dev"), format!("{major}:{minor}\n")).unwrap();
            fs::write(node.join("size"), "8\n").unwrap();
            fs::write(node.join("serial"), format!("S{minor}\n")).unwrap();
            if major == 7 {
                fs::create_dir(node.join("loop")).unwrap();
                fs::write(
                    node.join("loop/backing_file"),
                    format!("/img/{minor}/file\n"),
                )
                .unwrap();
            }
            symlink(&node, sys.path().join(format!("dev/block/{major}:{minor}"))).unwrap();
        }
    }
    sys
}

fn planned(text: &str) -> Vec<(String, u32)> {
    let sys = sys();
    order(
        &parse(text.as_bytes()),
        &BlockDevices::new(sys.path()),
        None,
    )
    .iter()
    .map(|fs| (fs.name(), fs.step))
    .collect()
}

#[test]
fn the_root_freezes_last_and_others_together() {
    let steps = planned(
        "1 0 254:0 / / rw - ext4 a rw\n2 1 254:1 / /home rw - xfs b rw\n3 1 254:2 / /var rw - ext4 c rw\n",
    );
    assert_eq!(
        steps,
        [("/home".into(), 0), ("/var".into(), 0), ("/".into(), 1)]
    );
}

#[test]
fn a_file_system_in_a_file_freezes_before_the_one_around_it() {
    // 7:2 is a file on 7:1, which is a file on 254:3, mounted in the opposite order of nesting.
    let steps = planned(
        "1 0 254:3 / /img/1 rw - ext4 a rw\n2 0 7:1 / /img/2 rw - ext4 b rw\n3 0 7:2 / /inner rw - ext4 c rw\n",
    );
    assert_eq!(
        steps,
        [
            ("/inner".into(), 0),
            ("/img/2".into(), 1),
            ("/img/1".into(), 2)
        ]
    );
}

#[test]
fn a_root_in_a_file_freezes_before_the_file_system_around_it() {
    let steps = planned("1 2 254:3 / /img/1 rw - ext4 a rw\n2 0 7:1 / / rw - ext4 b rw\n");
    assert_eq!(steps, [("/".into(), 0), ("/img/1".into(), 1)]);
}

#[test]
fn a_superblock_mounted_twice_is_named_once_by_its_root() {
    let steps = planned(
        "1 0 254:0 /sub /bind rw - ext4 a rw\n2 0 254:0 / /whole rw - ext4 a rw\n3 0 254:0 /x /other rw - ext4 a rw\n",
    );
    assert_eq!(steps, [("/whole".into(), 0)]);
}

#[test]
fn what_is_not_on_a_disk_is_never_a_candidate() {
    let steps = planned(
        "1 0 0:30 / /nfs rw - nfs4 server:/x rw\n2 0 0:31 / /tmp rw - tmpfs tmpfs rw\n\
         3 0 0:34 / /ssh rw - fuse.sshfs me@there rw\n4 0 0:32 / /auto rw - autofs systemd-1 rw\n\
         5 0 0:33 / /over rw - overlay overlay rw\n6 0 99:1 / /gone rw - ext4 /dev/gone rw\n",
    );
    assert!(steps.is_empty());
}

#[test]
fn a_covered_mount_point_is_not_opened() {
    let steps = planned("1 0 254:0 / /mnt rw - ext4 a rw\n2 1 254:1 / /mnt rw - ext4 b rw\n");
    assert_eq!(steps, [("/mnt".into(), 0), ("/mnt (hidden)".into(), 0)]);
    let sys = sys();
    let all = order(
        &parse(b"1 0 254:0 / /mnt rw - ext4 a rw\n2 1 0:9 / /mnt rw - nfs b rw\n"),
        &BlockDevices::new(sys.path()),
        None,
    );
    assert_eq!(all.len(), 1);
    let why = all[0].why_not.as_deref();
    assert_eq!(why, Some("hidden beneath another mount"));
}

#[test]
fn a_hidden_mount_point_does_not_name_a_file_system_that_has_another() {
    let sys = sys();
    let mounts = parse(
        b"1 0 254:0 / /mnt rw - ext4 a rw\n2 1 0:9 / /mnt rw - nfs b rw\n3 0 254:0 / /seen rw - ext4 a rw\n",
    );
    let all = order(&mounts, &BlockDevices::new(sys.path()), None);
    assert_eq!(all.len(), 1);
    assert_eq!(all[0].mountpoints, [PathBuf::from("/seen")]);
    assert_eq!(all[0].why_not, None);
}

#[test]
fn what_lies_on_a_covered_mount_is_hidden_too_and_reached_by_another_mount() {
    let sys = sys();
    let covered = "1 0 254:9 / / rw - ext4 r rw\n2 1 254:0 / /srv rw - ext4 a rw\n3 2 254:1 / /srv/data rw - ext4 b rw\n\
                   4 2 0:9 / /srv rw - tmpfs t rw\n";
    let all = order(
        &parse(covered.as_bytes()),
        &BlockDevices::new(sys.path()),
        None,
    );
    let names: Vec<_> = all.iter().map(Filesystem::name).collect();
    assert_eq!(names, ["/srv/data (hidden)", "/srv (hidden)", "/"]);
    let why = all[0].why_not.as_deref();
    assert_eq!(why, Some("hidden beneath another mount"));
    let seen = format!("{covered}5 1 254:1 /sub /other rw - ext4 b rw\n");
    let all = order(
        &parse(seen.as_bytes()),
        &BlockDevices::new(sys.path()),
        None,
    );
    let data = all.iter().find(|fs| fs.device.minor == 1).unwrap();
    assert_eq!(data.mountpoints, [PathBuf::from("/other")]);
    assert_eq!(data.why_not, None);
}

#[test]
fn name_spaces_that_are_too_large_to_read_are_told_as_not_held() {
    let sys = sys();
    let proc = tempfile::tempdir().unwrap();
    let line = "2 1 0:5 / /proc rw - proc proc rw\n";
    let much = line.repeat(OTHER_SPACES_BYTES_MAX / line.len() + 1);
    for (process, space, mounts) in [
        ("1", "mnt:[1]", "1 0 254:0 / /data rw - ext4 a rw\n"),
        ("8", "mnt:[2]", &much),
    ] {
        fs::create_dir_all(proc.path().join(process).join("ns")).unwrap();
        symlink(space, proc.path().join(process).join("ns/mnt")).unwrap();
        fs::write(proc.path().join(process).join("mountinfo"), mounts).unwrap();
    }
    let sources = Sources {
        proc: proc.path().to_owned(),
        sys: sys.path().to_owned(),
        only_under: None,
    };
    let all = sources.filesystems().unwrap();
    assert_eq!(all.len(), 2);
    assert!(!all[1].info().freezable);
    assert!(all[1].is_on(&["S3".into()]), "it may be on any disk");
}

#[test]
fn fuse_on_a_disk_is_named_and_never_opened() {
    let sys = sys();
    let mounts = parse(b"1 0 254:4 / /ntfs rw - fuseblk /dev/vd4 rw\n");
    let fs = order(&mounts, &BlockDevices::new(sys.path()), None).remove(0);
    assert!(fs.is_on(&["S4".into()]));
    assert!(!fs.info().freezable);
    assert!(fs.info().why_not.unwrap().contains("fuseblk"));
}

#[test]
fn what_has_data_on_disks_but_no_freeze_is_named_as_not_held() {
    let sys = sys();
    for (fstype, source) in [("zfs", "tank/data"), ("bcachefs", "/dev/vd1:/dev/vd2")] {
        let mounts = parse(format!("1 0 0:40 / /data rw - {fstype} {source} rw\n").as_bytes());
        let fs = order(&mounts, &BlockDevices::new(sys.path()), None).remove(0);
        assert!(!fs.info().freezable);
        assert!(fs.info().why_not.unwrap().contains(fstype));
        // Nobody can say that it lies elsewhere.
        assert!(fs.is_on(&["S1".into()]), "{fstype}");
    }
}

#[test]
fn what_only_another_name_space_sees_is_named_as_not_freezable() {
    let sys = sys();
    let proc = tempfile::tempdir().unwrap();
    for (process, space, mounts) in [
        ("1", "mnt:[1]", "1 0 254:0 / /data rw - ext4 a rw\n"),
        ("7", "mnt:[1]", "1 0 254:9 / /not-read rw - ext4 a rw\n"),
        (
            "8",
            "mnt:[2]",
            "1 0 254:0 / / rw - ext4 a rw\n2 1 254:1 / /data rw - ext4 b rw\n3 1 0:5 / /proc rw - proc proc rw\n",
        ),
    ] {
        fs::create_dir_all(proc.path().join(process).join("ns")).unwrap();
        symlink(space, proc.path().join(process).join("ns/mnt")).unwrap();
        fs::write(proc.path().join(process).join("mountinfo"), mounts).unwrap();
    }
    // They end between the look at their name space and the look at their mounts.
    for process in ["2", "5", "9", "10"] {
        let ended = proc.path().join(process).join("ns");
        fs::create_dir_all(&ended).unwrap();
        symlink("mnt:[2]", ended.join("mnt")).unwrap();
    }
    let sources = Sources {
        proc: proc.path().to_owned(),
        sys: sys.path().to_owned(),
        only_under: None,
    };
    let all = sources.filesystems().unwrap();
    let names: Vec<_> = all.iter().map(Filesystem::name).collect();
    assert_eq!(names, ["/data", "/proc/8/root/data"]);
    assert_eq!(all[0].why_not, None);
    assert!(all[1].why_not.as_ref().unwrap().contains("process 8"));
    assert!(all[1].is_on(&["S1".into()]) && !all[1].is_on(&["S0".into()]));
}

#[test]
fn only_what_lies_under_the_given_directory_exists() {
    let sys = sys();
    let mounts =
        parse(b"1 0 254:0 / / rw - ext4 a rw\n2 1 254:1 / /t/a rw - ext4 b rw\n3 1 254:2 / /tt rw - ext4 b rw\n");
    let all = order(
        &mounts,
        &BlockDevices::new(sys.path()),
        Some(Path::new("/t")),
    );
    assert_eq!(all.len(), 1);
    assert_eq!(all[0].name(), "/t/a");
}

#[test]
fn a_file_system_belongs_to_a_set_by_its_disks() {
    let sys = sys();
    let mounts = parse(b"1 0 254:1 / /a rw - vfat a rw\n");
    let fs = order(&mounts, &BlockDevices::new(sys.path()), None).remove(0);
    assert!(fs.is_on(&[]));
    assert!(fs.is_on(&["S1".into(), "S2".into()]));
    assert!(!fs.is_on(&["S2".into()]));
    assert!(!fs.info().freezable);
    assert!(fs.info().why_not.unwrap().contains("vfat"));
}

#[test]
fn swap_that_is_in_memory_alone_is_told_nowhere() {
    let (proc, sys) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let device = |name: &str, number: &str, backing: Option<&str>| {
        let node = sys.path().join("class/block").join(name);
        fs::create_dir_all(&node).unwrap();
        fs::write(node.join("dev"), format!("{number}\n")).unwrap();
        fs::write(node.join("size"), "8\n").unwrap();
        if let Some(backing) = backing {
            fs::write(node.join("backing_dev"), format!("{backing}\n")).unwrap();
        }
        let by_number = sys.path().join("dev/block");
        fs::create_dir_all(&by_number).unwrap();
        symlink(&node, by_number.join(number)).unwrap();
    };
    device("ram3", "1:3", None);
    device("zram0", "252:0", None);
    device("zram1", "252:1", Some("none"));
    device("zram2", "252:2", Some("/dev/vdb"));
    device("vdz9", "254:9", None);
    let text = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority
/dev/ram3                               partition\t1024\t0\t-2
/dev/zram0                              partition\t1024\t0\t100
/dev/zram1                              partition\t1024\t0\t100
/dev/zram2                              partition\t1024\t0\t100
/dev/vdz9                               partition\t1024\t0\t-3
/zram0                                  file\t1024\t0\t-4
";
    fs::write(proc.path().join("swaps"), text).unwrap();
    let sources = Sources {
        proc: proc.path().to_owned(),
        sys: sys.path().to_owned(),
        only_under: None,
    };
    let swap = sources.swap();
    // What one writes back lies somewhere on a disk.
    let on_disks = ["252:2", "254:9"].map(|number| DeviceNumber::parse(number).unwrap());
    assert_eq!(swap.devices, on_disks);
    assert_eq!(swap.files, [PathBuf::from("/zram0")]);
    let exempt: Vec<_> = sources.exempt().into_iter().map(|part| part.disk).collect();
    assert_eq!(exempt, ["zram2", "vdz9"]);
}
