//! mountinfo as the kernel writes it.

use super::*;
use proptest::prelude::*;

#[test]
fn a_line_is_read_with_and_without_optional_fields() {
    let text = b"36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 shared:2 - ext3 /dev/root rw,errors=continue\n\
                 27 1 254:0 / / rw,relatime - ext4 /dev/vda ro\n";
    let mounts = parse(text);
    assert_eq!(mounts.len(), 2);
    assert_eq!(
        mounts[0],
        Mount {
            id: 36,
            parent: 35,
            device: DeviceNumber {
                major: 98,
                minor: 0
            },
            root: "/mnt1".into(),
            mountpoint: "/mnt2".into(),
            fstype: "ext3".into(),
            source: "/dev/root".into(),
            read_only: false,
        }
    );
    assert!(mounts[1].read_only);
}

#[test]
fn a_read_only_bind_mount_of_a_writable_file_system_is_writable() {
    let mounts = parse(b"1 1 8:1 / /a ro - ext4 /dev/sda1 rw\n");
    assert!(!mounts[0].read_only);
}

#[test]
fn escapes_are_undone() {
    let mounts = parse(b"1 1 8:1 / /a\\040b\\134c\\011 rw - ext4 /dev/sda1 rw\n");
    assert_eq!(mounts[0].mountpoint, Path::new("/a b\\c\t"));
    assert_eq!(unescape(b"\\04"), b"\\04");
    assert_eq!(unescape(b"\\999"), b"\\999");
}

#[test]
fn a_path_lies_on_the_innermost_and_latest_mount() {
    let mounts = parse(
        b"1 1 8:1 / / rw - ext4 a rw\n2 1 8:2 / /var rw - ext4 b rw\n3 1 8:3 / /var rw - ext4 c rw\n",
    );
    assert_eq!(
        mount_of(&mounts, Path::new("/var/x")).unwrap().device.minor,
        3
    );
    assert_eq!(
        mount_of(&mounts, Path::new("/varx")).unwrap().device.minor,
        1
    );
}

#[test]
fn a_path_is_looked_up_as_the_kernel_does() {
    let mounts = parse(
        b"1 0 8:1 / / rw - ext4 a rw\n2 1 8:2 / /a/b rw - ext4 b rw\n3 1 8:3 / /a rw - ext4 c rw\n\
          4 3 8:4 / /a/c rw - ext4 d rw\n5 4 8:5 / /a/c rw - ext4 e rw\n6 5 8:5 /x /a/c rw - ext4 e rw\n",
    );
    let tree = Tree::new(&mounts);
    let reached = |path: &str| tree.reached(Path::new(path)).unwrap().id;
    assert_eq!(reached("/x"), 1);
    assert_eq!(reached("/a/b"), 3);
    assert_eq!(reached("/a/c/d"), 6);
    let hidden = mounts.iter().filter(|mount| tree.is_hidden(mount));
    let hidden: Vec<u32> = hidden.map(|mount| mount.id).collect();
    // Not 5, which is covered by its own file system.
    assert_eq!(hidden, [2, 4]);
}

#[test]
fn mounts_that_lie_on_each_other_are_no_way_round_and_round() {
    let mounts = parse(b"1 2 8:1 / / rw - ext4 a rw\n2 1 8:2 / / rw - ext4 b rw\n");
    assert_eq!(Tree::new(&mounts).reached(Path::new("/x")), None);
}

proptest! {
    #[test]
    fn no_bytes_make_the_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        prop_assert!(parse(&bytes).len() <= bytes.len());
    }

    #[test]
    fn damaged_lines_do_not_make_the_parser_panic(cut in 0usize..79, byte in any::<u8>()) {
        let mut line = b"36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue\n".to_vec();
        line[cut] = byte;
        prop_assert!(parse(&line).len() <= 2);
        line.truncate(cut);
        prop_assert!(parse(&line).len() <= 1);
    }
}
