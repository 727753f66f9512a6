//! Bytes in, bytes out. The actor's and the workshop's places are taken by the other ends of channels.

use super::*;
use crate::filesystem::plan::Sources;
use crate::qga::workshop::WAITING_MAX;
use crate::quiesce::service::Signal;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel, sync_channel};

struct Room {
    desk: Desk,
    jobs: Receiver<Job>,
    signals: Receiver<Signal>,
    workshop: Workshop,
    syncs: Syncs,
    said: Sender<Vec<u8>>,
    replies: Receiver<Vec<u8>>,
}

impl Room {
    fn new() -> Self {
        Self::with(Policy::default())
    }

    fn with(policy: Policy) -> Self {
        let (sender, signals) = channel();
        let (work, jobs) = sync_channel(WAITING_MAX);
        let (said, replies) = channel();
        Self {
            desk: Desk {
                service: Service::new(sender),
                policy,
                work,
                door: Door::default(),
            },
            jobs,
            signals,
            workshop: Workshop::new(Sources {
                proc: PathBuf::from("/proc"),
                sys: PathBuf::from("/sys"),
                only_under: Some(PathBuf::from("/nowhere")),
            }),
            syncs: Syncs::default(),
            said,
            replies,
        }
    }

    fn hear(&self, text: &str) {
        let said = self.said.clone();
        hear(text.as_bytes(), &self.desk, &self.syncs, move |reply| {
            said.send(reply).unwrap();
        });
    }

    /// Does what the workshop and the actor would, and returns whether there was anything.
    fn work(&mut self) -> bool {
        let Ok(job) = self.jobs.try_recv() else {
            return false;
        };
        match job.work {
            // Nobody plays the actor while this thread waits for it.
            Work::Freeze(..) => (job.answer)(Ok(json!(1))),
            Work::Function(..) => self.workshop.work(job, &self.desk.service, false),
        }
        true
    }

    fn reply(&self) -> Option<String> {
        let bytes = self.replies.try_recv().ok()?;
        Some(String::from_utf8_lossy(&bytes).into_owned())
    }

    fn said(&mut self, text: &str) -> String {
        self.hear(text);
        self.work();
        if let Ok(Signal::Request(_, answer)) = self.signals.try_recv() {
            answer(Ok(json!(0)));
        }
        self.reply().unwrap()
    }

    fn value(&mut self, text: &str) -> Value {
        let reply: Value = serde_json::from_str(&self.said(text)).unwrap();
        reply.get("return").cloned().unwrap()
    }
}

/// Commands whose success would change this machine; none of them is done here.
const CHANGES_THE_MACHINE: &[&str] = &[
    "guest-fstrim",
    "guest-set-time",
    "guest-shutdown",
    "guest-suspend-disk",
    "guest-suspend-ram",
    "guest-suspend-hybrid",
];

