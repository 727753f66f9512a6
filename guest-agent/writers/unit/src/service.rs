//! A systemd service that is stopped and started again.
//!
//! Called by the writer and by `watch`. It speaks to systemd through `systemctl`, never to the service itself. What it refuses to
//! stop is what a stop would take others down with, or what somebody else would start meanwhile.

use guest_agent_wire::sdk::{Call, Veto};
use guest_agent_wire::types::WriterFailure;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

/// Between two looks at a job of systemd's.
const LOOK: Duration = Duration::from_millis(20);
/// Longest time for a question, which systemd answers at once or not at all.
const ANSWER: Duration = Duration::from_secs(20);
/// A stop of these takes others down that a start does not bring back.
const TAKEN_DOWN: [&str; 3] = ["RequiredBy", "BoundBy", "ConsistsOf"];
/// These start it, whatever a person asked for.
const STARTERS: [&str; 1] = ["TriggeredBy"];
/// What is asked of a unit.
const STATE: &str = "--property=LoadState,ActiveState,RefuseManualStop,RefuseManualStart,MainPID,\
     InactiveEnterTimestampMonotonic,ActiveEnterTimestampMonotonic,\
     RequiredBy,BoundBy,ConsistsOf,TriggeredBy";

/// A service, by its unit's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    unit: String,
}

impl Service {
    /// Of this name; a name of no kind is a service's, as for `systemctl`.
    ///
    /// # Errors
    /// It is no service: the stop of a target, slice or scope stops others.
    pub fn named(unit: &str) -> Result<Self, Veto> {
        let kind = unit.rsplit_once('.').map(|(_, kind)| kind);
        let is_name = !unit.is_empty()
            && !unit.starts_with('-')
            && !unit.contains(|c: char| c.is_whitespace() || c.is_control());
        if is_name && kind.is_none() {
            return Self::named(&format!("{unit}.service"));
        }
        if !is_name || kind != Some("service") {
            let message = format!("{unit} is no service: only services are stopped");
            return Err(Veto::nonretryable(message));
        }
        Ok(Self {
            unit: unit.to_owned(),
        })
    }

