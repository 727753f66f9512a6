//! What a round cost the machine: processor time, bytes that reached the device, system calls, syncs.
//!
//! Called by `rounds`. Processor time is read from `/proc/PID/task/*/schedstat` (nanoseconds, all threads, io_uring's workers among
//! them). Bytes are those of the block device under the files, which counts what the file system and io_uring write as well, and is
//! therefore read after `syncfs`. Calls are counted by `perf stat` on the kernel's tracepoints in a round of their own; syncs
//! are fsync, fdatasync, sync_file_range, syncfs, msync and io_uring's fsync.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::fs::{major, minor, syncfs};
use rustix::process::{Pid, Signal, kill_process};

use crate::harness::wait;

/// Keeps the processors from halting for as long as it lives (Documentation/power/pm_qos_interface.rst). To wake a halted virtual processor
/// takes longer than a whole request, so what programs cost would drown in how often the machine happened to be idle.
#[derive(Debug)]
pub struct NoHalt {
    _request: File,
}

impl NoHalt {
    /// Fails where there is no such file, or this program is not root.
    pub fn hold() -> Result<Self> {
        const LATENCY_US: i32 = 0;
        const PATH: &str = "/dev/cpu_dma_latency";
        let mut request = File::options().write(true).open(PATH).context(PATH)?;
        #[allow(clippy::host_endian_bytes, reason = "the kernel's own number")]
        request.write_all(&LATENCY_US.to_ne_bytes())?;
        Ok(Self { _request: request })
    }
}

/// Processor time that all threads of a process have spent.
pub fn processor_time(pid: u32) -> Result<Duration> {
    let mut spent_ns = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        // A thread may end meanwhile.
        let text = fs::read_to_string(task?.path().join("schedstat")).unwrap_or_default();
        let first = text.split_whitespace().next().unwrap_or("0");
        spent_ns += first.parse::<u64>()?;
    }
    Ok(Duration::from_nanos(spent_ns))
}

/// Resident memory of a process, in bytes.
pub fn resident_bytes(pid: u32) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().next());
    Ok(kib.context("VmRSS")?.parse::<u64>()? << 10)
}

/// Waits until the process spends less than 2 % of a processor: what it had to do in the background is done.
pub fn wait_quiet(pid: u32, deadline: Duration) -> Result<()> {
    const LOOK: Duration = Duration::from_millis(100);
    wait::until(&format!("process {pid} to be quiet"), deadline, || {
        let before = processor_time(pid)?;
        std::thread::sleep(LOOK);
        let spent = processor_time(pid)?.saturating_sub(before);
        Ok((spent < LOOK / 50).then_some(()))
    })
}

/// What a block device has done since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceCounters {
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Cache flushes.
    pub flushes: u64,
}

impl DeviceCounters {
    /// What came since `before`.
    #[must_use]
    pub fn since(self, before: Self) -> Self {
        Self {
            read_bytes: self.read_bytes.saturating_sub(before.read_bytes),
            written_bytes: self.written_bytes.saturating_sub(before.written_bytes),
            flushes: self.flushes.saturating_sub(before.flushes),
        }
    }

    /// From the kernel's `stat` (Documentation/block/stat.rst): sectors are 512 bytes.
    fn parse(text: &str) -> Option<Self> {
        let numbers: Vec<u64> = text
            .split_whitespace()
            .map_while(|word| word.parse().ok())
            .collect();
        Some(Self {
            read_bytes: numbers.get(2)? * 512,
            written_bytes: numbers.get(6)? * 512,
            flushes: *numbers.get(15)?,
        })
    }
}

/// The block device under a directory, if there is one.
#[derive(Clone, Debug)]
pub struct Device {
    directory: PathBuf,
    stat: PathBuf,
}

impl Device {
    /// `None` on file systems without a device, such as tmpfs.
    pub fn under(directory: &Path) -> Result<Option<Self>> {
        let number = fs::metadata(directory)?.dev();
        let stat = format!("/sys/dev/block/{}:{}/stat", major(number), minor(number));
        let device = Self {
            directory: directory.to_owned(),
            stat: stat.into(),
        };
        Ok(device.stat.exists().then_some(device))
    }

    /// The counters, after everything dirty was written.
    pub fn settled(&self) -> Result<DeviceCounters> {
        syncfs(File::open(&self.directory)?)?;
        self.now()
    }

    /// The counters as they are.
    pub fn now(&self) -> Result<DeviceCounters> {
        let text = fs::read_to_string(&self.stat)?;
        DeviceCounters::parse(&text).context("the device's stat")
    }
}

/// Calls into the kernel that a process has made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Calls {
    /// All system calls.
    pub system_calls: u64,
    /// Calls that make data durable, also those that went through io_uring.
    pub syncs: u64,
}

