//! The machine is shut down, halted and started again by QEMU's own agent and by ours: QEMU hears the same.
//!
//! Called by the scenario, last. The same QEMU starts the machine again each time; what it has on its disks is kept.

use anyhow::{Context, Result, ensure};
use serde_json::json;
use vmshadow_tests::guest_protocol::{LOAD_PORT, QGA_PORT};
use vmshadow_tests::harness::qga::QgaClient;
use vmshadow_tests::harness::qmp::Qmp;
use vmshadow_tests::harness::site::Site;
use vmshadow_tests::harness::wait;

/// What can be asked for.
struct Mode {
    name: &'static str,
    /// How QEMU hears of it: the event and its reason.
    event: Option<(&'static str, &'static str)>,
    /// The kernel's last words.
    words: &'static str,
    /// It comes up again by itself.
    again: bool,
}

const POWER_DOWN: Mode = Mode {
    name: "powerdown",
    event: Some(("SHUTDOWN", "guest-shutdown")),
    words: "reboot: Power down",
    again: false,
};
const HALT: Mode = Mode {
    name: "halt",
    event: None,
    words: "reboot: System halted",
    again: false,
};
const REBOOT: Mode = Mode {
    name: "reboot",
    event: Some(("RESET", "guest-reset")),
    words: "reboot: Restarting system",
    again: true,
};

/// Each boot takes 10 to 20 s, so that all are for those who ask for them: `make shutdowns` does.
fn all_modes() -> bool {
    std::env::var_os("VMSHADOW_ALL_SHUTDOWNS").is_some()
}

/// Ours starts the machine again and switches it off; or every mode by each agent: what is expected is the same. It is not up in the end.
pub(crate) fn is_off_as_qemus_own_agent_puts_it(site: &Site) -> Result<()> {
    let mut monitor = site.vm.monitor()?;
    monitor.set_deadline(3 * wait::STEP)?;
    // Other than the rig wants it else: QEMU stays.
    monitor.execute(
        "set-action",
        json!({"reboot": "reset", "shutdown": "pause"}),
    )?;
    let (theirs, ours) = if all_modes() {
        eprintln!("every mode by each agent");
        (
            vec![POWER_DOWN, HALT, REBOOT],
            vec![HALT, REBOOT, POWER_DOWN],
        )
    } else {
        (vec![], vec![REBOOT, POWER_DOWN])
    };
    let theirs = theirs.iter().map(|mode| (LOAD_PORT, mode));
    let ours = ours.iter().map(|mode| (QGA_PORT, mode));
    let mut boots = 1;
    let mut is_up = true;
    for (port, mode) in theirs.chain(ours) {
        let what = format!("{} on {port}", mode.name);
        if !is_up {
            monitor.execute("system_reset", json!({}))?;
            monitor.execute("cont", json!({}))?;
            boots += 1;
            site.vm.is_up_again(boots)?;
        }
        if port == LOAD_PORT {
            super::start_stock(site)?;
        }
        one(site, &mut monitor, port, mode).context(what)?;
        is_up = mode.again;
        if is_up {
            boots += 1;
            site.vm.is_up_again(boots)?;
            // Our unit starts by itself, as the package has enabled it; a set is made of what came up.
            site.wait_for_writer("told")?;
            site.create(&[])?;
        }
    }
    Ok(())
}

fn one(site: &Site, monitor: &mut Qmp, port: &str, mode: &Mode) -> Result<()> {
    let mut agent = QgaClient::connect(&site.vm.port(port))?;
    // Neither shuts down for a word that it does not know.
    let refused = agent.ask("guest-shutdown", json!({"mode": "off"}))?;
    ensure!(refused["error"]["class"] == "GenericError", "{refused}");
    let said = || site.vm.console().matches(mode.words).count();
    let before = said();
    agent.tell("guest-shutdown", &json!({ "mode": mode.name }))?;
    agent.tell("guest-ping", &json!({}))?;
    if let Some((name, reason)) = mode.event {
        let heard = monitor
            .event(|event| event["event"] == name && event["data"]["guest"] == true)
            .with_context(|| site.log())?;
        ensure!(heard["data"]["reason"] == reason, "{heard}");
    }
    wait::until(mode.words, 3 * wait::STEP, || {
        Ok((said() > before).then_some(()))
    })
    .with_context(|| site.log())?;
    // A machine that is halted is there, and QEMU hears nothing.
    let status = monitor.execute("query-status", json!({}))?;
    let is_off = status["status"] == "shutdown";
    ensure!(is_off == (mode.name == POWER_DOWN.name), "{status}");
    // No reply on success. One that still runs answers the ping.
    let rest = agent.rest()?;
    ensure!(
        rest.is_empty() || rest == [json!({"return": {}})],
        "replies to {}: {rest:?}",
        mode.name
    );
    eprintln!("{} on {port}: {} replies", mode.name, rest.len());
    Ok(())
}
