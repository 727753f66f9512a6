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
