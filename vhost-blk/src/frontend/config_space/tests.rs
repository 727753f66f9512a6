//! Reads of every length that front ends use, and writes of the one field that can be written.

use super::{read, write_cache_written};
use crate::engine::testing::volume;

#[test]
fn reads_of_57_60_and_96_bytes_are_answered_in_full_and_agree() {
    let (volume, _directory) = volume(1 << 20);
    let longest = read(&volume, 4, 0, 96);
    assert_eq!(longest.len(), 96);
    for size in [57, 60] {
        let part = read(&volume, 4, 0, size);
        assert_eq!(part.len(), size as usize);
        assert_eq!(part, longest[..part.len()]);
    }
    assert_eq!(
        longest[0..8],
        (2048_u64).to_le_bytes(),
        "capacity in sectors"
    );
    assert_eq!(longest[34..36], 4_u16.to_le_bytes(), "queues");
}

#[test]
fn an_old_cloud_hypervisor_reads_the_same_space() {
    let (volume, _directory) = volume(1 << 20);
    assert_eq!(read(&volume, 1, 0x100, 60), read(&volume, 1, 0, 60));
}

#[test]
fn reads_beyond_the_end_are_zeroes_of_the_length_asked() {
    let (volume, _directory) = volume(1 << 20);
    assert_eq!(read(&volume, 1, 90, 20), [0; 20]);
    assert_eq!(read(&volume, 1, u32::MAX, 8), [0; 8]);
}

#[test]
fn only_a_write_that_covers_the_write_cache_byte_switches_it() {
    assert_eq!(write_cache_written(32, &[0]), Some(false));
    assert_eq!(write_cache_written(32, &[1]), Some(true));
    assert_eq!(write_cache_written(30, &[0, 0, 1]), Some(true));
    assert_eq!(write_cache_written(33, &[1]), None);
    assert_eq!(write_cache_written(0, &[1; 8]), None);
    assert_eq!(write_cache_written(32, &[]), None);
}