#[test]
fn libvirt_gets_its_large_id_back() {
    assert_eq!(
        Room::new().said(r#"{"execute":"guest-sync", "arguments":{"id":1795328126191}}"#),
        "{\"return\":1795328126191}\n"
    );
}

#[test]
fn a_delimited_sync_begins_with_the_delimiter() {
    let room = Room::new();
    room.hear(r#"{"execute":"guest-sync-delimited","arguments":{"id":7}}"#);
    assert_eq!(room.replies.recv().unwrap(), b"\xff{\"return\":7}\n");
}

#[test]
fn the_request_id_is_echoed() {
    assert_eq!(
        Room::new().said(r#"{"execute":"guest-ping","id":"x"}"#),
        "{\"id\":\"x\",\"return\":{}}\n"
    );
}

#[test]
fn what_is_wrong_with_a_request_is_said_in_qemus_words() {
    for (text, desc) in [
        (
            r#"{"execute":5}"#,
            "QMP input member 'execute' must be a string",
        ),
        (r#"{"arguments":{}}"#, "QMP input lacks member 'execute'"),
        (
            r#"{"execute":"guest-ping","arguments":5}"#,
            "QMP input member 'arguments' must be an object",
        ),
        (
            r#"{"execute":"guest-ping","foo":1}"#,
            "QMP input member 'foo' is unexpected",
        ),
        (
            r#"{"execute":"guest-ping","arguments":{"x":1}}"#,
            "Parameter 'x' is unexpected",
        ),
        (r#"{"execute":"guest-sync"}"#, "Parameter 'id' is missing"),
        (
            r#"{"execute":"guest-sync","arguments":{"id":"x"}}"#,
            "Invalid parameter type for 'id', expected: integer",
        ),
        (
            r#"{"execute":"guest-fsfreeze-freeze-list","arguments":{"mountpoints":[5]}}"#,
            "Invalid parameter type for 'mountpoints[0]', expected: string",
        ),
        (r#"{"execute":"#, "JSON parse error"),
    ] {
        let reply: Value = serde_json::from_str(&Room::new().said(text)).unwrap();
        assert_eq!(
            reply["error"],
            json!({"class": "GenericError", "desc": desc})
        );
    }
    let reply = Room::new().said(r#"{"execute":"guest-nonsense"}"#);
    assert_eq!(
        reply,
        "{\"error\":{\"class\":\"CommandNotFound\",\"desc\":\"The command guest-nonsense has not been found\"}}\n"
    );
}

#[test]
fn only_what_leads_out_of_a_freeze_works_while_frozen() {
    let open = [
        "guest-sync-delimited",
        "guest-sync",
        "guest-ping",
        "guest-info",
        "guest-fsfreeze-status",
        "guest-fsfreeze-thaw",
    ];
    let policy = Policy::default();
    for command in COMMANDS {
        let allowed = allow(command.name, &policy, true).is_ok();
        assert_eq!(allowed, open.contains(&command.name), "{}", command.name);
    }
    let failed = allow("guest-fsfreeze-freeze", &policy, true).err().unwrap();
    assert_eq!(failed.class, "CommandNotFound");
    assert_eq!(
        failed.desc,
        "Command guest-fsfreeze-freeze has been disabled: the agent is in frozen state"
    );
}

#[test]
fn a_blocked_command_is_refused_and_shown_as_disabled() {
    let block = "guest-exec,guest-get-time".parse().unwrap_or_default();
    let mut room = Room::with(Policy::new(block, None));
    let reply = room.said(r#"{"execute":"guest-exec","arguments":{"path":"/bin/true"}}"#);
    assert_eq!(
        reply,
        "{\"error\":{\"class\":\"CommandNotFound\",\"desc\":\"Command guest-exec has been disabled\"}}\n"
    );
    let info = room.value(r#"{"execute":"guest-info"}"#);
    for command in info["supported_commands"].as_array().unwrap() {
        let name = command["name"].as_str().unwrap();
        let closed = ["guest-exec", "guest-get-time", "guest-get-devices"].contains(&name);
        assert_eq!(command["enabled"], !closed, "{name}");
    }
}

#[test]
fn every_command_answers_one_line() {
    let mut room = Room::new();
    for command in COMMANDS {
        if CHANGES_THE_MACHINE.contains(&command.name) {
            continue;
        }
        let reply = room.said(&json!({"execute": command.name}).to_string());
        assert_eq!(reply.matches('\n').count(), 1, "{}", command.name);
        assert!(!reply.contains("does nothing"), "{reply}");
    }
}

#[test]
fn what_is_not_answered_on_success_is_answered_on_failure() {
    let mut room = Room::new();
    let silent: Vec<_> = COMMANDS
        .iter()
        .filter(|c| !c.answers)
        .map(|c| c.name)
        .collect();
    assert_eq!(
        silent,
        [
            "guest-shutdown",
            "guest-suspend-disk",
            "guest-suspend-ram",
            "guest-suspend-hybrid"
        ]
    );
    let reply = room.said(r#"{"execute":"guest-shutdown","arguments":{"mode":"now"}}"#);
    assert!(reply.contains("mode is invalid"), "{reply}");
    room.hear(r#"{"execute":"guest-shutdown"}"#);
    let job = room.jobs.try_recv().unwrap();
    (job.answer)(Ok(json!({})));
    assert_eq!(room.reply(), None);
}

#[test]
fn a_sync_gives_up_what_was_asked_before() {
    let mut room = Room::new();
    room.hear(r#"{"execute":"guest-get-host-name"}"#);
    room.hear(r#"{"execute":"guest-sync","arguments":{"id":8}}"#);
    room.hear(r#"{"execute":"guest-get-timezone"}"#);
    assert!(room.work() && room.work() && !room.work());
    assert_eq!(room.reply().unwrap(), "{\"return\":8}\n");
    let reply = room.reply().unwrap();
    assert!(reply.contains("\"zone\""), "{reply}");
    assert_eq!(room.reply(), None);
}

#[test]
fn there_is_an_end_to_waiting_commands() {
    let room = Room::new();
    for _ in 0..WAITING_MAX {
        room.hear(r#"{"execute":"guest-get-osinfo"}"#);
    }
    assert_eq!(room.reply(), None);
    room.hear(r#"{"execute":"guest-get-osinfo"}"#);
    let reply = room.reply().unwrap();
    assert!(reply.contains("too many commands"), "{reply}");
    room.hear(r#"{"execute":"guest-ping"}"#);
    assert_eq!(room.reply().unwrap(), "{\"return\":{}}\n");
}

#[test]
fn a_command_that_was_accepted_before_a_freeze_of_the_bridge_is_refused_after_it() {
    let mut room = Room::new();
    room.hear(r#"{"execute":"guest-get-host-name"}"#);
    let job = room.jobs.try_recv().unwrap();
    room.workshop.work(job, &room.desk.service, true);
    assert!(room.reply().unwrap().contains("in frozen state"));
}

#[test]
fn a_broken_hold_is_told_as_an_error_of_the_thaw() {
    let room = Room::new();
    room.hear(r#"{"execute":"guest-fsfreeze-thaw"}"#);
    let Ok(Signal::Request(Request::QgaThaw, answer)) = room.signals.try_recv() else {
        panic!("no thaw was asked for");
    };
    let code = guest_agent_wire::host::ErrorCode::HoldBroken;
    answer(Err(crate::quiesce::cause::error(
        code,
        "the limit passed".into(),
        true,
    )));
    assert_eq!(
        room.reply().unwrap(),
        "{\"error\":{\"class\":\"GenericError\",\"desc\":\"couldn't hold writes: the limit passed\"}}\n"
    );
}

#[test]
fn replies_are_what_qapis_client_types_expect() {
    use qapi::qga;
    let mut room = Room::new();
    let mut ask = |name: &str| room.value(&json!({ "execute": name }).to_string());
    let info: qga::GuestAgentInfo = serde_json::from_value(ask("guest-info")).unwrap();
    assert_eq!(info.supported_commands.len(), COMMANDS.len());
    serde_json::from_value::<qga::GuestOSInfo>(ask("guest-get-osinfo")).unwrap();
    serde_json::from_value::<qga::GuestHostName>(ask("guest-get-host-name")).unwrap();
    serde_json::from_value::<qga::GuestTimezone>(ask("guest-get-timezone")).unwrap();
    serde_json::from_value::<Vec<qga::GuestUser>>(ask("guest-get-users")).unwrap();
    serde_json::from_value::<Vec<qga::GuestDiskInfo>>(ask("guest-get-disks")).unwrap();
    serde_json::from_value::<Vec<qga::GuestDiskStatsInfo>>(ask("guest-get-diskstats")).unwrap();
    serde_json::from_value::<Vec<qga::GuestCpuStats>>(ask("guest-get-cpustats")).unwrap();
    let processors = ask("guest-get-vcpus");
    serde_json::from_value::<Vec<qga::GuestLogicalProcessor>>(processors).unwrap();
    let interfaces = ask("guest-network-get-interfaces");
    serde_json::from_value::<Vec<qga::GuestNetworkInterface>>(interfaces).unwrap();
    assert!(ask("guest-get-time").as_i64().unwrap() > 0);
}

/// What becomes of a freeze that waits while this comes; the actor's place is taken by a thread that freezes.
fn freeze_behind(text: &str) -> (bool, Option<String>) {
    let mut room = Room::new();
    room.hear(r#"{"execute":"guest-fsfreeze-freeze","id":1}"#);
    room.hear(text);
    let job = room.jobs.try_recv().unwrap();
    let (_, nobody) = channel();
    let signals = std::mem::replace(&mut room.signals, nobody);
    let actor = std::thread::spawn(move || {
        let mut froze = false;
        for signal in signals {
            if let Signal::Request(request, answer) = signal {
                froze |= matches!(request, Request::QgaFreeze { .. });
                answer(Ok(json!(1)));
            }
        }
        froze
    });
    room.workshop.work(job, &room.desk.service, false);
    // The actor answers what it still has, and ends when nobody can ask it any more.
    let replies = std::mem::replace(&mut room.replies, channel().1);
    drop(room);
    let froze = actor.join().unwrap();
    let mut replies = replies
        .iter()
        .map(|reply| String::from_utf8_lossy(&reply).into_owned());
    (froze, replies.find(|reply| reply.contains("\"id\":1")))
}

#[test]
fn a_freeze_that_was_given_up_while_it_waited_freezes_nothing() {
    let (froze, reply) = freeze_behind(r#"{"execute":"guest-fsfreeze-thaw"}"#);
    assert!(!froze, "nobody would thaw it");
    assert!(reply.unwrap().contains("given up"));
    let (froze, reply) = freeze_behind(r#"{"execute":"guest-sync","arguments":{"id":7}}"#);
    assert!(!froze, "its client has begun anew");
    assert_eq!(reply, None);
    let (froze, reply) = freeze_behind(r#"{"execute":"guest-ping"}"#);
    assert!(froze);
    assert!(reply.unwrap().contains("\"return\":1"));
}
