//! Files that need not be in a copy (VSS: `FilesNotToSnapshot`): from patterns to places on disks.
//!
//! Called by `quiesce`: [`find`] while a set is prepared, with the patterns of writers' metadata and of `/etc/vmshadow`, and [`place`]
//! when all is frozen (why not before: `PROTOCOL.md`). Best effort: what cannot be placed for certain is counted as unresolved, never guessed.
//! Invariants: only what `place` says names places, for a file that is cut short gives its blocks to others; no symbolic link is
//! followed, in no part of a path (whoever owns a directory on the way could make a pattern mean files of others), and no mount
//! entered on the way down; a file with another name, blocks that it shares with another file, file systems that are not frozen, and
//! those whose addresses are not those of one disk give no extents; a pattern of a writer that is not root names that user's files
//! alone.
#![deny(clippy::indexing_slicing)]

mod blocks;
mod patterns;

pub use patterns::read_directory;

use super::devices::BlockDevices;
use super::mounts::{DeviceNumber, Mount, mount_of};
use guest_agent_wire::host::NotToSnapshot;
use guest_agent_wire::metadata::FileSet;
use guest_agent_wire::types::DiskExtent;
use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, Stat, fstat, openat, openat2, statat,
};
use rustix::io::Errno;
use std::cmp::Reverse;
use std::collections::HashSet;
use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Types whose FIEMAP answers addresses on the one device under them.
const PLACEABLE: [&str; 4] = ["ext2", "ext3", "ext4", "xfs"];
/// Most names that are looked at.
const NAMES_MAX: u64 = 200_000;
/// Most files that are placed while all is frozen, the largest.
const FILES_MAX: usize = 512;
/// Most extents that are told, the largest.
const EXTENTS_MAX: usize = 1024;
/// Most extents that are looked at while all is frozen.
const PIECES_MAX: usize = 8192;
/// Most reasons that are told, and names of files.
const TOLD_MAX: usize = 16;
/// Deepest directory below a pattern's own.
const DEPTH_MAX: usize = 64;
/// What swap keeps: its header, by whose label or UUID it is found at the next boot. One page, of the largest there are.
const SWAP_HEADER_BYTES: u64 = 64 << 10;

/// A pattern, and whose files it may name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wish {
    /// The pattern.
    pub set: FileSet,
    /// The user; `None`: anybody's.
    pub owner: Option<u32>,
}

/// A file that fits a pattern.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Candidate {
    path: PathBuf,
    device: u64,
    inode: u64,
    /// As it was found, to choose the largest.
    bytes: u64,
    owner: Option<u32>,
    /// It was swap when it was found; whether a pattern names it too is not known.
    is_swap: bool,
    disk: DiskExtent,
    /// In how many pieces it lay when it was found.
    pieces: usize,
}

/// What `find` found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Candidates {
    patterns: u64,
    files: Vec<Candidate>,
    unresolved: u64,
    reasons: Vec<String>,
}

impl Candidates {
    /// Nothing of these patterns is known.
    #[must_use]
    pub fn none_of(patterns: u64, why: String) -> Self {
        let mut none = Self {
            patterns,
            ..Self::default()
        };
        none.unresolved(why);
        none.unresolved = patterns.max(1);
        none
    }

    /// One more that could not be placed.
    pub fn unresolved(&mut self, why: String) {
        self.unresolved += 1;
        if self.reasons.len() < TOLD_MAX {
            self.reasons.push(why);
        }
    }

