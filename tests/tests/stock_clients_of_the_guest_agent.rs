//! Programs that only know QEMU's guest agent find one in ours: libvirt by `virsh`, Proxmox by the bytes it writes.

#[path = "stock_clients_of_the_guest_agent/virsh_script.rs"]
mod virsh_script;

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use vmshadow_tests::guest_protocol::QGA_PORT;
use vmshadow_tests::harness::daemon::VhostBlk;
use vmshadow_tests::harness::disk::{self, FileSystem};
use vmshadow_tests::harness::guest::Guest;
use vmshadow_tests::harness::image::{self, GuestImage};
use vmshadow_tests::harness::libvirt::{DomainDisk, Libvirt, may_run};
use vmshadow_tests::harness::site::{Site, SiteDisk};
use vmshadow_tests::harness::{requires, wait};

/// A domain with two disks of ours, whose agent libvirt sees. Dropped in this order.
struct Domain {
    libvirt: Libvirt,
    _daemon: VhostBlk,
    _directory: tempfile::TempDir,
    _turn: MutexGuard<'static, ()>,
}

/// Two libvirtd at a time would fight for one file of process numbers.
static TURN: Mutex<()> = Mutex::new(());

impl Domain {
    fn start(name: &str, image: &GuestImage) -> Result<Self> {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
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
        let libvirt = Libvirt::start(name, image, &attached)?;
        wait::until("libvirt to see the agent", wait::STEP, || {
            let ping = r#"{"execute":"guest-ping"}"#;
            Ok(libvirt.virsh(&["qemu-agent-command", name, ping]).ok())
        })
        .with_context(|| libvirt.log())?;
        Ok(Self {
            libvirt,
            _daemon: daemon,
            _directory: directory,
            _turn: turn,
        })
    }
}

fn libvirt_runs() -> bool {
    requires::machines() && requires::programs(Libvirt::PROGRAMS) && may_run()
}

/// What the programs that the agent starts need in the small guest.
const ACCOUNTS_AND_PROGRAMS: &str = r#"set -e
hostname tester
ip link set lo up
mkdir -p /home/ann
echo 'ann:x:1000:1000:Ann:/home/ann:/bin/sh' >>/etc/passwd
echo 'ann:*:19000:0:99999:7:::' >>/etc/shadow
# Busybox here has none: the word itself takes the hash's place.
printf '#!/bin/sh\nread -r line; user=${line%%%%:*}; grep -q "^$user:" /etc/passwd || exit 1\nsed -i "s|^$user:[^:]*:|$user:${line#*:}$1:|" /etc/shadow\n' >/sbin/chpasswd
chmod 755 /sbin/chpasswd
ln -sf /bin/busybox /sbin/hwclock
printf '#!/bin/sh\necho "shutdown: $@" >/dev/console\npoweroff -f\n' >/sbin/shutdown
chmod 755 /sbin/shutdown
"#;

/// What is done to the disk all the while.
const WRITES: &str = r#"disk=$(grep -lx own /sys/block/vd*/serial) && mkdir -p /mnt/own &&
    mount -t ext4 /dev/$(echo $disk | cut -d/ -f4) /mnt/own || exit 1
    n=0
    while [ ! -e /tmp/enough ]; do n=$((n + 1)); echo $n >>/mnt/own/numbers; sync /mnt/own/numbers; echo $n >/tmp/written; done"#;

/// A snapshot of the disk that libvirt itself serves: the machine writes to this file from now on.
fn snapshot(libvirt: &Libvirt, overlay: &str, more: &[&str]) -> Result<String> {
    let overlay = libvirt.file(overlay);
    let own = format!(
        "{},snapshot=external,file={}",
        Libvirt::OWN_DISK,
        overlay.display()
    );
    let mut words = vec!["snapshot-create-as", libvirt.domain(), "one"];
    words.extend(["--disk-only", "--no-metadata"]);
    for disk in ["vda,snapshot=no", "vdb,snapshot=no", own.as_str()] {
        words.extend(["--diskspec", disk]);
    }
    words.extend(more);
    libvirt.virsh(&words)
}

