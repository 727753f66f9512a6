//! A control group (cgroup v2): the processes of a service, which stand still and go on together.
//!
//! Called by the writer and by `watch`. It speaks to the kernel's files alone, which need no disk.

use guest_agent_wire::sdk::{Call, Veto};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Where control groups are mounted.
const ROOT: &str = "/sys/fs/cgroup";
/// Between two looks whether all processes stand.
const LOOK: Duration = Duration::from_millis(1);

/// A control group with processes in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    directory: PathBuf,
}

impl Group {
    /// That of a unit which runs.
    ///
    /// # Errors
    /// systemd does not know it, or it does not run.
    pub fn of_unit(unit: &str) -> Result<Self, Veto> {
        let output = Command::new("systemctl")
            .args(["show", "--property=ControlGroup", "--value", "--", unit])
            .output()
            .map_err(|error| Veto::retryable(format!("systemctl: {error}")))?;
        let name = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        if !output.status.success() || name.is_empty() {
            let said = String::from_utf8_lossy(&output.stderr);
            return Err(Veto::retryable(format!("{unit} does not run: {said}")));
        }
        Self::at(&Path::new(ROOT).join(name.trim_start_matches('/')))
    }

    /// The one in this directory.
    ///
    /// # Errors
    /// It is none that can be frozen, or there is nobody in it.
    pub fn at(directory: &Path) -> Result<Self, Veto> {
        let group = Self {
            directory: directory.to_owned(),
        };
        if !directory.join("cgroup.freeze").exists() {
            let message = format!(
                "{} is no control group that can be frozen",
                directory.display()
            );
            return Err(Veto::nonretryable(message));
        }
        let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let own = own.lines().find_map(|line| line.strip_prefix("0::/"));
        if own.is_some_and(|own| Path::new(ROOT).join(own).starts_with(directory)) {
            let message = format!("{} is the writer's own control group", directory.display());
            return Err(Veto::nonretryable(message));
        }
        Ok(group)
    }

    /// Its directory, for people.
    #[must_use]
    pub fn name(&self) -> String {
        self.directory.display().to_string()
    }

    fn read(&self, file: &str) -> Result<String, Veto> {
        let path = self.directory.join(file);
        fs::read_to_string(&path)
            .map_err(|error| Veto::retryable(format!("{}: {error}", path.display())))
    }

    fn set(&self, value: &str) -> io::Result<()> {
        fs::write(self.directory.join("cgroup.freeze"), value)
    }

    /// Processes in it and in the groups below.
    ///
    /// # Errors
    /// It is gone.
    pub fn processes(&self) -> Result<Vec<u32>, Veto> {
        let mut all = Vec::new();
        let mut directories = vec![self.directory.clone()];
        while let Some(directory) = directories.pop() {
            let group = Self { directory };
            let text = group.read("cgroup.procs")?;
            all.extend(text.lines().filter_map(|line| line.parse::<u32>().ok()));
            let below = fs::read_dir(&group.directory)
                .into_iter()
                .flatten()
                .flatten();
            directories.extend(below.map(|entry| entry.path()).filter(|path| path.is_dir()));
        }
        all.sort_unstable();
        Ok(all)
    }

    /// The kernel's word: all of them stand still.
    ///
    /// # Errors
    /// It is gone.
    pub fn is_frozen(&self) -> Result<bool, Veto> {
        Ok(self
            .read("cgroup.events")?
            .lines()
            .any(|line| line == "frozen 1"))
    }

    /// Returns when all of them stand still.
    ///
    /// # Errors
    /// They did not in time: one of them is inside the kernel and does not come out; they are not let go. Or somebody else, such
    /// as the watch whose time is over, let them go.
    pub fn freeze(&self, call: &Call<'_>) -> Result<(), Veto> {
        self.set("1")
            .map_err(|error| Veto::retryable(format!("{}: {error}", self.name())))?;
        while !self.is_frozen()? {
            if self.read("cgroup.freeze")?.trim() == "0" {
                return Err(Veto::retryable(format!("{} was let go", self.name())));
            }
            if call.is_over() {
                return Err(Veto::timeout(format!(
                    "{} does not stand still",
                    self.name()
                )));
            }
            std::thread::sleep(LOOK);
        }
        Ok(())
    }

    /// Lets them go on. A group that is gone has nobody to go on.
    ///
    /// # Errors
    /// The kernel's.
    pub fn thaw(&self) -> Result<(), Veto> {
        match self.set("0") {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(Veto::retryable(format!("{}: {error}", self.name())))
            }
            Ok(()) | Err(_) => Ok(()),
        }
    }
}
