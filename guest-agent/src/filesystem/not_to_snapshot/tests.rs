//! Places of files: merging, and FIEMAP where the file system under the tests can.

use super::*;
use std::io::Write;

fn area(disk: usize, start_bytes: u64, length_bytes: u64) -> Area {
    Area {
        disk,
        start_bytes,
        length_bytes,
    }
}

#[test]
fn an_area_is_counted_once_however_often_it_was_named() {
    let all = vec![
        area(1, 0, 10),
        area(0, 20, 10),
        area(0, 0, 10),
        area(0, 5, 5),
        area(0, 10, 2),
    ];
    let expected = [area(0, 0, 12), area(0, 20, 10), area(1, 0, 10)];
    assert_eq!(merged(all), expected);
}

fn later() -> Instant {
    Instant::now() + std::time::Duration::from_secs(600)
}

/// A directory, and a system in which its file system lies on a partition that begins at a mebibyte.
struct Guest {
    place: tempfile::TempDir,
    sys: tempfile::TempDir,
    number: DeviceNumber,
}

impl Guest {
    fn new() -> Self {
        let place = tempfile::tempdir().unwrap();
        let sys = tempfile::tempdir().unwrap();
        let device = rustix::fs::stat(place.path()).unwrap().st_dev;
        let number = number(device);
        let partition = sys.path().join("devices/vda/vda1");
        let links = sys.path().join("dev/block");
        std::fs::create_dir_all(&partition).unwrap();
        std::fs::create_dir_all(&links).unwrap();
        std::fs::write(sys.path().join("devices/vda/serial"), "ser").unwrap();
        std::fs::write(partition.join("partition"), "1").unwrap();
        std::fs::write(partition.join("start"), "2048").unwrap();
        std::fs::write(partition.join("size"), u64::from(u32::MAX).to_string()).unwrap();
        std::os::unix::fs::symlink(&partition, links.join(number.to_string())).unwrap();
        Self { place, sys, number }
    }

    fn devices(&self) -> BlockDevices {
        BlockDevices::new(self.sys.path())
    }

    fn mounts(&self, fstype: &str) -> Vec<Mount> {
        vec![Mount {
            id: 1,
            parent: 0,
            device: self.number,
            root: "/".into(),
            mountpoint: "/".into(),
            fstype: fstype.to_owned(),
            source: "/dev/vda1".to_owned(),
            read_only: false,
        }]
    }

    fn write(&self, name: &str, bytes: usize) -> PathBuf {
        let path = self.place.path().join(name);
        let mut file = std::fs::File::create(&path).unwrap();
        file.write_all(&vec![7; bytes]).unwrap();
        rustix::fs::fsync(&file).unwrap();
        path
    }

    fn wish(&self, spec: &str, owner: Option<u32>) -> Wish {
        let set = FileSet::new(self.place.path().to_str().unwrap(), spec);
        Wish { set, owner }
    }

    fn find(&self, wishes: &[Wish], swap_files: &[PathBuf], disks: &[&str]) -> Candidates {
        let disks: Vec<String> = disks.iter().map(|&disk| disk.to_owned()).collect();
        find(
            wishes,
            swap_files,
            &self.mounts("ext4"),
            &self.devices(),
            &disks,
            later(),
        )
    }

    fn place(&self, found: &Candidates, frozen: &[DeviceNumber]) -> NotToSnapshot {
        self.place_beside(found, &[], frozen)
    }

    /// The same while these files are swap.
    fn place_beside(
        &self,
        found: &Candidates,
        swap_files: &[PathBuf],
        frozen: &[DeviceNumber],
    ) -> NotToSnapshot {
        let swap = Swap {
            devices: Vec::new(),
            files: swap_files.to_vec(),
        };
        place(found, &swap, &self.devices(), &[], frozen, later()).0
    }

    /// Where the file system under the tests says that this file lies; `None`, with the reason, if it cannot.
    fn can_tell(&self, path: &Path) -> bool {
        match blocks::of(std::fs::File::open(path).unwrap()) {
            Ok(_) => true,
            Err(why) => {
                eprintln!("skipped: the file system under the tests cannot tell: {why}");
                false
            }
        }
    }
}

fn names(found: &Candidates) -> Vec<String> {
    let mut names: Vec<String> = found
        .files
        .iter()
        .map(|file| {
            file.path
                .file_name()
                .unwrap()
                .to_string_lossy()
                .into_owned()
        })
        .collect();
    names.sort();
    names
}

#[test]
fn what_cannot_be_placed_is_told_and_gives_no_files() {
    let devices = BlockDevices::new(Path::new("/nowhere"));
    let guest = Guest::new();
    for (path, fstype, why) in [
        ("/tmp", "btrfs", "cannot be placed"),
        ("/tmp", "ext4", "not on a disk or partition"),
        ("/tmp/../etc", "ext4", "not an absolute path"),
        ("tmp", "ext4", "not an absolute path"),
    ] {
        let set = FileSet::tree(path);
        let wish = Wish { set, owner: None };
        let found = find(&[wish], &[], &guest.mounts(fstype), &devices, &[], later());
        assert_eq!(
            (found.unresolved, found.files.len()),
            (1, 0),
            "{path} {fstype}"
        );
        assert!(found.reasons.iter().all(|r| r.contains(why)), "{found:?}");
    }
}