    /// Asks for all places before the freeze. The answers are forgotten, since they may be wrong by then; but what the kernel must read for
    /// them, it has read, and their number is known: files with the largest pieces stay, as many as are looked at in a short time.
    fn rehearse(&mut self, until: Instant) {
        for mut file in std::mem::take(&mut self.files) {
            if Instant::now() < until {
                match file.count_pieces() {
                    Ok(pieces) => file.pieces = pieces,
                    Err(why) => {
                        self.unresolved(format!("{}: {why}", file.path.display()));
                        continue;
                    }
                }
            }
            self.files.push(file);
        }
        self.files.sort_by_key(|file| Reverse(file.bytes_a_piece()));
        let mut pieces = 0;
        for file in std::mem::take(&mut self.files) {
            if pieces + file.pieces <= PIECES_MAX {
                pieces += file.pieces;
                self.files.push(file);
            } else {
                let (path, own) = (file.path.display(), file.pieces);
                self.unresolved(format!(
                    "{path}: its {own} pieces and those of files with larger ones are more than {PIECES_MAX}"
                ));
            }
        }
    }

    /// The largest, if there are too many.
    fn keep_largest(&mut self) {
        self.files.sort_by_key(|file| Reverse(file.bytes));
        while self.files.len() > FILES_MAX {
            self.files.pop();
            self.unresolved(format!("only the {FILES_MAX} largest files are placed"));
        }
    }
}

/// Swap as it is in use.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Swap {
    /// Partitions and disks.
    pub devices: Vec<DeviceNumber>,
    /// Files.
    pub files: Vec<PathBuf>,
}

/// A search.
struct Search<'a> {
    mounts: &'a [Mount],
    devices: &'a BlockDevices,
    disks: &'a [String],
    mountpoints: HashSet<&'a Path>,
    until: Instant,
    names: u64,
    /// Device and inode of the files found, which two patterns may name.
    seen: HashSet<(u64, u64)>,
    found: Candidates,
}

/// What one pattern wants, on its way down.
struct Hunt<'a> {
    wish: &'a Wish,
    device: u64,
    disk: DiskExtent,
}

/// Opens what has this path if no symbolic link is on the way.
fn open(path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
    let flags = flags | OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat2(CWD, path, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS)
}

fn not_opened(errno: Errno) -> String {
    match errno {
        Errno::LOOP => "a symbolic link is on the way".to_owned(),
        // Linux before 5.6.
        Errno::NOSYS => "this kernel cannot open it without following symbolic links".to_owned(),
        other => other.to_string(),
    }
}

/// Finds the files that the patterns name on these disks (all if none is named), and swap files. Touches the disks; it may take
/// long on a large tree, and ends at `until` with what it has by then.
#[must_use]
pub fn find(
    wishes: &[Wish],
    swap_files: &[PathBuf],
    mounts: &[Mount],
    devices: &BlockDevices,
    disks: &[String],
    until: Instant,
) -> Candidates {
    let mut search = Search {
        mounts,
        devices,
        disks,
        mountpoints: mounts.iter().map(|m| m.mountpoint.as_path()).collect(),
        until,
        names: 0,
        seen: HashSet::new(),
        found: Candidates::default(),
    };
    // Before a pattern names one, which would not keep its header.
    for path in swap_files {
        if let Err(why) = search.swap_file(path) {
            search
                .found
                .unresolved(format!("{}: {why}", path.display()));
        }
    }
    for wish in wishes {
        search.found.patterns += 1;
        if let Err(why) = search.wish(wish) {
            let FileSet { path, spec, .. } = &wish.set;
            search.found.unresolved(format!("{path}/{spec}: {why}"));
        }
    }
    let mut found = search.found;
    found.keep_largest();
    found.rehearse(until);
    found
}

