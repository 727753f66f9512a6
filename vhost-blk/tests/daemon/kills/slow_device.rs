//! A device whose writes stand still on command: a loop device over a file of a file system that can be frozen.
//!
//! Used by `late_io`. A write to the device that came before the freeze or comes during it is under way until the thaw, whatever
//! becomes of the process that asked for it. Needs root, loop devices and ext4.

use crate::harness::PATIENCE;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The device. Dropped after everything that uses it.
pub(super) struct SlowDevice {
    directory: PathBuf,
    loops: Vec<String>,
    mounts: Vec<PathBuf>,
}

/// While this lives, no write to the device ends.
pub(super) struct StandStill {
    /// Thaws at the end of its input: when this is dropped, and also if this process is killed.
    thawer: Child,
}

fn run(program: &str, arguments: &[&str]) -> Result<String, String> {
    let output = Command::new(program).args(arguments).output();
    let output = output.map_err(|error| format!("{program}: {error}"))?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    } else {
        let told = String::from_utf8_lossy(&output.stderr);
        Err(format!("{program} {arguments:?}: {told}"))
    }
}

/// The same, again while something lets go of it: a loop device is detached when its last user has closed it.
fn run_until_free(program: &str, argument: &str) -> Result<String, String> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match run(
            program,
            &["-d", argument][usize::from(program == "umount")..],
        ) {
            Err(busy) if busy.contains("busy") && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(5));
            }
            ended => return ended,
        }
    }
}

impl SlowDevice {
    /// A device of zeroes; the reason if this machine has none to give.
    pub(super) fn new(directory: &Path, size_bytes: u64) -> Result<Self, String> {
        if !rustix::process::geteuid().is_root() {
            return Err("not root".to_owned());
        }
        let mut device = Self {
            directory: directory.join("lower"),
            loops: Vec::new(),
            mounts: Vec::new(),
        };
        let image = directory.join("lower.img");
        let sized = |path: &Path, size| {
            let file = std::fs::File::create(path);
            file.and_then(|file| file.set_len(size))
                .map_err(|error| format!("{}: {error}", path.display()))
        };
        sized(&image, 2 * size_bytes + (32 << 20))?;
        run("mkfs.ext4", &["-q", "-F", image.to_str().unwrap()])?;
        let lower = device.directory.clone();
        let below = device.attach(&image)?;
        device.mount(&below, &lower)?;
        let disk = lower.join("disk.raw");
        sized(&disk, size_bytes)?;
        device.attach(&disk)?;
        Ok(device)
    }

    fn attach(&mut self, file: &Path) -> Result<String, String> {
        let name = run("losetup", &["--find", "--show", file.to_str().unwrap()])?;
        self.loops.push(name.clone());
        Ok(name)
    }

    fn mount(&mut self, device: &str, at: &Path) -> Result<(), String> {
        std::fs::create_dir(at).map_err(|error| error.to_string())?;
        run("mount", &["-t", "ext4", device, at.to_str().unwrap()])?;
        self.mounts.push(at.to_owned());
        Ok(())
    }

    /// The device's name under `/dev`.
    pub(super) fn path(&self) -> &Path {
        Path::new(self.loops.last().unwrap())
    }

    /// Makes a file system on the device and mounts it.
    pub(super) fn with_file_system(&mut self, at: &Path) -> Result<(), String> {
        let device = self.loops.last().unwrap().clone();
        run("mkfs.ext4", &["-q", "-F", &device])?;
        self.mount(&device, at)
    }

    pub(super) fn stand_still(&self) -> StandStill {
        let directory = self.directory.clone();
        let thaw = format!(
            "cat >/dev/null; exec fsfreeze --unfreeze '{}'",
            directory.display()
        );
        let mut shell = Command::new("sh");
        let shell = shell.args(["-c", &thaw]).stdin(Stdio::piped());
        let thawer = shell.stdout(Stdio::null()).spawn().unwrap();
        run("fsfreeze", &["--freeze", directory.to_str().unwrap()]).unwrap();
        StandStill { thawer }
    }

    /// Writes that have reached the device and have not ended.
    pub(super) fn under_way(&self) -> u64 {
        let name = self.path().file_name().unwrap().to_str().unwrap();
        let text = std::fs::read_to_string(format!("/sys/block/{name}/inflight")).unwrap();
        text.split_whitespace().nth(1).unwrap().parse().unwrap()
    }
}

impl Drop for StandStill {
    fn drop(&mut self) {
        drop(self.thawer.stdin.take());
        let thawed = self.thawer.wait();
        if !std::thread::panicking() {
            assert!(thawed.unwrap().success());
        }
    }
}

impl Drop for SlowDevice {
    fn drop(&mut self) {
        // From the top down: a file system, the loop device below it, and the same again.
        let mut failed = Vec::new();
        if self.mounts.len() == 2 {
            let upper = self.mounts.pop().unwrap();
            failed.push(run_until_free("umount", upper.to_str().unwrap()));
        }
        while let Some(device) = self.loops.pop() {
            if self.loops.is_empty()
                && let Some(lower) = self.mounts.pop()
            {
                failed.push(run_until_free("umount", lower.to_str().unwrap()));
            }
            failed.push(run_until_free("losetup", &device));
        }
        for failure in failed.into_iter().filter_map(Result::err) {
            println!("left behind: {failure}");
        }
    }
}
