//! `guest-network-get-interfaces`: names, hardware addresses, IP addresses and counters.
//!
//! Called by `command`. Addresses come from the kernel through getifaddrs(3); the rest is text in `/sys` and `/proc`.
#![deny(clippy::indexing_slicing)]

use super::arguments::Arguments;
use super::failed::{Failed, Outcome};
use nix::ifaddrs::getifaddrs;
use nix::sys::socket::SockaddrStorage;
use serde_json::{Map, Value, json};
use std::fs;
use std::io;
use std::net::IpAddr;

pub(super) fn interfaces(arguments: &Arguments) -> Outcome {
    arguments.end()?;
    let all = getifaddrs()
        .map_err(|error| Failed::because("getifaddrs failed", &io::Error::from(error)))?;
    let counters = fs::read_to_string("/proc/net/dev").unwrap_or_default();
    let mut found: Vec<(String, Vec<Value>)> = Vec::new();
    for interface in all {
        let name = interface.interface_name;
        let addresses = match found.iter_mut().find(|(known, _)| *known == name) {
            Some((_, addresses)) => addresses,
            None => {
                found.push((name, Vec::new()));
                match found.last_mut() {
                    Some((_, addresses)) => addresses,
                    None => continue,
                }
            }
        };
        if let Some(ip) = interface.address.as_ref().and_then(ip) {
            let mask = interface.netmask.as_ref().and_then(self::ip);
            addresses.push(address(ip, mask));
        }
    }
    Ok(found
        .into_iter()
        .map(|(name, addresses)| describe(&name, addresses, &counters))
        .collect())
}

fn ip(address: &SockaddrStorage) -> Option<IpAddr> {
    let four = address.as_sockaddr_in().map(|a| IpAddr::V4(a.ip()));
    four.or_else(|| address.as_sockaddr_in6().map(|a| IpAddr::V6(a.ip())))
}

fn address(ip: IpAddr, mask: Option<IpAddr>) -> Value {
    let prefix = match mask {
        Some(IpAddr::V4(mask)) => mask.to_bits().count_ones(),
        Some(IpAddr::V6(mask)) => mask.to_bits().count_ones(),
        None => 0,
    };
    let kind = if ip.is_ipv4() { "ipv4" } else { "ipv6" };
    json!({"ip-address": ip.to_string(), "ip-address-type": kind, "prefix": prefix})
}

fn describe(name: &str, addresses: Vec<Value>, counters: &str) -> Value {
    let mut object = Map::new();
    object.insert("name".into(), json!(name));
    // An alias (eth0:1) is the device's.
    let device = name.split(':').next().unwrap_or(name);
    let hardware = fs::read_to_string(format!("/sys/class/net/{device}/address"));
    if let Ok(hardware) = hardware {
        let hardware = hardware.trim();
        // Tunnels have none; longer ones (InfiniBand) are cut to the six bytes that the schema has room for.
        let hardware = if hardware.is_empty() {
            "00:00:00:00:00:00"
        } else {
            hardware.get(..17).unwrap_or(hardware)
        };
        object.insert("hardware-address".into(), json!(hardware));
    }
    if !addresses.is_empty() {
        object.insert("ip-addresses".into(), json!(addresses));
        if let Some(statistics) = statistics(device, counters) {
            object.insert("statistics".into(), statistics);
        }
    }
    Value::Object(object)
}

/// A line of `/proc/net/dev`: the name, a colon, eight numbers for what came and eight for what went.
fn statistics(device: &str, counters: &str) -> Option<Value> {
    let line = counters.lines().find_map(|line| {
        let (name, numbers) = line.split_once(':')?;
        (name.trim() == device).then_some(numbers)
    })?;
    let numbers = line.split_ascii_whitespace().map(str::parse);
    let numbers: Vec<u64> = numbers.collect::<Result<_, _>>().ok()?;
    let number = |at: usize| numbers.get(at).copied();
    Some(json!({
        "rx-bytes": number(0)?, "rx-packets": number(1)?, "rx-errs": number(2)?, "rx-dropped": number(3)?,
        "tx-bytes": number(8)?, "tx-packets": number(9)?, "tx-errs": number(10)?, "tx-dropped": number(11)?,
    }))
}

#[cfg(test)]
mod tests {
    //! Counters, and this machine's own loopback.
    use super::*;

    #[test]
    fn counters_are_found_by_name() {
        let text = "Inter-|   Receive  |  Transmit\n face |bytes |bytes\n    lo: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16\neth0:1 2";
        let lo = statistics("lo", text).unwrap();
        assert_eq!(
            (&lo["rx-dropped"], &lo["tx-dropped"]),
            (&json!(4), &json!(12))
        );
        assert_eq!(statistics("eth0", text), None);
        assert_eq!(statistics("eth1", text), None);
    }

    #[test]
    fn the_loopback_interface_has_its_address() {
        let Ok(Value::Array(all)) = interfaces(&Arguments::default()) else {
            panic!("no list");
        };
        let lo = all.iter().find(|one| one["name"] == "lo").unwrap();
        assert_eq!(lo["hardware-address"], "00:00:00:00:00:00");
        assert_eq!(
            lo["ip-addresses"][0],
            json!({"ip-address": "127.0.0.1", "ip-address-type": "ipv4", "prefix": 8})
        );
    }
}
