//! QMP framing, as clients see it.

use crate::harness::{Control, Served, serve_disk};
use serde_json::json;
use vhost_blk_wire::command::{COMMAND_NAMES, QueryVersion, QueryVolumes};

fn serve() -> Served {
    serve_disk(1 << 20, &["--serial", "serial-1"])
}

#[test]
fn nothing_works_before_negotiation_and_negotiation_only_once() {
    let served = serve();
    let socket = &served.control;
    let mut control = Control::greeted(socket);
    assert_eq!(
        control
            .execute("query-version", json!({}))
            .unwrap_err()
            .class,
        "CommandNotFound"
    );
    control.execute("qmp_capabilities", json!({})).unwrap();
    assert_eq!(
        control
            .execute("qmp_capabilities", json!({}))
            .unwrap_err()
            .class,
        "CommandNotFound"
    );
    control.run(&QueryVersion::default()).unwrap();
}

#[test]
fn messages_need_no_newline_and_may_come_in_any_pieces() {
    let served = serve();
    let socket = &served.control;
    let mut control = Control::greeted(socket);
    control
        .send(r#"{"execute":"qmp_capabilities"}{"execute":"query-version","id":{"a":[1]}}{"exec"#);
    assert_eq!(control.value(), json!({ "return": {} }));
    let version = control.value();
    assert_eq!(
        version["id"],
        json!({ "a": [1] }),
        "the id comes back as it was"
    );
    control.send("ute\" : \"query-commands\"}\r\n\r\n");
    assert_eq!(
        control.value()["return"].as_array().unwrap().len(),
        COMMAND_NAMES.len()
    );
}

#[test]
fn every_command_that_is_named_is_there_and_others_are_not() {
    let served = serve();
    let socket = &served.control;
    let mut control = Control::connect(socket);
    for name in COMMAND_NAMES
        .iter()
        .filter(|name| **name != "qmp_capabilities")
    {
        if let Err(error) = control.execute(name, json!({})) {
            assert_ne!(error.class, "CommandNotFound", "{name}: {error}");
        }
    }
    assert_eq!(
        control.execute("device_add", json!({})).unwrap_err().class,
        "CommandNotFound"
    );
}

#[test]
fn garbage_is_answered_and_the_connection_closed_and_others_go_on() {
    let served = serve();
    let socket = &served.control;
    for garbage in ["hello\n", "}", "\u{1}\u{2}"] {
        let mut control = Control::connect(socket);
        control.send(garbage);
        assert_eq!(control.answer().unwrap_err().class, "GenericError");
        assert!(control.is_closed());
    }
    for odd in ["[]", "17", "{}", r#"{"execute":7}"#, r#"{"arguments":{}}"#] {
        let mut control = Control::connect(socket);
        control.send(odd);
        control.send("\n");
        assert_eq!(control.answer().unwrap_err().class, "GenericError", "{odd}");
        control.run(&QueryVersion::default()).unwrap();
    }
}

#[test]
fn volumes_are_described() {
    let served = serve();
    let (scratch, socket) = (&served.scratch, &served.control);
    let volumes = Control::connect(socket)
        .run(&QueryVolumes::default())
        .unwrap();
    let [volume] = volumes.as_slice() else {
        panic!("{volumes:?}")
    };
    assert_eq!(volume.volume, "serial-1");
    assert_eq!(volume.serial, "serial-1");
    assert_eq!(volume.size_bytes, 1 << 20);
    assert_eq!(volume.socket, scratch.path("socket").to_str().unwrap());
    assert!(volume.plain && !volume.connected && !volume.poisoned && !volume.read_only);
}

#[test]
fn getfd_without_a_descriptor_is_an_error() {
    let served = serve();
    let socket = &served.control;
    let mut control = Control::connect(socket);
    let error = control
        .execute("getfd", json!({ "fdname": "x" }))
        .unwrap_err();
    assert_eq!(error.class, "GenericError");
}
