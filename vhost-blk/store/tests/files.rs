//! The store on real files and on a block device: O_DIRECT, locks, short tails, a base that somebody else
//! changed, and the two commands.
#![allow(clippy::unwrap_used, reason = "a test ends at the first surprise")]

mod harness;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use harness::{Methods, Model, Op, Verdict, World, history, small_options};
use vhost_blk_store::{
    Access, BootId, DataFile, DiskFile, Maintenance, Method, OpenOptions, StoreError, View, Volume,
    VolumeFiles,
};

/// Not a whole number of blocks: the last one has a single sector.
const SECTORS: u64 = 12 * 8 + 1;

/// On the build directory's filesystem: tmpfs, where /tmp may be, has no O_DIRECT.
fn directory() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

fn base_in(directory: &Path, model: &Model) -> PathBuf {
    let path = directory.join("disk.raw");
    fs::write(&path, model.bytes()).unwrap();
    path
}

/// A process that another test is starting holds copies of all open files between its fork and its exec, and
/// with them the locks: a volume that was just let go of may be in use for a moment.
fn options(direct: bool) -> OpenOptions {
    OpenOptions {
        direct,
        lock_wait: Duration::from_secs(30),
        ..small_options(1)
    }
}

/// Does not wait for a lock that somebody has.
fn impatient() -> OpenOptions {
    OpenOptions {
        lock_wait: Duration::ZERO,
        ..options(true)
    }
}

fn maintain_to_idle(volume: &Volume) {
    while volume.maintain(64).unwrap() != Maintenance::Idle {}
}

#[test]
fn histories_hold_on_real_files_direct_and_buffered() {
    for direct in [true, false] {
        let directory = directory();
        let model = Model::new(SECTORS);
        let base = base_in(directory.path(), &model);
        let access = Access {
            direct,
            read_only: false,
            create: false,
        };
        if direct && !DiskFile::open(&base, access).unwrap().is_direct() {
            println!(
                "skipped: no O_DIRECT with 512-byte alignment on {}",
                base.display()
            );
            continue;
        }
        let files =
            VolumeFiles::open(&base, &directory.path().join("shadow"), &options(direct)).unwrap();
        let mut world = World::new(files, options(direct), model);
        for op in history(11, Methods::Mixed, 150, SECTORS) {
            world.apply(&op);
            world.compare();
        }
        world.finish_all().unwrap();
        while !world.model.snapshots.is_empty() {
            world.apply(&Op::Delete { which: 0 });
        }
        maintain_to_idle(world.volume());
        world.compare();
        world.volume.take().unwrap().close().unwrap();
        assert_eq!(
            fs::read(&base).unwrap(),
            world.model.bytes(),
            "the base alone is the disk"
        );
    }
}

/// A volume with a redirected block, closed in order.
fn closed_with_snapshot(directory: &Path) -> (PathBuf, PathBuf) {
    let base = base_in(directory, &Model::new(SECTORS));
    let shadow = directory.join("shadow");
    let (volume, report) = Volume::adopt(&base, &shadow, &options(true)).unwrap();
    assert!(report.created);
    volume
        .take_snapshot(vhost_blk_store::NewSnapshot {
            snapshot_id: uuid::Uuid::from_u128(1).into(),
            set_id: uuid::Uuid::from_u128(2).into(),
            members: vec![volume.id()],
            method: Method::RedirectOnWrite,
            created_unix_ms: 3,
        })
        .unwrap();
    volume.write_at(4096, &[9; 4096]).unwrap();
    volume.close().unwrap();
    (base, shadow)
}

#[test]
fn volume_in_use_is_refused_and_readable() {
    let directory = directory();
    let (base, shadow) = closed_with_snapshot(directory.path());
    let (volume, report) = Volume::adopt(&base, &shadow, &options(true)).unwrap();
    assert!(report.clean && !report.created);
    assert!(matches!(
        Volume::adopt(&base, &shadow, &impatient()),
        Err(StoreError::InUse)
    ));
    let read_only = OpenOptions {
        read_only: true,
        ..options(true)
    };
    let (reader, _) = Volume::adopt(&base, &shadow, &read_only).unwrap();
    let mut sector = [0; 512];
    reader.read_at(View::Head, 4096, &mut sector).unwrap();
    assert_eq!(sector, [9; 512]);
    assert!(matches!(
        reader.write_at(0, &sector),
        Err(StoreError::ReadOnly)
    ));
    drop(volume);
    assert!(Volume::adopt(&base, &shadow, &options(true)).is_ok());
}

#[test]
fn late_writes_of_a_killed_daemon_keep_the_next_one_out() {
    let directory = directory();
    let (base, shadow) = closed_with_snapshot(directory.path());
    for which in [DataFile::Base, DataFile::Log] {
        let (volume, _) = Volume::adopt(&base, &shadow, &options(true)).unwrap();
        // What a request in flight has: a reference to the open file, and nothing else of the volume.
        let in_flight = volume
            .data_file(which)
            .raw_fd()
            .unwrap()
            .try_clone_to_owned()
            .unwrap();
        drop(volume);
        assert!(matches!(
            Volume::adopt(&base, &shadow, &impatient()),
            Err(StoreError::InUse)
        ));
        drop(in_flight);
        Volume::adopt(&base, &shadow, &options(true)).unwrap();
    }
}

