//! The writer on real control groups (root and cgroup v2; skipped aloud without).

#![allow(
    clippy::unwrap_used,
    clippy::missing_panics_doc,
    reason = "a test may panic; clippy sees only its #[test] functions as one"
)]

use database_writer::{Disks, Identity};
use guest_agent_wire::sdk::{Call, Writer};
use guest_agent_wire::types::WriterFailure;
use guest_agent_wire::writer::{Freeze, PrepareBackup, Thaw};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};
use unit_writer::group::Group;
use unit_writer::service::Service as SystemdService;
use unit_writer::watch::Watch;
use unit_writer::{UnitWriter, Way};

/// A service: a process in a control group of its own that counts in a file.
struct Service {
    top: tempfile::TempDir,
    group: PathBuf,
    child: Child,
}

/// Where control groups of version 2 are mounted here.
fn groups() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/mounts").unwrap();
    let mount = mounts
        .lines()
        .find(|line| line.split(' ').nth(2) == Some("cgroup2"))?;
    mount.split(' ').nth(1).map(PathBuf::from)
}

impl Service {
    fn start(name: &str) -> Option<Self> {
        let name = format!("vmshadow-test-{name}-{}", std::process::id());
        let group = groups().map(|groups| groups.join(name));
        let Some(group) = group.filter(|group| fs::create_dir(group).is_ok()) else {
            eprintln!("SKIPPED: no control group can be made here");
            return None;
        };
        let top = tempfile::tempdir().unwrap();
        let child = Command::new("sh")
            .arg("-c")
            .arg(format!(
                "echo $$ >{}/cgroup.procs && while :; do echo x >>count; done",
                group.display()
            ))
            .current_dir(top.path())
            .spawn()
            .unwrap();
        let service = Self { top, group, child };
        service.wait_for_more();
        Some(service)
    }

    fn count(&self) -> u64 {
        fs::metadata(self.top.path().join("count")).map_or(0, |file| file.len())
    }

    fn wait_for_more(&self) {
        let until = Instant::now() + Duration::from_secs(60);
        let before = self.count();
        while self.count() <= before {
            assert!(Instant::now() < until, "the service stands still");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn writer(&self) -> UnitWriter {
        let identity = Identity {
            socket: "/none".into(),
            instance: None,
            freeze_timeout_ms: 10_000,
            service: None,
        };
        UnitWriter::new(
            identity,
            "test.service".into(),
            Way::FreezeGroup(self.group.clone()),
            vec![self.top.path().into()],
            Disks::default(),
            Watch::start(watch_command()).unwrap(),
        )
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        fs::write(self.group.join("cgroup.freeze"), "0").unwrap();
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        fs::remove_dir(&self.group).unwrap();
    }
}

/// The program itself, asked to be the watch.
fn watch_command() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_unit-writer"));
    command.arg("--watch");
    command
}

fn call() -> Call<'static> {
    Call::alone(Duration::from_secs(60))
}

fn hold(hold_ms: u64) -> Freeze {
    Freeze {
        set: "s".into(),
        generation: 1,
        hold_ms,
    }
}

fn thaw() -> Thaw {
    Thaw {
        set: "s".into(),
        generation: 1,
    }
}

#[test]
fn a_service_stands_still_while_frozen_and_goes_on_afterwards() {
    let (Some(service), Some(other)) = (Service::start("frozen"), Service::start("beside")) else {
        return;
    };
    let mut writer = service.writer();
    writer
        .prepare_backup(&call(), &PrepareBackup::default())
        .unwrap();
    let evidence = writer.freeze(&call(), &hold(10_000)).unwrap();
    let before = service.count();
    other.wait_for_more();
    other.wait_for_more();
    assert_eq!(service.count(), before);
    let held = writer.thaw(&call(), &thaw()).unwrap();
    assert!(held.held);
    assert_eq!(held.evidence, evidence);
    service.wait_for_more();
}

#[test]
fn a_group_that_somebody_else_let_go_was_not_held() {
    let Some(service) = Service::start("let-go") else {
        return;
    };
    let mut writer = service.writer();
    writer.freeze(&call(), &hold(10_000)).unwrap();
    fs::write(service.group.join("cgroup.freeze"), "0").unwrap();
    service.wait_for_more();
    assert!(!writer.thaw(&call(), &thaw()).unwrap().held);
}

#[test]
fn a_service_goes_on_when_the_time_is_over_or_the_writer_is_gone() {
    let Some(service) = Service::start("watched") else {
        return;
    };
    let mut writer = service.writer();
    // On a busy host the time may be over before all stand still: that is a veto, and they go on as well.
    drop(writer.freeze(&call(), &hold(100)));
    // Nobody thaws.
    service.wait_for_more();
    writer.freeze(&call(), &hold(60_000)).unwrap();
    drop(writer);
    service.wait_for_more();
}

#[test]
fn an_abort_lets_go_in_any_state() {
    let Some(service) = Service::start("aborted") else {
        return;
    };
    let mut writer = service.writer();
    writer.abort("s", "early");
    writer.freeze(&call(), &hold(60_000)).unwrap();
    writer.abort("s", "late");
    writer.abort("s", "again");
    service.wait_for_more();
    assert!(writer.thaw(&call(), &thaw()).is_err());
}

#[test]
fn what_is_no_group_or_the_writers_own_is_refused_for_good() {
    let veto = Group::at(Path::new("/tmp")).unwrap_err();
    assert_eq!(veto.code, WriterFailure::Nonretryable);
}

#[test]
fn only_services_are_stopped() {
    for unit in [
        "multi-user.target",
        "system.slice",
        "session-1.scope",
        "--all.service",
        "a b.service",
        "a\nb.service",
        "",
    ] {
        let veto = SystemdService::named(unit).unwrap_err();
        assert_eq!(veto.code, WriterFailure::Nonretryable, "{unit}");
    }
    assert!(SystemdService::named("app@1.service").is_ok());
    assert_eq!(SystemdService::named("app").unwrap().name(), "app.service");
}