/// libvirt's own snapshots, with `--quiesce` and without, of a disk that is written to: what was copied tells whether the guest was frozen
/// at that moment, for ext4 marks itself as one to be recovered while it is mounted, but not while it is frozen.
fn snapshots_of_libvirts_own(libvirt: &Libvirt, shell: &Guest) -> Result<()> {
    let name = libvirt.domain();
    let writing = shell.start(WRITES)?;
    let wait_for_more = || {
        let written = || shell.shell("cat /tmp/written 2>/dev/null || true");
        let before = written()?;
        wait::until("more to be written", wait::STEP, || {
            let now = written()?;
            Ok((!now.is_empty() && now != before).then_some(()))
        })
    };
    let mut copy = libvirt.file("own.qcow2");
    for quiesce in [false, true] {
        wait_for_more()?;
        let overlay = format!("overlay-{quiesce}.qcow2");
        let more: &[&str] = if quiesce { &["--quiesce"] } else { &[] };
        let said = snapshot(libvirt, &overlay, more)?;
        ensure!(said.contains("created"), "{said}");
        // Nothing is frozen afterwards.
        let status = r#"{"execute":"guest-fsfreeze-status"}"#;
        let status = libvirt.virsh(&["qemu-agent-command", name, status])?;
        ensure!(status.contains("thawed"), "{status}");
        wait_for_more()?;
        // The machine writes to the overlay now, and to this no more.
        let plain = libvirt.file("copy.raw");
        let from = copy.to_str().context("path")?;
        disk::run("qemu-img", &["convert", "-U", "-O", "raw", from], &plain)?;
        let state = disk::run("dumpe2fs", &["-h"], &plain)?;
        ensure!(
            state.contains("needs_recovery") != quiesce,
            "quiesce {quiesce}: {state}"
        );
        if quiesce {
            // As it is, with nothing replayed.
            disk::run("e2fsck", &["-fn"], &plain)?;
        }
        copy = libvirt.file(&overlay);
    }
    ensure!(writing.still_runs(), "nothing is written any more");
    shell.shell("touch /tmp/enough")?;
    writing.wait(wait::STEP)?;
    Ok(())
}

#[test]
fn every_word_of_virsh_that_asks_an_agent_is_answered_by_ours() -> Result<()> {
    if !libvirt_runs() {
        return Ok(());
    }
    let domain = Domain::start("words", image::guest_image()?)?;
    let libvirt = &domain.libvirt;
    let name = libvirt.domain();
    // Each line: the words after the domain's name, and what virsh must say.
    let say = |words: &[&str], expected: &[&str]| -> Result<String> {
        let (first, rest) = words.split_first().context("no words")?;
        let all: Vec<_> = [*first, name]
            .into_iter()
            .chain(rest.iter().copied())
            .collect();
        let said = libvirt.virsh(&all)?;
        for text in expected {
            ensure!(
                said.contains(text),
                "virsh {words:?}: no {text:?} in {said}"
            );
        }
        Ok(said)
    };
    let check = || -> Result<()> {
        let shell = libvirt.shell()?;
        shell.shell(ACCOUNTS_AND_PROGRAMS)?;
        say(&["domfsinfo"], &["/mnt/a", "/mnt/b", "ext4"])?;
        say(&["domhostname", "--source", "agent"], &["tester"])?;
        say(&["domifaddr", "--source", "agent"], &["lo", "127.0.0.1/8"])?;
        say(
            &["guestinfo"],
            &[
                "os.kernel-release",
                "timezone.name",
                "hostname",
                "fs.count",
                "disk.count",
                "if.0.name",
            ],
        )?;
        say(&["domfstrim"], &[])?;
        say(&["domtime"], &["Time:"])?;
        say(&["domtime", "--time", "1800000000"], &[])?;
        let now: u64 = shell.shell("date +%s")?.trim().parse()?;
        ensure!(
            (1_800_000_000..1_800_000_600).contains(&now),
            "the time is {now}"
        );
        say(&["domtime", "--sync"], &[])?;
        say(&["domtime", "--now"], &[])?;
        let now: u64 = shell.shell("date +%s")?.trim().parse()?;
        ensure!(
            !(1_800_000_000..=1_800_000_600).contains(&now),
            "the time is still {now}"
        );
        say(&["guestvcpus"], &["vcpus", ": 0-1"])?;
        say(&["guestvcpus", "--cpulist", "1", "--disable"], &[])?;
        ensure!(shell.shell("cat /sys/devices/system/cpu/online")?.trim() == "0");
        say(&["setvcpus", "2", "--guest"], &[])?;
        ensure!(shell.shell("cat /sys/devices/system/cpu/online")?.trim() == "0-1");
        let hash = || shell.shell("grep ^ann: /etc/shadow");
        let before = hash()?;
        say(&["set-user-password", "ann", "secret"], &["successfully"])?;
        ensure!(hash()? != before, "the password is as it was");
        say(
            &["set-user-password", "ann", "$6$a$b", "--encrypted"],
            &["successfully"],
        )?;
        ensure!(hash()?.contains("$6$a$b"), "{}", hash()?);
        let keys = libvirt.file("keys");
        std::fs::write(&keys, "ssh-rsa AAAA ann@host\n")?;
        let keys = keys.to_str().context("path")?;
        say(&["set-user-sshkeys", "ann", "--file", keys], &[])?;
        say(&["get-user-sshkeys", "ann"], &["ssh-rsa AAAA ann@host"])?;
        say(
            &["set-user-sshkeys", "ann", "--file", keys, "--remove"],
            &[],
        )?;
        ensure!(!say(&["get-user-sshkeys", "ann"], &[])?.contains("ssh-rsa"));
        let run = r#"{"execute":"guest-exec","arguments":{"path":"/bin/echo"}}"#;
        say(&["qemu-agent-command", run], &["pid"])?;
        libvirt.destroy()
    };
    check().with_context(|| libvirt.log())
}

