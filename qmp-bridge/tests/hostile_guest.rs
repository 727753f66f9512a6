//! A guest in somebody else's hands: what it can make the bridge do, show and wait for.
#![allow(clippy::unwrap_used, reason = "tests")]

mod fakes;

use fakes::World;
use guest_agent_wire::types::DiskExtent;
use qmp_bridge::guest::{AgentAddress, GuestClient, GuestError, StockClient};
use qmp_bridge::snapshot::document::{CreateRequest, Outcome};
use serde_json::{Value, json};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread::JoinHandle;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(20);
const SHORT: Duration = Duration::from_millis(600);

/// An agent that does `act` with its one connection; the result of that is handed out at the end.
fn agent<T: Send + 'static>(
    act: impl FnOnce(UnixStream) -> T + Send + 'static,
) -> (tempfile::TempDir, AgentAddress, JoinHandle<T>) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("agent");
    let listener = UnixListener::bind(&path).unwrap();
    let agent = std::thread::spawn(move || act(listener.accept().unwrap().0));
    (directory, AgentAddress::Serial(path), agent)
}

/// Waits for its end without keeping the bridge from its work.
async fn end<T: Send + 'static>(agent: JoinHandle<T>) -> T {
    let joined = tokio::task::spawn_blocking(move || agent.join().unwrap());
    tokio::time::timeout(LIMIT, joined).await.unwrap().unwrap()
}

/// Reads a request and gives its id.
fn request(reader: &mut impl std::io::BufRead) -> Value {
    let mut line = Vec::new();
    reader.read_until(b'\n', &mut line).unwrap();
    let line = line.strip_prefix(&[0xff]).unwrap_or(&line);
    serde_json::from_slice::<Value>(line).unwrap()["id"].clone()
}

fn hello(stream: &UnixStream, reader: &mut impl std::io::BufRead) {
    let id = request(reader);
    let answer = json!({"id": id, "return": {"version": 1, "agent": "a", "boot_id": "b"}});
    (&*stream)
        .write_all(format!("{answer}\n").as_bytes())
        .unwrap();
}

#[tokio::test]
async fn a_guest_that_floods_is_hung_up_on_after_what_it_was_asked_for() {
    let flood = |mut stream: UnixStream| {
        let line = [&[b'x'; 1023][..], b"\n"].concat();
        let mut written = 0_u64;
        while stream.write_all(&line).is_ok() {
            written += 1024;
        }
        written
    };
    let (_directory, address, ours) = agent(flood);
    let error = GuestClient::connect(&address, LIMIT).await.unwrap_err();
    let (_directory, address, stock) = agent(flood);
    let AgentAddress::Serial(path) = address else {
        unreachable!()
    };
    let address = AgentAddress::Qga(path);
    let stock_error = StockClient::connect(&address, LIMIT).await.unwrap_err();
    for (error, agent) in [(error, ours), (stock_error, stock)] {
        let said = error.to_string();
        assert!(said.contains("more than it was asked"), "{said}");
        // What the bridge took, and what the socket keeps.
        assert!(end(agent).await < 4 << 20);
    }
}

/// QEMU's socket does both while the last client's end is under way.
#[tokio::test]
async fn a_way_that_hangs_up_or_carries_nothing_is_dialled_again() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("agent");
    let listener = UnixListener::bind(&path).unwrap();
    let agent = std::thread::spawn(move || {
        // Hung up on; then one on which whatever is said is lost; then one on which the first hello is lost.
        drop(listener.accept().unwrap());
        let (mut deaf, _) = listener.accept().unwrap();
        let mut said = Vec::new();
        deaf.read_to_end(&mut said).unwrap();
        let hellos = said.iter().filter(|byte| **byte == b'\n').count();
        let (stream, _) = listener.accept().unwrap();
        let mut reader = BufReader::new(&stream);
        request(&mut reader);
        hello(&stream, &mut reader);
        // Until the bridge has heard it.
        let mut rest = Vec::new();
        reader.read_to_end(&mut rest).unwrap();
        hellos
    });
    let address = AgentAddress::Serial(path);
    let client = GuestClient::connect(&address, LIMIT).await.unwrap();
    assert_eq!(client.hello().agent, "a");
    drop(client);
    assert!(end(agent).await > 3);
}

#[tokio::test]
async fn a_guest_that_answers_byte_by_byte_has_no_more_time_than_another() {
    let (_directory, address, agent) = agent(|mut stream| {
        // Until the bridge hangs up.
        while stream.write_all(b"x").is_ok() {
            std::thread::park_timeout(Duration::from_millis(20));
        }
    });
    let error = GuestClient::connect(&address, SHORT).await.unwrap_err();
    assert!(matches!(error, GuestError::Link(_)), "{error}");
    end(agent).await;
}

