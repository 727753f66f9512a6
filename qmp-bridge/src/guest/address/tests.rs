//! What addresses mean, and what is said to a hybrid socket.

use super::*;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixListener;

fn address(text: &str) -> AgentAddress {
    text.parse().unwrap()
}

#[test]
fn each_way_to_an_agent_has_its_words() {
    let serial = AgentAddress::Serial("/run/a.sock".into());
    assert_eq!(address("/run/a.sock"), serial);
    assert_eq!(address("unix:/run/a.sock"), serial);
    let (cid, port) = (42, VSOCK_PORT);
    let qemu = AgentAddress::Qga("/run/q.sock".into());
    assert_eq!(address("qga:/run/q.sock"), qemu);
    assert_eq!(address("qga:unix:/run/q.sock"), qemu);
    assert_eq!(address("vsock:42"), AgentAddress::Vsock { cid, port });
    assert_eq!(address("vsock:42:9"), AgentAddress::Vsock { cid, port: 9 });
    let hybrid = |socket: &str, port| AgentAddress::HybridVsock {
        socket: socket.into(),
        port,
    };
    assert_eq!(address("hybrid-vsock:/v"), hybrid("/v", VSOCK_PORT));
    assert_eq!(address("hybrid-vsock:/v:9"), hybrid("/v", 9));
    assert_eq!(address("hybrid-vsock:/a:b"), hybrid("/a:b", VSOCK_PORT));
}

#[test]
fn an_address_is_written_as_it_is_read() {
    for text in [
        "/run/a",
        "vsock:3:867",
        "hybrid-vsock:/v:9",
        "unix:vsock:3",
        "qga:/run/q",
        "unix:qga:q",
    ] {
        assert_eq!(address(text).to_string(), text);
    }
}

#[test]
fn what_is_no_address_is_refused_with_what_would_be_one() {
    for text in [
        "",
        "unix:",
        "vsock:",
        "vsock:x",
        "vsock:3:y",
        "vsock:-1",
        "hybrid-vsock:",
        "hybrid-vsock::9",
        "qga:",
        "qga:unix:",
    ] {
        assert!(text.parse::<AgentAddress>().is_err(), "{text}");
    }
}

/// Answers one connection by `answer` and gives the line that came.
fn hybrid(
    answer: &'static [u8],
) -> (
    tempfile::TempDir,
    AgentAddress,
    std::thread::JoinHandle<String>,
) {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("v");
    let listener = UnixListener::bind(&socket).unwrap();
    let peer = std::thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        let mut line = String::new();
        BufReader::new(&stream).read_line(&mut line).unwrap();
        (&stream).write_all(answer).unwrap();
        line
    });
    (
        directory,
        AgentAddress::HybridVsock { socket, port: 9 },
        peer,
    )
}

#[tokio::test]
async fn a_hybrid_socket_is_asked_for_the_port_and_nothing_behind_its_answer_is_lost() {
    let (_directory, address, peer) = hybrid(b"OK 1073741824\nfirst words");
    let stream = address.connect(Duration::from_secs(10)).await.unwrap();
    assert_eq!(peer.join().unwrap(), "CONNECT 9\n");
    let mut buffer = [0; 64];
    let count = link::read(&stream, &mut buffer).await.unwrap();
    assert_eq!(&buffer[..count], b"first words");
}

#[tokio::test]
async fn a_hybrid_socket_that_does_not_say_ok_is_no_way_to_an_agent() {
    // Nobody listens in the guest; another protocol; a line without an end.
    for answer in [
        &b""[..],
        b"HTTP/1.1 400\r\n",
        b"OK 1111111111111111111111111111111111",
    ] {
        let (_directory, address, peer) = hybrid(answer);
        let refused = address.connect(Duration::from_millis(500)).await;
        assert!(
            matches!(
                refused,
                Err(LinkError::Closed { .. } | LinkError::Absent { .. })
            ),
            "{refused:?}"
        );
        peer.join().unwrap();
    }
}
