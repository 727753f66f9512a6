//! Runs the tests' commands inside the guest: `guest-shell PORT`.
//!
//! Started by the guest's init and kept alive by it. Each line read from the port is a
//! `ShellRequest`; each command runs in a thread of its own, so that one that hangs on a frozen
//! file system does not keep the others waiting. It must not touch a disk itself: program, port
//! and shell are all in the initramfs.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use vmshadow_tests::guest_protocol::{OUTPUT_MAX_BYTES, ShellRequest, ShellResponse};

fn main() -> Result<()> {
    let path = std::env::args().nth(1).context("usage: guest-shell PORT")?;
    let port = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .context(path)?;
    let answers = Arc::new(Mutex::new(port.try_clone()?));
    let mut requests = BufReader::new(port);
    let mut line = String::new();
    loop {
        line.clear();
        if requests.read_line(&mut line)? == 0 {
            // Nobody holds the host's end. The driver offers no way to wait for that.
            thread::sleep(Duration::from_millis(50));
            continue;
        }
        match serde_json::from_str::<ShellRequest>(&line) {
            Ok(request) => {
                let answers = Arc::clone(&answers);
                thread::spawn(move || answer(&answers, request));
            }
            Err(error) => eprintln!("guest-shell: {error} in {line:?}"),
        }
    }
}

fn answer(answers: &Mutex<File>, request: ShellRequest) {
    let response = run(&request).unwrap_or_else(|error| ShellResponse {
        id: request.id,
        status: 127,
        stdout: String::new(),
        stderr: format!("{error:#}"),
    });
    let mut line = serde_json::to_string(&response).unwrap_or_default();
    line.push('\n');
    if let Ok(mut port) = answers.lock()
        && let Err(error) = port.write_all(line.as_bytes())
    {
        eprintln!("guest-shell: cannot answer: {error}");
    }
}

fn run(request: &ShellRequest) -> Result<ShellResponse> {
    let mut child = Command::new("/bin/sh")
        .arg("-c")
        .arg(&request.command)
        .env("PATH", "/bin:/sbin")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let stdout = collect(child.stdout.take().context("no stdout")?);
    let stderr = collect(child.stderr.take().context("no stderr")?);
    let status = child.wait()?;
    Ok(ShellResponse {
        id: request.id,
        status: status_code(status),
        stdout: stdout.join().unwrap_or_default(),
        stderr: stderr.join().unwrap_or_default(),
    })
}

fn status_code(status: ExitStatus) -> i32 {
    status
        .code()
        .or_else(|| status.signal().map(|signal| 128 + signal))
        .unwrap_or(127)
}

/// Keeps the beginning and throws the rest away, so that a chatty command does not block.
fn collect(mut from: impl Read + Send + 'static) -> thread::JoinHandle<String> {
    thread::spawn(move || {
        let mut kept = Vec::new();
        if (&mut from)
            .take(OUTPUT_MAX_BYTES)
            .read_to_end(&mut kept)
            .is_ok()
            && let Err(error) = std::io::copy(&mut from, &mut std::io::sink())
        {
            eprintln!("guest-shell: {error}");
        }
        String::from_utf8_lossy(&kept).into_owned()
    })
}
