//! The thread that does what touches disks and processes, one command after another.
//!
//! Fed by `command`. It may be stuck for minutes (a trim) or until a thaw (a write to a frozen file system): the thread that
//! reads goes on answering ping, status and thaw meanwhile. Freezes go through it, so that a command that came before a freeze
//! is done before it.

use super::arguments::Arguments;
use super::command::{Turn, refused_while_frozen};
use super::exec::Children;
use super::failed::{Failed, Outcome};
use super::files::Files;
use crate::filesystem::plan::Sources;
use crate::quiesce::service::{Request, Service};
use std::sync::mpsc::{Receiver, channel};

/// Commands that may wait.
pub(super) const WAITING_MAX: usize = 16;

/// Takes the outcome of a command.
pub(super) type Answer = Box<dyn FnOnce(Outcome) + Send>;

/// What there is to do.
pub(super) enum Work {
    /// A function of the workshop.
    Function(fn(&mut Arguments, &mut Workshop) -> Outcome, Arguments),
    /// A request to the actor, unless it is given up first; what comes behind it waits for its end.
    Freeze(Request, Turn),
}

/// A command that was accepted.
pub(super) struct Job {
    pub(super) name: &'static str,
    pub(super) work: Work,
    pub(super) answer: Answer,
}

/// What commands leave for later ones.
#[derive(Debug)]
pub(super) struct Workshop {
    pub(super) sources: Sources,
    pub(super) files: Files,
    pub(super) children: Children,
}

impl Workshop {
    pub(super) fn new(sources: Sources) -> Self {
        Self {
            sources,
            files: Files::default(),
            children: Children::default(),
        }
    }

    /// Works until nobody can give it anything any more.
    pub(super) fn run(&mut self, jobs: &Receiver<Job>, service: &Service) {
        for job in jobs {
            // It was allowed when it was accepted; the bridge may have frozen since.
            self.work(job, service, service.is_frozen());
        }
    }

    /// Does one command, and answers it.
    pub(super) fn work(&mut self, job: Job, service: &Service, frozen: bool) {
        let outcome = match job.work {
            _ if frozen => Err(refused_while_frozen(job.name)),
            Work::Function(function, mut arguments) => function(&mut arguments, self),
            Work::Freeze(request, turn) => freeze(service, request, &turn),
        };
        (job.answer)(outcome);
    }
}

fn freeze(service: &Service, request: Request, turn: &Turn) -> Outcome {
    let (sender, receiver) = channel();
    let begun = turn.begin(|| {
        service.ask(request, move |answer| sender.send(answer).unwrap_or(()));
    });
    if begun.is_none() {
        return Err(Failed::generic("given up by its client before it began"));
    }
    let outcome = match receiver.recv() {
        Ok(outcome) => outcome.map_err(|error| Failed::generic(error.message))?,
        Err(_) => return Err(Failed::generic("the agent is ending")),
    };
    if outcome == 0 {
        // Clients need not thaw what froze nothing, so nothing may stay held: writers are let go now.
        service.ask_and_wait(Request::QgaThaw);
    }
    Ok(outcome)
}