#[tokio::test]
async fn a_guest_that_reads_nothing_or_answers_others_keeps_nobody_waiting() {
    let (_directory, address, agent) = agent(|stream| {
        let mut reader = BufReader::new(stream.try_clone().unwrap());
        hello(&stream, &mut reader);
        let id = request(&mut reader).as_u64().unwrap();
        // Numbers of calls that nobody made.
        for other in [0, id + 1, u64::MAX] {
            let answer = json!({"id": other, "return": {}});
            (&stream)
                .write_all(format!("{answer}\n").as_bytes())
                .unwrap();
        }
        let mut rest = Vec::new();
        reader.read_to_end(&mut rest).unwrap();
    });
    let guest = GuestClient::connect(&address, LIMIT).await.unwrap();
    let error = guest.identify(SHORT).await.unwrap_err();
    assert!(matches!(error, GuestError::Link(_)), "{error}");
    // That connection is not used again.
    assert!(guest.closed().is_some());
    drop(guest);
    end(agent).await;
}

#[tokio::test]
async fn an_agent_of_another_version_is_named_as_such() {
    for answer in [
        json!({"return": {"version": 9, "agent": "agent 9.1", "boot_id": "b"}}),
        json!({"error": {"code": "VERSION_MISMATCH", "message": "agent 9.1 speaks [9]", "retryable": false}}),
    ] {
        let (_directory, address, agent) = agent(move |stream| {
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            let mut answer = answer;
            answer["id"] = request(&mut reader);
            (&stream)
                .write_all(format!("{answer}\n").as_bytes())
                .unwrap();
            drop(reader.read_line(&mut String::new()));
        });
        let error = GuestClient::connect(&address, LIMIT).await.unwrap_err();
        assert!(
            matches!(error, GuestError::VersionMismatch { .. }),
            "{error}"
        );
        assert!(error.to_string().contains("agent 9.1"), "{error}");
        end(agent).await;
    }
}

fn extent(start_bytes: u64, length_bytes: u64) -> DiskExtent {
    DiskExtent {
        serial: "ser-data".to_owned(),
        disk: "vd1".to_owned(),
        start_bytes,
        length_bytes,
    }
}

#[tokio::test]
async fn numbers_at_the_edge_refuse_a_set_and_break_nothing() {
    // An exempt area that reaches over all of the disk and beyond.
    for exempt in [
        extent(0, u64::MAX),
        extent(u64::MAX, u64::MAX),
        extent(1, u64::MAX),
    ] {
        let world = World::new();
        world
            .agent
            .change(|guest| guest.exempt = vec![exempt.clone()]);
        let document = world.create(CreateRequest::default()).await;
        // The frozen file system cannot be hidden behind it.
        let hides = exempt.start_bytes <= 1;
        assert_eq!(document.outcome == Outcome::Refused, hides, "{exempt:?}");
    }
    let world = World::new();
    world.agent.change(|guest| guest.hold_ms = u64::MAX);
    let document = world.create(CreateRequest::default()).await;
    assert_eq!(document.outcome, Outcome::Refused);
    world.assert_nothing_left();
}

#[tokio::test]
async fn more_exempt_areas_than_any_guest_has_are_not_believed() {
    let world = World::new();
    world
        .agent
        .change(|guest| guest.exempt = (0..300).map(|n| extent(n << 20, 1)).collect());
    let document = world.create(CreateRequest::default()).await;
    assert_ne!(document.outcome, Outcome::Kept);
    let message = document.reason.unwrap().message;
    assert!(message.contains("300 exempt extents"), "{message}");
    world.assert_nothing_left();
}

#[tokio::test]
async fn what_a_guest_calls_itself_moves_no_cursor_and_forges_no_line() {
    let world = World::new();
    let evil = "db\u{1b}[2J\u{9b}1A\r\n\u{202e}set 1 kept";
    world.agent.change(|guest| {
        guest.writers = vec![evil.to_owned()];
        guest.mountpoints[1] = format!("/m1{evil}");
        guest.unfreezable = vec![format!("/m1{evil}")];
    });
    let options = world.vm_options();
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    let list = [&["list", "writers"][..], &options].concat();
    for mut command in [
        world.vmshadow(&list),
        world.vmshadow(&[&list[..], &["--json"]].concat()),
        world.vmshadow_create(&[]),
        world.vmshadow_create(&["--best-effort", "--json"]),
    ] {
        let output = command.output().await.unwrap();
        for shown in [&output.stdout, &output.stderr] {
            let shown = String::from_utf8(shown.clone()).unwrap();
            let harmful = |c: char| (c.is_control() && c != '\n') || c == '\u{202e}';
            assert!(!shown.contains(harmful), "{shown:?}");
            let forged = |line: &str| line.starts_with("set 1 kept");
            assert!(!shown.lines().any(forged), "{shown}");
        }
        // It was there to be shown.
        assert!(String::from_utf8_lossy(&output.stdout).contains("set 1 kept"));
    }
}
