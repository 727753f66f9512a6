//! Volumes whose metadata was edited behind its checksums, opened and used: what every fuzz target runs.
//!
//! An input is a list of edits of 8 bytes each, applied to one of a few volumes that were worn by a random history.
//! Whatever the bytes say, nothing may panic, hang or take memory without bounds; what is read is of no
//! interest, because with all checksums trusted the bytes may say anything.

#![allow(dead_code, reason = "each target edits its part")]
#![allow(clippy::let_underscore_must_use, reason = "any answer is right")]
#![allow(clippy::cast_possible_truncation, reason = "volumes of a few blocks")]
#![allow(clippy::unwrap_used, reason = "a test ends at the first surprise")]

use std::sync::OnceLock;

use vhost_blk_store::sim::{Image, Part, contents, memory_volume, metadata, trusting_checksums};
use vhost_blk_store::{
    ByteRange, Maintenance, Method, NewSnapshot, View, Volume, VolumeFiles, check, dump,
};

use crate::harness::{JOURNAL_REGION, Methods, Model, World, history, memory_files, small_options};

/// Histories whose volumes are edited.
const VOLUMES: usize = 6;
/// Edits of one input.
const MAX_EDITS: usize = 24;
/// Bytes of an edit.
const EDIT_BYTES: usize = 8;

/// Which metadata a target edits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    Superblock,
    Journal,
    Index,
    /// All of it.
    Volume,
}

impl Target {
    fn takes(self, part: Part) -> bool {
        let superblock = part.place == vhost_blk_store::sim::SUPERBLOCK;
        match self {
            Target::Superblock => superblock,
            Target::Journal => part.journal,
            Target::Index => !superblock && !part.journal,
            Target::Volume => true,
        }
    }
}

fn worn() -> &'static [Vec<Image>] {
    static WORN: OnceLock<Vec<Vec<Image>>> = OnceLock::new();
    WORN.get_or_init(|| {
        (0..VOLUMES as u64)
            .map(|seed| {
                let model = Model::new(83);
                let mut world = World::new(memory_files(model.bytes()), small_options(1), model);
                for op in history(seed, Methods::Mixed, 70, 83) {
                    world.apply(&op);
                }
                world.finish_all().unwrap();
                if seed % 2 == 0 {
                    world.volume().flush().unwrap();
                } else {
                    world.volume.take().unwrap().close().unwrap();
                }
                contents(&world.files).unwrap()
            })
            .collect()
    })
}

/// One edit: which part, where, what.
fn edit(images: &mut [Image], parts: &[Part], edit: [u8; EDIT_BYTES]) {
    let [part, kind, low, high, value, ..] = edit;
    let Some(part) = parts.get(usize::from(part) % parts.len().max(1)) else {
        return;
    };
    // Fields are aligned; the first pages hold most of what matters.
    let place = u64::from(u16::from_le_bytes([low, high]));
    let width: u64 = [1, 2, 4, 8][usize::from(kind >> 6)];
    let within = place * if kind & 32 == 0 { 1 } else { width };
    let at = part.offset_bytes + within % part.length_bytes.max(1);
    let image = &mut images[part.place];
    let mut field = [0; 8];
    image.read(&mut field, at);
    let old = u64::from_le_bytes(field);
    let rest = u64::from(u32::from_le_bytes([edit[4], edit[5], edit[6], edit[7]]));
    let new = match kind % 8 {
        0 => rest,
        1 => old.wrapping_add(1),
        2 => old.wrapping_sub(1),
        3 => u64::MAX >> (value % 64),
        4 => 1 << (value % 64),
        5 => 0,
        6 => {
            // Something that stands elsewhere.
            let from = part.offset_bytes + rest % part.length_bytes.max(1);
            image.read(&mut field, from);
            u64::from_le_bytes(field)
        }
        _ => old ^ 1 << (value % 64),
    };
    let length = image.len_bytes();
    image.write(&new.to_le_bytes()[..width as usize], at);
    image.set_len(length);
}

/// Runs one input.
pub(crate) fn run(target: Target, input: &[u8]) {
    let Some((first, edits)) = input.split_first() else {
        return;
    };
    let mut images = worn()[usize::from(*first) % VOLUMES].clone();
    let parts: Vec<Part> = metadata(&images, JOURNAL_REGION)
        .into_iter()
        .filter(|part| target.takes(*part) && part.length_bytes > 0)
        .collect();
    for bytes in edits.chunks_exact(EDIT_BYTES).take(MAX_EDITS) {
        edit(&mut images, &parts, bytes.try_into().unwrap());
    }
    let files = memory_volume(images);
    trusting_checksums(|| {
        drop(check(&files));
        drop(dump(&files));
        use_it(files, 1 + (first >> 6) % 2);
    });
}

/// Everything a daemon does, for as long as nothing refuses it.
fn use_it(files: VolumeFiles, boot: u8) {
    let Ok((volume, _)) = Volume::open_files(files, &small_options(boot)) else {
        return;
    };
    let size_bytes = volume.size_bytes();
    let mut bytes = vec![0; size_bytes.min(1 << 20) as usize];
    let mut views = vec![View::Head];
    let snapshots = volume.snapshots();
    views.extend(
        snapshots
            .iter()
            .take(8)
            .map(|s| View::Snapshot(s.snapshot_id)),
    );
    for view in views {
        let _ = volume.read_at(view, 0, &mut bytes);
    }
    let maintain = |steps| {
        for _ in 0..steps {
            if !matches!(volume.maintain(16), Ok(Maintenance::More)) {
                break;
            }
        }
    };
    let _ = volume.write_at(0, &[1; 8192]);
    let _ = volume.write_at(512, &[2; 512]);
    let _ = volume.write_at(8 * 4096, &[3; 4096]);
    let _ = volume.flush();
    let id = uuid::Uuid::from_u128(0xabcd);
    for method in [Method::RedirectOnWrite, Method::CopyOnWrite] {
        let new = NewSnapshot {
            snapshot_id: uuid::Uuid::from_u128(method as u128 + 1).into(),
            set_id: id.into(),
            members: vec![volume.id()],
            method,
            created_unix_ms: 0,
        };
        let _ = volume.take_snapshot(new);
        let _ = volume.keep_set(id.into());
        let _ = volume.write_at(0, &[4; 16384]);
        let _ = volume.write_zeroes_at(ByteRange::new(4096, 8192), true);
        let _ = volume.discard_at(ByteRange::new(4096, 16384));
        let _ = volume.flush();
    }
    maintain(60);
    if let Some(snapshot) = snapshots.last() {
        let _ = volume.revert(snapshot.snapshot_id);
    }
    for snapshot in snapshots.iter().take(8) {
        let _ = volume.delete_snapshot(snapshot.snapshot_id);
    }
    maintain(200);
    let _ = volume.read_at(View::Head, 0, &mut bytes);
    let _ = volume.close();
}