    /// The unit.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.unit
    }

    /// Whether it may be stopped, asked before any effect.
    ///
    /// # Errors
    /// It does not run; it may not be stopped or started by hand; others would go down with it; another unit would start it.
    pub fn may_be_stopped(&self) -> Result<(), Veto> {
        let state = self.state()?;
        if !state.is("ActiveState", "active") {
            let message = format!("{} does not run: it is {}", self.unit, state.word());
            return Err(Veto::retryable(message));
        }
        if state.is("RefuseManualStop", "yes") || state.is("RefuseManualStart", "yes") {
            let message = format!("{} may not be stopped and started by hand", self.unit);
            return Err(Veto::nonretryable(message));
        }
        let own = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        if own.split(['/', '\n']).any(|part| part == self.unit) {
            let message = format!("{} is the writer's own unit", self.unit);
            return Err(Veto::nonretryable(message));
        }
        for (properties, what) in [
            (&TAKEN_DOWN[..], "would go down with it"),
            (&STARTERS[..], "would start it meanwhile"),
        ] {
            for unit in properties.iter().flat_map(|name| state.units(name)) {
                if Self::runs(unit)? {
                    let message = format!("{}: {unit} {what}; let it be frozen", self.unit);
                    return Err(Veto::nonretryable(message));
                }
            }
        }
        Ok(())
    }

    /// Returns when it is stopped.
    ///
    /// # Errors
    /// It is not, in time or at all. Then it may be half way: it is for the caller to start it.
    pub fn stop(&self, call: &Call<'_>) -> Result<(), Veto> {
        // A job that somebody else waits for is not replaced.
        let arguments = ["stop", "--quiet", "--job-mode=fail", "--", &self.unit];
        let output = within(systemctl(&arguments), call.remaining(), || call.is_over())
            .map_err(|error| self.not_done("stop", &error))?;
        if !output.status.success() {
            return Err(self.said("stop", &output));
        }
        if self.is_stopped()? {
            return Ok(());
        }
        let message = format!("{} was stopped, and runs again", self.unit);
        Err(Veto::retryable(message))
    }

    /// Has it started; does not wait until it is up.
    ///
    /// # Errors
    /// systemd does not do it.
    pub fn start(&self) -> Result<(), Veto> {
        let arguments = ["start", "--quiet", "--no-block", "--", &self.unit];
        let output = within(systemctl(&arguments), ANSWER, || false)
            .map_err(|error| self.not_done("start", &error))?;
        if !output.status.success() {
            return Err(self.said("start", &output));
        }
        Ok(())
    }

    /// Returns when it is up after a start.
    ///
    /// # Errors
    /// It failed, or is not up in time.
    pub fn wait_until_up(&self, call: &Call<'_>) -> Result<(), Veto> {
        loop {
            let state = self.state()?;
            if state.is("ActiveState", "active") {
                return Ok(());
            }
            if state.is("ActiveState", "failed") {
                let message = format!("{} failed when it was started again", self.unit);
                return Err(Veto::nonretryable(message));
            }
            if call.is_over() {
                let message = format!("{} is still {}", self.unit, state.word());
                return Err(Veto::timeout(message));
            }
            std::thread::sleep(LOOK);
        }
    }

    /// None of its processes is left, and systemd has nothing to do with it.
    ///
    /// # Errors
    /// systemd does not answer.
    pub fn is_stopped(&self) -> Result<bool, Veto> {
        let state = self.state()?;
        Ok(["inactive", "failed"].contains(&state.word()) && state.is("MainPID", "0"))
    }

    /// When it was stopped and started last: one start in between changes it.
    ///
    /// # Errors
    /// systemd does not answer.
    pub fn evidence(&self) -> Result<Value, Veto> {
        let state = self.state()?;
        let number = |name: &str| state.text(name).parse::<u64>().ok();
        Ok(json!({
            "unit": self.unit,
            "state": state.word(),
            "started_us": number("ActiveEnterTimestampMonotonic"),
            "stopped_us": number("InactiveEnterTimestampMonotonic"),
        }))
    }

    fn runs(unit: &str) -> Result<bool, Veto> {
        let service = Self {
            unit: unit.to_owned(),
        };
        let state = service.state()?;
        Ok(!["inactive", "failed"].contains(&state.word()))
    }

    fn state(&self) -> Result<State, Veto> {
        let output = within(
            systemctl(&["show", STATE, "--", &self.unit]),
            ANSWER,
            || false,
        )
        .map_err(|error| self.not_done("show", &error))?;
        if !output.status.success() {
            return Err(self.said("show", &output));
        }
        let state = State::parse(&String::from_utf8_lossy(&output.stdout));
        if !state.is("LoadState", "loaded") {
            let message = format!("{} is {}", self.unit, state.text("LoadState"));
            return Err(Veto::nonretryable(message));
        }
        Ok(state)
    }

    fn not_done(&self, what: &str, error: &io::Error) -> Veto {
        let code = if error.kind() == io::ErrorKind::TimedOut {
            WriterFailure::Timeout
        } else {
            WriterFailure::Retryable
        };
        Veto::new(code, format!("systemctl {what} {}: {error}", self.unit))
    }

    fn said(&self, what: &str, output: &Output) -> Veto {
        let said = String::from_utf8_lossy(&output.stderr);
        Veto::retryable(format!("systemctl {what} {}: {}", self.unit, said.trim()))
    }
}

fn systemctl(arguments: &[&str]) -> Command {
    let mut command = Command::new("systemctl");
    command.arg("--no-ask-password").args(arguments);
    command
}

/// Its output, if it ends in time; killed if not. It prints a line or two, which the pipes hold.
fn within(mut command: Command, limit: Duration, is_over: impl Fn() -> bool) -> io::Result<Output> {
    let until = std::time::Instant::now() + limit;
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    while child.try_wait()?.is_none() {
        if is_over() || std::time::Instant::now() >= until {
            child.kill()?;
            child.wait()?;
            return Err(io::ErrorKind::TimedOut.into());
        }
        std::thread::sleep(LOOK);
    }
    child.wait_with_output()
}

/// What `systemctl show` says: a line `NAME=VALUE` for each property.
#[derive(Debug)]
struct State {
    properties: BTreeMap<String, String>,
}

impl State {
    fn parse(text: &str) -> Self {
        let lines = text.lines().filter_map(|line| line.split_once('='));
        let properties = lines.map(|(name, value)| (name.to_owned(), value.to_owned()));
        Self {
            properties: properties.collect(),
        }
    }

    /// Empty if systemd does not know the property.
    fn text(&self, name: &str) -> &str {
        self.properties.get(name).map_or("", String::as_str)
    }

    fn is(&self, name: &str, value: &str) -> bool {
        self.text(name) == value
    }

    /// The active state.
    fn word(&self) -> &str {
        self.text("ActiveState")
    }

    fn units(&self, name: &str) -> impl Iterator<Item = &str> {
        self.text(name).split_whitespace()
    }
}