impl Search<'_> {
    /// Where the file system of a path lies; `None` if it is on no disk of the set.
    fn disk_of(&self, path: &Path) -> Result<Option<(&Mount, DiskExtent)>, String> {
        if !patterns::is_plain(path) {
            return Err("not an absolute path without `.` and `..`".to_owned());
        }
        let mount = mount_of(self.mounts, path).ok_or("on no file system")?;
        if !PLACEABLE.contains(&mount.fstype.as_str()) {
            return Err(format!("files on {} cannot be placed", mount.fstype));
        }
        let disk = self
            .devices
            .exact(mount.device)
            .ok_or("its file system is not on a disk or partition of its own")?;
        let is_in_set = self.disks.is_empty() || self.disks.contains(&disk.serial);
        Ok(is_in_set.then_some((mount, disk)))
    }

    fn wish(&mut self, wish: &Wish) -> Result<(), String> {
        let path = Path::new(&wish.set.path);
        let Some((mount, disk)) = self.disk_of(path)? else {
            return Ok(());
        };
        let expected = mount.device;
        let directory = match open(path, OFlags::DIRECTORY) {
            Ok(directory) => directory,
            Err(Errno::NOENT) => return Ok(()),
            Err(errno) => return Err(not_opened(errno)),
        };
        let device = fstat(&directory).map_err(|e| e.to_string())?.st_dev;
        if number(device) != expected {
            return Err("its file system was mounted or unmounted meanwhile".to_owned());
        }
        let hunt = Hunt { wish, device, disk };
        self.directory(&directory, path, &hunt, DEPTH_MAX)
    }

    fn directory(
        &mut self,
        directory: &OwnedFd,
        path: &Path,
        hunt: &Hunt<'_>,
        depth: usize,
    ) -> Result<(), String> {
        let depth = depth.checked_sub(1).ok_or("directories nest too deep")?;
        let entries = Dir::read_from(directory).map_err(|e| e.to_string())?;
        for entry in entries {
            let entry = entry.map_err(|e| e.to_string())?;
            let name = entry.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            self.names += 1;
            if self.names > NAMES_MAX {
                return Err(format!("more than {NAMES_MAX} names to look at"));
            }
            if Instant::now() >= self.until {
                return Err("no time left to look for it".to_owned());
            }
            let Ok(stat) = statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) else {
                // It has gone.
                continue;
            };
            if stat.st_dev != hunt.device {
                continue;
            }
            let kind = FileType::from_raw_mode(stat.st_mode);
            let here = path.join(OsStr::from_bytes(name.to_bytes()));
            if self.mountpoints.contains(here.as_path()) {
                // Also one of the same file system.
                continue;
            }
            if kind == FileType::RegularFile {
                if patterns::matches(&hunt.wish.set.spec, &name.to_string_lossy()) {
                    self.file(here, &stat, hunt.wish.owner, false, &hunt.disk);
                }
            } else if kind == FileType::Directory && hunt.wish.set.recursive {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                if let Ok(below) = openat(directory, name, flags, Mode::empty()) {
                    self.directory(&below, &here, hunt, depth)?;
                }
            }
        }
        Ok(())
    }

    fn swap_file(&mut self, path: &Path) -> Result<(), String> {
        if let Some((_, disk)) = self.disk_of(path)? {
            let stat = statat(CWD, path, AtFlags::SYMLINK_NOFOLLOW).map_err(|e| e.to_string())?;
            self.file(path.to_owned(), &stat, None, true, &disk);
        }
        Ok(())
    }

    fn file(
        &mut self,
        path: PathBuf,
        stat: &Stat,
        owner: Option<u32>,
        is_swap: bool,
        disk: &DiskExtent,
    ) {
        if let Err(why) = is_alone(stat, owner) {
            return self.found.unresolved(format!("{}: {why}", path.display()));
        }
        let bytes = u64::try_from(stat.st_blocks)
            .unwrap_or(0)
            .saturating_mul(512);
        if bytes == 0 || !self.seen.insert((stat.st_dev, stat.st_ino)) {
            return;
        }
        self.found.files.push(Candidate {
            path,
            device: stat.st_dev,
            inode: stat.st_ino,
            bytes,
            owner,
            is_swap,
            disk: disk.clone(),
            pieces: 0,
        });
        if self.found.files.len() >= 4 * FILES_MAX {
            self.found.keep_largest();
        }
    }
}

fn number(device: u64) -> DeviceNumber {
    DeviceNumber {
        major: rustix::fs::major(device),
        minor: rustix::fs::minor(device),
    }
}

