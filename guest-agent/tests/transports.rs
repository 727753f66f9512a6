//! Ways to the agent: several ports at once, and who is let in.

mod rig;

use rig::{Bridge, Rig, can_run, wait_until};
use serde_json::json;
use std::io::Read as _;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::process::Command;

/// An agent with a second port at `run/second`.
fn with_two_ports() -> Rig {
    let mut rig = Rig::new();
    rig.mount("a", "ext4");
    let second = format!("unix:{}", rig.path("run/second").display());
    rig.option("--port", &second);
    rig.start();
    wait_until("the second port", || rig.path("run/second").exists());
    rig
}

fn hello_on_the_second(rig: &Rig) -> Bridge {
    let mut bridge = Bridge::connect(&rig.path("run/second"));
    bridge.ok("hello", json!({"versions": [1]}));
    bridge
}

#[test]
fn a_conversation_on_one_port_does_not_end_with_one_on_the_other() {
    if !can_run(&[]) {
        return;
    }
    let rig = with_two_ports();
    let silent = Bridge::connect(&rig.path("run/second"));
    let mut bridge = rig.bridge();
    bridge.prepare();
    let frozen = bridge.freeze();
    drop(silent);
    // Answered after whatever the end of the other conversation did.
    let mut asking = Bridge::connect(&rig.path("run/second"));
    assert_eq!(asking.ok("status", json!({}))["frozen"], true);
    assert_eq!(bridge.thaw(&frozen)["held"], true);
}

#[test]
fn a_bridge_takes_over_from_one_that_was_lost_on_another_port() {
    if !can_run(&[]) {
        return;
    }
    let rig = with_two_ports();
    let mut lost = rig.bridge();
    lost.prepare();
    lost.freeze();
    // Its connection stays open without a word, as a vsock connection whose host end was killed does.
    let mut bridge = hello_on_the_second(&rig);
    assert_eq!(bridge.status()["frozen"], false);
    bridge.prepare();
    let frozen = bridge.freeze();
    // What the lost one still says is refused, and its end ends nothing.
    assert_eq!(
        lost.error("abort", json!({"set": "s", "reason": "late"}))["code"],
        "BAD_REQUEST"
    );
    drop(lost);
    let mut next = Bridge::connect(&rig.path("run/native"));
    assert_eq!(next.ok("status", json!({}))["frozen"], true);
    assert_eq!(bridge.thaw(&frozen)["held"], true);
}

#[test]
fn a_user_who_is_not_root_is_turned_away_from_the_native_port() {
    if !can_run(&["setpriv", "python3"]) {
        return;
    }
    let rig = Rig::with("ext4");
    let port = rig.path("run/native");
    // Even where the file mode would let him in.
    std::fs::set_permissions(&port, std::fs::Permissions::from_mode(0o666)).unwrap();
    let ask = "import socket, sys\ns = socket.socket(socket.AF_UNIX)\ns.connect(sys.argv[1])\n\
               s.sendall(b'{\"id\":1,\"execute\":\"status\"}\\n')\nprint(len(s.recv(100)))";
    let answer = |arguments: &[&str]| {
        let output = Command::new("setpriv")
            .args(arguments)
            .args(["python3", "-c", ask])
            .arg(&port)
            .output()
            .unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let stranger = ["--reuid", "65534", "--regid", "65534", "--clear-groups"];
    // Turned away before or after his request was sent: nothing, or a connection reset.
    assert!(["0\n", ""].contains(&answer(&stranger).as_str()));
    assert_ne!(answer(&[]), "0\n", "root is answered");
    let mut stream = UnixStream::connect(&port).unwrap();
    drop(stream.set_read_timeout(Some(std::time::Duration::from_millis(1))));
    assert!(stream.read(&mut [0]).is_err(), "root is not hung up on");
}
