//! NFS: a mount whose server is gone keeps nobody waiting, and clients of an export that is frozen wait and go on.
//!
//! Called by the scenario. The machine is its own server and client.

use anyhow::{Context, Result, ensure};
use serde_json::json;
use vmshadow_tests::guest_protocol::QGA_PORT;
use vmshadow_tests::harness::qga::QgaClient;
use vmshadow_tests::harness::site::Site;
use vmshadow_tests::harness::wait;

use super::nothing_is_frozen;

/// Where the machine mounts its own `/mnt/a`.
const MOUNT: &str = "/srv/client";

/// Both, and nothing of them is left.
pub(crate) fn keep_nobody_waiting(site: &Site) -> Result<()> {
    // Version 4 alone needs none of the port mapper's family; no client was here before, so there is no time of grace.
    site.vm.shell(&format!(
        "systemctl unmask nfs-server 2>&1 && mkdir -p /mnt/a/exported {MOUNT} && \
         printf '[nfsd]\\nvers3=n\\nthreads=2\\ngrace-time=10\\nlease-time=10\\n' >/etc/nfs.conf.d/test.conf && \
         echo '/mnt/a/exported localhost(rw,no_root_squash,no_subtree_check,insecure)' >/etc/exports && \
         systemctl start nfs-server && mount -t nfs4 -o hard localhost:/mnt/a/exported {MOUNT} && echo one >{MOUNT}/file && grep one /mnt/a/exported/file"
    ))?;
    an_export_is_frozen(site)?;
    the_server_is_gone(site)?;
    site.vm
        .shell(&format!("umount {MOUNT} && systemctl stop nfs-server"))?;
    Ok(())
}

fn count(site: &Site) -> Result<u64> {
    let text = site.vm.shell("wc -l </run/written")?;
    Ok(text.trim().parse()?)
}

/// A client's writes wait for the thaw of what it has mounted, and go on.
fn an_export_is_frozen(site: &Site) -> Result<()> {
    // Closing a file of NFS waits until the server has it on its disk.
    site.vm.shell("touch /run/written")?;
    let client = format!(
        "while [ ! -e /run/enough ]; do echo x >>{MOUNT}/log && echo x >>/run/written; done"
    );
    let client = site.vm.guest()?.start(&client)?;
    wait::until("a client to write", wait::STEP, || {
        Ok((count(site)? > 3).then_some(()))
    })?;
    let mut create = site.bridge.start(&["create"], Some("frozen"))?;
    create.wait_stopped().with_context(|| site.log())?;
    // A thread of the server stands before the frozen file system.
    site.vm.shell(
        "until cat $(pgrep -x nfsd | sed 's,.*,/proc/&/wchan,') | grep -q percpu_rwsem_wait; do :; done",
    )?;
    let before = count(site)?;
    ensure!(count(site)? == before, "written while frozen");
    create.go_on()?;
    let answer = create.wait(3 * wait::STEP)?;
    ensure!(answer.code == 0, "{answer:?}\n{}", site.log());
    wait::until("the client to go on", wait::STEP, || {
        Ok((count(site)? > before + 3).then_some(()))
    })?;
    site.vm.shell("touch /run/enough")?;
    ensure!(
        client.wait(wait::STEP)?.status == 0,
        "the client has failed"
    );
    let lost = site.vm.shell(&format!(
        "[ $(wc -l <{MOUNT}/log) = $(wc -l </run/written) ] && cmp {MOUNT}/log /mnt/a/exported/log; rm /run/enough"
    ))?;
    ensure!(lost.is_empty(), "{lost}");
    Ok(())
}

/// A hard mount without its server: whoever opens it hangs. Nobody does.
fn the_server_is_gone(site: &Site) -> Result<()> {
    site.vm.shell("systemctl stop nfs-server")?;
    let hangs = site
        .vm
        .guest()?
        .start(&format!("! cat {MOUNT}/never-seen"))?;
    let writes = site.vm.guest()?.start(&format!("echo two >{MOUNT}/two"))?;
    let mut stock = QgaClient::connect(&site.vm.port(QGA_PORT))?;
    let mut ask = |name: &str| -> Result<serde_json::Value> {
        let reply = stock.ask(name, json!({}))?;
        ensure!(reply.get("error").is_none(), "{name}: {reply}");
        Ok(reply)
    };
    ensure!(
        ask("guest-fsfreeze-status")? == json!({"return": "thawed"}),
        "not thawed"
    );
    let told = ask("guest-get-fsinfo")?.to_string();
    ensure!(told.contains("/mnt/a") && !told.contains(MOUNT), "{told}");
    for name in ["guest-get-disks", "guest-get-diskstats"] {
        ask(name)?;
    }
    let frozen = ask("guest-fsfreeze-freeze")?;
    ensure!(frozen == json!({"return": 3}), "{frozen}");
    ensure!(
        ask("guest-fsfreeze-status")? == json!({"return": "frozen"}),
        "not frozen"
    );
    let thawed = ask("guest-fsfreeze-thaw")?;
    ensure!(thawed == json!({"return": 3}), "{thawed}");

    // By our own protocol: at the level of applications, with all that is on disks and nothing else.
    let set = site.create(&[])?;
    let report = set.answer.document.to_string();
    for point in ["\"/\"", "/mnt/a", "/mnt/b"] {
        ensure!(report.contains(point), "no {point}: {report}");
    }
    ensure!(!report.contains(MOUNT), "{report}");
    eprintln!(
        "with a dead NFS mount: frozen in {} ms of the guest's, {}",
        set.window.hold_ms,
        set.answer.at("/timings")?
    );
    let lower = site.try_create(&["--level", "filesystem"])?.succeeded()?;
    ensure!(lower.at("/level-reached")? == "filesystem", "{lower:?}");
    nothing_is_frozen(site)?;
    ensure!(
        hangs.still_runs() && writes.still_runs(),
        "this mount is not dead"
    );
    // What waits for the server goes on with it.
    site.vm.shell("systemctl start nfs-server")?;
    for waiting in [hangs, writes] {
        let answer = waiting.wait(3 * wait::STEP)?;
        ensure!(answer.status == 0, "{answer:?}");
    }
    Ok(())
}
