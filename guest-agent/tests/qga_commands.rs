//! Commands of the QEMU guest agent that need the real agent: programs, files on real file systems, trim, and what happens
//! around a freeze. What they answer beside QEMU's own agent is tested in a machine (`tests/beside_the_stock_guest_agent.rs`).

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod rig;

use rig::{Qga, Rig, can_run, run, wait_until};
use serde_json::{Value, json};

fn reply(qga: &mut Qga, name: &str, arguments: &Value) -> Value {
    let request = json!({"execute": name, "arguments": arguments});
    serde_json::from_str(&qga.ask(&request.to_string())).unwrap()
}

fn ok(qga: &mut Qga, name: &str, arguments: &Value) -> Value {
    let reply = reply(qga, name, arguments);
    assert!(reply.get("return").is_some(), "{name}: {reply}");
    reply["return"].clone()
}

/// Runs a line of shell to its end.
fn shell(qga: &mut Qga, line: &str) -> Value {
    let arguments = json!({"path": "/bin/sh", "arg": ["-c", line], "capture-output": true});
    let pid = ok(qga, "guest-exec", &arguments)["pid"].clone();
    let mut ended = Value::Null;
    wait_until("the program ends", || {
        ended = ok(qga, "guest-exec-status", &json!({ "pid": pid }));
        ended["exited"] == true
    });
    ended
}

#[test]
fn a_program_of_the_host_has_not_the_agents_score_for_the_killer() {
    if !can_run(&[]) {
        return;
    }
    let mut rig = Rig::new();
    rig.mount("a", "ext4");
    // The agent lowers its own, if it may; one that may not keeps what it was started with. Neither is 0.
    let raised = [
        "/bin/sh",
        "-c",
        "echo 500 >/proc/self/oom_score_adj; exec \"$0\" \"$@\"",
    ];
    rig.start_by(&raised, &rig.path("run/log"));
    let mut qga = rig.qga();
    let own = std::fs::read_to_string(format!("/proc/{}/oom_score_adj", rig.agent_pid())).unwrap();
    assert!(["-900\n", "500\n"].contains(&&*own), "{own}");
    // "0\n"
    let ended = shell(&mut qga, "cat /proc/self/oom_score_adj");
    assert_eq!(ended["out-data"], "MAo=", "{ended}");
    assert_eq!(ended["exitcode"], 0);
}

#[test]
fn a_program_goes_on_through_a_freeze_but_none_is_started_in_it() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let mut qga = rig.qga();
    let go = rig.path("run/go");
    let line = format!(
        "while [ ! -e {} ]; do sleep 0.02; done; echo done",
        go.display()
    );
    let arguments = json!({"path": "/bin/sh", "arg": ["-c", line], "capture-output": true});
    let pid = ok(&mut qga, "guest-exec", &arguments)["pid"].clone();
    assert_eq!(ok(&mut qga, "guest-fsfreeze-freeze", &json!({})), 1);
    for name in [
        "guest-exec",
        "guest-exec-status",
        "guest-file-open",
        "guest-get-fsinfo",
    ] {
        let reply = reply(&mut qga, name, &json!({"path": "/bin/true"}));
        assert_eq!(
            reply["error"],
            json!({
                "class": "CommandNotFound",
                "desc": format!("Command {name} has been disabled: the agent is in frozen state"),
            })
        );
    }
    std::fs::write(go, "").unwrap();
    assert_eq!(ok(&mut qga, "guest-fsfreeze-thaw", &json!({})), 1);
    wait_until("the program ends", || {
        let status = ok(&mut qga, "guest-exec-status", &json!({ "pid": pid }));
        status["out-data"] == "ZG9uZQo="
    });
}

#[test]
fn a_command_that_hangs_holds_up_neither_ping_nor_what_comes_after_a_sync() {
    if !can_run(&["fsfreeze"]) {
        return;
    }
    let rig = Rig::with("ext4");
    let mut qga = rig.qga();
    let file = rig.mountpoint("a").join("file");
    let open = json!({"path": file, "mode": "w"});
    let handle = ok(&mut qga, "guest-file-open", &open);
    let place = rig.mountpoint_text("a");
    run("fsfreeze", &["-f", &place]);
    let write =
        json!({"execute": "guest-file-write", "arguments": {"handle": handle, "buf-b64": "eA=="}});
    qga.write(&write.to_string());
    let ping = qga.ask("{\"execute\":\"guest-ping\",\"id\":1}");
    // A client that waits no longer, and asks for something else.
    let sync = qga.ask("{\"execute\":\"guest-sync\",\"arguments\":{\"id\":2}}");
    qga.write("{\"execute\":\"guest-get-host-name\"}");
    run("fsfreeze", &["-u", &place]);
    assert_eq!(ping, "{\"id\":1,\"return\":{}}\n");
    assert_eq!(sync, "{\"return\":2}\n");
    let next = String::from_utf8(qga.line()).unwrap();
    assert!(next.contains("host-name"), "the late reply came: {next}");
    assert_eq!(std::fs::read(&file).unwrap(), b"x");
}

#[test]
fn what_the_owner_blocks_is_closed() {
    if !can_run(&[]) {
        return;
    }
    let mut rig = Rig::new();
    rig.option("--block-rpcs", "guest-exec,guest-file-open");
    rig.start();
    let mut qga = rig.qga();
    for name in ["guest-exec", "guest-file-open"] {
        let reply = reply(&mut qga, name, &json!({"path": "/bin/true"}));
        assert_eq!(
            reply["error"]["desc"],
            format!("Command {name} has been disabled")
        );
    }
    ok(&mut qga, "guest-get-host-name", &json!({}));
}

#[test]
fn a_file_system_is_trimmed_and_described_at_each_of_its_mount_points() {
    if !can_run(&[]) {
        return;
    }
    let mut rig = Rig::new();
    let a = rig.mount("a", "ext4");
    let again = rig.mount_with("again", &["--bind", a.to_str().unwrap()]);
    rig.start();
    let mut qga = rig.qga();
    let trimmed = ok(&mut qga, "guest-fstrim", &json!({}));
    let paths = trimmed["paths"].as_array().unwrap();
    assert_eq!(paths.len(), 2, "{trimmed}");
    // The last mounted first, as QEMU's agent has it.
    assert_eq!(paths[0]["path"], json!(again));
    assert!(paths[0]["trimmed"].as_u64().unwrap() > 0, "{trimmed}");
    let described = ok(&mut qga, "guest-get-fsinfo", &json!({}));
    assert_eq!(described[1]["mountpoint"], json!(a));
    assert_eq!(described[0]["name"], described[1]["name"]);
    assert_eq!(ok(&mut qga, "guest-fsfreeze-freeze", &json!({})), 1);
    assert_eq!(ok(&mut qga, "guest-fsfreeze-thaw", &json!({})), 1);
}
