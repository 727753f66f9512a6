//! One script of `virsh`'s words, said to whichever agent is in the domain, and how two rounds of it are laid beside each other.
//!
//! Called by the scenario.

use std::collections::BTreeSet;

use anyhow::{Result, ensure};
use vmshadow_tests::harness::libvirt::Libvirt;
use vmshadow_tests::harness::wait;

/// QEMU's own agent takes the port.
pub(crate) const STOCK: &str = r#"set -e
mkdir -p /var && ln -sfn /run /var/run
cp /bin/start-agent /tmp/ours
cat >/bin/start-agent <<END
#!/bin/sh
exec /usr/sbin/qemu-ga --method virtio-serial --path /dev/virtio-ports/org.qemu.guest_agent.0 --statedir /run
END
killall guest-agent
until pidof qemu-ga >/dev/null && ! pidof guest-agent >/dev/null; do usleep 100000; done"#;

/// Ours takes it back.
pub(crate) const OURS: &str = r#"set -e
cp /tmp/ours /bin/start-agent
killall qemu-ga
until pidof guest-agent >/dev/null && ! pidof qemu-ga >/dev/null; do usleep 100000; done"#;

/// What is said, in this order; `@` stands for the domain. What fails is compared by what it says.
const WORDS: &[&str] = &[
    "domfsinfo @",
    "domhostname @ --source agent",
    "domifaddr @ --source agent",
    "domifaddr @ --source agent --full",
    "guestinfo @ --user",
    "guestinfo @ --os",
    "guestinfo @ --timezone",
    "guestinfo @ --hostname",
    "guestinfo @ --filesystem",
    "guestinfo @ --disk",
    "guestinfo @ --interface",
    "domfstrim @",
    "domfstrim @ --mountpoint /mnt/a",
    "domtime @",
    "domtime @ --time 1800000000",
    "domtime @ --sync",
    "guestvcpus @",
    "guestvcpus @ --cpulist 1 --disable",
    "guestvcpus @",
    "guestvcpus @ --cpulist 0 --disable",
    "setvcpus @ 2 --guest",
    "vcpucount @ --guest",
    "set-user-password @ ann secret",
    "set-user-password @ nobody-there secret",
    "set-user-password @ ann $6$a$b --encrypted",
    "set-user-sshkeys @ ann --file KEYS",
    "set-user-sshkeys @ ann --file KEYS",
    "get-user-sshkeys @ ann",
    "set-user-sshkeys @ ann --file KEYS --remove",
    "get-user-sshkeys @ ann",
    "get-user-sshkeys @ nobody-there",
    r#"qemu-agent-command @ {"execute":"guest-ping"}"#,
    r#"qemu-agent-command @ {"execute":"guest-exec","arguments":{"path":"/nowhere"}}"#,
    r#"qemu-agent-command @ {"execute":"no-such-command"}"#,
    r#"qemu-agent-command @ {"execute":"guest-exec-status","arguments":{"pid":"no-number"}}"#,
    "domfsfreeze @",
    r#"qemu-agent-command @ {"execute":"guest-fsfreeze-status"}"#,
    r#"qemu-agent-command @ {"execute":"guest-ping"}"#,
    r#"qemu-agent-command @ {"execute":"guest-get-fsinfo"}"#,
    "domfsinfo @",
    "domfstrim @",
    "domfsfreeze @",
    "domfsthaw @",
    "domfsthaw @",
    r#"qemu-agent-command @ {"execute":"guest-fsfreeze-status"}"#,
    "domfsfreeze @ --mountpoint /mnt/b",
    "domfsthaw @",
    "domfsfreeze @ --mountpoint /nowhere",
    "domfsthaw @",
    "domfsfreeze @ --mountpoint /mnt/a --mountpoint /mnt/b",
    "domfsthaw @ --mountpoint /mnt/a",
    "domfsthaw @",
];

/// Lines that say how late it is.
const VOLATILE: &str = "Time: ";

/// A step and what `virsh` said, with its standard error if it failed.
pub(crate) type Said = (String, String);

/// Says it all.
pub(crate) fn run(libvirt: &Libvirt) -> Result<Vec<Said>> {
    let keys = libvirt.file("keys");
    std::fs::write(&keys, "ssh-rsa AAAA ann@host\n")?;
    let keys = keys.display().to_string();
    wait::until("libvirt to see the agent", wait::STEP, || {
        let ping = r#"{"execute":"guest-ping"}"#;
        let words = ["qemu-agent-command", libvirt.domain(), ping];
        Ok(libvirt.virsh(&words).ok())
    })?;
    let mut all = Vec::new();
    for (number, line) in WORDS.iter().enumerate() {
        let words: Vec<_> = line
            .split(' ')
            .map(|word| match word {
                "@" => libvirt.domain(),
                "KEYS" => keys.as_str(),
                other => other,
            })
            .collect();
        let said = match libvirt.virsh(&words) {
            Ok(text) => text,
            Err(error) => format!("{error:#}"),
        };
        all.push((format!("{number}: {line}"), said));
    }
    Ok(all)
}

/// The lines that only one of them says, with whose they are. In which order lists come says nothing: their numbers are left out.
pub(crate) fn differences(theirs: &[Said], ours: &[Said]) -> Result<Vec<Said>> {
    ensure!(theirs.len() == ours.len(), "the script took two ways");
    let mut found = Vec::new();
    for ((step, theirs), (_, ours)) in theirs.iter().zip(ours) {
        let (theirs, ours) = (lines(theirs), lines(ours));
        for line in theirs.difference(&ours) {
            found.push((step.clone(), format!("theirs: {line}")));
        }
        for line in ours.difference(&theirs) {
            found.push((step.clone(), format!("ours: {line}")));
        }
    }
    Ok(found)
}

fn lines(said: &str) -> BTreeSet<String> {
    said.lines()
        .filter(|line| !line.starts_with(VOLATILE))
        .map(|line| {
            // `fs.0.disk.1.alias: vda` is about one of a list.
            match line.split_once(':') {
                Some((name, value)) if name.contains('.') => {
                    let name: String = name.chars().filter(|c| !c.is_ascii_digit()).collect();
                    format!("{name}:{value}")
                }
                _ => line.split_whitespace().collect::<Vec<_>>().join(" "),
            }
        })
        .collect()
}
