//! A disk that remembers: one file of a FUSE file system of ours, every write and every flush of which is kept
//! in order, so that any moment between two of them can be made again, with any part of what was not flushed.
//!
//! The kernel's loop driver stands on the file, a file system on the loop device, the store on that.

use std::ffi::OsStr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, UNIX_EPOCH};

use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry,
    ReplyOpen, ReplyWrite, Request, WriteFlags,
};
use vhost_blk_store::sim::Image;

/// Its name in the mounted directory.
pub(crate) const NAME: &str = "disk";
const FILE: INodeNo = INodeNo(2);
const SECTOR_BYTES: usize = 512;

#[derive(Debug)]
enum Event {
    Write {
        offset_bytes: u64,
        bytes: Arc<[u8]>,
    },
    /// Everything before is durable.
    Flush,
}

/// What happened to the disk.
#[derive(Debug)]
pub(crate) struct History {
    initial: Image,
    current: Image,
    events: Vec<Event>,
}

/// The disk. Clones are the same one.
#[derive(Clone, Debug)]
pub(crate) struct LogDisk(Arc<Mutex<History>>);

impl LogDisk {
    pub(crate) fn new(initial: Image) -> LogDisk {
        LogDisk(Arc::new(Mutex::new(History {
            current: initial.clone(),
            initial,
            events: Vec::new(),
        })))
    }

    /// Serves the disk as a file in `directory` until the session is dropped.
    pub(crate) fn mount(&self, directory: &Path) -> std::io::Result<BackgroundSession> {
        fuser::spawn_mount(self.clone(), directory, &Config::default())
    }

    /// How many writes and flushes there were.
    pub(crate) fn events(&self) -> usize {
        self.0.lock().unwrap().events.len()
    }

    /// The disk after a power cut behind the first `events` events: everything up to the last flush, and of
    /// what was written since the sectors that `chosen` says, or whole writes if `whole`.
    pub(crate) fn cut(
        &self,
        events: usize,
        whole: bool,
        mut chosen: impl FnMut() -> bool,
    ) -> Image {
        let history = self.0.lock().unwrap();
        let past = &history.events[..events];
        let flushed = past
            .iter()
            .rposition(|event| matches!(event, Event::Flush))
            .unwrap_or(0);
        let mut image = history.initial.clone();
        for (number, event) in past.iter().enumerate() {
            let Event::Write {
                offset_bytes,
                bytes,
            } = event
            else {
                continue;
            };
            if number < flushed {
                image.write(bytes, *offset_bytes);
            } else if whole {
                if chosen() {
                    image.write(bytes, *offset_bytes);
                }
            } else {
                for (place, sector) in (0..).zip(bytes.chunks(SECTOR_BYTES)) {
                    if chosen() {
                        image.write(sector, offset_bytes + place * SECTOR_BYTES as u64);
                    }
                }
            }
        }
        image
    }

    fn attributes(&self, ino: INodeNo) -> FileAttr {
        let directory = ino == INodeNo::ROOT;
        let size = self.0.lock().unwrap().current.len_bytes();
        FileAttr {
            ino,
            size: if directory { 0 } else { size },
            blocks: 0,
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind: if directory {
                FileType::Directory
            } else {
                FileType::RegularFile
            },
            perm: 0o700,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            flags: 0,
            blksize: 4096,
        }
    }
}

const TTL: Duration = Duration::from_secs(3600);

impl Filesystem for LogDisk {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if parent == INodeNo::ROOT && name == NAME {
            reply.entry(&TTL, &self.attributes(FILE), Generation(0));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&TTL, &self.attributes(ino));
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), FopenFlags::empty());
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let mut bytes = vec![0; size as usize];
        self.0.lock().unwrap().current.read(&mut bytes, offset);
        reply.data(&bytes);
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset_bytes: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let mut history = self.0.lock().unwrap();
        history.current.write(data, offset_bytes);
        history.events.push(Event::Write {
            offset_bytes,
            bytes: data.into(),
        });
        reply.written(data.len() as u32);
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        self.0.lock().unwrap().events.push(Event::Flush);
        reply.ok();
    }
}
