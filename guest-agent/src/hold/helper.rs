//! The helper process: one loop that never calls FIFREEZE itself, and a thread per file system that does.
//!
//! Started by `client` as this same binary with [`ARGUMENT`]; standard input is its socket to the agent. It runs in a session
//! of its own, all memory locked, as the last process that the kernel would kill for want of memory. Between the first
//! FIFREEZE and the last FITHAW it allocates nothing, opens nothing and writes nothing but the ledger's marks (tmpfs) and
//! its socket, which it never waits for.

use super::ledger::Ledger;
use super::message::{Ask, HEAD_BYTES, MESSAGE_BYTES_MAX, SLOTS_MAX, Tell};
use super::slot::{Answer, Condition, Slot};
use crate::clock::{Alarm, BootTime};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;
use rustix::mm::{MlockAllFlags, mlockall};
use rustix::net::{
    RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recv, send, sendmsg,
};
use std::ffi::OsString;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// First argument of the helper process.
pub const ARGUMENT: &str = "hold-helper";

/// Time for one step of the thaw before the next is begun all the same, milliseconds.
pub const THAW_STEP_MS: u64 = 2_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Opening and writing back; nothing is frozen.
    Loose,
    /// Freezing this step.
    Freezing { step: u32 },
    /// All is frozen.
    Frozen,
    /// Thawing this step.
    Thawing { step: u32 },
}

struct Helper {
    socket: OwnedFd,
    done: Arc<OwnedFd>,
    alarm: Alarm,
    state_dir: PathBuf,
    slots: Vec<Slot>,
    /// Of earlier sets, still in the kernel. Their ledger stays with them.
    stuck: Vec<(Slot, Option<Arc<Ledger>>)>,
    phase: Phase,
    generation: u64,
    failed: bool,
    first_freeze: BootTime,
    first_thaw: BootTime,
    ledger: Option<Arc<Ledger>>,
    agent_gone: bool,
}

/// Runs until the agent is gone and nothing is frozen.
pub fn run(state_dir: &Path) -> std::io::Result<()> {
    // Started in the agent's group; a signal to that group must not reach it. Fails only for a group leader.
    rustix::process::setsid().map(drop).unwrap_or(());
    std::fs::write("/proc/self/oom_score_adj", "-1000").unwrap_or(());
    let mut helper = Helper {
        socket: std::io::stdin().as_fd().try_clone_to_owned()?,
        done: Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?),
        alarm: Alarm::new()?,
        state_dir: state_dir.to_owned(),
        slots: Vec::with_capacity(SLOTS_MAX),
        stuck: Vec::with_capacity(SLOTS_MAX),
        phase: Phase::Loose,
        generation: 0,
        failed: false,
        first_freeze: BootTime::now(),
        first_thaw: BootTime::now(),
        ledger: None,
        agent_gone: false,
    };
    // Without the right to lock memory the helper still works; it may then wait for a page.
    mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE).unwrap_or(());
    let mut buffer = vec![0; MESSAGE_BYTES_MAX];
    while !(helper.agent_gone && helper.is_loose()) {
        helper.turn(&mut buffer)?;
    }
    Ok(())
}

impl Helper {
    fn is_loose(&self) -> bool {
        self.phase == Phase::Loose && self.stuck.iter().all(|(slot, _)| !slot.is_busy())
    }

