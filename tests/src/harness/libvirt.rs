//! Stock libvirt, started for one scenario and confined to a mount namespace of its own.
//!
//! Called by scenarios that let `virsh` do what a person with libvirt does. The host's own libvirt, if it has one, is
//! not touched: `/etc/libvirt`, `/run/libvirt` and the rest are empty in-memory file systems in there.
//! Needs root (mount namespace); everything is killed and gone when the value is dropped.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

use super::disk::{self, FileSystem};
use super::guest::Guest;
use super::image::{self, GuestImage};
use super::process::Process;
use super::vm;
use super::wait;
use crate::guest_protocol::{QGA_PORT, SHELL_PORT};

/// What libvirtd finds in its namespace. No cgroups, no security driver, no virtlogd: QEMU's output goes to files.
const SETUP: &str = r#"set -e
for directory in /etc/libvirt /var/lib/libvirt /var/log/libvirt /var/cache/libvirt /run/libvirt; do
    mkdir -p $directory
    mount -t tmpfs tmpfs $directory
done
mkdir -p /etc/libvirt/qemu /var/lib/libvirt/qemu
cat >/etc/libvirt/qemu.conf <<END
user = "root"
group = "root"
security_driver = "none"
cgroup_controllers = []
namespaces = []
stdio_handler = "file"
remember_owner = 0
END
printf 'auth_unix_rw = "none"\nauth_unix_ro = "none"\n' >/etc/libvirt/libvirtd.conf
exec libvirtd
"#;

/// A disk of the domain, served over vhost-user.
#[derive(Clone, Debug)]
pub struct DomainDisk {
    /// Where it is served.
    pub socket: PathBuf,
    /// Serial as the guest reads it.
    pub serial: String,
    /// Mount point in the guest; the file system is ext4.
    pub point: String,
}

/// A libvirtd with one running domain.
#[derive(Debug)]
pub struct Libvirt {
    daemon: Process,
    domain: String,
    directory: TempDir,
}

impl Libvirt {
    /// Programs that it needs beside those of a machine.
    pub const PROGRAMS: &[&str] = &["libvirtd", "virsh", "unshare", "nsenter", "qemu-img"];
    /// The domain's disk that libvirt itself can make snapshots of: it does none of vhost-user disks. An ext4 that nobody has mounted;
    /// its serial is `own`.
    pub const OWN_DISK: &str = "vdz";

    /// Starts libvirtd, creates the domain by `virsh create` and waits until the guest is ready. It is the small guest or the databases'.
    pub fn start(domain: &str, image: &GuestImage, disks: &[DomainDisk]) -> Result<Self> {
        let directory = tempfile::Builder::new()
            .prefix("vmshadow-libvirt-")
            .tempdir()?;
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-c", SETUP]);
        let daemon = Process::start("libvirtd", command, &directory.path().join("libvirtd"))?;
        let mut libvirt = Self {
            daemon,
            domain: domain.to_owned(),
            directory,
        };
        wait::until("libvirtd to answer", wait::STEP, || {
            Ok(libvirt.virsh(&["version"]).ok())
        })?;
        let xml = libvirt.directory.path().join("domain.xml");
        fs::write(&xml, libvirt.domain_xml(image, disks)?)?;
        libvirt.virsh(&["create", xml.to_str().context("path")?])?;
        libvirt.wait_ready()?;
        Ok(libvirt)
    }