/// Whether the file's blocks are nobody's but those of this name, and whose it is.
fn is_alone(stat: &Stat, owner: Option<u32>) -> Result<(), String> {
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err("is no file".to_owned());
    }
    if stat.st_nlink != 1 {
        return Err("has other names".to_owned());
    }
    match owner {
        Some(owner) if owner != stat.st_uid => {
            Err("does not belong to the user whose writer names it".to_owned())
        }
        Some(_) | None => Ok(()),
    }
}

/// Files that were opened while their file system was frozen. Closing one may write (XFS gives back what it had set aside behind a
/// file's end), and so wait for the thaw: it is done on a thread.
#[derive(Debug, Default)]
pub struct KeptOpen(Vec<OwnedFd>);

impl Drop for KeptOpen {
    fn drop(&mut self) {
        let files = std::mem::take(&mut self.0);
        if !files.is_empty() {
            // Without a thread they are closed here: the thaw has been by then.
            let closing = std::thread::Builder::new().name("close".to_owned());
            drop(closing.spawn(move || drop(files)));
        }
    }
}

/// Where these files and swap lie at this moment. Called while `frozen` are frozen, with the swap that is in use then, so that what it
/// says is true until the thaw. Ends at `until`, with what it has by then. The files are to be kept open until the thaw.
#[must_use]
pub fn place(
    candidates: &Candidates,
    swap: &Swap,
    devices: &BlockDevices,
    disks: &[String],
    frozen: &[DeviceNumber],
    until: Instant,
) -> (NotToSnapshot, KeptOpen) {
    let mut found = NotToSnapshot {
        patterns: candidates.patterns,
        unresolved: candidates.unresolved,
        reasons: candidates.reasons.clone(),
        ..NotToSnapshot::default()
    };
    let mut open = KeptOpen::default();
    let mut on = Vec::new();
    let mut areas = Vec::new();
    for device in &swap.devices {
        let Some(mut area) = devices.exact(*device) else {
            unresolved(
                &mut found,
                format!("swap on {device}: not on a disk or partition of its own"),
            );
            continue;
        };
        if disks.is_empty() || disks.contains(&area.serial) {
            area.start_bytes += SWAP_HEADER_BYTES;
            area.length_bytes = area.length_bytes.saturating_sub(SWAP_HEADER_BYTES);
            tell(&mut found.names, format!("swap on {}", area.disk));
            areas.push(Area {
                disk: number_in(&mut on, &area),
                start_bytes: area.start_bytes,
                length_bytes: area.length_bytes,
            });
        }
    }
    for file in &candidates.files {
        let is_swap = swap.files.contains(&file.path);
        let placed = if Instant::now() >= until {
            Err("no time left to place it".to_owned())
        } else if areas.len() >= PIECES_MAX {
            Err(format!("there are {PIECES_MAX} pieces already"))
        } else if file.is_swap && !is_swap {
            // Whatever it is now, nobody has said that it need not be in the copy.
            Err("is no longer swap".to_owned())
        } else if frozen.contains(&number(file.device)) {
            let header = if is_swap { SWAP_HEADER_BYTES } else { 0 };
            file.place(header, number_in(&mut on, &file.disk), &mut open)
        } else {
            Err("its file system is not frozen".to_owned())
        };
        match placed {
            Ok(mut lies_in) => {
                found.files += 1;
                tell(&mut found.names, file.path.display().to_string());
                areas.append(&mut lies_in);
            }
            Err(why) => unresolved(&mut found, format!("{}: {why}", file.path.display())),
        }
    }
    // Neighbours become one, so that more can be told.
    let mut areas = merged(areas);
    found.bytes = areas.iter().map(|area| area.length_bytes).sum();
    areas.sort_by_key(|area| Reverse(area.length_bytes));
    let told = areas.len().min(EXTENTS_MAX);
    found.extents_not_told = u64::try_from(areas.len() - told).unwrap_or(u64::MAX);
    areas.truncate(told);
    found.extents = areas.iter().filter_map(|area| area.told_of(&on)).collect();
    (found, open)
}

