//! A snapshot set in the guest, from prepare to the verdict, for both protocols.
//!
//! `native` and `qga` hand requests to [`service::Service`]; one thread, the [`actor`], owns everything. [`state`] decides what
//! may happen when and is pure; `writers` and `filesystems` are the actor's steps,
//! `step` the events for writers, `words` how much they may say, `work` what is done on threads, `session` what follows a set and what restores; [`cause`] names why a set ended.

pub mod actor;
pub mod cause;
mod filesystems;
mod not_to_snapshot;
mod participant;
mod qga_mark;
pub mod service;
mod session;
pub mod state;
mod step;
mod words;
mod work;
mod writers;
