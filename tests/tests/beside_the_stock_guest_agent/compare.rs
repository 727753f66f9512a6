//! Two replies beside each other: the same keys, the same types, and the same values where these are facts of the guest.
//!
//! Called by the scenario. Lists are laid beside each other by what names their members, since their order says nothing.

use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

/// Members of a list are known by the first of these that they have.
const NAMES: &[&str] = &[
    "mountpoint",
    "name",
    "path",
    "logical-id",
    "phys-index",
    "cpu",
    "user",
    "ip-address",
    "dev",
];

/// Where they differ, and how: `.disk[vda].serial`, `only in ours`. Of a key in `volatile` only the type counts.
pub(crate) fn compare(theirs: &Value, ours: &Value, volatile: &[&str]) -> Vec<(String, String)> {
    let mut found = Vec::new();
    walk(theirs, ours, volatile, "", false, &mut found);
    found
}

fn walk(
    theirs: &Value,
    ours: &Value,
    volatile: &[&str],
    place: &str,
    loose: bool,
    found: &mut Vec<(String, String)>,
) {
    match (theirs, ours) {
        (Value::Object(theirs), Value::Object(ours)) => {
            let keys: BTreeSet<_> = theirs.keys().chain(ours.keys()).collect();
            for key in keys {
                let place = format!("{place}.{key}");
                let loose = loose || volatile.contains(&key.as_str());
                both(
                    theirs.get(key),
                    ours.get(key),
                    volatile,
                    &place,
                    loose,
                    found,
                );
            }
        }
        (Value::Array(theirs), Value::Array(ours)) => {
            let (theirs, ours) = (by_name(theirs), by_name(ours));
            let names: BTreeSet<_> = theirs.keys().chain(ours.keys()).collect();
            for name in names {
                let place = format!("{place}[{name}]");
                let pair = (theirs.get(name).copied(), ours.get(name).copied());
                both(pair.0, pair.1, volatile, &place, loose, found);
            }
        }
        _ => {
            let same = if loose {
                kind(theirs) == kind(ours)
            } else {
                theirs == ours
            };
            if !same {
                let shown = |value: &Value| value.to_string().chars().take(300).collect::<String>();
                let what = format!("theirs {}, ours {}", shown(theirs), shown(ours));
                found.push((place.to_owned(), what));
            }
        }
    }
}

fn both(
    theirs: Option<&Value>,
    ours: Option<&Value>,
    volatile: &[&str],
    place: &str,
    loose: bool,
    found: &mut Vec<(String, String)>,
) {
    match (theirs, ours) {
        (Some(theirs), Some(ours)) => walk(theirs, ours, volatile, place, loose, found),
        (Some(theirs), None) => found.push((place.to_owned(), format!("only in theirs: {theirs}"))),
        (None, Some(ours)) => found.push((place.to_owned(), format!("only in ours: {ours}"))),
        (None, None) => {}
    }
}

fn by_name(list: &[Value]) -> BTreeMap<String, &Value> {
    let mut named = BTreeMap::new();
    for value in list {
        let name = NAMES.iter().find_map(|key| value.get(key));
        let name = match name.unwrap_or(value) {
            Value::String(text) => text.clone(),
            other @ (Value::Null
            | Value::Bool(_)
            | Value::Number(_)
            | Value::Array(_)
            | Value::Object(_)) => other.to_string(),
        };
        // Equal names are counted, so that two of one are not one.
        let mut unique = name.clone();
        let mut count = 1;
        while named.contains_key(&unique) {
            count += 1;
            unique = format!("{name}#{count}");
        }
        named.insert(unique, value);
    }
    named
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(number) if number.is_f64() => "float",
        Value::Number(_) => "integer",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

#[test]
fn differences_are_found_and_named() {
    use serde_json::json;
    let theirs = json!({"a": 1, "n": 5, "list": [{"name": "x", "v": 1}, {"name": "y"}], "e": "x"});
    let ours = json!({"a": 2, "n": 6, "list": [{"name": "y"}, {"name": "x", "v": 1, "w": 0}]});
    let found = compare(&theirs, &ours, &["n"]);
    let places: Vec<_> = found.iter().map(|(place, _)| place.as_str()).collect();
    assert_eq!(places, [".a", ".e", ".list[x].w"]);
    assert_eq!(
        compare(&json!({"n": 1.5}), &json!({"n": 1}), &["n"]).len(),
        1
    );
    assert_eq!(compare(&json!([1, 1]), &json!([1]), &[]).len(), 1);
    assert!(compare(&theirs, &theirs, &[]).is_empty());
}
