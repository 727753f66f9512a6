//! Files of the guest, opened, read and written by the host: `guest-file-*`.
//!
//! Called by `command`. Invariants: at most [`OPEN_MAX`] files are open; a read holds at most [`READ_BYTES_MAX`]; no open and
//! no read waits for the other end of a pipe. A handle stays until it is closed or the agent ends, whoever is connected.

use super::arguments::{Arguments, encode};
use super::failed::{Failed, Outcome};
use rustix::fs::OFlags;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;

/// Files that may be open at a time.
const OPEN_MAX: usize = 128;
/// As QEMU's agent: what one read may ask for.
const READ_BYTES_MAX: i64 = 48 << 20;
/// What it gets if it does not say.
const READ_BYTES: i64 = 4096;
/// Rights of a file that is made.
const NEW_FILE_MODE: u32 = 0o644;

/// The files that are open.
#[derive(Debug)]
pub(super) struct Files {
    open: BTreeMap<i64, File>,
    next: i64,
}

impl Default for Files {
    fn default() -> Self {
        Self {
            open: BTreeMap::new(),
            // As QEMU's agent: small numbers are easily mistaken for something else.
            next: 1000,
        }
    }
}

/// How to open by a mode of fopen(3).
fn options(mode: &str) -> Option<OpenOptions> {
    let mut options = OpenOptions::new();
    match mode {
        "r" | "rb" => options.read(true),
        "w" | "wb" => options.write(true).create(true).truncate(true),
        "a" | "ab" => options.append(true).create(true),
        "r+" | "rb+" | "r+b" => options.read(true).write(true),
        "w+" | "wb+" | "w+b" => options.read(true).write(true).create(true).truncate(true),
        "a+" | "ab+" | "a+b" => options.read(true).append(true).create(true),
        _ => return None,
    };
    let flags = OFlags::NONBLOCK | OFlags::NOCTTY;
    let flags = i32::try_from(flags.bits()).unwrap_or(0);
    options.custom_flags(flags).mode(NEW_FILE_MODE);
    Some(options)
}

impl Files {
    /// `guest-file-open`: answers a handle.
    pub(super) fn open(&mut self, arguments: &mut Arguments) -> Outcome {
        let path = arguments.text("path")?;
        let mode = arguments.maybe_text("mode")?;
        arguments.end()?;
        let mode = mode.as_deref().unwrap_or("r");
        let Some(options) = options(mode) else {
            return Err(Failed::generic(format!("invalid file open mode '{mode}'")));
        };
        let what = format!("failed to open file '{path}' (mode: '{mode}')");
        if self.open.len() >= OPEN_MAX {
            let many = rustix::io::Errno::MFILE.raw_os_error();
            return Err(Failed::because(what, &io::Error::from_raw_os_error(many)));
        }
        let file = options
            .open(&path)
            .map_err(|error| Failed::because(what, &error))?;
        let handle = self.next;
        self.next += 1;
        self.open.insert(handle, file);
        Ok(json!(handle))
    }

    fn get(&mut self, handle: i64) -> Result<&mut File, Failed> {
        self.open.get_mut(&handle).ok_or_else(|| not_found(handle))
    }

    /// `guest-file-close`.
    pub(super) fn close(&mut self, arguments: &mut Arguments) -> Outcome {
        let handle = arguments.integer("handle")?;
        arguments.end()?;
        self.open.remove(&handle).ok_or_else(|| not_found(handle))?;
        Ok(json!({}))
    }

    /// `guest-file-flush`. Nothing is kept back here: a write has been the kernel's when it was answered.
    pub(super) fn flush(&mut self, arguments: &mut Arguments) -> Outcome {
        let handle = arguments.integer("handle")?;
        arguments.end()?;
        self.get(handle)?;
        Ok(json!({}))
    }

