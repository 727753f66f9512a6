//! Services that know nothing of snapshots, in a real machine with a real systemd: one is frozen under load, one is stopped and
//! started again.

use anyhow::{Context, Result, ensure};
use vmshadow_tests::guest_protocol::{Ack, LOAD_PORT};
use vmshadow_tests::harness::disk::{self, FileSystem};
use vmshadow_tests::harness::load::Load;
use vmshadow_tests::harness::oracle;
use vmshadow_tests::harness::proof;
use vmshadow_tests::harness::site::{Site, Taken};
use vmshadow_tests::harness::vm::VmBuilder;
use vmshadow_tests::harness::{requires, wait};

/// A service that leaves a word behind when it is stopped in order, and takes it away when it starts.
const ORDERLY: &str = r#"cd /mnt/b
rm -f order
trap stop=1 TERM
touch log
n=$(wc -l <log)
while [ -z "$stop" ]; do n=$((n + 1)); echo $n >>log; usleep 5000; done
echo $n >order"#;

/// A file in the guest, of these lines.
fn file(site: &Site, path: &str, text: &str) -> Result<()> {
    let text = text.replace('\'', "'\\''");
    site.vm.shell(&format!(
        "p={path} && mkdir -p ${{p%/*}} && echo '{text}' >$p"
    ))?;
    Ok(())
}

/// What systemd prints.
fn systemctl(site: &Site, words: &str) -> Result<String> {
    let running = site
        .vm
        .guest()?
        .start(&format!("start-systemd ask {words}"))?;
    let answer = running.wait(wait::STEP)?;
    ensure!(
        answer.status == 0,
        "systemctl {words}: {answer:?}\n{}",
        site.vm.log()
    );
    Ok(answer.stdout)
}

fn service(site: &Site, name: &str, lines: &str) -> Result<()> {
    let text = format!("[Unit]\nDefaultDependencies=no\n{lines}");
    file(site, &format!("/etc/systemd/system/{name}.service"), &text)
}

/// Our writer for a unit, by the unit file that we ship.
fn writer(site: &Site, unit: &str, options: &str) -> Result<()> {
    let name = format!("vmshadow-unit-writer@{unit}.service");
    let lines =
        format!("[Unit]\nDefaultDependencies=no\n[Service]\nEnvironment=\"OPTIONS={options}\"");
    file(
        site,
        &format!("/etc/systemd/system/{name}.d/test.conf"),
        &lines,
    )?;
    systemctl(site, "daemon-reload")?;
    systemctl(site, &format!("start {name}"))?;
    site.wait_for_writer(&format!("\"{unit}\""))
}

fn is_active(site: &Site, unit: &str) -> Result<bool> {
    let state = systemctl(site, &format!("show --property=ActiveState --value {unit}"))?;
    Ok(state.trim() == "active")
}

fn lines(site: &Site) -> Result<u64> {
    Ok(site.vm.shell("wc -l </mnt/b/log")?.trim().parse()?)
}

/// Starts the service whose clients tell what was acknowledged to them.
fn start_load(site: &Site) -> Result<Load> {
    Load::start_command(
        &site.vm,
        "guest-load",
        "start-systemd ask start frozen && while killall -0 guest-load; do usleep 100000; done",
        1,
    )
}

/// Sets under load, and how many lines the stopped service had written before each.
fn take(site: &Site, load: &Load, count: usize) -> Result<Vec<(u64, Taken)>> {
    let mut taken = Vec::new();
    for _ in 0..count {
        let before = lines(site)?;
        let set = site.create(&[])?;
        // The writer has waited for it: nobody else has to.
        ensure!(is_active(site, "stopped")?, "it is not up again");
        taken.push((before, set));
        load.wait_for_more(40)?;
        wait::until("the stopped service to go on", wait::STEP, || {
            Ok((lines(site)? > before).then_some(()))
        })?;
    }
    Ok(taken)
}

