//! Coordinates guest freeze and host commit inside the window, and serves requesters.
//!
//! Control flows one way: `cli` and `daemon` call [`sets`], that calls [`snapshot`], that calls the three peers:
//! [`guest`] (the agent in the VM), [`storage`] (vhost-blk), [`vm`] (QEMU). [`qmp`] and `link` carry their bytes.
//! COORDINATION.md is the normative text: sequence, deadlines, witnesses, who dies when.
//!
//! * [`cli`]: the command `vmshadow`: options, tables, exit codes.
//! * [`daemon`]: the program `qmp-bridge`: the same operations over a socket in QMP framing ([`protocol`]).
//! * [`config`]: the TOML file that names VMs.
//! * [`sets`]: create, list, show, delete, revert, recover.
//! * [`snapshot`]: one set, from intent to document.
#![forbid(unsafe_code)]

pub mod cli;
pub mod config;
pub mod daemon;
pub mod error;
pub mod guest;
mod link;
pub mod protocol;
pub mod qmp;
pub mod sets;
mod shown;
pub mod snapshot;
pub mod storage;
pub mod vm;