/// Where `virsh` says something else of ours than of QEMU's own agent, and why: the step, a part of each such line, the reason.
const DIFFERENCES: &[(&str, &str, &str)] = &[
    (
        "8: guestinfo @ --filesystem",
        "ours: fs..disk..serial",
        UDEV,
    ),
    ("9: guestinfo @ --disk", "ours: disk..serial", UDEV),
    ("35: domfsfreeze @", "theirs: Froze 3 ", READ_ONLY),
    ("35: domfsfreeze @", "ours: Froze 2 ", READ_ONLY),
    ("42: domfsthaw @", "theirs: Thawed 3 ", READ_ONLY),
    ("42: domfsthaw @", "ours: Thawed 2 ", READ_ONLY),
];

const UDEV: &str = "theirs asks udev, which this guest has not; ours asks the disk itself then";
const READ_ONLY: &str =
    "ours leaves read-only file systems (/usr) alone: they have no writes to hold";

#[test]
fn virsh_says_of_ours_what_it_says_of_qemus_own_agent() -> Result<()> {
    if !libvirt_runs() {
        return Ok(());
    }
    let domain = Domain::start("beside", image::databases_image()?)?;
    let libvirt = &domain.libvirt;
    let check = || -> Result<()> {
        let shell = libvirt.shell()?;
        shell.shell(ACCOUNTS_AND_PROGRAMS)?;
        shell.shell(virsh_script::STOCK)?;
        let theirs = virsh_script::run(libvirt)?;
        // It was the one.
        shell.shell("pidof qemu-ga && ! pidof guest-agent")?;
        shell.shell(virsh_script::OURS)?;
        let ours = virsh_script::run(libvirt)?;
        shell.shell("pidof guest-agent && ! pidof qemu-ga")?;
        let (mut unexpected, mut seen) = (Vec::new(), Vec::new());
        for (step, line) in virsh_script::differences(&theirs, &ours)? {
            let known = DIFFERENCES
                .iter()
                .find(|(at, part, _)| *at == step && line.contains(part));
            match known {
                Some(known) => seen.push(known),
                None => unexpected.push(format!("{step}: {line}")),
            }
        }
        eprintln!("{} answers compared", ours.len());
        ensure!(unexpected.is_empty(), "{}", unexpected.join("\n"));
        for difference in DIFFERENCES {
            ensure!(seen.contains(&difference), "not seen: {difference:?}");
        }
        libvirt.destroy()
    };
    check().with_context(|| libvirt.log())
}

