//! The guest's clock: `guest-get-time`, `guest-set-time`, `guest-get-timezone`.
//!
//! Called by `command`. Holds are timed by `crate::clock`, which a set time does not touch.

use super::arguments::Arguments;
use super::failed::{Failed, Outcome};
use super::program;
use rustix::time::{ClockId, Timespec, clock_gettime, clock_settime};
use serde_json::json;
use std::path::Path;
use tz::TimeZone;

const HWCLOCK: &str = "/sbin/hwclock";
const NANOSECONDS: i64 = 1_000_000_000;

/// Nanoseconds since 1970.
pub(super) fn time(arguments: &Arguments) -> Outcome {
    arguments.end()?;
    let now = clock_gettime(ClockId::Realtime);
    Ok(json!(
        now.tv_sec
            .saturating_mul(NANOSECONDS)
            .saturating_add(now.tv_nsec)
    ))
}

/// Sets the system's clock and then the hardware's by it; without a time, the system's by the hardware's.
pub(super) fn set(arguments: &mut Arguments) -> Outcome {
    let time_ns = arguments.maybe_integer("time")?;
    arguments.end()?;
    let hwclock = program::find(HWCLOCK).map_err(|_| Failed::unsupported())?;
    if let Some(time_ns) = time_ns {
        set_system(time_ns)?;
    }
    synchronise(&hwclock, if time_ns.is_some() { "-w" } else { "-s" })
}

fn set_system(time_ns: i64) -> Result<(), Failed> {
    let time = Timespec {
        tv_sec: time_ns / NANOSECONDS,
        // Negative for a time before 1970, which the kernel refuses.
        tv_nsec: time_ns % NANOSECONDS,
    };
    clock_settime(ClockId::Realtime, time)
        .map_err(|error| Failed::because("Failed to set time to guest", &error.into()))
}

fn synchronise(hwclock: &Path, direction: &str) -> Outcome {
    match program::run(hwclock, &[direction], b"") {
        Ok(status) if status.success() => Ok(json!({})),
        Ok(_) => Err(Failed::generic(
            "hwclock failed to set hardware clock to system time",
        )),
        Err(error) => Err(Failed::because("failed to create child process", &error)),
    }
}

/// What `/etc/localtime` says now; a guest without it lives by UTC.
pub(super) fn time_zone(arguments: &Arguments) -> Outcome {
    arguments.end()?;
    let zone = TimeZone::local().unwrap_or_else(|_| TimeZone::utc());
    let now = zone.find_current_local_time_type();
    let (name, offset) = match &now {
        Ok(now) => (now.time_zone_designation(), now.ut_offset()),
        Err(_) => ("", 0),
    };
    let name = if name.is_empty() { "UTC" } else { name };
    Ok(json!({"zone": name, "offset": offset}))
}
