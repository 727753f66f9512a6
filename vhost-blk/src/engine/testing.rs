//! What unit tests of several rooms need: a volume on a temporary file, and some guest memory.

use super::{EngineKind, VolumeEngine, VolumeSettings};
use std::sync::Arc;
use vhost_blk_store::{OpenOptions, Volume};
use vhost_blk_wire::types::Method;
use vm_memory::{GuestAddress, GuestMemoryMmap};

/// A volume of zeroes; its directory goes with the guard.
pub(crate) fn volume(size_bytes: u64) -> (Arc<VolumeEngine>, tempfile::TempDir) {
    let directory = tempfile::tempdir().unwrap();
    let base = directory.path().join("disk.raw");
    let file = std::fs::File::create(&base).unwrap();
    file.set_len(size_bytes).unwrap();
    let shadow_storage = directory.path().join("disk.shadow");
    let (store, _) = Volume::adopt(&base, &shadow_storage, &OpenOptions::default()).unwrap();
    let settings = VolumeSettings {
        name: "vda".to_owned(),
        serial: "test".to_owned(),
        base,
        shadow_storage,
        socket: directory.path().join("socket"),
        method: Method::Row,
        read_only: false,
        engine: EngineKind::Auto,
    };
    let volume = VolumeEngine::new(settings, Arc::new(store), Arc::new(|_| {})).unwrap();
    (volume, directory)
}

/// Two regions with a hole between them: 64 KiB at 0 and 64 KiB at 1 MiB.
pub(crate) fn memory() -> Arc<GuestMemoryMmap> {
    let regions = [
        (GuestAddress(0), 0x1_0000),
        (GuestAddress(0x10_0000), 0x1_0000),
    ];
    Arc::new(GuestMemoryMmap::from_ranges(&regions).unwrap())
}
