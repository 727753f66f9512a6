//! What the command line says and refuses.

use crate::config::{Command, Config, Kind};
use clap::Parser as _;
use guest_agent_wire::types::Level;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;

fn check(words: &[&str]) -> Result<(Config, Kind), String> {
    let all = ["vmshadow-writer"].iter().chain(words);
    let mut config = Config::try_parse_from(all).map_err(|error| error.to_string())?;
    match config.settings.check() {
        Ok(kind) => Ok((config, kind)),
        Err(error) => {
            assert_eq!(error.exit_code(), 2);
            Err(error.to_string())
        }
    }
}

#[test]
fn commands_for_events_make_a_writer_of_their_name() {
    let words = [
        "--name", "db", "--level", "BACK_END", "--freeze", "lock", "--thaw", "unlock",
    ];
    let (config, kind) = check(&words).unwrap();
    let registration = config.settings.registration();
    assert_eq!(registration.instance_id, "command:db");
    assert_eq!(registration.level, Level::BackEnd);
    let Kind::Commands(commands) = kind else {
        panic!("no commands");
    };
    assert_eq!(commands["freeze"], Command::Shell("lock".to_owned()));
}

#[test]
fn what_cannot_work_is_a_usage_error_with_its_reason() {
    for (words, reason) in [
        (&["--freeze", "x", "--thaw", "y"][..], "--name is missing"),
        (&["--name", "a"], "give one of"),
        (
            &["--name", "a", "--session", "s", "--thaw", "y"],
            "give one of",
        ),
        (
            &["--name", "a", "--freeze", "x"],
            "nothing would let the application go on",
        ),
        (
            &["--name", "a", "--session", "s", "--level", "BACK"],
            "one of FRONT_END",
        ),
        (
            &["--name", "a", "--scripts", "/nowhere/at/all"],
            "--scripts /nowhere/at/all",
        ),
        (
            &["--name", "a", "--session", "s", "--metadata", "/nowhere"],
            "--metadata /nowhere",
        ),
    ] {
        let why = check(words).unwrap_err();
        assert!(why.contains(reason), "{words:?}: {why}");
    }
}

#[test]
fn scripts_must_be_trusted_and_a_freeze_needs_its_undoing() {
    let top = tempfile::tempdir().unwrap();
    fs::set_permissions(top.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let words = ["--name", "a", "--scripts", top.path().to_str().unwrap()];
    assert!(check(&words).unwrap_err().contains("it has none of"));
    for event in ["freeze", "thaw"] {
        fs::write(top.path().join(event), "#!/bin/sh\n").unwrap();
        fs::set_permissions(top.path().join(event), fs::Permissions::from_mode(0o755)).unwrap();
    }
    assert!(check(&words).is_ok());
    fs::set_permissions(top.path().join("thaw"), fs::Permissions::from_mode(0o777)).unwrap();
    assert!(check(&words).unwrap_err().contains("can be changed"));
    fs::remove_file(top.path().join("thaw")).unwrap();
    assert!(check(&words).unwrap_err().contains("nothing would let"));
}
