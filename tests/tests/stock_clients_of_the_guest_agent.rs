//! Programs that only know QEMU's guest agent find one in ours: libvirt by `virsh`, Proxmox by the bytes it writes.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use vmshadow_tests::guest_protocol::QGA_PORT;
use vmshadow_tests::harness::daemon::VhostBlk;
use vmshadow_tests::harness::disk::{self, FileSystem};
use vmshadow_tests::harness::libvirt::{DomainDisk, Libvirt, may_run};
use vmshadow_tests::harness::site::{Site, SiteDisk};
use vmshadow_tests::harness::{requires, wait};

#[test]
fn libvirt_freezes_and_thaws_a_domain_through_our_agent() -> Result<()> {
    if !requires::machines() || !requires::programs(Libvirt::PROGRAMS) || !may_run() {
        return Ok(());
    }
    let directory = tempfile::Builder::new()
        .prefix("vmshadow-libvirt-disks-")
        .tempdir()?;
    let mut disks = Vec::new();
    for name in ["a", "b"] {
        disks.push(SiteDisk {
            name: name.to_owned(),
            file_system: FileSystem::Ext4,
            base: disk::create(directory.path(), name, FileSystem::Ext4)?,
        });
    }
    let daemon = VhostBlk::start(directory.path(), &disks)?;
    let attached: Vec<_> = disks
        .iter()
        .map(|disk| DomainDisk {
            socket: daemon.socket(&disk.name),
            serial: disk.name.clone(),
            point: format!("/mnt/{}", disk.name),
        })
        .collect();
    let libvirt = Libvirt::start("guest", &attached)?;
    let check = || -> Result<()> {
        let name = libvirt.domain();
        wait::until("libvirt to see the agent", wait::STEP, || {
            let ping = r#"{"execute":"guest-ping"}"#;
            Ok(libvirt.virsh(&["qemu-agent-command", name, ping]).ok())
        })?;
        let mounted = libvirt.virsh(&["domfsinfo", name])?;
        for point in ["/mnt/a", "/mnt/b"] {
            ensure!(mounted.contains(point), "domfsinfo: {mounted}");
        }
        let shell = libvirt.shell()?;

        let frozen = libvirt.virsh(&["domfsfreeze", name])?;
        ensure!(frozen.contains("2 filesystem"), "domfsfreeze: {frozen}");
        let held = shell.start("touch /mnt/a/held")?;
        let status = r#"{"execute":"guest-fsfreeze-status"}"#;
        let answer: Value =
            serde_json::from_str(&libvirt.virsh(&["qemu-agent-command", name, status])?)?;
        ensure!(answer == json!({"return": "frozen"}), "{answer}");
        ensure!(held.still_runs(), "a write went through while frozen");
        let thawed = libvirt.virsh(&["domfsthaw", name])?;
        ensure!(thawed.contains("2 filesystem"), "domfsthaw: {thawed}");
        ensure!(
            held.wait(wait::STEP)?.status == 0,
            "the held write never ended"
        );

        let frozen = libvirt.virsh(&["domfsfreeze", name, "--mountpoint", "/mnt/b"])?;
        ensure!(frozen.contains("1 filesystem"), "one of them: {frozen}");
        let free = shell.start("touch /mnt/a/free")?;
        ensure!(
            free.wait(wait::STEP)?.status == 0,
            "the other one was frozen, too"
        );
        let again = libvirt
            .virsh(&["domfsfreeze", name])
            .err()
            .context("frozen twice")?;
        ensure!(
            format!("{again:#}").contains("in frozen state"),
            "{again:#}"
        );
        let thawed = libvirt.virsh(&["domfsthaw", name])?;
        ensure!(thawed.contains("1 filesystem"), "domfsthaw: {thawed}");
        let nothing = libvirt.virsh(&["domfsthaw", name])?;
        ensure!(nothing.contains("0 filesystem"), "thawed twice: {nothing}");
        libvirt.destroy()
    };
    check().with_context(|| libvirt.log())
}

/// One exchange as Proxmox makes it: a sync and the command in a single write without a leading 0xFF; the answer is
/// 0xFF, the sync's line, the command's line.
fn proxmox(port: &mut UnixStream, id: u64, command: &str) -> Result<Value> {
    let sync = json!({"execute": "guest-sync-delimited", "arguments": {"id": id}});
    let request = json!({"execute": command, "arguments": {}});
    port.write_all(format!("{sync}\n{request}\n").as_bytes())?;
    let mut answers = BufReader::new(&mut *port);
    let mut first = [0];
    answers.read_exact(&mut first)?;
    ensure!(first == [0xff], "the sync does not begin with 0xff");
    let mut line = String::new();
    answers.read_line(&mut line)?;
    ensure!(
        serde_json::from_str::<Value>(&line)? == json!({"return": id}),
        "{line}"
    );
    line.clear();
    answers.read_line(&mut line)?;
    ensure!(line.ends_with("}\n"), "not one line: {line:?}");
    Ok(serde_json::from_str(&line)?)
}

#[test]
fn proxmox_freezes_and_thaws_through_our_agent() -> Result<()> {
    if !requires::machines() {
        return Ok(());
    }
    let site = Site::start("proxmox", &[("a", FileSystem::Ext4)])?;
    let mut port = UnixStream::connect(site.vm.port(QGA_PORT))?;
    port.set_read_timeout(Some(wait::STEP))?;
    // Ids as Proxmox makes them: seconds and a counter; they need more than 32 bits elsewhere.
    let mut id = 1_795_328_126_000;
    let mut ask = |command: &str| -> Result<Value> {
        id += 1;
        proxmox(&mut port, id, command)
    };
    ensure!(ask("guest-ping")? == json!({"return": {}}));
    ensure!(ask("guest-fsfreeze-freeze")? == json!({"return": 1}));
    ensure!(ask("guest-fsfreeze-status")? == json!({"return": "frozen"}));
    let held = site.vm.guest()?.start("touch /mnt/a/held")?;
    let refused = ask("guest-get-fsinfo")?;
    ensure!(
        refused["error"]["class"] == json!("CommandNotFound"),
        "{refused}"
    );
    ensure!(held.still_runs(), "a write went through while frozen");
    ensure!(ask("guest-fsfreeze-thaw")? == json!({"return": 1}));
    ensure!(held.wait(wait::STEP)?.status == 0);
    ensure!(ask("guest-fsfreeze-status")? == json!({"return": "thawed"}));
    ensure!(
        ask("guest-fsfreeze-thaw")? == json!({"return": 0}),
        "nothing was frozen"
    );
    Ok(())
}
