//! The command line.
//!
//! Read by `main` alone.

use crate::qga::policy::Names;
use crate::transport::Endpoint;
use crate::writer::script::Hooks;
use clap::{Args, Parser, Subcommand};
use std::ffi::OsString;
use std::path::PathBuf;

/// The half of the snapshot service that runs in the guest.
#[derive(Debug, Parser)]
#[command(version, about)]
pub struct Config {
    /// What this process is; the agent itself if nothing is given.
    #[command(subcommand)]
    pub role: Option<Role>,
    /// The agent's own settings.
    #[command(flatten)]
    pub agent: Agent,
}

/// Other roles of the same binary.
#[derive(Debug, Subcommand)]
pub enum Role {
    /// The process that holds file systems; started by the agent.
    #[command(hide = true)]
    HoldHelper {
        /// Directory for state.
        #[arg(long)]
        state_dir: PathBuf,
    },
    /// Moves itself into a control group and becomes a writer's script; started by the agent.
    #[command(hide = true)]
    WriterScript {
        /// `cgroup.procs` of the group.
        #[arg(long)]
        group: Option<PathBuf>,
        /// The script.
        program: PathBuf,
        /// Its arguments.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        words: Vec<OsString>,
    },
    /// Becomes a program that the host runs; started by the agent.
    #[command(hide = true)]
    ExecChild {
        /// The name that the program sees as its own.
        #[arg(long)]
        name: String,
        /// Its file.
        program: PathBuf,
        /// Its arguments.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        words: Vec<OsString>,
    },
}

/// Settings of the agent.
#[derive(Debug, Args)]
pub struct Agent {
    /// Where the bridge speaks: a virtio-serial port, `vsock:PORT` or `unix:PATH` to listen on; may be given more than once.
    /// Port 867 of vsock is for the host alone and is used only where the guest has vsock.
    #[arg(long, default_values = ["/dev/virtio-ports/org.vmshadow.agent.0", "vsock:867"])]
    pub port: Vec<Endpoint>,
    /// Where clients of the QEMU guest agent protocol speak, in the same words; `none` for nowhere.
    #[arg(long, default_value = "/dev/virtio-ports/org.qemu.guest_agent.0")]
    pub qga_port: Vec<Endpoint>,
    /// Commands of the QEMU guest agent that the host may not use, separated by commas (as `qemu-ga --block-rpcs`).
    #[arg(
        long,
        value_name = "LIST",
        default_value = "",
        hide_default_value = true
    )]
    pub block_rpcs: Names,
    /// The only ones that it may use (as `qemu-ga --allow-rpcs`).
    #[arg(long, value_name = "LIST")]
    pub allow_rpcs: Option<Names>,
    /// Directories of script writers.
    #[arg(long, default_value = "/etc/vmshadow/writers")]
    pub writers_dir: PathBuf,
    /// Whose hooks are writers too, where they are there: separated by commas, or none.
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_values = ["qemu", "vmware", "azure"])]
    pub foreign_hooks: Vec<Hooks>,
    /// QEMU's hook, if it is not in the place where packages put it (as `qemu-ga --fsfreeze-hook`).
    #[arg(long, value_name = "PATH")]
    pub fsfreeze_hook: Option<PathBuf>,
    /// Directory that stands for `/` when the hooks of others are looked for (containers, tests).
    #[arg(long, value_name = "DIR", default_value = "/")]
    pub foreign_root: PathBuf,
    /// Files that allow users other than root to be writers.
    #[arg(long, default_value = "/etc/vmshadow/writers.d")]
    pub allow_dir: PathBuf,
    /// Patterns of files that need not be in a copy: `*.conf`, one path a line (VSS: FilesNotToSnapshot).
    #[arg(long, default_value = "/etc/vmshadow/files-not-to-snapshot.d")]
    pub not_to_snapshot_dir: PathBuf,
    /// Copies have the content of swap partitions and swap files, too.
    #[arg(long)]
    pub keep_swap: bool,
    /// Socket for writers; by default writers.sock in the state directory.
    #[arg(long)]
    pub writer_socket: Option<PathBuf>,
    /// Directory for state; must be a tmpfs, or it may lie on a frozen file system.
    #[arg(long, default_value = "/run/vmshadow")]
    pub state_dir: PathBuf,
    /// Mount point that is never frozen; may be given more than once.
    #[arg(long)]
    pub exclude_filesystem: Vec<String>,
    /// Limit of a freeze by the QEMU guest agent protocol, milliseconds. KubeVirt holds for up to 300 s.
    #[arg(long, default_value_t = 330_000, value_parser = clap::value_parser!(u64).range(1..=3_600_000))]
    pub qga_hold_ms: u64,
    /// Only file systems mounted below this directory exist for the agent (containers, tests).
    #[arg(long)]
    pub only_under: Option<PathBuf>,
    /// Thaw what a killed agent left frozen, undo what its script writers did, and exit.
    #[arg(long)]
    pub thaw_leftovers: bool,
}

#[cfg(test)]
mod tests {
    //! What the defaults are.
    use super::*;
    use guest_agent_wire::host::{PORT_NAME, VSOCK_PORT};

    #[test]
    fn the_bridge_is_heard_on_both_ways_unless_told_otherwise() {
        let config = Config::try_parse_from(["guest-agent"]).unwrap();
        let serial = Endpoint::Port(format!("/dev/virtio-ports/{PORT_NAME}").into());
        assert_eq!(config.agent.port, [serial, Endpoint::Vsock(VSOCK_PORT)]);
        let config = Config::try_parse_from(["guest-agent", "--port", "unix:/run/n"]).unwrap();
        assert_eq!(config.agent.port, [Endpoint::Listen("/run/n".into())]);
        assert!(Config::try_parse_from(["guest-agent", "--port", "vsock:x"]).is_err());
    }

    #[test]
    fn a_client_of_qemus_protocol_may_hold_for_longer_than_kubevirts_five_minutes() {
        let config = Config::try_parse_from(["guest-agent"]).unwrap();
        assert_eq!(config.agent.qga_hold_ms, 330_000);
    }
}
