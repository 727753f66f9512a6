//! Work on the store that blocks: whole requests through the store's own drivers, preparation of write plans, flushes.
//!
//! Called by the workers: inline by the synchronous engine, through a [`Hand`] (a thread of the volume) by the io_uring
//! engine, so that no read waits behind a flush or a copy. Knows nothing of queues but their [`Inbox`].
//!
//! Invariant: a hand takes everything that waits at once, so that the plans of one pass, of all queues, share one round
//! of syncs, and so do their flushes.

use super::buffers::GuestBuffers;
use super::kick::Kick;
use super::request::{Op, Request};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use vhost_blk_store::{ByteRange, FileName, StoreError, View, Volume, WritePlan};

/// Longest piece that is moved through a buffer at once, in bytes.
const PIECE_BYTES_MAX: u64 = 1 << 20;
/// Most orders that one round takes, so that the first of them need not wait for ever.
const ROUND_MAX: usize = 256;

/// News for the worker of one queue.
#[derive(Debug)]
pub(super) struct Inbox {
    reports: Mutex<Vec<Report>>,
    /// There may be reports: looked at in every pass, where the lock would be dear.
    any: AtomicBool,
    kick: Arc<Kick>,
}

/// What a hand has done. Requests are named by the worker's own numbers.
#[derive(Debug)]
pub(super) enum Report {
    /// The plan is ready for its data.
    Prepared(u32, Result<WritePlan, StoreError>),
    /// A whole request has been tried.
    Performed(u32, Performed),
    /// A flush is done.
    Flushed(u32, Result<(), StoreError>),
}

impl Inbox {
    pub(super) fn new(kick: Arc<Kick>) -> Arc<Self> {
        Arc::new(Self {
            reports: Mutex::new(Vec::new()),
            any: AtomicBool::new(false),
            kick,
        })
    }

