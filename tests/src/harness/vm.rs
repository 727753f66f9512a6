//! A real machine under stock QEMU.
//!
//! Called by scenarios, the demo, `image` (to try an accelerator) and `oracle`. It knows QEMU's
//! command line and nothing of the programs under test: a disk is either a vhost-user socket
//! somebody serves or a plain file. The machine is killed when it is dropped.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::disk::FileSystem;
use super::guest::Guest;
use super::image::{self, Accelerator};
use super::process::Process;
use super::qmp::Qmp;
use super::wait;
use crate::guest_protocol::{AGENT_PORT, LOAD_PORT, QGA_PORT, SHELL_PORT};

/// What the small guest's kernel is told in any machine.
pub(super) const KERNEL_ARGUMENTS: &str = "console=ttyS0 quiet panic=-1 mitigations=off nokaslr \
     no_timer_check tsc=reliable cryptomgr.notests rodata=off";

/// The file in which QEMU keeps the processors' state at each reset.
const RESETS: &str = "resets";

/// The serial of the disk that a Debian starts from.
pub const ROOT: &str = "root";

/// The virtio-serial ports. The guest waits for the shell's alone: it comes last.
const PORTS: [&str; 4] = [LOAD_PORT, QGA_PORT, AGENT_PORT, SHELL_PORT];

/// Queues of a vhost-user disk.
const QUEUES: u32 = 2;

#[derive(Clone, Debug)]
enum Backing {
    VhostUser(PathBuf),
    File(PathBuf),
}

#[derive(Clone, Debug)]
struct Disk {
    serial: String,
    backing: Backing,
    mount: Option<(String, FileSystem)>,
}

/// What the guest is (`images`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum System {
    Small,
    Databases,
    Debian,
    DebianWithSelinux,
}

/// What a machine shall be. Methods chain; `boot` starts it.
#[derive(Clone, Debug)]
pub struct VmBuilder {
    name: String,
    disks: Vec<Disk>,
    memory_mib: u32,
    cpus: u32,
    agent: bool,
    system: System,
    vsock: Option<PathBuf>,
    slots: bool,
    accelerator: Option<Accelerator>,
    boot_deadline: Duration,
}

