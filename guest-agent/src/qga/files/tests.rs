//! Real files in a directory of the test's own, and what QEMU's agent was heard to answer.

use super::*;
use serde_json::Map;

fn arguments(value: &Value) -> Arguments {
    Arguments::new(value.as_object().cloned().unwrap_or_else(Map::new))
}

struct Desk {
    files: Files,
    directory: tempfile::TempDir,
}

impl Desk {
    fn new() -> Self {
        Self {
            files: Files::default(),
            directory: tempfile::tempdir().unwrap(),
        }
    }

    fn path(&self, name: &str) -> String {
        self.directory
            .path()
            .join(name)
            .to_str()
            .unwrap()
            .to_owned()
    }

    fn open(&mut self, name: &str, mode: &str) -> i64 {
        let path = self.path(name);
        let handle = self
            .files
            .open(&mut arguments(&json!({"path": path, "mode": mode})));
        handle.unwrap().as_i64().unwrap()
    }

    fn read(&mut self, value: &Value) -> Outcome {
        self.files.read(&mut arguments(value))
    }

    fn write(&mut self, value: &Value) -> Outcome {
        self.files.write(&mut arguments(value))
    }

    fn seek(&mut self, value: &Value) -> Outcome {
        self.files.seek(&mut arguments(value))
    }
}

#[test]
fn what_is_written_is_read_back() {
    let mut desk = Desk::new();
    let handle = desk.open("f", "w+");
    assert_eq!(handle, 1000);
    let wrote = desk.write(&json!({"handle": handle, "buf-b64": "YWJjZGVm"}));
    assert_eq!(wrote.unwrap(), json!({"count": 6, "eof": false}));
    let wrote = desk.write(&json!({"handle": handle, "buf-b64": "YWJjZGVm", "count": 2}));
    assert_eq!(wrote.unwrap()["count"], 2);
    let read = desk.read(&json!({"handle": handle}));
    assert_eq!(
        read.unwrap(),
        json!({"count": 0, "buf-b64": "", "eof": true})
    );
    let sought = desk.seek(&json!({"handle": handle, "offset": 0, "whence": "set"}));
    assert_eq!(sought.unwrap(), json!({"position": 0, "eof": false}));
    let read = desk.read(&json!({"handle": handle, "count": 3}));
    assert_eq!(
        read.unwrap(),
        json!({"count": 3, "buf-b64": "YWJj", "eof": false})
    );
    let read = desk.read(&json!({"handle": handle}));
    assert_eq!(
        read.unwrap(),
        json!({"count": 5, "buf-b64": "ZGVmYWI=", "eof": true})
    );
    let read = desk.read(&json!({"handle": handle, "count": 0}));
    assert_eq!(read.unwrap()["eof"], false);
    let close = json!({"handle": handle});
    assert_eq!(desk.files.flush(&mut arguments(&close)).unwrap(), json!({}));
    assert_eq!(desk.files.close(&mut arguments(&close)).unwrap(), json!({}));
    let gone = desk.files.close(&mut arguments(&close)).unwrap_err();
    assert_eq!(gone.desc, "handle '1000' has not been found");
}

#[test]
fn wrong_counts_places_and_modes_are_refused_in_qemus_words() {
    let mut desk = Desk::new();
    let handle = desk.open("f", "w+");
    let desc = |outcome: Outcome| outcome.unwrap_err().desc;
    for count in [-1, READ_BYTES_MAX + 1] {
        assert_eq!(
            desc(desk.read(&json!({"handle": handle, "count": count}))),
            format!("value '{count}' is invalid for argument count")
        );
    }
    for count in [-1, 7] {
        assert_eq!(
            desc(desk.write(&json!({"handle": handle, "buf-b64": "YWJjZGVm", "count": count}))),
            format!("value '{count}' is invalid for argument count")
        );
    }
    for (offset, whence, error) in [
        (-1, json!(0), "failed to seek file: Invalid argument"),
        (-100, json!("cur"), "failed to seek file: Invalid argument"),
        (0, json!(7), "invalid whence code 7"),
        (
            0,
            json!("bad"),
            "Parameter 'whence' does not accept value 'bad'",
        ),
        (
            0,
            json!([]),
            "Invalid parameter type for 'whence', expected: GuestFileWhence",
        ),
    ] {
        let seek = json!({"handle": handle, "offset": offset, "whence": whence});
        assert_eq!(desc(desk.seek(&seek)), error);
    }
    let (read_only, missing) = (desk.open("f", "r"), desk.path("missing"));
    assert_eq!(
        desc(desk.write(&json!({"handle": read_only, "buf-b64": "eA=="}))),
        "failed to write to file: Bad file descriptor"
    );
    assert_eq!(
        desc(desk.files.open(&mut arguments(&json!({"path": missing})))),
        format!("failed to open file '{missing}' (mode: 'r'): No such file or directory")
    );
    for mode in ["rw", "x", "", "br"] {
        assert_eq!(
            desc(
                desk.files
                    .open(&mut arguments(&json!({"path": missing, "mode": mode})))
            ),
            format!("invalid file open mode '{mode}'")
        );
    }
}

#[test]
fn a_pipe_without_another_end_does_not_stop_the_agent() {
    let mut desk = Desk::new();
    let path = desk.path("pipe");
    let made = std::process::Command::new("mkfifo").arg(&path).status();
    assert!(made.unwrap().success());
    let reader = desk.open("pipe", "r");
    assert_eq!(desk.read(&json!({"handle": reader})).unwrap()["eof"], true);
    let _writer = OpenOptions::new().write(true).open(&path).unwrap();
    assert_eq!(
        desk.read(&json!({"handle": reader})).unwrap_err().desc,
        "failed to read file: Resource temporarily unavailable"
    );
}

#[test]
fn there_is_an_end_to_open_files() {
    let mut desk = Desk::new();
    for _ in 0..OPEN_MAX {
        desk.open("f", "a");
    }
    let path = desk.path("f");
    let more = desk
        .files
        .open(&mut arguments(&json!({"path": path})))
        .unwrap_err();
    assert!(more.desc.ends_with("Too many open files"), "{}", more.desc);
}
