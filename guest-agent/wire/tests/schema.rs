//! The JSON schemas in `schema`: fresh from the types, and true of every golden message.
//!
//! After a change of the types: `cargo test -p guest-agent-wire --test schema -- --ignored` writes them anew.

#![allow(
    clippy::unwrap_used,
    reason = "a test may panic; clippy sees only its #[test] functions as one"
)]

use guest_agent_wire::host::{
    Frozen, Hello, Identified, Prepared, Request, Response, Status, Thawed, WritersSaid,
};
use guest_agent_wire::metadata::Metadata;
use guest_agent_wire::writer::{Event, FromWriter, Registration};
use jsonschema::Validator;
use schemars::{JsonSchema, schema_for};
use serde_json::Value;
use std::fs;
use std::path::PathBuf;

fn top() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn schema<T: JsonSchema>() -> Value {
    schema_for!(T).to_value()
}

/// Every message, and the file of its schema.
fn schemas() -> Vec<(&'static str, Value)> {
    vec![
        ("writer-registration", schema::<Registration>()),
        ("writer-event", schema::<Event>()),
        ("writer-line", schema::<FromWriter>()),
        ("writer-metadata", schema::<Metadata>()),
        ("host-request", schema::<Request>()),
        ("host-response", schema::<Response>()),
        ("host-hello", schema::<Hello>()),
        ("host-identify", schema::<Identified>()),
        ("host-prepare", schema::<Prepared>()),
        ("host-freeze", schema::<Frozen>()),
        ("host-thaw", schema::<Thawed>()),
        ("host-writers-said", schema::<WritersSaid>()),
        ("host-status", schema::<Status>()),
    ]
}

fn path(name: &str) -> PathBuf {
    top().join("schema").join(format!("{name}.json"))
}

fn read(path: &PathBuf) -> Value {
    let text = fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap()
}

#[test]
#[ignore = "writes the files"]
fn write_the_schemas() {
    fs::create_dir_all(top().join("schema")).unwrap();
    for (name, schema) in schemas() {
        let text = serde_json::to_string_pretty(&schema).unwrap();
        fs::write(path(name), text + "\n").unwrap();
    }
}

#[test]
fn the_schemas_are_those_of_the_types_and_there_are_no_others() {
    for (name, schema) in schemas() {
        assert!(read(&path(name)) == schema, "{name}: write it anew");
    }
    let files = fs::read_dir(top().join("schema")).unwrap().count();
    assert_eq!(files, schemas().len());
}

fn validator(name: &str) -> Validator {
    jsonschema::validator_for(&read(&path(name))).unwrap()
}

fn check(schema: &str, message: &Value) {
    let validator = validator(schema);
    let errors: Vec<String> = validator
        .iter_errors(message)
        .map(|error| format!("{}: {error}", error.instance_path()))
        .collect();
    assert!(errors.is_empty(), "{schema}: {errors:#?}\n{message:#}");
}

/// The golden messages: the schema of each, and the message.
fn golden() -> Vec<(String, Value)> {
    let mut messages = Vec::new();
    for entry in fs::read_dir(top().join("tests/golden")).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_str().unwrap();
        let message = read(&path);
        if let Some(command) = name.strip_prefix("host-") {
            if let Some(request) = message.get("request") {
                messages.push(("host-request".to_owned(), request.clone()));
            }
            let response = &message["response"];
            messages.push(("host-response".to_owned(), response.clone()));
            let answer = match command {
                "abort" | "error" => continue,
                "post_snapshot" | "backup_complete" | "pre_restore" | "post_restore" => {
                    "writers-said"
                }
                own => own,
            };
            messages.push((format!("host-{answer}"), response["return"].clone()));
        } else {
            let schema = match name {
                "writer-registration" | "writer-metadata" => name,
                "writer-reply" | "writer-progress" | "writer-release" => "writer-line",
                event => {
                    assert!(event.starts_with("writer-event-"), "{event}");
                    "writer-event"
                }
            };
            messages.push((schema.to_owned(), message));
        }
    }
    messages
}

#[test]
fn every_golden_message_is_as_its_schema_says() {
    let messages = golden();
    assert!(messages.len() > 40, "{}", messages.len());
    for (schema, message) in messages {
        check(&schema, &message);
    }
}

/// A schema that lets everything pass would be fresh and true as well.
#[test]
fn a_message_that_lacks_what_it_needs_or_has_another_type_is_not_as_its_schema_says() {
    for (schema, message, needed) in [
        ("writer-registration", "writer-registration", "instance_id"),
        ("writer-event", "writer-event-freeze", "generation"),
        ("writer-event", "writer-event-post_restore", "set"),
        ("writer-event", "writer-event-thaw", "seq"),
        ("writer-line", "writer-reply", "ok"),
        ("writer-line", "writer-progress", "progress"),
    ] {
        let validator = validator(schema);
        let mut message = read(&top().join(format!("tests/golden/{message}.json")));
        assert!(validator.is_valid(&message));
        message[needed] = Value::Array(Vec::new());
        assert!(!validator.is_valid(&message), "{schema}: {needed}");
        message.as_object_mut().unwrap().remove(needed);
        assert!(!validator.is_valid(&message), "{schema}: {needed}");
    }
    let mut document = read(&top().join("tests/golden/writer-metadata.json"));
    document["components"][0]["type"] = "table".into();
    assert!(!validator("writer-metadata").is_valid(&document));
}
