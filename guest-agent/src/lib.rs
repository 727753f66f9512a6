//! The guest agent: half of the snapshot service, in the VM.
//!
//! | room | what it is |
//! |---|---|
//! | [`agent`] | puts the rooms together and starts their threads |
//! | [`transport`] | virtio-serial ports, Unix sockets |
//! | [`native`] | the bridge's protocol |
//! | [`qga`] | the QEMU guest agent protocol |
//! | [`quiesce`] | a set, from prepare to the verdict: state machine and actor |
//! | [`writer`] | applications: scripts and connected processes |
//! | [`hold`] | the helper process that freezes and is sure to thaw |
//! | [`filesystem`] | mounts, extents, order, FIFREEZE |
//! | [`clock`], [`journal`], [`config`] | CLOCK_BOOTTIME, the log, the command line |
//!
//! Requests come from the left (`transport` -> `native`, `qga` -> `quiesce`) and go to the right (`writer`, `hold` -> `filesystem`);
//! no room names one to its left, but for `writer::socket`, which tells `quiesce::service` of a writer that hung up.

pub mod agent;
pub mod clock;
pub mod config;
pub mod filesystem;
pub mod hold;
pub mod journal;
pub mod native;
pub mod qga;
pub mod quiesce;
pub mod transport;
pub mod writer;
