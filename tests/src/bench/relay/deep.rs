//! The relay's backend with many requests in flight: one thread and one io_uring, set up as our daemon's is.
//!
//! Called by `relay`. Its ring's completions ring the same bell as the client's requests do, while it sleeps only.

#![allow(unsafe_code, reason = "the kernel is handed addresses of memory")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{Ordering, fence};

use anyhow::{Context, Result};
use io_uring::{IoUring, opcode, types};

use super::channel::Channel;
use super::{END, aligned, offset, slot};
use crate::bench::job::{Job, Op};

/// Serves until the client ends.
pub(super) fn serve(file: &File, job: &Job, requests: &Channel, answers: &Channel) -> Result<()> {
    let outcome = serve_all(file, job, requests, answers);
    if outcome.is_err() {
        answers.send(END)?;
        answers.ring()?;
    }
    outcome
}

/// The ring and the memory it works on.
struct Ring {
    uring: IoUring,
    memory: Vec<u8>,
    skip: usize,
    in_flight: usize,
}

impl Drop for Ring {
    fn drop(&mut self) {
        // The kernel has to be done with the memory before it is given back.
        while self.in_flight > 0 {
            if self.uring.submit_and_wait(1).is_err() {
                std::process::abort();
            }
            self.in_flight -= self.uring.completion().count();
        }
    }
}

impl Ring {
    fn new(file: &File, job: &Job, requests: &Channel) -> Result<Self> {
        let (memory, skip) = aligned(job.block_bytes * job.depth as u64)?;
        let mut uring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .build(u32::try_from(job.depth)?.next_power_of_two())?;
        let submitter = uring.submitter();
        submitter.register_files(&[file.as_raw_fd()])?;
        submitter.register_eventfd(requests.bell().as_raw_fd())?;
        uring.completion().disable_eventfd();
        Ok(Self {
            uring,
            memory,
            skip,
            in_flight: 0,
        })
    }

    fn start(&mut self, job: &Job, request: u64) -> Result<()> {
        let length = usize::try_from(job.block_bytes)?;
        let begin = self.skip + slot(request)? * length;
        let part = self.memory.get_mut(begin..begin + length);
        let pointer = part.context("memory of a slot")?.as_mut_ptr();
        let bytes = u32::try_from(length)?;
        let fd = types::Fixed(0);
        let entry = match job.op {
            Op::Read => opcode::Read::new(fd, pointer, bytes)
                .offset(offset(request))
                .build(),
            Op::Write => opcode::Write::new(fd, pointer, bytes)
                .offset(offset(request))
                .build(),
        };
        let entry = entry.user_data(request);
        // SAFETY: the entry points into `self.memory`, which lives until nothing is in flight (`Drop`); no slot has two requests.
        unsafe { self.uring.submission().push(&entry) }.context("the relay's ring is full")?;
        self.in_flight += 1;
        Ok(())
    }

    /// Hands over what was queued, and lets the kernel finish what is ready. Answers whether there was either.
    fn enter(&mut self) -> Result<bool> {
        let is_due = self.has_news() || !self.uring.submission().is_empty();
        if is_due {
            self.uring.submit()?;
        }
        Ok(is_due)
    }

    fn has_news(&mut self) -> bool {
        let submission = self.uring.submission();
        submission.taskrun() || submission.cq_overflow()
    }

    /// Answers what is complete. Answers whether anything was.
    fn answer(&mut self, job: &Job, answers: &Channel) -> Result<bool> {
        let before = self.in_flight;
        let mut outcome = Ok(());
        for completion in self.uring.completion() {
            self.in_flight -= 1;
            match u64::try_from(completion.result()) {
                Ok(bytes) if bytes == job.block_bytes => answers.send(completion.user_data())?,
                Ok(_) => outcome = Err(io::ErrorKind::UnexpectedEof.into()),
                Err(_) => outcome = Err(io::Error::from_raw_os_error(-completion.result())),
            }
        }
        answers.ring()?;
        outcome?;
        Ok(before > self.in_flight)
    }

    fn sleep(&mut self, requests: &Channel) -> Result<()> {
        self.uring.completion().enable_eventfd();
        // The kernel looks whether it shall ring after it has made a completion known.
        fence(Ordering::SeqCst);
        if !self.has_news() && self.uring.completion().is_empty() && requests.may_sleep() {
            requests.sleep()?;
        }
        self.uring.completion().disable_eventfd();
        Ok(())
    }
}

fn serve_all(file: &File, job: &Job, requests: &Channel, answers: &Channel) -> Result<()> {
    let mut ring = Ring::new(file, job, requests)?;
    let mut ended = false;
    while !ended || ring.in_flight > 0 {
        let mut worked = false;
        while let Some(request) = requests.take() {
            worked = true;
            if request == END {
                ended = true;
            } else {
                ring.start(job, request)?;
            }
        }
        worked |= ring.enter()?;
        worked |= ring.answer(job, answers)?;
        if !worked {
            ring.sleep(requests)?;
        }
    }
    Ok(())
}
