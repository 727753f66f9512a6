//! Tests of the file behind `BlockFile`.

use super::*;

fn access(direct: bool) -> Access {
    Access {
        direct,
        read_only: false,
        create: true,
    }
}

#[test]
fn unaligned_memory_and_short_files_work_with_and_without_direct_io() {
    // Not tmpfs: the point is O_DIRECT, which the build directory's filesystem usually has.
    let directory = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    for direct in [false, true] {
        let path = directory.path().join(format!("file-{direct}"));
        let file = DiskFile::open(&path, access(direct)).unwrap();
        if direct && !file.is_direct() {
            println!("skipped: no O_DIRECT on {}", directory.path().display());
            continue;
        }
        let data: Vec<u8> = (0..=250u8).cycle().take(3 * 512 + 1).collect();
        file.write_at(&data[1..], 512).unwrap();
        assert_eq!(file.len_bytes().unwrap(), 2048);
        let mut back = vec![7; 4096 + 1];
        file.read_at(&mut back[1..], 0).unwrap();
        assert_eq!(&back[1 + 512..1 + 2048], &data[1..]);
        assert!(back[1..513].iter().all(|byte| *byte == 0));
        assert!(
            back[1 + 2048..].iter().all(|byte| *byte == 0),
            "zeroes behind the end"
        );
        file.write_zeroes(1024, 512, true).unwrap();
        file.read_at(&mut back[1..], 0).unwrap();
        assert!(back[1 + 1024..1 + 1536].iter().all(|byte| *byte == 0));
        assert_eq!(&back[1 + 1536..1 + 2048], &data[1 + 1024..]);
        file.sync_data().unwrap();
    }
}

#[test]
fn second_lock_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("superblock");
    let first = DiskFile::open(&path, access(false)).unwrap();
    let second = DiskFile::open(&path, access(false)).unwrap();
    assert!(first.try_lock().unwrap());
    assert!(!second.try_lock().unwrap());
    drop(first);
    assert!(second.try_lock().unwrap());
}
