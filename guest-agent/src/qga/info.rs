//! What the guest is: operating system and name.
//!
//! Called by `command`, never while frozen.

use super::arguments::Arguments;
use super::failed::Outcome;
use rustix::system::uname;
use serde_json::{Map, Value, json};
use std::fs;

/// `guest-get-osinfo`: uname(2), and os-release(5) where there is one.
pub(super) fn operating_system(arguments: &Arguments) -> Outcome {
    arguments.end()?;
    let kernel = uname();
    let mut object = Map::new();
    for (key, text) in [
        ("kernel-release", kernel.release()),
        ("kernel-version", kernel.version()),
        ("machine", kernel.machine()),
    ] {
        object.insert(key.into(), json!(text.to_string_lossy()));
    }
    let release = fs::read_to_string("/etc/os-release")
        .or_else(|_| fs::read_to_string("/usr/lib/os-release"))
        .unwrap_or_default();
    for (key, text) in release.lines().filter_map(release_line) {
        object.insert(key.into(), json!(text));
    }
    Ok(Value::Object(object))
}

fn release_line(line: &str) -> Option<(&'static str, &str)> {
    let (name, value) = line.split_once('=')?;
    let key = match name {
        "ID" => "id",
        "NAME" => "name",
        "PRETTY_NAME" => "pretty-name",
        "VERSION" => "version",
        "VERSION_ID" => "version-id",
        "VARIANT" => "variant",
        "VARIANT_ID" => "variant-id",
        _ => return None,
    };
    Some((key, value.trim_matches(['"', '\''])))
}

/// `guest-get-host-name`.
pub(super) fn host_name(arguments: &Arguments) -> Outcome {
    arguments.end()?;
    Ok(json!({ "host-name": uname().nodename().to_string_lossy() }))
}

#[cfg(test)]
mod tests {
    //! Lines of os-release(5).
    use super::*;

    #[test]
    fn quotes_of_either_kind_are_taken_off() {
        assert_eq!(release_line("NAME=\"A B\""), Some(("name", "A B")));
        assert_eq!(release_line("VERSION_ID='12'"), Some(("version-id", "12")));
        assert_eq!(release_line("ID=debian"), Some(("id", "debian")));
        assert_eq!(release_line("HOME_URL=x"), None);
        assert_eq!(release_line("nonsense"), None);
    }
}
