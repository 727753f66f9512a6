//! `vmshadow` as a process.