/// Lets libvirt take snapshots and shut the machine down by the agent that the small script starts; what the machine was told to do.
fn snapshots_and_a_shutdown(start_agent: &str) -> Result<String> {
    let domain = Domain::start("either", image::databases_image()?)?;
    let libvirt = &domain.libvirt;
    let name = libvirt.domain();
    let check = || -> Result<String> {
        let shell = libvirt.shell()?;
        shell.shell(ACCOUNTS_AND_PROGRAMS)?;
        shell.shell(start_agent)?;
        snapshots_of_libvirts_own(libvirt, &shell)?;
        libvirt.virsh(&["shutdown", name, "--mode", "agent"])?;
        wait::until("the domain to end", wait::STEP, || {
            let running = libvirt.virsh(&["list", "--name"])?;
            Ok((!running.contains(name)).then_some(()))
        })?;
        let log = libvirt.log();
        let told = log.lines().find(|line| line.contains("shutdown:"));
        Ok(told.context("it was not told to end")?.trim().to_owned())
    };
    check().with_context(|| libvirt.log())
}

#[test]
fn libvirts_quiesced_snapshots_and_shutdowns_are_the_same_by_qemus_own_agent_and_by_ours()
-> Result<()> {
    if !libvirt_runs() {
        return Ok(());
    }
    let theirs = snapshots_and_a_shutdown(virsh_script::STOCK)?;
    let ours = snapshots_and_a_shutdown("pidof guest-agent && ! pidof qemu-ga")?;
    ensure!(theirs == ours, "theirs: {theirs}, ours: {ours}");
    Ok(())
}

