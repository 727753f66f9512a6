//! Strangers on the writers' socket: who says nothing, comes too often or takes another's name keeps no writer out.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod rig;

use rig::played::Played;
use rig::{Rig, can_run, wait_until};
use serde_json::json;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

/// More connections than there are places of any kind.
const MANY: &str = "600";

/// A process of another user with connections to the agent, until it is dropped.
struct Stranger {
    process: Child,
    stdin: Option<ChildStdin>,
    said: Vec<String>,
}

impl Stranger {
    /// Connects so often, says `line` on each, and reads a line of what comes if it said one.
    fn connect(rig: &Rig, uid: u32, times: &str, line: &str) -> Self {
        let script = r#"$SIG{PIPE} = 'IGNORE'; $| = 1; my @all;
            for (1 .. $ARGV[1]) {
                my $s = IO::Socket::UNIX->new(Peer => $ARGV[0]) or die $!;
                if ($ARGV[2]) { print $s "$ARGV[2]\n"; $s->flush; print scalar(<$s>) // "nothing\n"; }
                push @all, $s;
            }
            print "connected\n"; <STDIN>;"#;
        let mut process = Command::new("setpriv")
            .args([format!("--reuid={uid}"), format!("--regid={uid}")])
            .args(["--clear-groups", "perl", "-MIO::Socket::UNIX", "-e", script])
            .arg(rig.path("run/writers.sock"))
            .args([times, line])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = BufReader::new(process.stdout.take().unwrap());
        let lines = output.lines().map(Result::unwrap);
        let said = lines.take_while(|line| line != "connected").collect();
        Self {
            stdin: process.stdin.take(),
            process,
            said,
        }
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        drop(self.stdin.take());
        self.process.wait().map(drop).unwrap_or(());
    }
}

fn registration(class: &str, instance: &str) -> String {
    json!({"protocol": 1, "class_id": class, "instance_id": instance, "name": instance,
           "freeze_timeout_ms": 5_000})
    .to_string()
}

#[test]
fn users_who_say_nothing_keep_out_neither_root_nor_each_other() {
    if !can_run(&["setpriv", "perl"]) {
        return;
    }
    let rig = Rig::with("ext4");
    rig.file("allow/test.conf", "web = 65533\ndb = 65532\n");
    let _strangers = Stranger::connect(&rig, 65_534, MANY, "");
    // One that may be a writer, and does not say which.
    let _silent = Stranger::connect(&rig, 65_533, MANY, "");
    let start = Instant::now();
    let root = Played::registered(&rig, "root", "BACK_END", 5_000);
    let other = Stranger::connect(&rig, 65_532, "1", &registration("db", "db"));
    assert!(other.said[0].contains("\"protocol\":1"), "{:?}", other.said);
    assert!(rig.has_writer("root") && rig.has_writer("db"));
    assert!(
        start.elapsed() < Duration::from_secs(4),
        "they waited for the strangers' patience"
    );
    // The log is not theirs either.
    assert!(rig.log().lines().count() < 30, "{}", rig.log());
    drop(root);
}

#[test]
fn the_name_of_a_writer_that_is_started_anew_is_not_taken_by_another_user() {
    if !can_run(&["setpriv", "perl"]) {
        return;
    }
    let rig = Rig::with("ext4");
    rig.file("allow/test.conf", "web = 65533\ndb = 65532\n");
    let own = Stranger::connect(&rig, 65_532, "1", &registration("db", "main"));
    assert!(own.said[0].contains("\"protocol\":1"), "{:?}", own.said);
    drop(own);
    wait_until("it is gone", || !rig.has_writer("main"));
    let thief = Stranger::connect(&rig, 65_533, "1", &registration("web", "main"));
    assert!(thief.said[0].contains("user 65532"), "{:?}", thief.said);
    let own = Stranger::connect(&rig, 65_532, "1", &registration("db", "main"));
    assert!(own.said[0].contains("\"protocol\":1"), "{:?}", own.said);
}

#[test]
fn a_registration_that_comes_byte_by_byte_or_without_end_is_not_waited_for() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let connect = || UnixStream::connect(rig.path("run/writers.sock")).unwrap();
    let mut slow = connect();
    slow.set_read_timeout(Some(Duration::from_millis(500)))
        .unwrap();
    let start = Instant::now();
    let mut said = [0; 512];
    let count = loop {
        assert!(
            start.elapsed() < Duration::from_secs(20),
            "it is still heard"
        );
        slow.write_all(b" ").unwrap();
        if let Ok(count) = slow.read(&mut said) {
            break count;
        }
    };
    assert!(String::from_utf8_lossy(&said[..count]).contains("no registration came"));
    let mut long = connect();
    long.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
    // It may hang up before all is written.
    long.write_all(&[b'x'; 64 << 10]).unwrap_or(());
    let count = long.read(&mut said).unwrap();
    assert!(String::from_utf8_lossy(&said[..count]).contains("no registration came"));
}
