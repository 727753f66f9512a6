//! `guest-get-users`: who is logged in.
//!
//! Called by `command`. Reads utmp(5), whose records have one layout on all 64-bit Linux but 32-bit times.
#![deny(clippy::indexing_slicing)]

use super::arguments::Arguments;
use super::failed::Outcome;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;

const FILE: &str = "/run/utmp";
/// Bytes of a record, and where its parts lie.
const RECORD_BYTES: usize = 384;
const USER: std::ops::Range<usize> = 44..76;
const SECONDS: std::ops::Range<usize> = 340..344;
const MICROSECONDS: std::ops::Range<usize> = 344..348;
/// Records of this type are logins of people.
const USER_PROCESS: i16 = 7;
/// More than any machine has; a file beyond that is not read to its end.
const RECORDS_MAX: usize = 65_536;

pub(super) fn list(arguments: &Arguments) -> Outcome {
    arguments.end()?;
    Ok(logins(&fs::read(FILE).unwrap_or_default()))
}

/// Each user once, with the earliest login.
fn logins(file: &[u8]) -> Value {
    let mut earliest: BTreeMap<String, f64> = BTreeMap::new();
    for record in file.chunks_exact(RECORD_BYTES).take(RECORDS_MAX) {
        if let Some((user, time)) = login(record) {
            let known = earliest.entry(user).or_insert(time);
            *known = known.min(time);
        }
    }
    earliest
        .into_iter()
        .map(|(user, time)| json!({"user": user, "login-time": time}))
        .collect()
}

fn login(record: &[u8]) -> Option<(String, f64)> {
    let kind = i16::from_le_bytes(record.get(..2)?.try_into().ok()?);
    if kind != USER_PROCESS {
        return None;
    }
    let number = |range: std::ops::Range<usize>| {
        Some(u32::from_le_bytes(record.get(range)?.try_into().ok()?))
    };
    let user = record.get(USER)?.split(|byte| *byte == 0).next()?;
    let user = String::from_utf8_lossy(user).into_owned();
    let time = f64::from(number(SECONDS)?) + f64::from(number(MICROSECONDS)?) / 1e6;
    Some((user, time))
}

#[cfg(test)]
mod tests {
    //! Records made by hand, by utmp(5).
    use super::*;

    fn record(kind: i16, user: &str, seconds: u32, microseconds: u32) -> Vec<u8> {
        let mut record = vec![0; RECORD_BYTES];
        record[..2].copy_from_slice(&kind.to_le_bytes());
        record[USER.start..USER.start + user.len()].copy_from_slice(user.as_bytes());
        record[SECONDS].copy_from_slice(&seconds.to_le_bytes());
        record[MICROSECONDS].copy_from_slice(&microseconds.to_le_bytes());
        record
    }

    #[test]
    fn each_user_is_named_once_with_the_first_login() {
        let file = [
            record(2, "reboot", 1, 0),
            record(7, "ann", 200, 0),
            record(7, "ann", 100, 500_000),
            record(7, "bob", 3_000_000_000, 0),
            vec![7; 10],
        ]
        .concat();
        assert_eq!(
            logins(&file),
            json!([{"user": "ann", "login-time": 100.5}, {"user": "bob", "login-time": 3e9}])
        );
        assert_eq!(logins(&[]), json!([]));
    }
}