#[test]
fn libvirt_freezes_and_thaws_a_domain_through_our_agent() -> Result<()> {
    if !libvirt_runs() {
        return Ok(());
    }
    let domain = Domain::start("guest", image::guest_image()?)?;
    let libvirt = &domain.libvirt;
    let check = || -> Result<()> {
        let name = libvirt.domain();
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

/// A script writer that says what it hears, and says no while `/tmp/no` is there.
const WRITER: &str = r#"set -e
w=/etc/vmshadow/writers/told
mkdir -p $w
printf '#!/bin/sh\necho freeze >>/tmp/told\n[ ! -e /tmp/no ] || { echo "not now" >&2; exit 1; }\n' >$w/freeze
printf '#!/bin/sh\necho thaw >>/tmp/told\n' >$w/thaw
chmod -R 700 $w"#;

#[test]
fn libvirts_freezes_run_the_writers_and_fail_where_one_says_no_or_the_hold_ran_out() -> Result<()> {
    if !libvirt_runs() {
        return Ok(());
    }
    let domain = Domain::start("writers", image::guest_image()?)?;
    let libvirt = &domain.libvirt;
    let name = libvirt.domain();
    let check = || -> Result<()> {
        let shell = libvirt.shell()?;
        shell.shell(WRITER)?;
        let told = || shell.shell("cat /tmp/told; rm /tmp/told");
        let says = |failed: Result<String>, what: &str| -> Result<()> {
            let said = format!("{:#}", failed.err().context("virsh was content")?);
            ensure!(said.contains(what), "{said}");
            Ok(())
        };
        libvirt.virsh(&["domfsfreeze", name])?;
        let said = shell.shell("cat /tmp/told")?;
        ensure!(said == "freeze\n", "{said}");
        libvirt.virsh(&["domfsthaw", name])?;
        let said = told()?;
        ensure!(said == "freeze\nthaw\n", "{said}");
        snapshot(libvirt, "good.qcow2", &["--quiesce"])?;
        let said = told()?;
        ensure!(said == "freeze\nthaw\n", "{said}");

        shell.shell("touch /tmp/no")?;
        says(snapshot(libvirt, "vetoed.qcow2", &["--quiesce"]), "not now")?;
        // Nothing is frozen, and the disk is what it was.
        shell.shell("rm /tmp/no && touch /mnt/a/free")?;
        let disks = libvirt.virsh(&["domblklist", name])?;
        ensure!(disks.contains("good.qcow2"), "{disks}");
        let said = told()?;
        ensure!(said == "freeze\nthaw\n", "{said}");

        // The agent's own limit ends a hold: whoever thaws then hears that it was broken, once.
        shell.shell("echo '--qga-hold-ms 700' >/etc/vmshadow/agent.args && killall guest-agent")?;
        wait::until(
            "libvirt to see the agent with its limit",
            wait::STEP,
            || {
                let ping = r#"{"execute":"guest-ping"}"#;
                let is_there = libvirt.virsh(&["qemu-agent-command", name, ping]).is_ok();
                let lines =
                    "for p in $(pidof guest-agent); do tr '\\0' ' ' </proc/$p/cmdline; done";
                Ok((is_there && shell.shell(lines)?.contains("--qga-hold-ms 700 ")).then_some(()))
            },
        )?;
        libvirt.virsh(&["domfsfreeze", name])?;
        let held = shell.start("touch /mnt/a/held")?;
        ensure!(held.wait(wait::STEP)?.status == 0);
        says(libvirt.virsh(&["domfsthaw", name]), "couldn't hold writes")?;
        let nothing = libvirt.virsh(&["domfsthaw", name])?;
        ensure!(nothing.contains("0 filesystem"), "{nothing}");
        let said = told()?;
        ensure!(said == "freeze\nthaw\n", "{said}");
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
    // What its interface offers for a running machine, by the same way.
    for command in [
        "guest-get-time",
        "guest-info",
        "guest-fstrim",
        "guest-network-get-interfaces",
        "guest-get-vcpus",
        "guest-get-fsinfo",
        "guest-get-memory-blocks",
        "guest-get-memory-block-info",
        "guest-get-host-name",
        "guest-get-osinfo",
        "guest-get-users",
        "guest-get-timezone",
    ] {
        let answer = ask(command)?;
        ensure!(answer.get("return").is_some(), "{command}: {answer}");
    }
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

#[test]
fn kubevirt_finds_every_command_that_it_asks_for() -> Result<()> {
    if !requires::machines() {
        return Ok(());
    }
    let site = Site::start("kubevirt", &[("a", FileSystem::Ext4)])?;
    let mut port = UnixStream::connect(site.vm.port(QGA_PORT))?;
    port.set_read_timeout(Some(wait::STEP))?;
    let mut id = 0;
    let mut ask = |command: &str| -> Result<Value> {
        id += 1;
        proxmox(&mut port, id, command)
    };
    let info = ask("guest-info")?;
    let commands = info["return"]["supported_commands"].as_array();
    let commands = commands.context("no commands")?;
    // It calls an agent unsupported if one of these is missing or disabled.
    for name in [
        "guest-ping",
        "guest-get-time",
        "guest-info",
        "guest-shutdown",
        "guest-network-get-interfaces",
        "guest-get-fsinfo",
        "guest-get-host-name",
        "guest-get-users",
        "guest-get-timezone",
        "guest-get-osinfo",
        // For probes, passwords and keys.
        "guest-exec",
        "guest-exec-status",
        "guest-file-open",
        "guest-file-write",
        "guest-file-close",
        "guest-set-user-password",
    ] {
        let command = commands.iter().find(|command| command["name"] == name);
        ensure!(
            command.is_some_and(|command| command["enabled"] == true),
            "{name}: {command:?}"
        );
    }
    // Its freeze: a second one is refused with words that it reads as "already frozen"; it polls the status.
    ensure!(ask("guest-fsfreeze-freeze")? == json!({"return": 1}));
    ensure!(ask("guest-fsfreeze-status")? == json!({"return": "frozen"}));
    ensure!(ask("guest-fsfreeze-freeze")?["error"]["class"] == "CommandNotFound");
    ensure!(ask("guest-fsfreeze-thaw")? == json!({"return": 1}));
    Ok(())
}