impl VmBuilder {
    /// A machine without disks; the name shows in messages.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            disks: Vec::new(),
            memory_mib: 512,
            cpus: 2,
            agent: false,
            system: System::Small,
            vsock: None,
            slots: false,
            accelerator: None,
            boot_deadline: wait::BOOT,
        }
    }

    /// A disk served over vhost-user on `socket`. QEMU connects again when the server goes away.
    #[must_use]
    pub fn vhost_user(mut self, serial: &str, socket: &Path) -> Self {
        let backing = Backing::VhostUser(socket.to_owned());
        self.disks.push(Disk {
            serial: serial.to_owned(),
            backing,
            mount: None,
        });
        self
    }

    /// A disk QEMU itself serves from a plain file.
    #[must_use]
    pub fn file(mut self, serial: &str, path: &Path) -> Self {
        let backing = Backing::File(path.to_owned());
        self.disks.push(Disk {
            serial: serial.to_owned(),
            backing,
            mount: None,
        });
        self
    }

    /// Mounts the disk added last.
    #[must_use]
    pub fn mounted(mut self, point: &str, file_system: FileSystem) -> Self {
        if let Some(disk) = self.disks.last_mut() {
            disk.mount = Some((point.to_owned(), file_system));
        }
        self
    }

    /// Starts the guest agent in it.
    #[must_use]
    pub fn with_agent(mut self) -> Self {
        self.agent = true;
        self
    }

    /// Gives it a vsock device, served over vhost-user on `socket`.
    #[must_use]
    pub fn vsock(mut self, socket: &Path) -> Self {
        self.vsock = Some(socket.to_owned());
        self
    }

    /// Boots the guest that has the databases' servers (`images/databases`).
    #[must_use]
    pub fn with_databases(mut self) -> Self {
        self.system = System::Databases;
        self.memory_mib = 1024;
        self
    }

    /// Boots a Debian whose first process is its own systemd (`images/debian`), on a disk that is forgotten with the machine or the one that has the
    /// serial [`ROOT`]. It has none
    /// of our programs but the shell; an agent is what a scenario installs.
    #[must_use]
    pub fn with_debian(mut self) -> Self {
        self.system = System::Debian;
        self.memory_mib = 1024;
        self.boot_deadline = 2 * wait::BOOT;
        self
    }

    /// The same with the distribution's SELinux policy, enforcing from the start.
    #[must_use]
    pub fn with_selinux(mut self) -> Self {
        self = self.with_debian();
        self.system = System::DebianWithSelinux;
        self
    }

    /// Every disk served over vhost-user can be pulled out and put back while the machine runs.
    #[must_use]
    pub fn with_slots(mut self) -> Self {
        self.slots = true;
        self
    }

    /// Uses this accelerator instead of the one that was found to work.
    #[must_use]
    pub fn accelerator(mut self, accelerator: Accelerator) -> Self {
        self.accelerator = Some(accelerator);
        self
    }

    /// Gives up on the boot after this time.
    #[must_use]
    pub fn boot_deadline(mut self, deadline: Duration) -> Self {
        self.boot_deadline = deadline;
        self
    }

    /// Starts QEMU and waits until the guest says that it is ready.
    pub fn boot(self) -> Result<Vm> {
        let image = match self.system {
            System::Small => image::guest_image()?,
            System::Databases => image::databases_image()?,
            System::Debian => image::debian_image()?,
            System::DebianWithSelinux => image::selinux_image()?,
        };
        let accelerator = match self.accelerator {
            Some(accelerator) => accelerator,
            None => image::accelerator()?,
        };
        let directory = tempfile::Builder::new().prefix("vmshadow-vm-").tempdir()?;
        let console = directory.path().join("console");
        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args([
            "-name",
            &self.name,
            "-accel",
            accelerator.name(),
            "-cpu",
            "max",
        ])
        .args([
            "-m",
            &format!("{}M", self.memory_mib),
            "-smp",
            &self.cpus.to_string(),
        ])
        .args(["-M", "q35,memory-backend=mem"])
        .arg("-object")
        .arg(format!(
            "memory-backend-memfd,id=mem,size={}M,share=on",
            self.memory_mib
        ))
        .args([
            "-nodefaults",
            "-nic",
            "none",
            "-display",
            "none",
            "-no-reboot",
        ])
        .arg("-kernel")
        .arg(&image.kernel)
        .arg("-initrd")
        .arg(&image.initramfs)
        .args(["-append", &self.kernel_arguments()])
        .args(["-serial", &format!("file:{}", console.display())])
        // One monitor for the program under test, one for the rig.
        .args(["-qmp", &server(&directory.path().join("qmp.sock"))])
        .args(["-qmp", &server(&directory.path().join("rig.sock"))])
        .args(["-device", "virtio-serial-pci"]);
        for (number, name) in PORTS.iter().enumerate() {
            let socket = directory.path().join(format!("{name}.sock"));
            qemu.arg("-chardev")
                .arg(format!(
                    "socket,id=port{number},path={},server=on,wait=off",
                    socket.display()
                ))
                .arg("-device")
                .arg(format!(
                    "virtserialport,id={name},chardev=port{number},name={name}"
                ));
        }
        if let Some(socket) = &self.vsock {
            qemu.arg("-chardev")
                .arg(format!("socket,id=vsock,path={}", socket.display()))
                .args(["-device", "vhost-user-vsock-pci,chardev=vsock"]);
        }
        for (number, disk) in self.disks.iter().enumerate() {
            disk_arguments(&mut qemu, number, disk, self.slots);
        }
        if let Some(usr) = &image.usr {
            qemu.arg("-blockdev")
                .arg(format!(
                    "driver=file,node-name=usr,read-only=on,filename={}",
                    usr.display()
                ))
                .args(["-device", "virtio-blk-pci,drive=usr,serial=usr"]);
        }
        let brings_root = self.disks.iter().any(|disk| disk.serial == ROOT);
        if let Some(root) = image.root.as_ref().filter(|_| !brings_root) {
            // What the machine writes goes to a file of QEMU's own that has no name.
            qemu.arg("-drive")
                .arg(format!(
                    "if=none,id=root,format=raw,snapshot=on,cache=unsafe,file={}",
                    root.display()
                ))
                .args(["-device", "virtio-blk-pci,drive=root,serial=root"]);
        }
        // A guest that resets itself ends QEMU without a word (`-no-reboot`): the processors' state is kept here.
        qemu.args(["-d", "cpu_reset"])
            .arg("-D")
            .arg(directory.path().join(RESETS));
        let begin = Instant::now();
        let process = Process::start(&self.name, qemu, &directory.path().join("qemu"))?;
        let mut vm = Vm {
            name: self.name,
            process,
            directory,
            guest: None,
            boot_time: Duration::ZERO,
        };
        wait::until(
            &format!("{} to be ready", vm.name),
            self.boot_deadline,
            || {
                if let Some(status) = vm.process.ended()? {
                    bail!("QEMU ended: {status}");
                }
                let text = vm.console();
                if text.lines().any(|line| line == "failed") || text.contains("Kernel panic") {
                    bail!("the guest could not start");
                }
                Ok(text.lines().any(|line| line == "ready").then_some(()))
            },
        )
        .with_context(|| format!("{}\n{}", vm.log(), vm.processors()))?;
        vm.boot_time = begin.elapsed();
        vm.guest = Some(Guest::connect(&vm.port(SHELL_PORT))?);
        Ok(vm)
    }

    fn kernel_arguments(&self) -> String {
        let mounts: Vec<_> = self
            .disks
            .iter()
            .filter_map(|disk| {
                let (point, file_system) = disk.mount.as_ref()?;
                let options = file_system.mount_options().replace(',', "+");
                Some(format!(
                    "{}:{point}:{}:{options}",
                    disk.serial,
                    file_system.name()
                ))
            })
            .collect();
        let agent = if self.agent { "on" } else { "off" };
        let disks = match self.system {
            System::Small => "",
            System::Databases => " vmshadow.usr=usr",
            System::Debian => " vmshadow.root=root systemd.show_status=0",
            // Without a daemon that takes them, denials are the kernel's messages.
            System::DebianWithSelinux => {
                " vmshadow.root=root systemd.show_status=0 security=selinux enforcing=1"
            }
        };
        let vsock = if self.vsock.is_some() { "on" } else { "off" };
        format!(
            "{KERNEL_ARGUMENTS} vmshadow.agent={agent}{disks} vmshadow.vsock={vsock} vmshadow.mount={}",
            mounts.join(",")
        )
    }
}

