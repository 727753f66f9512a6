//! The peers: `qemu-storage-daemon` over a raw file, overlays, chains and copy-before-write.
//!
//! Called by the figures. Each is one process that exports one node over vhost-user, with O_DIRECT and io_uring.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::client::Client;
use super::place;
use crate::harness::process::Process;

/// How an overlay is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overlay {
    /// qcow2 as it is made by default: clusters of 64 KiB.
    Clusters64K,
    /// Clusters of 128 KiB in 32 subclusters of 4 KiB.
    ExtendedL2,
}

impl Overlay {
    fn options(self) -> &'static str {
        match self {
            Self::Clusters64K => "cluster_size=64k",
            Self::ExtendedL2 => "cluster_size=128k,extended_l2=on",
        }
    }
}

/// The file below a chain.
pub const BASE: &str = "base.raw";

/// A running `qemu-storage-daemon`, killed on drop.
#[derive(Debug)]
pub struct StorageDaemon {
    process: Process,
    socket: PathBuf,
}

fn file(path: &Path) -> String {
    format!(
        "driver=file,filename={},cache.direct=on,aio=io_uring",
        path.display()
    )
}

/// The same as part of another node.
fn file_of(prefix: &str, path: &Path) -> String {
    format!(
        "{prefix}.driver=file,{prefix}.filename={},{prefix}.cache.direct=on,{prefix}.aio=io_uring",
        path.display()
    )
}

impl StorageDaemon {
    /// Over a raw file, with as many queues.
    pub fn raw(directory: &Path, base: &Path, queues: usize) -> Result<Self> {
        Self::start(
            directory,
            &[format!("{},node-name=disk", file(base))],
            queues,
        )
    }

    /// Over nothing: reads and writes are answered at once.
    pub fn null(directory: &Path, size_bytes: u64) -> Result<Self> {
        let node = format!("driver=null-co,node-name=disk,read-zeroes=off,size={size_bytes}");
        Self::start(directory, &[node], 1)
    }

    /// Over a fresh overlay of a raw file: QEMU's snapshot just taken.
    pub fn overlay(directory: &Path, base: &Path, kind: Overlay) -> Result<Self> {
        let overlay = directory.join("overlay.qcow2");
        create(&overlay, kind.options(), Backing::Raw(base))?;
        let node = format!(
            "driver=qcow2,node-name=disk,{},backing.driver=raw,{}",
            file_of("file", &overlay),
            file_of("backing.file", base)
        );
        Self::start(directory, &[node], 1)
    }

    /// Over a chain that `make_chain` has made, its newest layer on top; `depth` 0 is the base alone.
    pub fn chain(directory: &Path, depth: usize) -> Result<Self> {
        let name = |number: usize| {
            if number == depth {
                "disk".to_owned()
            } else {
                format!("layer{number}")
            }
        };
        let base = directory.join(BASE);
        let mut nodes = vec![format!("{},node-name={}", file(&base), name(0))];
        for number in 1..=depth {
            let layer = directory.join(layer_name(number));
            nodes.push(format!(
                "driver=qcow2,node-name={},{},backing={}",
                name(number),
                file_of("file", &layer),
                name(number - 1)
            ));
        }
        Self::start(directory, &nodes, 1)
    }

    /// Over a raw file whose old blocks go to a fresh qcow2 file before they are overwritten.
    pub fn copy_before_write(directory: &Path, base: &Path, size_bytes: u64) -> Result<Self> {
        let target = directory.join("target.qcow2");
        create(
            &target,
            Overlay::Clusters64K.options(),
            Backing::None(size_bytes),
        )?;
        let nodes = [
            format!("{},node-name=base", file(base)),
            format!("driver=qcow2,node-name=target,{}", file_of("file", &target)),
            "driver=copy-before-write,node-name=disk,file=base,target=target".to_owned(),
        ];
        Self::start(directory, &nodes, 1)
    }

    fn start(directory: &Path, nodes: &[String], queues: usize) -> Result<Self> {
        let socket = directory.join("qsd.sock");
        let mut command = Command::new("qemu-storage-daemon");
        for node in nodes {
            command.arg("--blockdev").arg(node);
        }
        command.arg("--export").arg(format!(
            "type=vhost-user-blk,id=export,node-name=disk,writable=on,num-queues={queues},addr.type=unix,addr.path={}",
            socket.display()
        ));
        let process = Process::start("qemu-storage-daemon", command, &directory.join("qsd"))?;
        Ok(Self { process, socket })
    }

    /// The process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Connects a client.
    pub fn client(&self, queues: usize) -> Result<Client> {
        Client::connect(&self.socket, queues).with_context(|| self.process.stderr())
    }
}

/// What an image lies on.
enum Backing<'a> {
    None(u64),
    Raw(&'a Path),
}

fn create(path: &Path, options: &str, backing: Backing<'_>) -> Result<()> {
    let mut command = Command::new("qemu-img");
    command.args(["create", "-q", "-f", "qcow2", "-o", options]);
    match backing {
        Backing::None(size_bytes) => command.arg(path).arg(size_bytes.to_string()),
        Backing::Raw(base) => command.args(["-F", "raw", "-b"]).arg(base).arg(path),
    };
    place::run(&mut command).map(drop)
}

fn layer_name(number: usize) -> String {
    format!("layer{number}.qcow2")
}

/// Makes the layers of a chain over `DIRECTORY/base.raw`; each, oldest first, has these 4 KiB blocks written. What lies below a layer
/// is only said when the chain is served: with it, each layer would open all below it first, and the zeroes that
/// fill its clusters instead of their data are as long to read.
pub fn make_chain(directory: &Path, size_bytes: u64, layers: &[Vec<u64>]) -> Result<()> {
    for (number, offsets) in (1..).zip(layers) {
        let layer = directory.join(layer_name(number));
        create(
            &layer,
            Overlay::Clusters64K.options(),
            Backing::None(size_bytes),
        )?;
        let mut command = Command::new("qemu-io");
        command.args(["-f", "qcow2"]);
        for offset in offsets {
            command.args([
                "-c",
                &format!("write -q -P {} {offset} 4096", number % 255 + 1),
            ]);
        }
        place::run(command.arg(&layer))?;
    }
    Ok(())
}