/// A part of a disk, which is named by its number in a table: there are thousands of one disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Area {
    disk: usize,
    start_bytes: u64,
    length_bytes: u64,
}

impl Area {
    fn told_of(self, disks: &[DiskExtent]) -> Option<DiskExtent> {
        let DiskExtent { serial, disk, .. } = disks.get(self.disk)?;
        Some(DiskExtent {
            serial: serial.clone(),
            disk: disk.clone(),
            start_bytes: self.start_bytes,
            length_bytes: self.length_bytes,
        })
    }
}

/// The number of the disk that this lies on; the table grows by one that it does not have.
fn number_in(disks: &mut Vec<DiskExtent>, wanted: &DiskExtent) -> usize {
    let found = disks
        .iter()
        .position(|known| (&known.serial, &known.disk) == (&wanted.serial, &wanted.disk));
    found.unwrap_or_else(|| {
        disks.push(wanted.clone());
        disks.len() - 1
    })
}

fn tell(told: &mut Vec<String>, text: String) {
    if told.len() < TOLD_MAX {
        told.push(text);
    }
}

fn unresolved(found: &mut NotToSnapshot, why: String) {
    found.unresolved += 1;
    tell(&mut found.reasons, why);
}

impl Candidate {
    /// On average; the whole of a file that nobody has asked for its pieces.
    fn bytes_a_piece(&self) -> u64 {
        self.bytes / u64::try_from(self.pieces.max(1)).unwrap_or(1)
    }

    fn count_pieces(&self) -> Result<usize, String> {
        let file = open(&self.path, OFlags::NONBLOCK).map_err(not_opened)?;
        Ok(self.look_at(&file, 0, 0)?.len())
    }

    fn place(
        &self,
        header_bytes: u64,
        disk: usize,
        kept: &mut KeptOpen,
    ) -> Result<Vec<Area>, String> {
        let file = open(&self.path, OFlags::NONBLOCK).map_err(not_opened)?;
        let looked_at = self.look_at(&file, header_bytes, disk);
        kept.0.push(file);
        looked_at
    }

    /// Its pieces, but for this much of its beginning.
    fn look_at(&self, file: &OwnedFd, header_bytes: u64, disk: usize) -> Result<Vec<Area>, String> {
        let stat = fstat(file).map_err(|e| e.to_string())?;
        if (stat.st_dev, stat.st_ino) != (self.device, self.inode) {
            return Err("is another file by now".to_owned());
        }
        is_alone(&stat, self.owner)?;
        let mut areas = Vec::new();
        for piece in blocks::of(file)? {
            let end = piece.start_bytes.saturating_add(piece.length_bytes);
            if end > self.disk.length_bytes {
                // No addresses on this partition, whatever they are.
                return Err("lies beyond its partition".to_owned());
            }
            let kept = header_bytes
                .saturating_sub(piece.logical_bytes)
                .min(piece.length_bytes);
            if kept < piece.length_bytes {
                areas.push(Area {
                    disk,
                    start_bytes: self.disk.start_bytes + piece.start_bytes + kept,
                    length_bytes: piece.length_bytes - kept,
                });
            }
        }
        Ok(areas)
    }
}

/// The same as areas that do not overlap, by disk and place.
fn merged(mut areas: Vec<Area>) -> Vec<Area> {
    areas.sort_by_key(|area| (area.disk, area.start_bytes));
    let mut merged: Vec<Area> = Vec::new();
    for area in areas {
        let end = area.start_bytes.saturating_add(area.length_bytes);
        match merged.last_mut() {
            Some(last)
                if last.disk == area.disk
                    && area.start_bytes <= last.start_bytes.saturating_add(last.length_bytes) =>
            {
                let length = end.saturating_sub(last.start_bytes);
                last.length_bytes = last.length_bytes.max(length);
            }
            Some(_) | None => merged.push(area),
        }
    }
    merged
}

#[cfg(test)]
mod tests;