/// `IORING_OP_FSYNC`.
const URING_FSYNC: &str = "opcode == 3";
const SYNCS: &[&str] = &[
    "syscalls:sys_enter_fdatasync",
    "syscalls:sys_enter_fsync",
    "syscalls:sys_enter_sync_file_range",
    "syscalls:sys_enter_syncfs",
    "syscalls:sys_enter_msync",
];

/// `perf stat` on a running process.
#[derive(Debug)]
pub struct CallCounter {
    perf: Child,
    output: tempfile::NamedTempFile,
}

impl CallCounter {
    /// Counts from now on all threads of the process.
    pub fn start(pid: u32) -> Result<Self> {
        let output = tempfile::NamedTempFile::new()?;
        let mut command = Command::new("perf");
        command.args(["stat", "-x", ",", "-o"]).arg(output.path());
        command.args(["-e", "raw_syscalls:sys_enter"]);
        command.args([
            "-e",
            "io_uring:io_uring_submit_req",
            "--filter",
            URING_FSYNC,
        ]);
        for name in SYNCS {
            command.args(["-e", name]);
        }
        command.args(["-p", &pid.to_string()]);
        let perf = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("perf")?;
        let counter = Self { perf, output };
        counter.wait_attached()?;
        Ok(counter)
    }

    /// perf holds a descriptor of each event and thread once it counts, and then sleeps.
    fn wait_attached(&self) -> Result<()> {
        let directory = format!("/proc/{}/fd", self.perf.id());
        wait::until("perf to count", wait::STEP, || {
            let events = fs::read_dir(&directory)?
                .flatten()
                .filter_map(|entry| fs::read_link(entry.path()).ok())
                .filter(|target| target.to_string_lossy().contains("perf_event"))
                .count();
            let stat = fs::read_to_string(format!("/proc/{}/stat", self.perf.id()))?;
            let asleep = stat
                .rsplit_once(") ")
                .is_some_and(|(_, rest)| rest.starts_with('S'));
            Ok((events > SYNCS.len() && asleep).then_some(()))
        })
    }

    /// Ends counting.
    pub fn stop(mut self) -> Result<Calls> {
        let pid = i32::try_from(self.perf.id()).ok().and_then(Pid::from_raw);
        kill_process(pid.context("perf's pid")?, Signal::INT)?;
        self.perf.wait()?;
        let text = fs::read_to_string(self.output.path())?;
        let calls = parse_perf(&text);
        ensure!(calls.system_calls > 0, "perf counted nothing: {text}");
        Ok(calls)
    }
}

impl Drop for CallCounter {
    fn drop(&mut self) {
        if let Ok(None) = self.perf.try_wait()
            && let Err(error) = self.perf.kill().and_then(|()| self.perf.wait())
        {
            eprintln!("bench: cannot end perf: {error}");
        }
    }
}

/// Lines of `perf stat -x,`: count, unit, event, ...
fn parse_perf(text: &str) -> Calls {
    let mut calls = Calls::default();
    for line in text.lines() {
        let mut fields = line.split(',');
        let Some(count) = fields.next().and_then(|field| field.parse::<u64>().ok()) else {
            continue;
        };
        if fields.nth(1) == Some("raw_syscalls:sys_enter") {
            calls.system_calls += count;
        } else {
            calls.syncs += count;
        }
    }
    calls
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_read_as_the_kernel_documents_it() {
        let text = "409100 0 3378212 26657 395208 26795 4151082 72108 0 61140 147923 0 0 0 0 44264 49157\n";
        let counters = DeviceCounters::parse(text).expect("17 numbers");
        assert_eq!(counters.read_bytes, 3_378_212 * 512);
        assert_eq!(counters.written_bytes, 4_151_082 * 512);
        assert_eq!(counters.flushes, 44_264);
        assert_eq!(DeviceCounters::parse("1 2 3"), None);
    }

    #[test]
    fn perf_tells_calls_from_syncs() {
        let text = "# started on\n\n120,,raw_syscalls:sys_enter,1,100.00,,\n3,,io_uring:io_uring_submit_req,1,100.00,,\n\
                    2,,syscalls:sys_enter_fdatasync,1,100.00,,\n<not counted>,,syscalls:sys_enter_msync,0,0.00,,\n";
        let calls = parse_perf(text);
        assert_eq!(
            calls,
            Calls {
                system_calls: 120,
                syncs: 5
            }
        );
    }

    #[test]
    fn this_process_has_spent_time_and_memory() {
        let pid = std::process::id();
        assert!(processor_time(pid).expect("own schedstat") > Duration::ZERO);
        assert!(resident_bytes(pid).expect("own status") > 0);
    }
}
