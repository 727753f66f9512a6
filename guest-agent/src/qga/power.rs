//! The machine's power: `guest-shutdown`, `guest-suspend-disk`, `guest-suspend-ram`, `guest-suspend-hybrid`.
//!
//! Called by `command`. None of them is answered when it succeeds: the client sees the machine's end, or its sleep.

use super::arguments::Arguments;
use super::failed::{Failed, Outcome};
use super::program;
use serde_json::json;
use std::fs;
use std::io;

const SHUTDOWN: &str = "/sbin/shutdown";
const STATE: &str = "/sys/power/state";

/// `guest-shutdown`, by shutdown(8).
pub(super) fn shut_down(arguments: &mut Arguments) -> Outcome {
    let mode = arguments.maybe_text("mode")?;
    arguments.end()?;
    let option = match mode.as_deref() {
        None | Some("powerdown") => "-P",
        Some("halt") => "-H",
        Some("reboot") => "-r",
        Some(_) => {
            return Err(Failed::generic(
                "mode is invalid (valid values are: halt|powerdown|reboot",
            ));
        }
    };
    let words = ["-h", option, "+0", "hypervisor initiated shutdown"];
    let run = program::find(SHUTDOWN).and_then(|program| program::run(&program, &words, b""));
    match run {
        Ok(status) if status.success() => Ok(json!({})),
        Ok(_) | Err(_) => Err(Failed::generic("child process has failed to shutdown")),
    }
}

/// How deep the machine sleeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sleep {
    Disk,
    Ram,
    Hybrid,
}

impl Sleep {
    /// What systemd calls it: the verb, and the unit whose presence says that it can.
    fn verb(self) -> (&'static str, &'static str) {
        match self {
            Self::Disk => ("hibernate", "systemd-hibernate"),
            Self::Ram => ("suspend", "systemd-suspend"),
            Self::Hybrid => ("hybrid-sleep", "systemd-hybrid-sleep"),
        }
    }

    /// What the kernel calls it, if it alone can do it.
    fn state(self) -> Option<&'static str> {
        match self {
            Self::Disk => Some("disk"),
            Self::Ram => Some("mem"),
            Self::Hybrid => None,
        }
    }
}

/// By systemd where it runs, otherwise by the kernel.
pub(super) fn suspend(arguments: &Arguments, sleep: Sleep) -> Outcome {
    arguments.end()?;
    if let Some(done) = by_systemd(sleep) {
        return done;
    }
    let states = fs::read_to_string(STATE).unwrap_or_default();
    let state = sleep
        .state()
        .filter(|state| states.split_ascii_whitespace().any(|s| s == *state));
    let Some(state) = state else {
        return Err(Failed::generic(
            "the requested suspend mode is not supported by the guest",
        ));
    };
    // Theirs writes in a child process, and says no more.
    fs::write(STATE, state).map_err(|_| Failed::generic("child process has failed to suspend"))?;
    Ok(json!({}))
}

fn by_systemd(sleep: Sleep) -> Option<Outcome> {
    let systemctl = program::find("systemctl").ok()?;
    let (verb, unit) = sleep.verb();
    let code = |words: &[&str]| -> io::Result<Option<i32>> {
        Ok(program::run(&systemctl, words, b"")?.code())
    };
    // 1 to 3 are the states of a unit that exists and does not run; 4 is one that does not exist.
    if !matches!(code(&["status", unit]), Ok(Some(1..=3))) {
        return None;
    }
    match code(&[verb]) {
        Ok(Some(0)) => Some(Ok(json!({}))),
        Ok(Some(_) | None) | Err(_) => None,
    }
}

#[cfg(test)]
mod tests {
    //! Only what changes nothing: the rest ends machines and is tested in one.
    use super::*;

    #[test]
    fn an_unknown_mode_shuts_nothing_down() {
        let mut map = serde_json::Map::new();
        map.insert("mode".into(), json!("now"));
        let failed = shut_down(&mut Arguments::new(map)).unwrap_err();
        assert!(failed.desc.starts_with("mode is invalid"));
    }

    #[test]
    fn the_kernel_alone_cannot_sleep_in_two_ways_at_once() {
        assert_eq!(Sleep::Hybrid.state(), None);
        assert_eq!(Sleep::Ram.state(), Some("mem"));
    }
}