#[test]
fn closed_volume_refuses_writes_and_closes_once() {
    let directory = directory();
    let (base, shadow) = closed_with_snapshot(directory.path());
    let (volume, _) = Volume::adopt(&base, &shadow, &options(true)).unwrap();
    let range = vhost_blk_store::ByteRange::new(0, 512);
    let plan = volume
        .plan_write(range, vhost_blk_store::WriteKind::Discard)
        .unwrap();
    assert!(matches!(volume.close(), Err(StoreError::Busy)));
    drop(plan);
    volume.close().unwrap();
    volume.close().unwrap();
    assert!(matches!(
        volume.write_at(0, &[0; 512]),
        Err(StoreError::Closed)
    ));
    assert!(matches!(volume.flush(), Err(StoreError::Closed)));
    assert!(matches!(volume.maintain(1), Err(StoreError::Closed)));
}

#[test]
fn base_changed_behind_our_back_is_refused_unless_forced() {
    let directory = directory();
    let (base, shadow) = closed_with_snapshot(directory.path());
    let file = fs::OpenOptions::new().write(true).open(&base).unwrap();
    let later = fs::metadata(&base).unwrap().modified().unwrap() + Duration::from_secs(1);
    file.write_all_at(&[1; 512], 0).unwrap();
    file.set_modified(later).unwrap();
    assert!(matches!(
        Volume::adopt(&base, &shadow, &options(true)),
        Err(StoreError::BaseChanged { .. })
    ));
    let forced = OpenOptions {
        force_base: true,
        ..options(true)
    };
    Volume::adopt(&base, &shadow, &forced)
        .unwrap()
        .0
        .close()
        .unwrap();
    file.set_len(SECTORS * 512 - 4096).unwrap();
    assert!(matches!(
        Volume::adopt(&base, &shadow, &forced),
        Err(StoreError::BaseChanged { .. })
    ));
}

#[test]
fn plain_volume_lets_its_base_be_changed_and_resized() {
    let directory = directory();
    let base = base_in(directory.path(), &Model::new(SECTORS));
    let shadow = directory.path().join("shadow");
    let (volume, _) = Volume::adopt(&base, &shadow, &options(true)).unwrap();
    assert!(volume.is_plain());
    volume.close().unwrap();
    drop(volume);
    fs::write(&base, vec![3; 40 * 4096]).unwrap();
    let (volume, report) = Volume::adopt(&base, &shadow, &options(true)).unwrap();
    assert!(report.clean);
    assert_eq!(volume.size_bytes(), 40 * 4096);
    let mut bytes = [0; 4096];
    volume.read_at(View::Head, 39 * 4096, &mut bytes).unwrap();
    assert_eq!(bytes, [3; 4096]);
    // What was added can be redirected at once, like the rest, and is there after the next opening.
    volume
        .take_snapshot(vhost_blk_store::NewSnapshot {
            snapshot_id: uuid::Uuid::from_u128(7).into(),
            set_id: uuid::Uuid::from_u128(8).into(),
            members: vec![volume.id()],
            method: vhost_blk_store::Method::RedirectOnWrite,
            created_unix_ms: 1,
        })
        .unwrap();
    volume.write_at(39 * 4096, &[4; 4096]).unwrap();
    volume.flush().unwrap();
    drop(volume);
    let (volume, _) = Volume::adopt(&base, &shadow, &options(true)).unwrap();
    volume.read_at(View::Head, 39 * 4096, &mut bytes).unwrap();
    assert_eq!(bytes, [4; 4096]);
}

#[test]
fn base_of_an_odd_size_is_not_adopted_and_not_touched() {
    let directory = directory();
    let base = directory.path().join("disk.raw");
    for length in [0, 511, 4097] {
        fs::write(&base, vec![1; length]).unwrap();
        let shadow = directory.path().join(format!("shadow-{length}"));
        let refused = Volume::adopt(&base, &shadow, &options(true));
        assert!(
            matches!(refused, Err(StoreError::BadBaseSize(_))),
            "{length}"
        );
        assert_eq!(fs::read(&base).unwrap(), vec![1; length]);
    }
}

#[test]
fn shadow_storage_of_another_volume_is_refused() {
    let directory = directory();
    let (base, shadow) = closed_with_snapshot(directory.path());
    let other = OpenOptions {
        volume_id: Some(uuid::Uuid::from_u128(5).into()),
        ..options(true)
    };
    assert!(matches!(
        Volume::adopt(&base, &shadow, &other),
        Err(StoreError::WrongVolume(_))
    ));
}