#[test]
fn a_user_names_only_files_of_its_own() {
    let guest = Guest::new();
    guest.write("a.tmp", 9_000);
    let own = rustix::process::geteuid().as_raw();
    let theirs = guest.find(&[guest.wish("*", Some(own + 1))], &[], &[]);
    assert_eq!((theirs.files.len(), theirs.unresolved), (0, 1));
    let ours = guest.find(&[guest.wish("*", Some(own))], &[], &[]);
    assert_eq!(names(&ours), ["a.tmp"]);
    let roots = guest.find(&[guest.wish("*", None)], &[], &[]);
    assert_eq!(names(&roots), ["a.tmp"]);
}

#[test]
fn only_files_without_other_names_on_disks_of_the_set_are_found() {
    let guest = Guest::new();
    guest.write("a.tmp", 9_000);
    guest.write("b.log", 9_000);
    let linked = guest.write("c.tmp", 9_000);
    std::fs::hard_link(&linked, guest.place.path().join("c2.tmp")).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", guest.place.path().join("d.tmp")).unwrap();
    let found = guest.find(&[guest.wish("*.tmp", None)], &[], &["ser", "other"]);
    assert_eq!(names(&found), ["a.tmp"]);
    assert_eq!(found.unresolved, 2, "{found:?}");
    let elsewhere = guest.find(&[guest.wish("*.tmp", None)], &[], &["other"]);
    assert_eq!((elsewhere.files.len(), elsewhere.unresolved), (0, 0));
}

#[test]
fn a_file_lies_where_it_lies_when_it_is_frozen_and_not_where_it_was_found() {
    let guest = Guest::new();
    let path = guest.write("a.tmp", 1 << 20);
    if !guest.can_tell(&path) {
        return;
    }
    let found = guest.find(&[guest.wish("*", None)], &[], &[]);
    let placed = guest.place(&found, &[guest.number]);
    assert_eq!((placed.files, placed.unresolved), (1, 0), "{placed:?}");
    assert_eq!(placed.bytes, 1 << 20);
    let all_behind = placed.extents.iter().all(|e| e.start_bytes >= 1 << 20);
    assert!(all_behind, "in the partition: {placed:?}");
    assert_eq!(placed.names, [path.display().to_string()]);
    // Cut short since it was found: what it gave back may be somebody else's.
    std::fs::File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(4096)
        .unwrap();
    assert_eq!(guest.place(&found, &[guest.number]).bytes, 4096);
    // Its file system is not frozen.
    let thawed = guest.place(&found, &[]);
    assert_eq!((thawed.bytes, thawed.unresolved), (0, 1));
    // Another name has come, and then another file.
    let link = guest.place.path().join("b");
    std::fs::hard_link(&path, &link).unwrap();
    assert_eq!(guest.place(&found, &[guest.number]).bytes, 0);
    std::fs::remove_file(&path).unwrap();
    guest.write("a.tmp", 8192);
    assert_eq!(guest.place(&found, &[guest.number]).bytes, 0);
}

#[test]
fn of_too_many_pieces_those_that_are_largest_are_looked_at() {
    let guest = Guest::new();
    let one = guest.write("one", 1 << 20);
    if !guest.can_tell(&one) {
        return;
    }
    // A block and a hole, one after the other.
    for (name, pieces) in [("some", 10), ("many", PIECES_MAX)] {
        let file = std::fs::File::create(guest.place.path().join(name)).unwrap();
        for piece in 0..pieces {
            let at = u64::try_from(piece).unwrap() * 8192;
            std::os::unix::fs::FileExt::write_all_at(&file, &[7; 4096], at).unwrap();
        }
        rustix::fs::fsync(&file).unwrap();
    }
    let found = guest.find(&[guest.wish("*", None)], &[], &[]);
    assert_eq!(names(&found), ["one", "some"], "{:?}", found.reasons);
    assert_eq!(found.unresolved, 1);
    assert!(found.reasons.iter().all(|why| why.contains("pieces")));
    let placed = guest.place(&found, &[guest.number]);
    assert_eq!((placed.files, placed.unresolved), (2, 1), "{placed:?}");
    assert_eq!(placed.bytes, (1 << 20) + 10 * 4096);
}

#[test]
fn swap_keeps_its_header() {
    let guest = Guest::new();
    let path = guest.write("swapfile", 1 << 20);
    let found = guest.find(&[], std::slice::from_ref(&path), &[]);
    assert_eq!(names(&found), ["swapfile"]);
    let none = Candidates::default();
    let swap = Swap {
        devices: vec![guest.number],
        files: Vec::new(),
    };
    let (placed, _open) = place(&none, &swap, &guest.devices(), &[], &[], later());
    let [area] = placed.extents.as_slice() else {
        panic!("{placed:?}");
    };
    assert_eq!(area.start_bytes, (1 << 20) + SWAP_HEADER_BYTES);
    assert_eq!(
        area.length_bytes,
        u64::from(u32::MAX) * 512 - SWAP_HEADER_BYTES
    );
    if guest.can_tell(&path) {
        let placed = guest.place_beside(&found, &[path], &[guest.number]);
        assert_eq!(placed.bytes, (1 << 20) - SWAP_HEADER_BYTES, "{placed:?}");
    }
}

