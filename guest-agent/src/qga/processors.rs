//! Processors: `guest-get-vcpus`, `guest-set-vcpus`, `guest-get-cpustats`, `guest-get-load`.
//!
//! Called by `command`; text in `/sys` and `/proc`.
#![deny(clippy::indexing_slicing)]

use super::arguments::Arguments;
use super::failed::{Failed, Outcome};
use serde_json::{Map, Value, json};
use std::fs;
use std::io;
use std::path::PathBuf;

const DIRECTORY: &str = "/sys/devices/system/cpu";
/// A tick of `/proc/stat` is 1/100 s on every architecture (USER_HZ), in milliseconds.
const TICK_MS: u64 = 10;

fn directory(id: i64) -> PathBuf {
    PathBuf::from(format!("{DIRECTORY}/cpu{id}"))
}

/// Numbers of the entries NAME0, NAME1, .. of a directory, in order.
pub(super) fn numbered(directory: &str, name: &str) -> io::Result<Vec<i64>> {
    let entries = fs::read_dir(directory)?.flatten();
    let mut numbers: Vec<i64> = entries
        .filter_map(|entry| {
            let entry = entry.file_name();
            let digits = entry.to_str()?.strip_prefix(name)?;
            digits
                .bytes()
                .all(|byte| byte.is_ascii_digit())
                .then_some(digits)?
                .parse()
                .ok()
        })
        .collect();
    numbers.sort_unstable();
    Ok(numbers)
}

pub(super) fn list(arguments: &Arguments) -> Outcome {
    arguments.end()?;
    let all = numbered(DIRECTORY, "cpu")
        .map_err(|error| Failed::because(format!("failed to list entries: {DIRECTORY}"), &error))?;
    let all = all.into_iter().map(|id| {
        // The first processor of many machines cannot be taken away and has no such file.
        let online = fs::read_to_string(directory(id).join("online"));
        json!({
            "logical-id": id,
            "online": online.as_ref().map_or(true, |text| !text.starts_with('0')),
            "can-offline": online.is_ok(),
        })
    });
    Ok(all.collect())
}

/// Answers how many of the list were done; an error only if the first one failed, as QEMU does.
pub(super) fn set(arguments: &mut Arguments) -> Outcome {
    let mut wanted = Vec::new();
    for mut processor in arguments.objects("vcpus")? {
        let id = processor.integer("logical-id")?;
        let online = processor.flag("online")?;
        processor.maybe_flag("can-offline")?;
        processor.end()?;
        wanted.push((id, online));
    }
    arguments.end()?;
    let mut done = 0;
    for (id, online) in wanted {
        match set_one(id, online) {
            Ok(()) => done += 1,
            Err(failed) if done == 0 => return Err(failed),
            Err(_) => break,
        }
    }
    Ok(json!(done))
}

fn set_one(id: i64, online: bool) -> Result<(), Failed> {
    let directory = directory(id);
    let name = directory.display();
    fs::metadata(&directory)
        .map_err(|error| Failed::because(format!("open(\"{name}/\")"), &error))?;
    let file = directory.join("online");
    match fs::read_to_string(&file) {
        Err(error) if error.kind() == io::ErrorKind::NotFound && online => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(Failed::generic(format!(
            "logical processor #{id} can't be offlined"
        ))),
        Err(error) => Err(Failed::because(format!("open(\"{name}//online\")"), &error)),
        Ok(text) if text.starts_with('0') != online => Ok(()),
        Ok(_) => fs::write(&file, if online { "1" } else { "0" })
            .map_err(|error| Failed::because(format!("pwrite(\"{name}//online\")"), &error)),
    }
}

pub(super) fn statistics(arguments: &Arguments) -> Outcome {
    arguments.end()?;
    let text = fs::read_to_string("/proc/stat")
        .map_err(|error| Failed::because("open(\"/proc/stat\")", &error))?;
    Ok(text.lines().filter_map(statistics_of).collect())
}

/// A line `cpu0 1 2 ..`; older kernels have fewer numbers.
fn statistics_of(line: &str) -> Option<Value> {
    const NAMES: [&str; 10] = [
        "user",
        "nice",
        "system",
        "idle",
        "iowait",
        "irq",
        "softirq",
        "steal",
        "guest",
        "guestnice",
    ];
    let mut words = line.strip_prefix("cpu")?.split(' ');
    let cpu: u64 = words.next()?.parse().ok()?;
    let mut object = Map::new();
    object.insert("type".into(), json!("linux"));
    object.insert("cpu".into(), json!(cpu));
    for (name, word) in NAMES.iter().zip(words) {
        let ticks: u64 = word.parse().ok()?;
        object.insert((*name).into(), json!(ticks.saturating_mul(TICK_MS)));
    }
    Some(Value::Object(object))
}

/// Newer than QEMU 7.2, asked by newer libvirt.
pub(super) fn load(arguments: &Arguments) -> Outcome {
    arguments.end()?;
    let text = fs::read_to_string("/proc/loadavg")
        .map_err(|error| Failed::because("Cannot query load average", &error))?;
    let mut numbers = text
        .split(' ')
        .map(|word| word.parse::<f64>().unwrap_or(0.0));
    let mut next = || numbers.next().unwrap_or(0.0);
    Ok(json!({"load1m": next(), "load5m": next(), "load15m": next()}))
}

#[cfg(test)]
mod tests {
    //! Lines of `/proc/stat`, and this machine's own processors, which are not changed.
    use super::*;

    #[test]
    fn ticks_become_milliseconds() {
        let one = statistics_of("cpu1 1 2 3 4 5").unwrap();
        assert_eq!(
            one,
            json!({"type": "linux", "cpu": 1, "user": 10, "nice": 20, "system": 30, "idle": 40, "iowait": 50})
        );
        assert_eq!(statistics_of("cpu  1 2 3"), None);
        assert_eq!(statistics_of("intr 5"), None);
    }

    #[test]
    fn the_first_processor_is_there_and_a_missing_one_is_an_error_only_at_the_head() {
        let all = list(&Arguments::default()).unwrap();
        assert_eq!(
            (&all[0]["logical-id"], &all[0]["online"]),
            (&json!(0), &json!(true))
        );
        let set = |list: Value| {
            let mut map = Map::new();
            map.insert("vcpus".into(), list);
            set(&mut Arguments::new(map))
        };
        let missing = json!({"logical-id": 7777, "online": true});
        assert_eq!(
            set(json!([missing])).unwrap_err().desc,
            "open(\"/sys/devices/system/cpu/cpu7777/\"): No such file or directory"
        );
        let first = json!({"logical-id": 0, "online": true});
        assert_eq!(set(json!([first, missing])).unwrap(), 1);
        assert_eq!(set(json!([])).unwrap(), 0);
    }
}