    pub(super) fn take(&self) -> Vec<Report> {
        if !self.any.load(Ordering::Acquire) {
            return Vec::new();
        }
        self.any.store(false, Ordering::Release);
        std::mem::take(&mut *self.reports.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn put(&self, report: impl IntoIterator<Item = Report>) {
        let mut reports = self.reports.lock().unwrap_or_else(PoisonError::into_inner);
        reports.extend(report);
        self.any.store(!reports.is_empty(), Ordering::Release);
        drop(reports);
        self.kick.wake();
    }
}

/// What became of a whole request.
#[derive(Debug)]
pub(super) struct Performed {
    pub(super) result: Result<(), StoreError>,
    /// It has claimed blocks, and may have changed some of them, even if it failed.
    pub(super) touched: bool,
}

/// What a hand is asked to do.
#[derive(Debug)]
pub(super) enum Task {
    /// `prepare_writes`.
    Prepare(Vec<(u32, WritePlan)>),
    /// `preserve`, of plans whose copies the worker has moved.
    Preserve(Vec<(u32, WritePlan)>),
    /// A whole request by the store's blocking drivers.
    Whole(u32, Request),
    /// One `flush` for all of them.
    Flush(Vec<u32>),
}

#[derive(Debug)]
struct Order {
    task: Task,
    inbox: Arc<Inbox>,
}

/// A thread that does blocking work for all queues of a volume.
#[derive(Debug)]
pub(super) struct Hand {
    orders: Option<Sender<Order>>,
    thread: Option<JoinHandle<()>>,
}

impl Hand {
    /// Starts the thread.
    pub(super) fn start(name: String, store: Arc<Volume>) -> std::io::Result<Self> {
        let (orders, incoming) = channel();
        let thread = std::thread::Builder::new()
            .name(name)
            .spawn(move || work(&store, &incoming))?;
        Ok(Self {
            orders: Some(orders),
            thread: Some(thread),
        })
    }

    /// Hands work over; the reports come to the inbox.
    pub(super) fn order(&self, task: Task, inbox: &Arc<Inbox>) {
        let order = Order {
            task,
            inbox: Arc::clone(inbox),
        };
        let refused = match &self.orders {
            Some(orders) => orders.send(order).err().map(|refused| refused.0),
            None => Some(order),
        };
        if let Some(Order { task, inbox }) = refused {
            // The thread is gone, which only a panic in it can do: the guest is told, the queue goes on.
            match task {
                Task::Prepare(plans) | Task::Preserve(plans) => inbox.put(
                    plans
                        .iter()
                        .map(|(number, _)| Report::Prepared(*number, Err(StoreError::Poisoned))),
                ),
                Task::Whole(number, _) => {
                    let gone = Performed {
                        result: Err(StoreError::Poisoned),
                        touched: true,
                    };
                    inbox.put([Report::Performed(number, gone)]);
                }
                Task::Flush(numbers) => inbox.put(
                    numbers
                        .iter()
                        .map(|number| Report::Flushed(*number, Err(StoreError::Poisoned))),
                ),
            }
        }
    }
}

impl Drop for Hand {
    fn drop(&mut self) {
        self.orders = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("a thread of the volume has panicked");
        }
    }
}

fn work(store: &Volume, incoming: &Receiver<Order>) {
    while let Ok(first) = incoming.recv() {
        let mut plans = Vec::new();
        let mut owners = Vec::new();
        let mut copied = Vec::new();
        let mut copied_owners = Vec::new();
        let mut flushes = Vec::new();
        let mut wholes = Vec::new();
        for Order { task, inbox } in
            std::iter::once(first).chain(incoming.try_iter().take(ROUND_MAX))
        {
            match task {
                Task::Prepare(more) => {
                    let (numbers, more): (Vec<_>, Vec<_>) = more.into_iter().unzip();
                    plans.extend(more);
                    owners.push((numbers, inbox));
                }
                Task::Preserve(more) => {
                    let (numbers, more): (Vec<_>, Vec<_>) = more.into_iter().unzip();
                    copied.extend(more);
                    copied_owners.push((numbers, inbox));
                }
                Task::Flush(numbers) => flushes.push((numbers, inbox)),
                Task::Whole(number, request) => wholes.push((number, inbox, request)),
            }
        }
        if !copied.is_empty() {
            let preserved = store.preserve(&mut copied);
            report_plans(preserved.err().as_ref(), copied, copied_owners);
        }
        if !plans.is_empty() {
            let prepared = store.prepare_writes(&mut plans);
            report_plans(prepared.err().as_ref(), plans, owners);
        }
        for (number, inbox, request) in wholes {
            inbox.put([Report::Performed(number, perform(store, &request))]);
        }
        if !flushes.is_empty() {
            let failure = store.flush().err();
            for (numbers, inbox) in flushes {
                inbox.put(numbers.into_iter().map(|number| {
                    let result = failure.as_ref().map_or(Ok(()), |error| Err(same(error)));
                    Report::Flushed(number, result)
                }));
            }
        }
    }
}

/// Gives the plans of a round back to their queues, or the error that ended it. The plans of a failed round are gone before
/// anybody is told, and with them their claims on blocks.
fn report_plans(
    failure: Option<&StoreError>,
    plans: Vec<WritePlan>,
    owners: Vec<(Vec<u32>, Arc<Inbox>)>,
) {
    let mut plans = if failure.is_some() {
        drop(plans);
        Vec::new()
    } else {
        plans
    }
    .into_iter();
    for (numbers, inbox) in owners {
        let plans = &mut plans;
        inbox.put(numbers.into_iter().map(|number| {
            let plan = match (failure, plans.next()) {
                (None, Some(plan)) => Ok(plan),
                (Some(error), _) => Err(same(error)),
                (None, None) => Err(StoreError::NotPrepared),
            };
            Report::Prepared(number, plan)
        }));
    }
}

/// Does a whole request by the store's blocking drivers. Repeating it after an error is harmless.
pub(super) fn perform(store: &Volume, request: &Request) -> Performed {
    let range = ByteRange::new(request.range.offset_bytes, request.range.length_bytes);
    let mut done_bytes = 0;
    let result = match request.op {
        Op::Flush => store.flush(),
        Op::Discard => store.discard_at(range),
        Op::WriteZeroes { may_unmap } => store.write_zeroes_at(range, may_unmap),
        Op::Read => in_pieces(range, &mut done_bytes, |piece, done, buffer| {
            store.read_at(View::Head, piece.offset_bytes, buffer)?;
            request
                .buffers
                .write_at(done, buffer)
                .map_err(|error| memory_error(piece, error))
        }),
        Op::Write => in_pieces(range, &mut done_bytes, |piece, done, buffer| {
            let buffers: &GuestBuffers = &request.buffers;
            buffers
                .read_at(done, buffer)
                .map_err(|error| memory_error(piece, error))?;
            store.write_at(piece.offset_bytes, buffer)
        }),
    };
    // These two come before anything is claimed.
    let refused = matches!(result, Err(StoreError::Overlaps | StoreError::Busy));
    Performed {
        touched: !refused || done_bytes > 0,
        result,
    }
}

/// Walks over a range with a buffer of bounded size; counts what is done.
fn in_pieces(
    range: ByteRange,
    done_bytes: &mut u64,
    mut step: impl FnMut(ByteRange, u64, &mut [u8]) -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    let longest = range.length_bytes.min(PIECE_BYTES_MAX);
    let mut buffer = vec![0_u8; usize::try_from(longest).unwrap_or_default()];
    while *done_bytes < range.length_bytes {
        let length = (range.length_bytes - *done_bytes).min(PIECE_BYTES_MAX);
        let piece = ByteRange::new(range.offset_bytes + *done_bytes, length);
        let Some(part) = buffer.get_mut(..usize::try_from(length).unwrap_or_default()) else {
            return Err(StoreError::OutOfRange {
                offset_bytes: piece.offset_bytes,
                length_bytes: length,
            });
        };
        step(piece, *done_bytes, part)?;
        *done_bytes += length;
    }
    Ok(())
}

fn memory_error(piece: ByteRange, error: vm_memory::GuestMemoryError) -> StoreError {
    StoreError::Io {
        op: "copy guest memory",
        file: FileName::Base,
        offset_bytes: piece.offset_bytes,
        source: std::io::Error::other(error),
    }
}

/// The same error for another request of the round: what failed was shared. Its source is told once, in the log.
pub(super) fn same(error: &StoreError) -> StoreError {
    if matches!(error, StoreError::Overlaps) {
        StoreError::Overlaps
    } else if matches!(error, StoreError::Busy) {
        StoreError::Busy
    } else if matches!(error, StoreError::NoSpace) {
        StoreError::NoSpace
    } else if let StoreError::Io {
        op,
        file,
        offset_bytes,
        source,
    } = error
    {
        StoreError::Io {
            op,
            file: *file,
            offset_bytes: *offset_bytes,
            source: source.kind().into(),
        }
    } else {
        StoreError::Poisoned
    }
}