    /// Waits for the agent, the limit or a thread, and goes on.
    fn turn(&mut self, buffer: &mut [u8]) -> std::io::Result<()> {
        let of_agent = if self.agent_gone {
            PollFlags::empty()
        } else {
            PollFlags::IN
        };
        let mut polled = [
            PollFd::new(&self.alarm, PollFlags::IN),
            PollFd::new(&*self.done, PollFlags::IN),
            PollFd::new(&self.socket, of_agent),
        ];
        // A hung-up socket would be reported for ever.
        let count = if self.agent_gone { 2 } else { 3 };
        let (polled, _) = polled.split_at_mut(count);
        match poll(polled, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let ready = |index: usize| polled.get(index).is_some_and(|fd| !fd.revents().is_empty());
        let (alarm, done, agent) = (ready(0), ready(1), ready(2));
        if alarm {
            self.alarm_rang();
        }
        if done {
            let mut count = [0; 8];
            rustix::io::read(&*self.done, &mut count)
                .map(drop)
                .unwrap_or(());
            self.collect();
        }
        if agent {
            self.hear(buffer);
        }
        Ok(())
    }

    fn hear(&mut self, buffer: &mut [u8]) {
        let length = match recv(&self.socket, &mut *buffer, RecvFlags::DONTWAIT) {
            Ok((length, _)) => length,
            Err(Errno::AGAIN | Errno::INTR) => return,
            Err(_) => 0,
        };
        let heard = buffer.get(..length).and_then(Ask::decode);
        match heard {
            // End of file: the agent is dead. Nobody is left to be told, everything is thawed.
            None => {
                self.agent_gone = true;
                self.end();
            }
            Some((Ask::Open { slot, step, device }, paths)) => {
                self.open(slot, step, device, paths);
            }
            Some((Ask::Sync, _)) => self.slots.iter().for_each(Slot::sync),
            Some((
                Ask::Freeze {
                    generation,
                    hold_ms,
                },
                _,
            )) => self.freeze(generation, hold_ms),
            Some((Ask::Thaw { generation }, _)) => {
                // A thaw that crossed the end of its generation has been answered by that.
                if generation == self.generation {
                    self.end();
                }
            }
            Some((Ask::Close, _)) => self.close(),
        }
    }

    fn open(
        &mut self,
        slot: u32,
        step: u32,
        device: crate::filesystem::mounts::DeviceNumber,
        paths: &[u8],
    ) {
        let paths = paths
            .split(|byte| *byte == 0)
            .map(|path| PathBuf::from(OsString::from_vec(path.to_vec())))
            .collect();
        let index = self.slots.len();
        let is_stuck = self.stuck.iter().any(|(slot, _)| slot.device == device);
        let fits = index < SLOTS_MAX && self.phase == Phase::Loose && !is_stuck;
        let opened = if fits {
            Slot::open(index, device, step, paths, Arc::clone(&self.done)).ok()
        } else {
            None
        };
        match opened {
            Some(opened) => self.slots.push(opened),
            None => self.tell(Tell::Opened {
                slot,
                errno: Errno::BUSY.raw_os_error(),
            }),
        }
    }

    fn freeze(&mut self, generation: u64, hold_ms: u64) {
        self.generation = generation;
        self.failed = false;
        let devices = self.slots.iter().map(|slot| slot.device);
        let ledger = match Ledger::create(&self.state_dir, generation, devices) {
            Ok(ledger) => Arc::new(ledger),
            Err(_) => {
                // Without it a double kill would leave the guest frozen for good.
                self.tell(Tell::FreezeDone {
                    generation,
                    ok: false,
                });
                return;
            }
        };
        self.first_freeze = BootTime::now();
        self.first_thaw = self.first_freeze;
        // The limit is armed before anything is frozen; if it cannot be, nothing is.
        let armed = self.alarm.set(Some(self.first_freeze.plus_ms(hold_ms)));
        self.ledger = Some(ledger);
        let first = self.slots.iter().map(|slot| slot.step).min();
        match (armed, first) {
            (Ok(()), Some(step)) => self.freeze_step(step),
            (Ok(()), None) => self.frozen(),
            (Err(_), _) => {
                self.failed = true;
                self.frozen();
            }
        }
    }

    fn freeze_step(&mut self, step: u32) {
        self.phase = Phase::Freezing { step };
        if let Some(ledger) = &self.ledger {
            for slot in self.slots.iter().filter(|slot| slot.step == step) {
                slot.freeze(ledger);
            }
        }
    }

    fn frozen(&mut self) {
        self.phase = Phase::Frozen;
        self.tell(Tell::FreezeDone {
            generation: self.generation,
            ok: !self.failed,
        });
    }

    fn alarm_rang(&mut self) {
        match self.phase {
            Phase::Freezing { .. } | Phase::Frozen => {
                self.tell(Tell::Ended {
                    generation: self.generation,
                });
                self.end();
            }
            // A thaw that hangs must not keep the others frozen.
            Phase::Thawing { step } => self.thaw_below(step),
            Phase::Loose => self.alarm.set(None).unwrap_or(()),
        }
    }

    /// Ends the hold: from now on everything thaws.
    fn end(&mut self) {
        if matches!(self.phase, Phase::Freezing { .. } | Phase::Frozen) {
            self.first_thaw = BootTime::now();
            self.thaw_from(self.slots.iter().map(|slot| slot.step).max());
        }
    }

    fn thaw_below(&mut self, step: u32) {
        let lower = self.slots.iter().map(|slot| slot.step);
        let next = lower.filter(|other| *other < step).max();
        self.thaw_from(next);
    }

    /// Orders the thaw of this step, or of the next lower one that has something to thaw; ends the generation after the last.
    fn thaw_from(&mut self, mut next: Option<u32>) {
        while let Some(step) = next {
            let mut ordered = false;
            for slot in self.slots.iter().filter(|slot| slot.step == step) {
                ordered |= slot.thaw();
            }
            if ordered {
                self.phase = Phase::Thawing { step };
                let limit = BootTime::now().plus_ms(THAW_STEP_MS);
                self.alarm.set(Some(limit)).unwrap_or(());
                return;
            }
            let lower = self.slots.iter().map(|slot| slot.step);
            next = lower.filter(|other| *other < step).max();
        }
        self.phase = Phase::Loose;
        self.alarm.set(None).unwrap_or(());
        // Before the word of it: who hears that all is thawed finds nothing of the set left.
        if self
            .slots
            .iter()
            .all(|slot| slot.condition() == Condition::Loose)
            && let Some(ledger) = self.ledger.take()
        {
            ledger.remove();
        }
        self.tell(Tell::ThawDone {
            generation: self.generation,
            first_freeze: self.first_freeze,
            first_thaw: self.first_thaw,
        });
    }

    /// Takes the threads' answers, tells the agent and goes on to the next step.
    fn collect(&mut self) {
        for at in 0..self.slots.len() {
            let Some(slot) = self.slots.get(at) else {
                break;
            };
            let Some(answer) = slot.take_answer() else {
                continue;
            };
            let index = u32::try_from(slot.index()).unwrap_or(u32::MAX);
            match answer {
                Answer::Opened(errno) => {
                    let fd = slot.take_duplicate();
                    self.tell_opened(index, errno, fd);
                }
                Answer::Synced(errno, took_us) => self.tell(Tell::Synced {
                    slot: index,
                    errno,
                    took_us,
                }),
                Answer::Froze(errno, took_us) => {
                    // No freeze operation: nothing of it can be held, and the agent says so.
                    self.failed |= errno != 0 && errno != Errno::OPNOTSUPP.raw_os_error();
                    self.tell(Tell::Froze {
                        slot: index,
                        errno,
                        took_us,
                    });
                }
                Answer::Thawed(errno, took_us) => self.tell(Tell::Thawed {
                    slot: index,
                    errno,
                    took_us,
                }),
            }
        }
        self.advance();
        self.bury();
    }

    fn advance(&mut self) {
        let pending = |step: u32, condition: &[Condition]| {
            self.slots
                .iter()
                .any(|slot| slot.step == step && !slot.is_past(condition))
        };
        match self.phase {
            Phase::Freezing { step } if !pending(step, &[Condition::Freezing]) => {
                let higher = self.slots.iter().map(|slot| slot.step);
                match higher.filter(|other| *other > step).min() {
                    Some(next) if !self.failed => self.freeze_step(next),
                    _ => self.frozen(),
                }
            }
            Phase::Thawing { step }
                if !pending(step, &[Condition::Freezing, Condition::Thawing]) =>
            {
                self.thaw_below(step);
            }
            Phase::Freezing { .. } | Phase::Thawing { .. } | Phase::Loose | Phase::Frozen => {}
        }
    }

    fn close(&mut self) {
        if self.phase != Phase::Loose {
            return;
        }
        let ledger = self.ledger.take();
        for slot in self.slots.drain(..) {
            slot.end();
            // A thread that is merely about to end must not keep the next set from this file system.
            if slot.condition() != Condition::Loose {
                self.stuck.push((slot, ledger.clone()));
            }
        }
        self.bury();
    }

    /// Forgets what has come back; removes a ledger once nobody needs it.
    fn bury(&mut self) {
        let mut at = 0;
        while let Some((slot, _)) = self.stuck.get(at) {
            if !slot.is_ended() {
                at += 1;
                continue;
            }
            let (_, ledger) = self.stuck.swap_remove(at);
            if let Some(ledger) = ledger
                && !self
                    .stuck
                    .iter()
                    .any(|(_, other)| other.as_ref().is_some_and(|o| Arc::ptr_eq(o, &ledger)))
            {
                ledger.remove();
            }
        }
    }

    /// Never waits: a full socket means a dead or stuck agent, which has its own limits.
    fn tell(&self, tell: Tell) {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        send(&self.socket, &tell.encode(), flags)
            .map(drop)
            .unwrap_or(());
    }

    fn tell_opened(&self, slot: u32, errno: i32, fd: Option<OwnedFd>) {
        let Some(fd) = fd else {
            self.tell(Tell::Opened { slot, errno });
            return;
        };
        let bytes: [u8; HEAD_BYTES] = Tell::Opened { slot, errno }.encode();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds = [fd.as_fd()];
        control.push(SendAncillaryMessage::ScmRights(&fds));
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        sendmsg(&self.socket, &[IoSlice::new(&bytes)], &mut control, flags)
            .map(drop)
            .unwrap_or(());
    }
}
