//! What goes into a set, and what cannot.

use super::*;
use uuid::Uuid;
use vhost_blk_wire::types::Method;

fn volume(name: &str) -> VolumeInfo {
    VolumeInfo {
        volume: name.to_owned(),
        id: Uuid::nil(),
        serial: format!("ser-{name}"),
        base: String::new(),
        shadow_storage: String::new(),
        socket: format!("/run/{name}.sock"),
        size_bytes: 1 << 20,
        method: Method::Row,
        read_only: false,
        connected: true,
        poisoned: false,
        snapshots: 0,
        shadow_used_bytes: 0,
        shadow_allocated_bytes: 0,
        shadow_ahead_bytes: 0,
        plain: true,
    }
}

fn daemon(control: &str, volumes: &[&str]) -> DaemonVolumes {
    DaemonVolumes {
        control: PathBuf::from(control),
        volumes: volumes.iter().map(|name| volume(name)).collect(),
    }
}

fn disk(device: &str, socket: &str) -> FoundDisk {
    FoundDisk {
        device: device.to_owned(),
        aliases: Vec::new(),
        backing: Backing::VhostUser {
            socket: PathBuf::from(socket),
        },
    }
}

fn foreign(device: &str, read_only: bool) -> FoundDisk {
    FoundDisk {
        device: device.to_owned(),
        aliases: vec!["node7".to_owned()],
        backing: Backing::Other {
            what: "QEMU".to_owned(),
            read_only,
        },
    }
}

fn names(plan: &Plan) -> Vec<Vec<&str>> {
    plan.parts
        .iter()
        .map(|part| part.volumes.iter().map(|v| v.volume.as_str()).collect())
        .collect()
}

fn asking(change: impl FnOnce(&mut CreateRequest)) -> CreateRequest {
    let mut request = CreateRequest::default();
    change(&mut request);
    request
}

fn two_disks() -> (Vec<FoundDisk>, Vec<DaemonVolumes>) {
    (
        vec![
            disk("disk0", "/run/root.sock"),
            disk("disk1", "/run/data.sock"),
        ],
        vec![daemon("/c0", &["root", "spare"]), daemon("/c1", &["data"])],
    )
}

#[test]
fn disks_are_matched_by_socket_and_other_volumes_of_the_daemon_stay_out() {
    let (disks, daemons) = two_disks();
    let plan = plan(&CreateRequest::default(), &disks, &daemons).unwrap();
    assert_eq!(names(&plan), [["root"], ["data"]]);
    assert!(plan.holds_across_daemons());
    assert_eq!(plan.serials(), ["ser-root", "ser-data"]);
    assert_eq!(plan.attempts, [Level::Application]);
    assert!(plan.uncovered.is_empty());
}

#[test]
fn a_socket_is_the_same_through_a_symbolic_link() {
    let dir = tempfile::tempdir().unwrap();
    let real = dir.path().join("real.sock");
    std::fs::write(&real, "").unwrap();
    let link = dir.path().join("link.sock");
    std::os::unix::fs::symlink(&real, &link).unwrap();
    let mut daemons = vec![daemon("/c0", &["root"])];
    daemons[0].volumes[0].socket = real.display().to_string();
    let disks = [disk("disk0", &link.display().to_string())];
    assert!(plan(&CreateRequest::default(), &disks, &daemons).is_ok());
}

#[test]
fn chosen_disks_leave_the_others_out_by_the_requesters_word() {
    let (mut disks, daemons) = two_disks();
    disks.push(foreign("other", false));
    for name in ["data", "ser-data", "disk1"] {
        let request = asking(|r| r.disks = vec![name.to_owned()]);
        let plan = plan(&request, &disks, &daemons).unwrap();
        assert_eq!(names(&plan), [["data"]]);
        assert!(plan.every_disk());
        assert_eq!(plan.attempts, [Level::Application]);
        assert_eq!(plan.uncovered.len(), 2);
    }
    let request = asking(|r| r.disks = vec!["spare".to_owned()]);
    assert_eq!(
        plan(&request, &disks, &daemons),
        Err(PlanError::NoSuchDisk("spare".to_owned()))
    );
}

