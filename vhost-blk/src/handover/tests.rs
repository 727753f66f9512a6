//! What is given arrives whole or not at all, and whoever gives knows which.

use super::*;

fn given() -> (Given, tempfile::TempDir) {
    let directory = tempfile::tempdir().unwrap();
    let listener = |name: &str| UnixListener::bind(directory.path().join(name)).unwrap();
    let disks = ["a", "b"].map(|name| GivenDisk {
        volume: name.to_owned(),
        listener: listener(name),
        session: None,
    });
    let control = Some(listener("control"));
    let given = Given {
        disks: disks.into(),
        control,
    };
    (given, directory)
}

fn address(listener: &UnixListener) -> String {
    format!("{:?}", listener.local_addr().unwrap())
}

#[test]
fn what_is_given_arrives_and_the_giver_hears_that_it_was_taken() {
    let (given, _directory) = given();
    let (ours, theirs) = UnixStream::pair().unwrap();
    std::thread::scope(|scope| {
        let giver = scope.spawn(|| given.give(&ours));
        let got = Given::receive(&theirs).unwrap();
        let of = |given: &Given| -> Vec<_> {
            let disks = given.disks.iter();
            let mut all: Vec<_> = disks
                .map(|disk| (disk.volume.clone(), address(&disk.listener)))
                .collect();
            all.extend(
                given
                    .control
                    .iter()
                    .map(|one| (String::new(), address(one))),
            );
            all
        };
        assert_eq!(of(&got), of(&given));
        Taking { peer: theirs }.taken().unwrap();
        assert!(matches!(giver.join().unwrap(), Outcome::Taken));
    });
}

#[test]
fn who_goes_without_a_word_has_taken_nothing() {
    let (given, _directory) = given();
    for listens in [false, true] {
        let (ours, theirs) = UnixStream::pair().unwrap();
        std::thread::scope(|scope| {
            let giver = scope.spawn(|| given.give(&ours));
            if listens {
                drop(Given::receive(&theirs).unwrap());
            }
            drop(theirs);
            assert!(matches!(giver.join().unwrap(), Outcome::Kept(_)));
        });
    }
}

#[test]
fn nothing_can_be_taken_once_the_giver_has_lost_patience() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.shutdown(Shutdown::Both).unwrap();
    assert!(Taking { peer: theirs }.taken().is_err());
}

#[test]
fn garbage_is_no_hand_over() {
    let head = |magic: &[u8; 8], text: &[u8], descriptors: u32| {
        let mut bytes = magic.to_vec();
        bytes.extend(u32::try_from(text.len()).unwrap().to_le_bytes());
        bytes.extend(descriptors.to_le_bytes());
        bytes.extend(text);
        bytes
    };
    let huge = [&MAGIC[..], &u32::MAX.to_le_bytes(), &0_u32.to_le_bytes()].concat();
    let text = |version: u32, disks: &str| {
        format!(r#"{{"version":{version},"disks":[{disks}],"control":false}}"#).into_bytes()
    };
    let disk = &text(HAND_OVER_VERSION, r#"{"volume":"a","session":null}"#)[..];
    let (older, newer) = (
        &text(HAND_OVER_VERSION - 1, "")[..],
        &text(HAND_OVER_VERSION + 1, "")[..],
    );
    for bytes in [
        head(b"somebody", b"{}", 0),
        huge,
        head(&MAGIC, b"{}", 0),
        head(&MAGIC, older, 0),
        head(&MAGIC, newer, 0),
        // A listener is missing; then one is promised and does not come.
        head(&MAGIC, disk, 0),
        head(&MAGIC, disk, 1),
        head(&MAGIC, disk, u32::MAX),
        vec![],
    ] {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (&ours).write_all(&bytes).unwrap();
        drop(ours);
        Given::receive(&theirs).unwrap_err();
    }
}
