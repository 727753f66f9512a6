//! One file system in the helper: a thread that may block in the kernel, and the cell through which it is told what to do.
//!
//! Called by `helper` alone. Between `Order::Freeze` and the answer to `Order::Thaw` nothing here allocates.
//! Invariant: under the cell's lock, a frozen file system is in condition `Frozen`, or its thread is in FIFREEZE with
//! `Freezing`; so whoever ends the generation either orders a thaw or sets `over`, and none is forgotten.

use super::ledger::{Ledger, Mark};
use crate::clock::BootTime;
use crate::filesystem::freeze;
use crate::filesystem::mounts::DeviceNumber;
use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

const BTRFS_MAGIC: u64 = 0x9123_683e;
/// Enough for a system call and a lock; every byte is locked in memory.
const STACK_BYTES: usize = 64 * 1024;

/// What the thread shall do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    Wait,
    Sync,
    Freeze,
    Thaw,
    End,
}

/// What the file system is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Condition {
    /// Not ours: never frozen, or thawed.
    Loose,
    /// FIFREEZE has been called.
    Freezing,
    /// FIFREEZE returned 0.
    Frozen,
    /// FITHAW has been called.
    Thawing,
}

/// What the thread has done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    Opened(i32),
    Synced(i32, u64),
    Froze(i32, u64),
    Thawed(i32, u64),
}

#[derive(Debug)]
struct Cell {
    order: Order,
    busy: bool,
    answer: Option<Answer>,
    condition: Condition,
    over: bool,
    ledger: Option<Arc<Ledger>>,
    /// Duplicate for the agent, taken with the answer to the opening.
    duplicate: Option<OwnedFd>,
    ended: bool,
}

#[derive(Debug)]
struct Shared {
    index: usize,
    cell: Mutex<Cell>,
    ordered: Condvar,
    done: Arc<OwnedFd>,
}

/// A file system and its thread.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) device: DeviceNumber,
    pub(super) step: u32,
    shared: Arc<Shared>,
}