fn server(socket: &Path) -> String {
    format!("unix:{},server=on,wait=off", socket.display())
}

fn disk_arguments(qemu: &mut Command, number: usize, disk: &Disk, slots: bool) {
    match &disk.backing {
        Backing::VhostUser(socket) => {
            let bus = if slots {
                // The root bus of this machine takes nothing while it runs.
                let chassis = number + 1;
                qemu.arg("-device")
                    .arg(format!("pcie-root-port,id=slot{number},chassis={chassis}"));
                format!(",bus=slot{number}")
            } else {
                String::new()
            };
            // QEMU asks one queue per CPU and refuses a backend that has fewer: say how many.
            qemu.arg("-chardev")
                .arg(format!(
                    "socket,id=vhost{number},path={},reconnect=1",
                    socket.display()
                ))
                .arg("-device")
                .arg(format!(
                    "vhost-user-blk-pci,id=disk{number},chardev=vhost{number},num-queues={QUEUES}{bus}"
                ));
        }
        Backing::File(path) => {
            qemu.arg("-blockdev")
                .arg(format!(
                    "driver=file,node-name=file{number},filename={}",
                    path.display()
                ))
                .arg("-device")
                .arg(format!(
                    "virtio-blk-pci,drive=file{number},serial={}",
                    disk.serial
                ));
        }
    }
}

/// A machine that has said it is ready.
#[derive(Debug)]
pub struct Vm {
    name: String,
    process: Process,
    directory: TempDir,
    guest: Option<Guest>,
    boot_time: Duration,
}

impl Vm {
    /// From the start of QEMU to the guest's word.
    #[must_use]
    pub fn boot_time(&self) -> Duration {
        self.boot_time
    }

    /// The command shell in the guest.
    pub fn guest(&self) -> Result<&Guest> {
        self.guest.as_ref().context("the guest is not up")
    }

    /// Runs a command in the guest; any status but 0 is an error.
    pub fn shell(&self, command: &str) -> Result<String> {
        self.guest()?.shell(command).with_context(|| self.log())
    }

    /// The monitor socket for the program under test.
    #[must_use]
    pub fn qmp_socket(&self) -> PathBuf {
        self.directory.path().join("qmp.sock")
    }

    /// The Unix socket behind a virtio-serial port.
    #[must_use]
    pub fn port(&self, name: &str) -> PathBuf {
        self.directory.path().join(format!("{name}.sock"))
    }

    /// The rig's own monitor.
    pub fn monitor(&self) -> Result<Qmp> {
        Qmp::connect(&self.directory.path().join("rig.sock"))
    }

    /// Waits until it has said for the `times`-th time that it is ready: it was started again inside the same QEMU.
    pub fn is_up_again(&self, times: usize) -> Result<()> {
        wait::until("the machine to be up again", 2 * wait::BOOT, || {
            let text = self.console();
            let ready = text.lines().filter(|line| *line == "ready").count();
            Ok((ready >= times).then_some(()))
        })
        .with_context(|| format!("{}\n{}", self.log(), self.processors()))
    }