    /// `guest-file-read`.
    pub(super) fn read(&mut self, arguments: &mut Arguments) -> Outcome {
        let handle = arguments.integer("handle")?;
        let count = arguments.maybe_integer("count")?.unwrap_or(READ_BYTES);
        arguments.end()?;
        let file = self.get(handle)?;
        let wanted = usize::try_from(count)
            .ok()
            .filter(|_| count <= READ_BYTES_MAX);
        let wanted = wanted.ok_or_else(|| invalid_count(count))?;
        let mut bytes = Vec::new();
        // Grows with what is there, not with what is asked for.
        let limit = u64::try_from(wanted).unwrap_or(0);
        let read = file.take(limit).read_to_end(&mut bytes);
        match read {
            // A pipe that has no more for now: what came before is not lost.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && !bytes.is_empty() => {}
            Err(error) => return Err(Failed::because("failed to read file", &error)),
            Ok(_) => {
                let eof = bytes.len() < wanted;
                return Ok(read_reply(&bytes, eof));
            }
        }
        Ok(read_reply(&bytes, false))
    }

    /// `guest-file-write`.
    pub(super) fn write(&mut self, arguments: &mut Arguments) -> Outcome {
        let handle = arguments.integer("handle")?;
        let bytes = arguments.bytes("buf-b64")?;
        let count = arguments.maybe_integer("count")?;
        arguments.end()?;
        let file = self.get(handle)?;
        let bytes = match count {
            None => bytes.as_slice(),
            Some(count) => {
                let part = usize::try_from(count)
                    .ok()
                    .and_then(|count| bytes.get(..count));
                part.ok_or_else(|| invalid_count(count))?
            }
        };
        file.write_all(bytes)
            .map_err(|error| Failed::because("failed to write to file", &error))?;
        Ok(json!({"count": bytes.len(), "eof": false}))
    }

    /// `guest-file-seek`: answers where it is then.
    pub(super) fn seek(&mut self, arguments: &mut Arguments) -> Outcome {
        let handle = arguments.integer("handle")?;
        let offset = arguments.integer("offset")?;
        let whence = arguments.value("whence")?;
        arguments.end()?;
        let to = whence_of(&whence, offset)?;
        let file = self.get(handle)?;
        let failed = |error: &io::Error| Failed::because("failed to seek file", error);
        let position = match to {
            Some(to) => file.seek(to).map_err(|error| failed(&error))?,
            None => {
                let invalid = rustix::io::Errno::INVAL.raw_os_error();
                return Err(failed(&io::Error::from_raw_os_error(invalid)));
            }
        };
        Ok(json!({"position": position, "eof": false}))
    }
}

/// A number or a word. `None` for a place before the beginning.
fn whence_of(whence: &Value, offset: i64) -> Result<Option<SeekFrom>, Failed> {
    let from_start = || u64::try_from(offset).ok().map(SeekFrom::Start);
    match (whence.as_i64(), whence.as_str()) {
        (Some(0), _) | (_, Some("set")) => Ok(from_start()),
        (Some(1), _) | (_, Some("cur")) => Ok(Some(SeekFrom::Current(offset))),
        (Some(2), _) | (_, Some("end")) => Ok(Some(SeekFrom::End(offset))),
        (Some(code), _) => Err(Failed::generic(format!("invalid whence code {code}"))),
        (_, Some(word)) => Err(Failed::generic(format!(
            "Parameter 'whence' does not accept value '{word}'"
        ))),
        (None, None) => Err(Failed::generic(
            "Invalid parameter type for 'whence', expected: GuestFileWhence",
        )),
    }
}

fn read_reply(bytes: &[u8], eof: bool) -> Value {
    json!({"count": bytes.len(), "buf-b64": encode(bytes), "eof": eof})
}

fn not_found(handle: i64) -> Failed {
    Failed::generic(format!("handle '{handle}' has not been found"))
}

fn invalid_count(count: i64) -> Failed {
    Failed::generic(format!("value '{count}' is invalid for argument count"))
}

#[cfg(test)]
mod tests;
