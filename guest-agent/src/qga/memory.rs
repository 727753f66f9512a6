//! Memory blocks: `guest-get-memory-blocks`, `guest-set-memory-blocks`, `guest-get-memory-block-info`.
//!
//! Called by `command`; text in `/sys/devices/system/memory`, which a kernel without memory hotplug has not.

use super::arguments::Arguments;
use super::failed::{Failed, Outcome};
use super::processors::numbered;
use serde_json::{Value, json};
use std::fs;
use std::io;
use std::path::PathBuf;

const DIRECTORY: &str = "/sys/devices/system/memory";

fn directory(index: i64) -> PathBuf {
    PathBuf::from(format!("{DIRECTORY}/memory{index}"))
}

pub(super) fn list(arguments: &Arguments) -> Outcome {
    arguments.end()?;
    let all = numbered(&format!("{DIRECTORY}/"), "memory").map_err(|error| {
        Failed::because(format!("Can't open directory\"{DIRECTORY}/\""), &error)
    })?;
    let mut blocks = Vec::new();
    for index in all {
        let directory = directory(index);
        let state = fs::read_to_string(directory.join("state"))
            .map_err(|error| Failed::because(format!("{}", directory.display()), &error))?;
        let removable = fs::read_to_string(directory.join("removable")).unwrap_or_default();
        blocks.push(json!({
            "phys-index": index,
            "online": state.starts_with("online"),
            "can-offline": !removable.starts_with('0'),
        }));
    }
    Ok(json!(blocks))
}

pub(super) fn set(arguments: &mut Arguments) -> Outcome {
    let mut wanted = Vec::new();
    for mut block in arguments.objects("mem-blks")? {
        let index = block.integer("phys-index")?;
        let online = block.flag("online")?;
        block.maybe_flag("can-offline")?;
        block.end()?;
        wanted.push((index, online));
    }
    arguments.end()?;
    if !fs::exists(DIRECTORY).unwrap_or(false) {
        return Err(Failed::unsupported());
    }
    Ok(wanted
        .into_iter()
        .map(|(index, online)| set_one(index, online))
        .collect())
}

fn set_one(index: i64, online: bool) -> Value {
    let file = directory(index).join("state");
    let done = fs::read_to_string(&file).and_then(|state| {
        if state.starts_with("online") == online {
            return Ok(());
        }
        fs::write(&file, if online { "online" } else { "offline" })
    });
    match done {
        Ok(()) => json!({"phys-index": index, "response": "success"}),
        Err(error) => {
            let response = if error.kind() == io::ErrorKind::NotFound {
                "not-found"
            } else {
                "operation-failed"
            };
            json!({"phys-index": index, "response": response, "error-code": error.raw_os_error().unwrap_or(0)})
        }
    }
}

pub(super) fn block_info(arguments: &Arguments) -> Outcome {
    arguments.end()?;
    let file = format!("{DIRECTORY}/block_size_bytes");
    let text = fs::read_to_string(&file)
        .map_err(|error| Failed::because(format!("failed to open {file}"), &error))?;
    let size = u64::from_str_radix(text.trim(), 16);
    size.map(|size| json!({ "size": size }))
        .map_err(|_| Failed::generic(format!("{file} is not a number: {}", text.trim())))
}
