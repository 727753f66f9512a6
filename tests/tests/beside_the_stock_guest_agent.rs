//! One script of commands, asked of QEMU's own guest agent and of ours in the same boot of the same guest: the replies are
//! the same but for the differences in [`DIFFERENCES`], each of which must be seen.
//!
//! `script` is what is asked, `compare` is how two replies are laid beside each other.

#[path = "beside_the_stock_guest_agent/compare.rs"]
mod compare;
#[path = "beside_the_stock_guest_agent/script.rs"]
mod script;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use compare::compare;
use script::{Reply, SETUP, VOLATILE, script};
use serde_json::{Value, json};
use vmshadow_tests::guest_protocol::{LOAD_PORT, QGA_PORT};
use vmshadow_tests::harness::disk::{self, FileSystem};
use vmshadow_tests::harness::vm::VmBuilder;
use vmshadow_tests::harness::{requires, wait};

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

/// A client of one agent.
#[derive(Debug)]
pub(crate) struct Agent {
    port: BufReader<UnixStream>,
    next: u64,
}

impl Agent {
    fn connect(socket: &Path) -> Result<Self> {
        let port = UnixStream::connect(socket)?;
        port.set_read_timeout(Some(Duration::from_secs(5)))?;
        let mut agent = Self {
            port: BufReader::new(port),
            next: 0,
        };
        // One that starts late answers all that waited for it: go on behind the last.
        wait::until("the agent to answer", wait::STEP, || {
            agent.next += 1;
            let sync = json!({"execute": "guest-sync", "arguments": {"id": agent.next}});
            writeln!(agent.port.get_mut(), "{sync}")?;
            while let Ok(reply) = agent.reply() {
                if reply == json!({"return": agent.next}) {
                    return Ok(Some(()));
                }
            }
            Ok(None)
        })?;
        agent.port.get_ref().set_read_timeout(Some(wait::STEP))?;
        Ok(agent)
    }

    /// One reply to one text, without the delimiter of a sync.
    pub(crate) fn ask_text(&mut self, text: &str) -> Result<Value> {
        let port = self.port.get_mut();
        port.write_all(text.as_bytes())?;
        port.write_all(b"\n")?;
        self.reply()
            .with_context(|| text.chars().take(200).collect::<String>())
    }

    pub(crate) fn reply(&mut self) -> Result<Value> {
        let mut line = Vec::new();
        self.port.read_until(b'\n', &mut line)?;
        ensure!(line.ends_with(b"}\n"), "not a line: {line:?}");
        let line = line.strip_prefix(b"\xff").unwrap_or(&line);
        Ok(serde_json::from_slice(line)?)
    }

    /// A command by name; the reply's id is checked and taken off.
    pub(crate) fn ask(&mut self, name: &str, arguments: Value) -> Result<Value> {
        self.next += 1;
        let mut request = json!({"execute": name, "id": self.next});
        if arguments != json!({}) {
            request["arguments"] = arguments;
        }
        let mut reply = self.ask_text(&request.to_string())?;
        let id = reply.as_object_mut().and_then(|reply| reply.remove("id"));
        ensure!(id == Some(json!(self.next)), "{name}: the id is {id:?}");
        Ok(reply)
    }
}

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
        let mut agent = Agent::connect(&vm.port(port))?;
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
    Ok(())
}