    /// Pulls out the disk of this number (from 0, as they were added) and lets go of its server.
    pub fn pull(&self, number: usize) -> Result<()> {
        let mut monitor = self.monitor()?;
        let device = format!("disk{number}");
        monitor.execute("device_del", json!({ "id": device }))?;
        // The guest has to let it go, too.
        wait::until("the disk to be out", wait::STEP, || {
            let there = monitor.execute("qom-list", json!({"path": "/machine/peripheral"}))?;
            let mut names = there.as_array().into_iter().flatten();
            Ok((!names.any(|one| one["name"] == json!(device))).then_some(()))
        })
        .with_context(|| self.log())?;
        // QEMU gives the device up a moment after it has taken it from its tree; until then its connection is busy.
        let chardev = json!({"id": format!("vhost{number}")});
        wait::until("the disk's connection to be free", wait::STEP, || {
            let removed = monitor.execute("chardev-remove", chardev.clone());
            Ok(removed.ok().map(drop))
        })
    }

    /// Pulls out a virtio-serial port, and waits until QEMU has said so to all its monitors. Its socket stays and nobody is behind it.
    pub fn pull_port(&self, name: &str) -> Result<()> {
        let mut monitor = self.monitor()?;
        monitor.execute("device_del", json!({ "id": name }))?;
        // QEMU says so when nothing of it is in use any more, which is later than the guest knows.
        let is_it =
            |event: &Value| event["event"] == "DEVICE_DELETED" && event["data"]["device"] == name;
        monitor.event(is_it).map(drop)
    }

    /// Puts it back, under the number that it had.
    pub fn put_port_back(&self, name: &str) -> Result<()> {
        let number = PORTS.iter().position(|port| *port == name);
        let number = number.context("no such port")?;
        let device = json!({
            "driver": "virtserialport",
            "id": name,
            "chardev": format!("port{number}"),
            "name": name,
            // The first one is that of a console.
            "nr": number + 1,
        });
        self.monitor()?.execute("device_add", device)?;
        Ok(())
    }

    /// Puts it back.
    pub fn put_back(&self, number: usize, socket: &Path) -> Result<()> {
        let mut monitor = self.monitor()?;
        let chardev = format!("vhost{number}");
        let address = json!({"type": "unix", "data": {"path": socket}});
        let backend =
            json!({"type": "socket", "data": {"addr": address, "server": false, "reconnect": 1}});
        monitor.execute("chardev-add", json!({"id": chardev, "backend": backend}))?;
        let device = json!({
            "driver": "vhost-user-blk-pci",
            "id": format!("disk{number}"),
            "chardev": chardev,
            "num-queues": QUEUES,
            "bus": format!("slot{number}"),
        });
        monitor.execute("device_add", device)?;
        Ok(())
    }

    /// Console, QEMU's own output, whether it runs and what made the guest fall, for messages.
    #[must_use]
    pub fn log(&self) -> String {
        let resets = fs::read_to_string(self.directory.path().join(RESETS)).unwrap_or_default();
        format!(
            "{}: console:\n{}\nqemu {}:\n{}{}",
            self.name,
            self.console(),
            self.process.state(),
            self.process.stderr(),
            // Before it are the resets that are part of a start.
            resets
                .find("Triple fault")
                .and_then(|at| resets.get(at..))
                .unwrap_or_default()
        )
    }

    /// Writes everything back, stops the guest and waits for QEMU's end, so that its disks can be read.
    pub fn shut_down(mut self) -> Result<()> {
        self.shell("for point in /mnt/*; do umount $point || exit 1; done; sync")?;
        self.monitor()?.execute("quit", json!({}))?;
        self.process.wait(wait::STEP)?;
        Ok(())
    }

    /// Cuts the power: QEMU is killed at once.
    pub fn power_cut(mut self) -> Result<()> {
        self.process.kill()
    }

    /// Where the guest's processors are, for a machine that does not come up.
    fn processors(&self) -> String {
        let registers = json!({"command-line": "info registers -a"});
        let answer = self
            .monitor()
            .and_then(|mut monitor| monitor.execute("human-monitor-command", registers));
        match answer {
            Ok(text) => text.as_str().unwrap_or_default().replace('\r', ""),
            Err(error) => format!("no registers: {error:#}"),
        }
    }

    /// What the guest has written to its console so far.
    #[must_use]
    pub fn console(&self) -> String {
        let bytes = fs::read(self.directory.path().join("console")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).replace('\r', "")
    }
}
