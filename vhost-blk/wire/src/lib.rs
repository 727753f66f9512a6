//! Messages of the vhost-blk control socket, in QMP framing.
//!
//! Called by the daemon (`vhost-blk/src/control`), which answers, and by `qmp-bridge`, which asks. The tests use the
//! same types, so that the bytes have one definition. This room knows nothing of virtio, of the store or of sockets.
//!
//! * [`frame`]: a JSON *stream* decoder. QMP clients end a message where the JSON value ends and send no newline.
//! * [`qmp`]: greeting, request, answer, event and error envelopes (QEMU `docs/interop/qmp-spec.rst`).
//! * [`command`]: one struct per command, with its answer type; the doc of each is the protocol reference.
//! * [`event`]: what the daemon tells unasked.
//! * [`types`]: the nouns which commands and events share.

pub mod command;
pub mod event;
pub mod frame;
pub mod qmp;
pub mod types;