/// Starts a second machine on the copies of these sets.
fn judge(site: &Site, taken: &[(u64, Taken)], acks: &[Ack]) -> Result<()> {
    let mut second = VmBuilder::new("second");
    let mut files = Vec::new();
    for (number, (_, set)) in taken.iter().enumerate() {
        files.push(site.read_back(&set.answer, &format!("set{number}"))?);
    }
    for (number, file) in files.iter().flatten().enumerate() {
        disk::run("e2fsck", &["-fn"], file)?;
        second = second
            .file(&format!("copy{number}"), file)
            .mounted(&format!("/mnt/{number}"), FileSystem::Ext4);
    }
    let second = second.boot()?;
    for (number, (before, set)) in taken.iter().enumerate() {
        let (a, b) = (2 * number, 2 * number + 1);
        let found = oracle::open_database(&second, &format!("/mnt/{a}/load.db"))?;
        oracle::compare(&found, 0, acks, &set.window)
            .with_context(|| format!("set {number}: {found:?}, {:?}", set.window))?;
        let said = second.shell(&format!("cat /mnt/{b}/order; wc -l </mnt/{b}/log"))?;
        let words: Vec<u64> = said
            .split_whitespace()
            .map(str::parse)
            .collect::<Result<_, _>>()?;
        let [order, log] = words.as_slice() else {
            anyhow::bail!("set {number}: {said}");
        };
        ensure!(
            order == log && log >= before,
            "set {number}: {said} of at least {before}"
        );
    }
    second.power_cut()?;
    for ((_, set), files) in taken.iter().zip(&files) {
        proof::forget(site, set, files)?;
    }
    Ok(())
}

#[test]
fn a_frozen_unit_loses_nothing_and_a_stopped_one_has_ended_in_order() -> Result<()> {
    if !requires::machines() {
        return Ok(());
    }
    let site = Site::start_in_databases_guest(
        "units",
        &[("a", FileSystem::Ext4), ("b", FileSystem::Ext4)],
    )?;
    drop(site.vm.guest()?.start("exec start-systemd")?);
    wait::until("systemd", wait::STEP, || {
        let asked = site
            .vm
            .guest()?
            .start("start-systemd ask show --property=Version")?;
        Ok((asked.wait(wait::STEP)?.status == 0).then_some(()))
    })
    .with_context(|| site.log())?;

    service(
        &site,
        "frozen",
        &format!(
            "[Service]\nExecStart=/bin/guest-load /dev/virtio-ports/{LOAD_PORT} /mnt/a/load.db"
        ),
    )?;
    file(&site, "/etc/orderly", ORDERLY)?;
    service(
        &site,
        "stopped",
        "[Service]\nExecStart=/bin/sh /etc/orderly",
    )?;
    service(
        &site,
        "needy",
        "Requires=stopped.service\n[Service]\nExecStart=/bin/sleep 100000",
    )?;
    systemctl(&site, "daemon-reload")?;
    systemctl(&site, "start stopped needy")?;
    let mut load = start_load(&site)?;
    writer(&site, "frozen", "--files /mnt/a")?;
    writer(&site, "stopped", "--stop --files /mnt/b")?;
    // All that follows works with no power of root's but the one that the unit leaves: CAP_DAC_OVERRIDE.
    let powers = site
        .vm
        .shell("for p in $(pidof unit-writer); do grep CapEff /proc/$p/status; done")?;
    ensure!(
        powers.contains("CapEff")
            && powers
                .lines()
                .all(|line| line.ends_with("\t0000000000000002")),
        "{powers}"
    );

    // Another would go down with it, and nobody would start that one again.
    let refused = site.try_create(&[])?;
    site.was_refused(&refused, &["WRITER_VETO"])?;
    let message = refused.at("/reason/message")?.to_string();
    ensure!(message.contains("needy.service"), "{message}");
    ensure!(is_active(&site, "stopped")? && is_active(&site, "needy")?);
    systemctl(&site, "stop needy")?;

    let sets = proof::sets()?;
    for done in (0..sets).step_by(proof::BATCH) {
        let taken = take(&site, &load, proof::BATCH.min(sets - done))?;
        judge(&site, &taken, &load.stop(&site.vm)?)?;
        eprintln!("units: {} of {sets} sets hold", done + taken.len());
        load = start_load(&site)?;
    }

    // A writer that is killed in the window takes the set with it, and leaves nothing stopped or frozen.
    site.script_writer(
        "killer",
        &[
            ("writer.json", r#"{"level": "SYSTEM"}"#),
            (
                "freeze",
                "for p in $(pidof unit-writer); do \
                 grep -q stopped /proc/$p/cmdline && kill -9 $p; done; exit 0",
            ),
            ("thaw", "exit 0"),
        ],
    )?;
    let killed = site.try_create(&[])?;
    site.was_refused(
        &killed,
        &["WRITER_NOT_RESPONDING", "WRITER_VETO", "HOLD_BROKEN"],
    )?;
    load.wait_for_more(40)?;
    wait::until("the stopped service to be started", wait::STEP, || {
        Ok(is_active(&site, "stopped")?.then_some(()))
    })?;

    drop(load.stop(&site.vm)?);
    Ok(())
}