impl Slot {
    /// Starts the thread, which opens the first of `paths` that lies on `device`. `done` is an eventfd, written after each
    /// answer.
    pub(super) fn open(
        index: usize,
        device: DeviceNumber,
        step: u32,
        paths: Vec<PathBuf>,
        done: Arc<OwnedFd>,
    ) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            index,
            cell: Mutex::new(Cell {
                order: Order::Wait,
                busy: true,
                answer: None,
                condition: Condition::Loose,
                over: false,
                ledger: None,
                duplicate: None,
                ended: false,
            }),
            ordered: Condvar::new(),
            done,
        });
        let of_thread = Arc::clone(&shared);
        std::thread::Builder::new()
            .name(format!("fs-{index}"))
            .stack_size(STACK_BYTES)
            .spawn(move || serve(&of_thread, device, &paths))?;
        Ok(Self {
            device,
            step,
            shared,
        })
    }

    pub(super) fn index(&self) -> usize {
        self.shared.index
    }

    pub(super) fn sync(&self) {
        self.shared.order(Order::Sync);
    }

    pub(super) fn freeze(&self, ledger: &Arc<Ledger>) {
        let mut cell = self.shared.lock();
        cell.ledger = Some(Arc::clone(ledger));
        cell.over = false;
        // Set here and not by the thread, so that a thaw which overtakes it finds it.
        cell.condition = Condition::Freezing;
        drop(cell);
        self.shared.order(Order::Freeze);
    }

    /// Ends the hold here: thaws now, or as soon as FIFREEZE returns. True if an answer will come of it.
    pub(super) fn thaw(&self) -> bool {
        let mut cell = self.shared.lock();
        match cell.condition {
            Condition::Frozen => {
                cell.condition = Condition::Thawing;
                drop(cell);
                self.shared.order(Order::Thaw);
                true
            }
            Condition::Freezing => {
                cell.over = true;
                true
            }
            Condition::Loose | Condition::Thawing => false,
        }
    }

    pub(super) fn condition(&self) -> Condition {
        self.shared.lock().condition
    }

    /// It has left these conditions, and the answer which says so has been taken: one that came while the others' answers
    /// were collected must still be told before the step is called done.
    pub(super) fn is_past(&self, conditions: &[Condition]) -> bool {
        let cell = self.shared.lock();
        cell.answer.is_none() && !conditions.contains(&cell.condition)
    }

    /// The thread is in the kernel, or on its way.
    pub(super) fn is_busy(&self) -> bool {
        self.shared.lock().busy
    }

    /// The thread will come back to nothing.
    pub(super) fn is_ended(&self) -> bool {
        self.shared.lock().ended
    }

    pub(super) fn take_answer(&self) -> Option<Answer> {
        self.shared.lock().answer.take()
    }

    pub(super) fn take_duplicate(&self) -> Option<OwnedFd> {
        self.shared.lock().duplicate.take()
    }

    /// Ends the thread once it is free.
    pub(super) fn end(&self) {
        self.shared.order(Order::End);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Cell> {
        self.cell.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn order(&self, order: Order) {
        let mut cell = self.lock();
        cell.order = order;
        cell.busy = true;
        drop(cell);
        self.ordered.notify_one();
    }

    fn wait(&self) -> Order {
        let mut cell = self.lock();
        while cell.order == Order::Wait {
            cell = self
                .ordered
                .wait(cell)
                .unwrap_or_else(PoisonError::into_inner);
        }
        std::mem::replace(&mut cell.order, Order::Wait)
    }

    fn answer(&self, answer: Answer) {
        self.answer_with(self.lock(), answer);
    }

    /// The condition that goes with the answer was set under the same lock: nobody sees one without the other.
    fn answer_with(&self, mut cell: MutexGuard<'_, Cell>, answer: Answer) {
        cell.answer = Some(answer);
        // An order that came meanwhile keeps it busy.
        cell.busy = cell.order != Order::Wait;
        drop(cell);
        self.ring();
    }

    fn ring(&self) {
        // Any count but zero wakes the main loop, so its byte order does not matter.
        rustix::io::write(&*self.done, &1u64.to_le_bytes())
            .map(drop)
            .unwrap_or(());
    }
}

fn serve(shared: &Shared, device: DeviceNumber, paths: &[PathBuf]) {
    let opened = open_first(device, paths);
    let errno = opened
        .as_ref()
        .map_or_else(|error| error.raw_os_error(), |_| 0);
    if let Ok(fd) = &opened {
        shared.lock().duplicate = fd.try_clone().ok();
    }
    shared.answer(Answer::Opened(errno));
    loop {
        let order = shared.wait();
        let start = BootTime::now();
        let took_us = || BootTime::now().us_since(start);
        let Ok(fd) = opened.as_ref() else { break };
        match order {
            Order::Wait => {}
            Order::Sync => {
                let errno = errno_of(rustix::fs::syncfs(fd));
                shared.answer(Answer::Synced(errno, took_us()));
            }
            Order::Freeze => {
                shared.mark(Mark::Freezing);
                let errno = errno_of(freeze::freeze(fd.as_fd()));
                let us = took_us();
                if errno == 0 {
                    shared.mark(Mark::Frozen);
                } else {
                    shared.mark(Mark::Done);
                }
                let mut cell = shared.lock();
                let over = cell.over && errno == 0;
                cell.condition = match (errno, over) {
                    (0, true) => Condition::Thawing,
                    (0, false) => Condition::Frozen,
                    _ => Condition::Loose,
                };
                if over {
                    drop(cell);
                    // Its generation ended while the kernel was freezing.
                    thaw(shared, fd, BootTime::now());
                } else {
                    shared.answer_with(cell, Answer::Froze(errno, us));
                }
            }
            Order::Thaw => thaw(shared, fd, start),
            Order::End => break,
        }
    }
    drop(opened);
    let mut cell = shared.lock();
    cell.ended = true;
    cell.busy = false;
    drop(cell);
    shared.ring();
}

impl Shared {
    fn mark(&self, mark: Mark) {
        let mut cell = self.lock();
        if let Some(ledger) = &cell.ledger {
            ledger.mark(self.index, mark);
        }
        if mark == Mark::Done {
            // The last mark of this hold: once it is removed, the ledger takes no room any more.
            cell.ledger = None;
        }
    }
}

fn thaw(shared: &Shared, fd: &OwnedFd, start: BootTime) {
    let errno = errno_of(freeze::thaw(fd.as_fd()));
    shared.mark(Mark::Done);
    let mut cell = shared.lock();
    cell.condition = Condition::Loose;
    shared.answer_with(cell, Answer::Thawed(errno, BootTime::now().us_since(start)));
}

fn errno_of(result: Result<(), Errno>) -> i32 {
    result.map_or_else(Errno::raw_os_error, |()| 0)
}

/// Opens the first path that is a directory on the device, so that a mount that came or went meanwhile is not mistaken.
pub(super) fn open_first(device: DeviceNumber, paths: &[PathBuf]) -> Result<OwnedFd, Errno> {
    let mut failure = Errno::NOENT;
    for path in paths {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let checked = open(path, flags, Mode::empty()).and_then(|fd| {
            if lies_on(&fd, device)? {
                Ok(fd)
            } else {
                Err(Errno::STALE)
            }
        });
        match checked {
            Ok(fd) => return Ok(fd),
            Err(error) => failure = error,
        }
    }
    Err(failure)
}

/// A btrfs directory carries the number of its subvolume, not of the superblock: there the type must do.
fn lies_on(fd: &OwnedFd, device: DeviceNumber) -> Result<bool, Errno> {
    if device.major == 0 {
        let kind = rustix::fs::fstatfs(fd)?.f_type;
        return Ok(u64::try_from(kind).is_ok_and(|kind| kind == BTRFS_MAGIC));
    }
    let number = rustix::fs::fstat(fd)?.st_dev;
    Ok(rustix::fs::major(number) == device.major && rustix::fs::minor(number) == device.minor)
}
