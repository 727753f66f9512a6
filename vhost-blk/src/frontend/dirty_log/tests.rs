//! Bits and their places.

use super::DirtyLog;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use std::fs::File;
use std::os::unix::fs::FileExt;
use vhost::vhost_user::message::VhostUserLog;

fn file(length_bytes: u64) -> File {
    let file = memfd_create("log", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, length_bytes).unwrap();
    File::from(file)
}

fn marked(address: u64, length_bytes: u64) -> [u8; 4] {
    let file = file(4);
    let log = DirtyLog::map(&VhostUserLog::new(4, 0), file.try_clone().unwrap()).unwrap();
    log.mark(address, length_bytes);
    let mut bytes = [0; 4];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

#[test]
fn every_page_that_a_range_touches_is_marked_and_no_other() {
    assert_eq!(marked(0, 1), [1, 0, 0, 0]);
    assert_eq!(marked(4095, 1), [1, 0, 0, 0]);
    assert_eq!(marked(4095, 2), [3, 0, 0, 0]);
    assert_eq!(marked(4096 * 7, 4096 * 2), [0x80, 1, 0, 0]);
    assert_eq!(marked(4096 * 31, 4096), [0, 0, 0, 0x80]);
    assert_eq!(marked(0, 0), [0; 4]);
}

#[test]
fn what_the_log_is_too_short_for_is_not_marked_and_ends() {
    assert_eq!(marked(4096 * 32, 1), [0; 4]);
    assert_eq!(marked(4096 * 31, u64::MAX), [0; 4], "no such range");
    assert_eq!(marked(4096 * 31, u64::MAX / 2), [0, 0, 0, 0x80]);
}

#[test]
fn a_log_that_the_file_does_not_have_is_refused() {
    for (length, offset) in [(5, 0), (4, 4096), (u64::MAX, 0), (4, u64::MAX)] {
        assert!(DirtyLog::map(&VhostUserLog::new(length, offset), file(4)).is_err());
    }
}
