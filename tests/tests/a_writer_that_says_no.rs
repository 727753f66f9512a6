//! Writers that do not agree: the set is deleted, the requester hears it, the guest goes on.

use std::time::Duration;

use anyhow::{Result, ensure};
use vmshadow_tests::harness::disk::FileSystem;
use vmshadow_tests::harness::requires;
use vmshadow_tests::harness::site::Site;

#[test]
fn a_writer_that_refuses_to_freeze_gets_the_set_deleted_and_the_guest_goes_on() -> Result<()> {
    if !requires::machines() {
        return Ok(());
    }
    let site = Site::start("refuses", &[("a", FileSystem::Ext4)])?;
    let load = site.load()?;
    site.script_writer("stubborn", &[("freeze", "echo not now >&2; exit 1")])?;
    let answer = site.try_create(&[])?;
    site.was_refused(&answer, &["WRITER_VETO"])?;
    let message = answer.at("/reason/message")?.to_string();
    ensure!(
        message.contains("stubborn"),
        "the reason does not name the writer: {message}"
    );
    site.is_unharmed(&load)
}

#[test]
fn a_writer_that_hangs_is_given_up_inside_its_limit() -> Result<()> {
    if !requires::machines() {
        return Ok(());
    }
    let site = Site::start("hangs", &[("a", FileSystem::Ext4)])?;
    let load = site.load()?;
    site.script_writer(
        "sleeper",
        &[
            ("writer.json", r#"{"freeze_timeout_ms": 3000}"#),
            ("freeze", "sleep 1000"),
        ],
    )?;
    let answer = site.try_create(&[])?;
    site.was_refused(&answer, &["WRITER_NOT_RESPONDING"])?;
    let message = answer.at("/reason/message")?.to_string();
    ensure!(
        message.contains("sleeper"),
        "the reason does not name the writer: {message}"
    );
    ensure!(
        answer.took < Duration::from_secs(30),
        "took {:?}",
        answer.took
    );
    site.is_unharmed(&load)
}