#[test]
fn a_writable_disk_that_is_not_ours_rules_out_application() {
    let (mut disks, daemons) = two_disks();
    disks.push(foreign("other", false));
    assert!(matches!(
        plan(&CreateRequest::default(), &disks, &daemons),
        Err(PlanError::NotCovered { device, .. }) if device == "other"
    ));
    let lower = plan(&asking(|r| r.level = Level::Filesystem), &disks, &daemons).unwrap();
    assert_eq!(lower.attempts, [Level::Filesystem]);
    let best = plan(&asking(|r| r.best_effort = true), &disks, &daemons).unwrap();
    assert_eq!(best.attempts, [Level::Filesystem, Level::Crash]);
    assert!(best.lowered_by.is_some());
    assert!(!best.every_disk());
    for name in ["other", "node7"] {
        let request = asking(|r| r.exclude_disks = vec![name.to_owned()]);
        let plan = plan(&request, &disks, &daemons).unwrap();
        assert_eq!(plan.attempts, [Level::Application]);
        assert!(plan.every_disk());
    }
}

#[test]
fn a_vhost_user_disk_of_somebody_else_is_not_ours_either() {
    let (mut disks, daemons) = two_disks();
    disks.push(disk("disk2", "/run/spdk.sock"));
    let refused = plan(&CreateRequest::default(), &disks, &daemons).unwrap_err();
    assert!(refused.to_string().contains("/run/spdk.sock"), "{refused}");
}

#[test]
fn read_only_disks_need_no_copy() {
    let (mut disks, daemons) = two_disks();
    disks.push(foreign("cd", true));
    let plan = plan(&CreateRequest::default(), &disks, &daemons).unwrap();
    assert!(plan.uncovered.is_empty());
}

#[test]
fn what_cannot_be_a_set_is_refused() {
    let (disks, daemons) = two_disks();
    assert_eq!(
        plan(&CreateRequest::default(), &[], &daemons),
        Err(PlanError::NoDisks)
    );
    let mut poisoned = daemons.clone();
    poisoned[1].volumes[0].poisoned = true;
    assert_eq!(
        plan(&CreateRequest::default(), &disks, &poisoned),
        Err(PlanError::Poisoned("data".to_owned()))
    );
    let mut same = daemons;
    same[1].volumes[0].serial = "ser-root".to_owned();
    assert_eq!(
        plan(&CreateRequest::default(), &disks, &same),
        Err(PlanError::SameSerial("ser-root".to_owned()))
    );
    let many: Vec<String> = (0..65).map(|n| format!("v{n}")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    let disks: Vec<FoundDisk> = many
        .iter()
        .map(|name| disk(name, &format!("/run/{name}.sock")))
        .collect();
    assert_eq!(
        plan(&CreateRequest::default(), &disks, &[daemon("/c0", &many)]),
        Err(PlanError::TooMany(65))
    );
}

#[test]
fn best_effort_attempts_every_lower_level() {
    let (disks, daemons) = two_disks();
    let attempts = |level, best_effort| {
        let request = asking(|r| {
            r.level = level;
            r.best_effort = best_effort;
        });
        plan(&request, &disks, &daemons).unwrap().attempts
    };
    assert_eq!(
        attempts(Level::Application, true),
        [Level::Application, Level::Filesystem, Level::Crash]
    );
    assert_eq!(
        attempts(Level::Filesystem, true),
        [Level::Filesystem, Level::Crash]
    );
    assert_eq!(attempts(Level::Filesystem, false), [Level::Filesystem]);
    assert_eq!(attempts(Level::Crash, true), [Level::Crash]);
}
