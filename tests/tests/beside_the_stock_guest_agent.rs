//! One script of commands, asked of QEMU's own guest agent and of ours in the same boot of the same guest: the replies are
//! the same but for the differences in [`DIFFERENCES`], each of which must be seen.
//!
//! `script` is what is asked, `compare` is how two replies are laid beside each other.

#[path = "beside_the_stock_guest_agent/compare.rs"]
mod compare;
#[path = "beside_the_stock_guest_agent/script.rs"]
mod script;

use anyhow::{Context, Result, ensure};
use compare::compare;
use script::{Reply, SETUP, VOLATILE, script};
use serde_json::json;
use vmshadow_tests::guest_protocol::{LOAD_PORT, QGA_PORT};
use vmshadow_tests::harness::disk::{self, FileSystem};
use vmshadow_tests::harness::qga::QgaClient;
use vmshadow_tests::harness::requires;
use vmshadow_tests::harness::vm::VmBuilder;
use vmshadow_tests::harness::wait;

/// Where ours answers otherwise than QEMU's, and why: the step of the script, the place in the reply, the reason.
const DIFFERENCES: &[(&str, &str, &str)] = &[
    ("info", ".return.supported_commands[guest-get-load]", LOAD),
    (
        "info while frozen",
        ".return.supported_commands[guest-get-load]",
        LOAD,
    ),
    ("guest-get-disks", ".return[/dev/vda].address.serial", UDEV),
    ("guest-get-disks", ".return[/dev/vdb].address.serial", UDEV),
    ("guest-get-disks", ".return[/dev/vdc].address.serial", UDEV),
    (
        "guest-get-fsinfo",
        ".return[/mnt/a].disk[/dev/vda].serial",
        UDEV,
    ),
    (
        "guest-get-fsinfo",
        ".return[/mnt/bound].disk[/dev/vda].serial",
        UDEV,
    ),
    (
        "guest-get-fsinfo",
        ".return[/mnt/b].disk[/dev/vdb].serial",
        UDEV,
    ),
    (
        "guest-get-fsinfo",
        ".return[/usr].disk[/dev/vdc].serial",
        UDEV,
    ),
    ("freeze all", ".return", READ_ONLY),
    ("thaw all", ".return", READ_ONLY),
];

const LOAD: &str = "newer than 7.2; libvirt 11 asks for it";
const UDEV: &str = "theirs asks udev, which this guest has not; ours asks the disk itself then";
const READ_ONLY: &str =
    "ours leaves read-only file systems (/usr) alone: they have no writes to hold";

#[test]
fn ours_answers_what_qemus_own_agent_answers() -> Result<()> {
    if !requires::machines() {
        return Ok(());
    }
    let directory = tempfile::Builder::new()
        .prefix("vmshadow-beside-")
        .tempdir()?;
    let mut machine = VmBuilder::new("beside").with_databases().with_agent();
    for name in ["a", "b"] {
        let file = disk::create(directory.path(), name, FileSystem::Ext4)?;
        machine = machine
            .file(name, &file)
            .mounted(&format!("/mnt/{name}"), FileSystem::Ext4);
    }
    let vm = machine.boot()?;
    vm.shell(SETUP)?;
    // Both read /etc/localtime when they start; ours comes back by itself.
    vm.shell("killall guest-agent")?;
    let stock = vm.guest()?.start(&format!(
        "exec /usr/sbin/qemu-ga --method virtio-serial --path /dev/virtio-ports/{LOAD_PORT} --statedir /run >/tmp/qemu-ga.log 2>&1"
    ))?;
    let run = |port: &str| -> Result<Vec<Reply>> {
        let mut agent = QgaClient::connect(&vm.port(port))?;
        script(&mut agent, &|command: &str| vm.shell(command)).with_context(|| {
            let log = vm.shell("cat /tmp/qemu-ga.log").unwrap_or_default();
            format!("asking on {port}\n{log}\n{}", vm.log())
        })
    };
    let theirs = run(LOAD_PORT)?;
    ensure!(stock.still_runs(), "qemu-ga has ended");
    let ours = run(QGA_PORT)?;

    ensure!(theirs.len() == ours.len(), "the script took two ways");
    let mut unexpected = Vec::new();
    let mut seen = Vec::new();
    for (theirs, ours) in theirs.iter().zip(&ours) {
        ensure!(theirs.step == ours.step, "{theirs:?} {ours:?}");
        for (place, what) in compare(&theirs.value, &ours.value, VOLATILE) {
            let known = DIFFERENCES
                .iter()
                .find(|(step, known, _)| *step == ours.step && *known == place);
            match known {
                Some(known) => seen.push(known),
                None => unexpected.push(format!("{}: {place}: {what}", ours.step)),
            }
        }
    }
    eprintln!("{} replies compared", ours.len());
    ensure!(unexpected.is_empty(), "{}", unexpected.join("\n"));
    for difference in DIFFERENCES {
        ensure!(seen.contains(&difference), "not seen: {difference:?}");
    }
    // Ours alone, and last: a machine whose kernel QEMU loads itself does not wake up from this.
    let mut ours = QgaClient::connect(&vm.port(QGA_PORT))?;
    ours.tell("guest-suspend-ram", &json!({}))?;
    let mut monitor = vm.monitor()?;
    wait::until("the machine to sleep", wait::STEP, || {
        let state = monitor.execute("query-status", json!({}))?;
        Ok((state["status"] == "suspended").then_some(()))
    })
    .with_context(|| vm.log())
}