#[test]
fn what_is_no_longer_swap_stays_in_the_copy() {
    let guest = Guest::new();
    let path = guest.write("swapfile", 1 << 20);
    let found = guest.find(&[], &[path], &[]);
    assert_eq!(names(&found), ["swapfile"]);
    let placed = guest.place(&found, &[guest.number]);
    assert_eq!((placed.files, placed.bytes, placed.unresolved), (0, 0, 1));
    assert!(placed.reasons[0].ends_with("is no longer swap"));
}

#[test]
fn what_became_swap_since_a_pattern_named_it_keeps_its_header() {
    let guest = Guest::new();
    let path = guest.write("swapfile", 1 << 20);
    let found = guest.find(&[guest.wish("swap*", None)], &[], &[]);
    assert_eq!(names(&found), ["swapfile"]);
    if guest.can_tell(&path) {
        let placed = guest.place_beside(&found, &[path], &[guest.number]);
        assert_eq!(placed.bytes, (1 << 20) - SWAP_HEADER_BYTES, "{placed:?}");
    }
}

#[test]
fn no_time_left_places_nothing() {
    let guest = Guest::new();
    guest.write("a.tmp", 9_000);
    let found = guest.find(&[guest.wish("*", None)], &[], &[]);
    let now = Instant::now();
    let frozen = [guest.number];
    let (placed, _open) = place(
        &found,
        &Swap::default(),
        &guest.devices(),
        &[],
        &frozen,
        now,
    );
    assert_eq!((placed.bytes, placed.unresolved), (0, 1));
}

#[test]
fn no_time_left_finds_nothing_and_says_so() {
    let guest = Guest::new();
    guest.write("a.tmp", 9_000);
    let wish = [guest.wish("*", None)];
    let mounts = guest.mounts("ext4");
    let found = find(&wish, &[], &mounts, &guest.devices(), &[], Instant::now());
    assert_eq!((found.files.len(), found.unresolved), (0, 1), "{found:?}");
}

#[test]
fn a_symbolic_link_on_the_way_makes_no_pattern_mean_other_files() {
    let guest = Guest::new();
    let real = guest.place.path().join("etc/cache");
    std::fs::create_dir_all(&real).unwrap();
    std::fs::write(real.join("secret"), [7; 9_000]).unwrap();
    std::os::unix::fs::symlink("etc", guest.place.path().join("home")).unwrap();
    let tree = |path: &str| Wish {
        set: FileSet::tree(guest.place.path().join(path).to_str().unwrap()),
        owner: None,
    };
    let led = guest.find(&[tree("home/cache")], &[], &[]);
    assert_eq!((led.files.len(), led.unresolved), (0, 1), "{led:?}");
    assert_eq!(
        names(&guest.find(&[tree("etc/cache")], &[], &[])),
        ["secret"]
    );
    // A directory that was one when the file was found.
    let found = guest.find(&[tree("etc")], &[], &[]);
    assert_eq!(names(&found), ["secret"]);
    std::fs::rename(&real, guest.place.path().join("moved")).unwrap();
    std::os::unix::fs::symlink("../moved", &real).unwrap();
    let placed = guest.place(&found, &[guest.number]);
    assert_eq!((placed.files, placed.unresolved), (0, 1), "{placed:?}");
}

#[test]
fn a_mount_below_a_pattern_is_not_entered_even_of_the_same_file_system() {
    let guest = Guest::new();
    let below = guest.place.path().join("bound");
    std::fs::create_dir(&below).unwrap();
    std::fs::write(below.join("theirs"), [7; 9_000]).unwrap();
    guest.write("ours", 9_000);
    let mut mounts = guest.mounts("ext4");
    let set = FileSet::tree(guest.place.path().to_str().unwrap());
    let wishes = [Wish { set, owner: None }];
    let all = find(&wishes, &[], &mounts, &guest.devices(), &[], later());
    assert_eq!(names(&all), ["ours", "theirs"]);
    let bound = Mount {
        mountpoint: below,
        ..mounts.first().unwrap().clone()
    };
    mounts.push(bound);
    let ours = find(&wishes, &[], &mounts, &guest.devices(), &[], later());
    assert_eq!(names(&ours), ["ours"]);
}

#[test]
fn a_file_is_placed_once_and_swap_keeps_its_header_whoever_names_it() {
    let guest = Guest::new();
    let path = guest.write("swapfile", 1 << 20);
    let wishes = [guest.wish("*", None), guest.wish("swap*", None)];
    let found = guest.find(&wishes, std::slice::from_ref(&path), &[]);
    assert_eq!(names(&found), ["swapfile"]);
    assert!(found.files.iter().all(|file| file.is_swap));
    let twice = guest.find(&wishes, &[], &[]);
    assert_eq!(names(&twice), ["swapfile"]);
}
