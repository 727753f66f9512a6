//! The guest image and the programs, built once per test program by `images/build.sh`.
//!
//! Called by `vm` (kernel, initramfs, accelerator) and by `daemon` and `bridge` (paths of the
//! programs). The accelerator is chosen by a boot that works: a /dev/kvm that opens says nothing
//! (some hosts give one under which no stock kernel gets to its first line).

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};

use super::vm::VmBuilder;

/// How QEMU runs the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accelerator {
    /// The host's own virtualisation.
    Kvm,
    /// Emulation; works everywhere.
    Tcg,
}

impl Accelerator {
    /// QEMU's name for it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }

    fn parse(name: &str) -> Result<Self> {
        match name {
            "kvm" => Ok(Self::Kvm),
            "tcg" => Ok(Self::Tcg),
            other => bail!("unknown accelerator {other:?}: kvm or tcg"),
        }
    }
}

/// The built image.
#[derive(Clone, Debug)]
pub struct GuestImage {
    /// The ELF kernel, started through PVH.
    pub kernel: PathBuf,
    /// The whole guest.
    pub initramfs: PathBuf,
    /// What was built from what, with hashes.
    pub manifest: PathBuf,
    /// The disk with Debian's programs, for `/usr`; the small guest has none.
    pub usr: Option<PathBuf>,
    /// The disk with a whole Debian, for reading only; the other guests have none.
    pub root: Option<PathBuf>,
}

/// The project's directory.
#[must_use]
pub fn project() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .map(Path::to_path_buf)
        .unwrap_or_default()
}

/// Cargo's target directory.
#[must_use]
pub fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| project().join("target"), PathBuf::from)
}

/// A program of the project, as a user gets it: the static release build.
pub fn program(name: &str) -> Result<PathBuf> {
    guest_image()?;
    let path = target().join("x86_64-unknown-linux-gnu/release").join(name);
    ensure!(path.is_file(), "{} is not built", path.display());
    Ok(path)
}

/// Builds what is not up to date; the first call of a program pays.
pub fn guest_image() -> Result<&'static GuestImage> {
    static IMAGE: OnceLock<Result<GuestImage, String>> = OnceLock::new();
    once(&IMAGE, None)
}

/// The same for the guest with the databases' servers.
pub fn databases_image() -> Result<&'static GuestImage> {
    static IMAGE: OnceLock<Result<GuestImage, String>> = OnceLock::new();
    once(&IMAGE, Some("databases"))
}

/// Whether that guest has MySQL, too, which comes from another release of Debian.
pub fn has_mysql() -> Result<bool> {
    databases_image()?;
    Ok(target().join("mysql/packages").exists())
}

/// The same for the guest that is a Debian with its own systemd. Building it needs root.
pub fn debian_image() -> Result<&'static GuestImage> {
    static IMAGE: OnceLock<Result<GuestImage, String>> = OnceLock::new();
    once(&IMAGE, Some("debian"))
}

/// The same Debian with SELinux: the distribution's policy, and labels on every file.
pub fn selinux_image() -> Result<&'static GuestImage> {
    static IMAGE: OnceLock<Result<GuestImage, String>> = OnceLock::new();
    once(&IMAGE, Some("selinux"))
}

fn once(
    image: &'static OnceLock<Result<GuestImage, String>>,
    which: Option<&str>,
) -> Result<&'static GuestImage> {
    image
        .get_or_init(|| build(which).map_err(|error| format!("{error:#}")))
        .as_ref()
        .map_err(|error| anyhow!("no guest image: {error}"))
}

fn build(which: Option<&str>) -> Result<GuestImage> {
    let script = project().join("images/build.sh");
    let output = Command::new(&script)
        .args(which)
        .env("CARGO_TARGET_DIR", target())
        .output()?;
    ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let directory = String::from_utf8(output.stdout)?;
    let directory = Path::new(
        directory
            .lines()
            .last()
            .context("build.sh printed nothing")?,
    );
    Ok(GuestImage {
        kernel: directory.join("vmlinux"),
        initramfs: directory.join("initramfs"),
        manifest: directory.join("manifest"),
        usr: Some(directory.join("usr")).filter(|_| which == Some("databases")),
        root: Some(directory.join("root")).filter(|_| matches!(which, Some("debian" | "selinux"))),
    })
}

/// The accelerator a guest boots with: `VMSHADOW_ACCEL`, else the verdict of this boot of the host, else a try.
pub fn accelerator() -> Result<Accelerator> {
    static CHOSEN: OnceLock<Result<Accelerator, String>> = OnceLock::new();
    CHOSEN
        .get_or_init(|| choose().map_err(|error| format!("{error:#}")))
        .clone()
        .map_err(|error| anyhow!("{error}"))
}

fn choose() -> Result<Accelerator> {
    if let Ok(name) = std::env::var("VMSHADOW_ACCEL") {
        return Accelerator::parse(&name);
    }
    let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let cache = target().join("images/accel");
    if let Some((id, name)) = fs::read_to_string(&cache)
        .unwrap_or_default()
        .split_once(' ')
        && id == boot_id.trim()
    {
        return Accelerator::parse(name.trim());
    }
    let verdict = if fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .is_err()
    {
        Accelerator::Tcg
    } else {
        // Under a working KVM this takes about a second.
        let trial = VmBuilder::new("accelerator")
            .accelerator(Accelerator::Kvm)
            .boot_deadline(Duration::from_secs(10))
            .boot();
        match trial {
            Ok(_) => Accelerator::Kvm,
            Err(_) => Accelerator::Tcg,
        }
    };
    eprintln!("harness: guests run under {}", verdict.name());
    fs::write(&cache, format!("{} {}\n", boot_id.trim(), verdict.name()))?;
    Ok(verdict)
}
