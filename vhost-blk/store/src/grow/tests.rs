//! What a flush beside a growth may take from it.

use std::io;
use std::sync::{Arc, OnceLock, Weak};

use super::*;
use crate::io::BlockFile;
use crate::units::{SetId, SnapshotId};
use crate::{Method, NewSnapshot, OpenOptions};

/// A log in which each write has a whole flush before it, once the volume is known.
#[derive(Debug)]
struct FlushedFirst {
    file: Arc<dyn BlockFile>,
    volume: Arc<OnceLock<Weak<Shared>>>,
}

impl BlockFile for FlushedFirst {
    fn len_bytes(&self) -> io::Result<u64> {
        self.file.len_bytes()
    }
    fn read_at(&self, buffer: &mut [u8], offset_bytes: u64) -> io::Result<()> {
        self.file.read_at(buffer, offset_bytes)
    }
    fn write_at(&self, bytes: &[u8], offset_bytes: u64) -> io::Result<()> {
        if let Some(shared) = self.volume.get().and_then(Weak::upgrade) {
            shared.flush().expect("a flush");
        }
        self.file.write_at(bytes, offset_bytes)
    }
    fn write_zeroes(&self, offset_bytes: u64, length_bytes: u64, unmap: bool) -> io::Result<()> {
        self.file.write_zeroes(offset_bytes, length_bytes, unmap)
    }
    fn allocate(&self, offset_bytes: u64, length_bytes: u64) -> io::Result<()> {
        self.file.allocate(offset_bytes, length_bytes)
    }
    fn release(&self, offset_bytes: u64, length_bytes: u64) -> io::Result<()> {
        self.file.release(offset_bytes, length_bytes)
    }
    fn sync_data(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}

#[test]
fn a_flush_beside_the_zeroes_of_the_last_block_leaves_them_to_the_next_one() {
    let mut base = crate::sim::Image::default();
    base.set_len(BLOCK_BYTES + 512);
    let mut files = crate::sim::memory_volume(vec![base]);
    let known = Arc::new(OnceLock::new());
    files.log = Arc::new(FlushedFirst {
        file: files.log,
        volume: Arc::clone(&known),
    });
    let options = OpenOptions {
        journal_prewritten_bytes: 0,
        segments_ahead: 0,
        ..OpenOptions::default()
    };
    let (volume, _) = Volume::open_files(files, &options).expect("a new volume");
    let new = NewSnapshot {
        snapshot_id: SnapshotId::from(uuid::Uuid::from_u128(1)),
        set_id: SetId::from(uuid::Uuid::from_u128(2)),
        members: vec![volume.id()],
        method: Method::RedirectOnWrite,
        created_unix_ms: 1,
    };
    volume.take_snapshot(new).expect("a snapshot");
    volume.write_at(BLOCK_BYTES, &[1; 512]).expect("a write");
    let shared = &volume.shared;
    shared.flush().expect("a flush");
    assert!(!shared.gate.log_dirty.load(Ordering::SeqCst));
    known.set(Arc::downgrade(shared)).expect("unset");
    shared.clear_last_block().expect("zeroes");
    assert!(shared.gate.log_dirty.load(Ordering::SeqCst));
}
