//! Bytes in, bytes out. The actor's place is taken by the other end of a channel.

use super::*;
use crate::quiesce::service::Signal;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, channel};

fn guest() -> Guest {
    Guest {
        sources: Sources {
            proc: PathBuf::from("/proc"),
            sys: PathBuf::from("/sys"),
            only_under: Some(PathBuf::from("/nowhere")),
        },
    }
}

fn service() -> (Service, Receiver<Signal>) {
    let (sender, receiver) = channel();
    (Service::new(sender), receiver)
}

fn said(text: &str) -> Vec<u8> {
    let (service, _signals) = service();
    let (sender, replies) = channel();
    hear(text.as_bytes(), &service, &guest(), move |reply| {
        sender.send(reply).unwrap();
    });
    replies.recv().unwrap()
}

fn said_text(text: &str) -> String {
    String::from_utf8(said(text)).unwrap()
}

#[test]
fn libvirt_gets_its_large_id_back() {
    assert_eq!(
        said_text(r#"{"execute":"guest-sync", "arguments":{"id":1795328126191}}"#),
        "{\"return\":1795328126191}\n"
    );
}

#[test]
fn a_delimited_sync_begins_with_the_delimiter() {
    assert_eq!(
        said(r#"{"execute":"guest-sync-delimited","arguments":{"id":7}}"#),
        b"\xff{\"return\":7}\n"
    );
}

#[test]
fn the_request_id_is_echoed() {
    assert_eq!(
        said_text(r#"{"execute":"guest-ping","id":"x"}"#),
        "{\"id\":\"x\",\"return\":{}}\n"
    );
}

#[test]
fn an_unknown_command_is_refused_in_qemus_words() {
    assert_eq!(
        said_text(r#"{"execute":"guest-exec"}"#),
        "{\"error\":{\"class\":\"CommandNotFound\",\"desc\":\"The command guest-exec has not been found\"}}\n"
    );
}

#[test]
fn only_the_allowed_list_works_while_frozen() {
    for (name, allowed) in COMMANDS {
        assert_eq!(allow(name, true).is_ok(), *allowed);
        assert!(allow(name, false).is_ok());
    }
    let failed = allow("guest-fsfreeze-freeze", true).unwrap_err();
    assert_eq!(failed.class, "CommandNotFound");
    assert_eq!(
        failed.desc,
        "Command guest-fsfreeze-freeze has been disabled: the agent is in frozen state"
    );
}

#[test]
fn every_command_does_something() {
    let (service, signals) = service();
    for (name, _) in COMMANDS {
        let (sender, replies) = channel();
        let text = format!("{{\"execute\":{name:?},\"arguments\":{{\"id\":1}}}}");
        hear(text.as_bytes(), &service, &guest(), move |reply| {
            sender.send(reply).unwrap();
        });
        if let Ok(Signal::Request(_, answer)) = signals.try_recv() {
            answer(Ok(json!(0)));
        }
        let reply = String::from_utf8_lossy(&replies.recv().unwrap()).into_owned();
        assert!(reply.contains("\"return\""), "{name}: {reply}");
        assert_eq!(reply.matches('\n').count(), 1);
    }
}

#[test]
fn a_broken_hold_is_told_as_an_error_of_the_thaw() {
    let (service, signals) = service();
    let (sender, replies) = channel();
    hear(
        br#"{"execute":"guest-fsfreeze-thaw"}"#,
        &service,
        &guest(),
        move |reply| sender.send(reply).unwrap(),
    );
    let Ok(Signal::Request(Request::QgaThaw, answer)) = signals.try_recv() else {
        panic!("no thaw was asked for");
    };
    let code = guest_agent_wire::host::ErrorCode::HoldBroken;
    answer(Err(crate::quiesce::cause::error(
        code,
        "the limit passed".into(),
        true,
    )));
    assert_eq!(
        String::from_utf8(replies.recv().unwrap()).unwrap(),
        "{\"error\":{\"class\":\"GenericError\",\"desc\":\"couldn't hold writes: the limit passed\"}}\n"
    );
}

#[test]
fn replies_are_what_qapis_client_types_expect() {
    let value = |text: &str| -> Value {
        let reply: Value = serde_json::from_slice(&said(text)).unwrap();
        reply.get("return").cloned().unwrap()
    };
    let info: qapi::qga::GuestAgentInfo =
        serde_json::from_value(value(r#"{"execute":"guest-info"}"#)).unwrap();
    assert_eq!(info.supported_commands.len(), COMMANDS.len());
    serde_json::from_value::<qapi::qga::GuestOSInfo>(value(r#"{"execute":"guest-get-osinfo"}"#))
        .unwrap();
    serde_json::from_value::<qapi::qga::GuestHostName>(value(
        r#"{"execute":"guest-get-host-name"}"#,
    ))
    .unwrap();
    assert!(value(r#"{"execute":"guest-get-time"}"#).as_i64().unwrap() > 0);
}
