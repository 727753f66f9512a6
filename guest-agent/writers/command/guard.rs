//! Lets an application go on when this program dies while it is frozen, whatever killed it.
//!
//! Used by `commands`. A guard is a shell that waits on a pipe from this process: a line says that all is well, its end
//! without one that this process is gone, and then the shell becomes the command that undoes the freeze, once what is left of
//! the freeze's own command is dead. It is started before the freeze, so nothing has to be started by anybody who may be dead.

use crate::config::Command;
use guest_agent::writer::script::left_over;
use std::io::{self, Write as _};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Stdio};

/// Signals that end this program at a stop of its unit must not end the guard as well.
const SHELL: &str = r#"trap "" HUP INT TERM; read -r _ && exit 0; "$0" kill-scripts "$1"; shift; trap - HUP INT TERM; exec "$@" >&2"#;

/// A guard that is on watch until it is released.
#[derive(Debug)]
pub(crate) struct Guard(Child);

impl Guard {
    /// Sets one on watch, which would run this command.
    pub(crate) fn start(
        undo: &Command,
        environment: Vec<(&'static str, String)>,
    ) -> io::Result<Self> {
        let (program, arguments) = undo.words();
        std::process::Command::new("/bin/sh")
            .args(["-c", SHELL])
            .arg(std::env::current_exe()?)
            .arg(left_over::this_process()?)
            .arg(program)
            .args(arguments)
            .envs(environment)
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .process_group(0)
            .spawn()
            .map(Self)
    }

    /// The application goes on: nothing is to be undone.
    pub(crate) fn release(mut self) {
        if let Some(mut pipe) = self.0.stdin.take() {
            // One that is gone needs no word.
            pipe.write_all(b"\n").unwrap_or(());
        }
        self.0.wait().map(drop).unwrap_or(());
    }
}