    /// Runs `virsh` and returns its standard output; a failure carries its standard error.
    pub fn virsh(&self, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new("nsenter");
        command
            .args(["--target", &self.daemon.pid().to_string(), "--mount"])
            .args(["virsh", "--connect", "qemu:///system"])
            .args(arguments);
        let output = command.output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let error = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success(),
            "virsh {arguments:?}: {}{text}{error}",
            output.status
        );
        Ok(text)
    }

    /// The name of the domain.
    #[must_use]
    pub fn domain(&self) -> &str {
        &self.domain
    }

    /// The command shell in the guest.
    pub fn shell(&self) -> Result<Guest> {
        Guest::connect(&self.directory.path().join("shell.sock"))
    }

    fn console(&self) -> String {
        fs::read_to_string(self.directory.path().join("console"))
            .unwrap_or_default()
            .replace('\r', "")
    }

    fn wait_ready(&mut self) -> Result<()> {
        wait::until("the domain to be ready", wait::BOOT, || {
            let console = self.console();
            ensure!(
                !console.lines().any(|line| line == "failed"),
                "the guest could not start: {console}"
            );
            Ok(console.lines().any(|line| line == "ready").then_some(()))
        })
    }

    fn domain_xml(&self, image: &GuestImage, disks: &[DomainDisk]) -> Result<String> {
        let file = |name: &str| self.directory.path().join(name).display().to_string();
        let mounts: Vec<_> = disks
            .iter()
            .map(|disk| format!("{}:{}:ext4", disk.serial, disk.point))
            .collect();
        let mut xml = format!(
            "<domain type='{}'><name>{}</name><memory unit='MiB'>{}</memory><vcpu>2</vcpu>\
             <memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>\
             <os><type arch='x86_64' machine='q35'>hvm</type><kernel>{}</kernel><initrd>{}</initrd>\
             <cmdline>{} {}vmshadow.agent=on vmshadow.mount={}</cmdline></os>\
             <on_reboot>destroy</on_reboot><on_crash>destroy</on_crash><devices>\
             <serial type='file'><source path='{}'/></serial>",
            match image::accelerator()? {
                image::Accelerator::Kvm => "kvm",
                image::Accelerator::Tcg => "qemu",
            },
            self.domain,
            if image.usr.is_some() { 1024 } else { 512 },
            image.kernel.display(),
            image.initramfs.display(),
            vm::KERNEL_ARGUMENTS,
            if image.usr.is_some() {
                "vmshadow.usr=usr "
            } else {
                ""
            },
            mounts.join(","),
            file("console"),
        );
        for (disk, letter) in disks.iter().zip('a'..='z') {
            xml += &format!(
                "<disk type='vhostuser' device='disk'><driver name='qemu' type='raw' queues='1'/>\
                 <source type='unix' path='{}'><reconnect enabled='yes' timeout='2'/></source>\
                 <target dev='vd{letter}' bus='virtio'/></disk>",
                disk.socket.display(),
            );
        }
        if let Some(usr) = &image.usr {
            xml += &format!(
                "<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{}'/>\
                 <target dev='vdy' bus='virtio'/><readonly/><serial>usr</serial></disk>",
                usr.display()
            );
        }
        let own = file("own.qcow2");
        let plain = disk::create(self.directory.path(), "own", FileSystem::Ext4)?;
        disk::run(
            "qemu-img",
            &["convert", "-q", "-O", "qcow2", &plain.display().to_string()],
            Path::new(&own),
        )?;
        xml += &format!(
            "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{own}'/>\
             <target dev='{}' bus='virtio'/><serial>own</serial></disk>",
            Self::OWN_DISK
        );
        xml += &format!(
            // The guest waits for the shell's port alone: it comes last.
            "<channel type='unix'><source mode='bind'/><target type='virtio' name='{QGA_PORT}'/></channel>\
             <channel type='unix'><source mode='bind' path='{}'/><target type='virtio' name='{SHELL_PORT}'/></channel>\
             </devices></domain>",
            file("shell.sock"),
        );
        Ok(xml)
    }

    /// A path for a file of the domain's, gone with the value.
    #[must_use]
    pub fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Ends the domain and waits for its QEMU.
    pub fn destroy(&self) -> Result<()> {
        self.virsh(&["destroy", &self.domain])?;
        Ok(())
    }

    /// libvirtd's own output, for messages.
    #[must_use]
    pub fn log(&self) -> String {
        format!("{}\n{}", self.daemon.stderr(), self.console())
    }
}

impl Drop for Libvirt {
    fn drop(&mut self) {
        // QEMU is a child of nobody here: it has to be told.
        if let Err(error) = self.virsh(&["destroy", &self.domain])
            && !format!("{error:#}").contains("failed to get domain")
        {
            eprintln!("harness: cannot destroy {}: {error:#}", self.domain);
        }
    }
}

/// True if the process may make a mount namespace.
#[must_use]
pub fn may_run() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("SKIPPED: libvirt in a mount namespace needs root");
    }
    root && Path::new("/proc/self/ns/mnt").exists()
}
