//! A session survives being taken apart, and one that is not whole is refused.

use super::*;
use std::os::fd::AsRawFd;

fn file() -> File {
    tempfile::tempfile().unwrap()
}

fn session() -> Session {
    let ring = |kick: Option<File>, call: Option<File>| Ring {
        state: RingState {
            size: 128,
            table: 0x1000,
            available: 0x2000,
            used: 0x3000,
            position: 65_535,
            enabled: true,
            started: kick.is_some(),
        },
        kick,
        call,
        error: None,
    };
    Session {
        connection: UnixStream::pair().unwrap().0,
        features: 1 << 30,
        protocol_features: 0x1234,
        write_cache: false,
        read_bytes: Some(1 << 20),
        back_channel: Some(UnixStream::pair().unwrap().0),
        regions: vec![Region {
            place: Place {
                guest: 0,
                front_end: 0x7f00_0000_0000,
                length_bytes: 1 << 20,
                file_offset_bytes: 4096,
            },
            file: file(),
        }],
        tracking: Some((
            TrackingState::from(&VhostUserInflight::new(4224, 0, 2, 128)),
            file(),
        )),
        rings: vec![ring(Some(file()), Some(file())), ring(None, Some(file()))],
    }
}

#[test]
fn a_session_is_the_same_after_the_journey() {
    let session = session();
    let (state, descriptors) = session.take_apart();
    // Connection, back-end channel, region, tracking, kick and call, call.
    assert_eq!(descriptors.len(), 7);
    let text = serde_json::to_string(&state).unwrap();
    let state: SessionState = serde_json::from_str(&text).unwrap();
    let numbers = |descriptors: &[BorrowedFd<'_>]| -> Vec<_> {
        let inodes = descriptors.iter().map(rustix::fs::fstat);
        inodes.map(|found| found.unwrap().st_ino).collect()
    };
    let sent = descriptors
        .iter()
        .map(|one| one.try_clone_to_owned().unwrap());
    let sent: Vec<OwnedFd> = sent.collect();
    let arrived = Session::put_together(state.clone(), &mut sent.into_iter()).unwrap();
    let (again, others) = arrived.take_apart();
    assert_eq!(again, state);
    assert_eq!(numbers(&others), numbers(&descriptors));
    assert_ne!(others[0].as_raw_fd(), descriptors[0].as_raw_fd());
}

#[test]
fn a_session_with_a_descriptor_missing_or_too_much_of_anything_is_refused() {
    let session = session();
    let (state, descriptors) = session.take_apart();
    for there in 0..descriptors.len() {
        let sent = descriptors.iter().take(there);
        let sent: Vec<OwnedFd> = sent.map(|one| one.try_clone_to_owned().unwrap()).collect();
        let refused = Session::put_together(state.clone(), &mut sent.into_iter());
        assert_eq!(refused.unwrap_err(), BadSession::Descriptors);
    }
    let mut large = state.clone();
    large.rings = vec![large.rings[0]; 33];
    let refused = Session::put_together(large, &mut std::iter::empty()).unwrap_err();
    assert_eq!(refused, BadSession::Rings(33));
    let mut large = state.clone();
    large.regions = vec![large.regions[0]; 510];
    let refused = Session::put_together(large, &mut std::iter::empty()).unwrap_err();
    assert_eq!(refused, BadSession::Regions(510));
    let text = serde_json::to_string(&state).unwrap();
    let foreign = text.replace("\"write_cache\"", "\"colour\"");
    assert!(serde_json::from_str::<SessionState>(&foreign).is_err());
}