#[test]
fn real_boot_id_tells_a_killed_daemon_from_a_power_cut() {
    let directory = directory();
    let base = base_in(directory.path(), &Model::new(SECTORS));
    let shadow = directory.path().join("shadow");
    let kernel = OpenOptions {
        boot_id: None,
        ..options(true)
    };
    let (volume, _) = Volume::adopt(&base, &shadow, &kernel).unwrap();
    drop(volume);
    let (_, report) = Volume::adopt(&base, &shadow, &kernel).unwrap();
    assert!(report.same_boot && !report.clean);
    let other = OpenOptions {
        boot_id: Some(BootId([9; 16])),
        ..kernel
    };
    let (_, report) = Volume::adopt(&base, &shadow, &other).unwrap();
    assert!(!report.same_boot);
}

#[test]
fn data_files_offer_a_descriptor_and_an_alignment() {
    let directory = directory();
    let base = base_in(directory.path(), &Model::new(SECTORS));
    let (volume, _) =
        Volume::adopt(&base, &directory.path().join("shadow"), &options(true)).unwrap();
    for which in [DataFile::Base, DataFile::Log] {
        let file = volume.data_file(which);
        assert!(file.raw_fd().is_some());
        assert!([1, 512].contains(&file.alignment_bytes()));
    }
}

fn run(program: &str, arguments: &[&Path], json: bool) -> Output {
    let mut command = Command::new(program);
    command.args(arguments);
    if json {
        command.arg("--json");
    }
    command.output().unwrap()
}

#[test]
fn store_check_and_store_dump_tell_clean_from_damaged_from_absent() {
    const CHECK: &str = env!("CARGO_BIN_EXE_store-check");
    const DUMP: &str = env!("CARGO_BIN_EXE_store-dump");
    let directory = directory();
    let (base, shadow) = closed_with_snapshot(directory.path());
    let arguments: [&Path; 2] = [&base, &shadow];

    let clean = run(CHECK, &arguments, false);
    assert_eq!(clean.status.code(), Some(0), "{clean:?}");
    let json: serde_json::Value =
        serde_json::from_slice(&run(CHECK, &arguments, true).stdout).unwrap();
    assert_eq!(json, serde_json::json!([]));
    let text = run(DUMP, &arguments, false);
    assert_eq!(text.status.code(), Some(0));
    assert!(
        String::from_utf8(text.stdout)
            .unwrap()
            .contains("block 1 now: log 16")
    );
    let json: serde_json::Value =
        serde_json::from_slice(&run(DUMP, &arguments, true).stdout).unwrap();
    assert_eq!(json["snapshots"][0]["method"], "redirect_on_write");
    assert_eq!(json["index"][1]["location"], "log 16");

    // Looking changed nothing: the volume opens as the clean one it was.
    let (volume, report) = Volume::adopt(&base, &shadow, &options(true)).unwrap();
    assert!(report.clean);
    volume.close().unwrap();

    {
        let file = fs::OpenOptions::new()
            .write(true)
            .open(shadow.join("index"))
            .unwrap();
        file.write_all_at(&[0xff; 8], 100).unwrap();
    }
    let damaged = run(CHECK, &arguments, false);
    assert_eq!(damaged.status.code(), Some(1), "{damaged:?}");
    let json: serde_json::Value =
        serde_json::from_slice(&run(CHECK, &arguments, true).stdout).unwrap();
    assert_eq!(json[0]["severity"], "damage");
    assert_eq!(json[0]["file"], "index");
    assert_eq!(run(DUMP, &arguments, false).status.code(), Some(1));

    let absent = directory.path().join("absent");
    assert_eq!(run(CHECK, &[&base, &absent], false).status.code(), Some(2));
    assert_eq!(run(DUMP, &[&base, &absent], false).status.code(), Some(2));
    assert_eq!(run(CHECK, &[], false).status.code(), Some(2));
    assert!(!absent.exists(), "a check creates nothing");
}

/// A loop device that goes away with it.
struct LoopDevice(PathBuf);

impl LoopDevice {
    fn attach(file: &Path) -> Option<LoopDevice> {
        let output = Command::new("losetup")
            .args(["-f", "--show"])
            .arg(file)
            .output()
            .ok()?;
        let name = String::from_utf8(output.stdout).ok()?;
        output
            .status
            .success()
            .then(|| LoopDevice(PathBuf::from(name.trim())))
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let detached = Command::new("losetup").arg("-d").arg(&self.0).status();
        assert!(
            detached.is_ok_and(|status| status.success()),
            "{:?} stays attached",
            self.0
        );
    }
}

#[test]
fn block_device_is_adopted_in_place() {
    let directory = directory();
    let model = Model::new(SECTORS);
    let image = base_in(directory.path(), &model);
    let Some(device) = LoopDevice::attach(&image) else {
        println!("skipped: no loop device can be attached here (needs root)");
        return;
    };
    let files =
        VolumeFiles::open(&device.0, &directory.path().join("shadow"), &options(true)).unwrap();
    let mut world = World::new(files, options(true), model);
    world.apply(&Op::Snapshot {
        method: Method::CopyOnWrite,
        verdict: Verdict::Keep,
    });
    for op in history(12, Methods::Mixed, 60, SECTORS) {
        world.apply(&op);
        world.compare();
    }
    drop(world);
}
