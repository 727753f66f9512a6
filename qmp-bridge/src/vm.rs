//! The VM through QEMU's monitor: does it run, which disks has it, what happens to it.
//!
//! Called by `run` and `sets`. It must not know sets or the agent.
//!
//! `query-block` does not list vhost-user disks. They are found as QOM objects of type `vhost-user-blk*`; the device's
//! `chardev` property names the character device, whose `addr` property keeps the socket's path. `query-chardev` does not:
//! while connected its file name is a bare `unix:` (seen with QEMU 7.2).

use crate::qmp::{CallError, QmpClient};
use qapi::qmp;
use serde::Deserialize;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::sync::broadcast;

/// Containers of the QOM tree in which QEMU keeps the devices that were given on its command line or plugged in later.
const DEVICE_CONTAINERS: [&str; 2] = ["/machine/peripheral", "/machine/peripheral-anon"];

/// Events after which a hold is worth nothing.
const DISTURBING_EVENTS: [&str; 9] = [
    "STOP",
    "SUSPEND",
    "SUSPEND_DISK",
    "MIGRATION",
    "DEVICE_DELETED",
    "SHUTDOWN",
    "POWERDOWN",
    "RESET",
    "GUEST_PANICKED",
];

/// Why the VM cannot be asked or is not in a state for a set.
#[derive(Clone, Debug, thiserror::Error)]
pub enum VmError {
    /// QEMU does not answer, or not as promised.
    #[error("QEMU at {}: {source}", qmp.display())]
    Unreachable {
        /// Its socket.
        qmp: PathBuf,
        /// What went wrong.
        #[source]
        source: CallError,
    },
    /// It does not run.
    #[error("the VM does not run: {status}")]
    NotRunning {
        /// QEMU's word for its state.
        status: String,
    },
    /// It migrates.
    #[error("the VM migrates: {status}")]
    Migrating {
        /// QEMU's word for it.
        status: String,
    },
}

/// What stands behind a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backing {
    /// A vhost-user back end at this socket.
    VhostUser {
        /// Absolute path, if QEMU's working directory could be found out.
        socket: PathBuf,
    },
    /// QEMU's own block layer, or a back end that cannot be matched.
    Other {
        /// For people.
        what: String,
        /// The guest cannot write to it.
        read_only: bool,
    },
}

impl Backing {
    /// The guest cannot write to it.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        match self {
            Self::VhostUser { .. } => false,
            Self::Other { read_only, .. } => *read_only,
        }
    }

    /// Why no copy can be made of it, for a disk that matches none of our volumes.
    #[must_use]
    pub fn why_not_ours(&self) -> String {
        match self {
            Self::VhostUser { socket } => {
                format!("its back end at {} is none of ours", socket.display())
            }
            Self::Other { what, .. } => format!("it is not served by vhost-blk ({what})"),
        }
    }
}

/// A disk of the VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundDisk {
    /// QEMU device id, or its QOM path if it has none.
    pub device: String,
    /// Other names of it (drive id, node name).
    pub aliases: Vec<String>,
    /// What stands behind it.
    pub backing: Backing,
}

/// A VM.
#[derive(Debug)]
pub struct Vm {
    qmp: PathBuf,
    client: QmpClient,
    limit: Duration,
    working_directory: Option<PathBuf>,
}

impl Vm {
    /// Connects to the monitor. `limit` holds for each call on it.
    ///
    /// # Errors
    /// [`VmError::Unreachable`].
    pub async fn connect(qmp: &Path, limit: Duration) -> Result<Self, VmError> {
        match QmpClient::connect(qmp, limit).await {
            Ok(client) => Ok(Self {
                qmp: qmp.to_owned(),
                // Where relative socket paths begin.
                working_directory: client
                    .peer_pid()
                    .and_then(|pid| std::fs::read_link(format!("/proc/{pid}/cwd")).ok()),
                client,
                limit,
            }),
            Err(source) => Err(VmError::Unreachable {
                qmp: qmp.to_owned(),
                source,
            }),
        }
    }

    /// Events from now on.
    #[must_use]
    pub fn subscribe(&self) -> broadcast::Receiver<Value> {
        self.client.subscribe()
    }

    /// The VM is not about to leave this host.
    ///
    /// # Errors
    /// [`VmError::Migrating`], [`VmError::Unreachable`].
    pub async fn not_migrating(&self) -> Result<(), VmError> {
        let info = self.call(&qmp::query_migrate {}).await?;
        let Some(status) = info.status else {
            return Ok(());
        };
        use qmp::MigrationStatus as S;
        let ended = matches!(status, S::none | S::cancelled | S::failed | S::completed);
        if ended {
            Ok(())
        } else {
            Err(VmError::Migrating {
                status: format!("{status:?}"),
            })
        }
    }

    /// The VM runs.
    ///
    /// # Errors
    /// [`VmError::NotRunning`], [`VmError::Unreachable`].
    pub async fn running(&self) -> Result<(), VmError> {
        let info = self.call(&qmp::query_status {}).await?;
        if info.running {
            Ok(())
        } else {
            Err(VmError::NotRunning {
                status: format!("{:?}", info.status),
            })
        }
    }

    /// Its disks: vhost-user ones in the order of the devices, then those of QEMU's block layer.
    ///
    /// # Errors
    /// [`VmError::Unreachable`].
    pub async fn disks(&self) -> Result<Vec<FoundDisk>, VmError> {
        let mut disks = Vec::new();
        for container in DEVICE_CONTAINERS {
            for device in self.devices(container).await? {
                let Some(class) = device
                    .type_
                    .strip_prefix("child<")
                    .and_then(|t| t.strip_suffix('>'))
                else {
                    continue;
                };
                let path = format!("{container}/{}", device.name);
                let name = if container.ends_with("anon") {
                    path.clone()
                } else {
                    device.name.clone()
                };
                let backing = if class.starts_with("vhost-user-blk") {
                    self.chardev_of(&path).await?
                } else if class.starts_with("vhost-user-scsi") || class.starts_with("vhost-scsi") {
                    Backing::Other {
                        what: class.to_owned(),
                        read_only: false,
                    }
                } else {
                    continue;
                };
                disks.push(FoundDisk {
                    device: name,
                    aliases: Vec::new(),
                    backing,
                });
            }
        }
        disks.extend(self.block_layer_disks().await?);
        Ok(disks)
    }

    /// QEMU's id of the virtio-serial port behind a socket. `None`: there is none, or it has no id and QEMU tells nothing of it.
    ///
    /// # Errors
    /// [`VmError::Unreachable`].
    pub async fn port_behind(&self, socket: &Path) -> Result<Option<String>, VmError> {
        let [container, _] = DEVICE_CONTAINERS;
        for device in self.devices(container).await? {
            if device.type_ != "child<virtserialport>" {
                continue;
            }
            let path = format!("{container}/{}", device.name);
            match self.socket_of(&path).await {
                Ok(Ok(found)) if same_socket(&found, socket) => return Ok(Some(device.name)),
                Ok(Ok(_) | Err(_)) => {}
                // What stands behind it has no address.
                Err(VmError::Unreachable {
                    source: CallError::Refused(_),
                    ..
                }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    async fn devices(&self, container: &str) -> Result<Vec<qmp::ObjectPropertyInfo>, VmError> {
        let path = container.to_owned();
        match self.call(&qmp::qom_list { path }).await {
            // A QEMU without any such device has no such container.
            Err(VmError::Unreachable {
                source: CallError::Refused(_),
                ..
            }) => Ok(Vec::new()),
            devices => devices,
        }
    }

    async fn chardev_of(&self, device: &str) -> Result<Backing, VmError> {
        Ok(match self.socket_of(device).await? {
            Ok(socket) => Backing::VhostUser { socket },
            Err(why) => Backing::Other {
                what: format!("vhost-user-blk {why}"),
                read_only: false,
            },
        })
    }

    /// The Unix socket of a device's character device, or what it has instead.
    async fn socket_of(&self, device: &str) -> Result<Result<PathBuf, String>, VmError> {
        let chardev = self.property(device, "chardev").await?;
        let Some(chardev) = chardev.as_str().filter(|id| !id.is_empty()) else {
            return Ok(Err("without a chardev".to_owned()));
        };
        let address = self
            .property(&format!("/chardevs/{chardev}"), "addr")
            .await?;
        let path = match (address.get("type"), address.get("path")) {
            (Some(Value::String(kind)), Some(Value::String(path))) if kind == "unix" => path,
            (_, _) => return Ok(Err(format!("on chardev {chardev}"))),
        };
        let mut socket = PathBuf::from(path);
        if socket.is_relative()
            && let Some(directory) = &self.working_directory
        {
            socket = directory.join(socket);
        }
        Ok(Ok(socket))
    }

    async fn property(&self, path: &str, property: &str) -> Result<Value, VmError> {
        self.call(&qmp::qom_get {
            path: path.to_owned(),
            property: property.to_owned(),
        })
        .await
    }

    async fn block_layer_disks(&self) -> Result<Vec<FoundDisk>, VmError> {
        // Decoded by hand: `query-block` drags in every image format's own information, and one that `qapi` does not know
        // would hide all disks.
        let answer = self
            .client
            .execute(
                "query-block",
                Value::Object(serde_json::Map::new()),
                None,
                Some(self.limit),
            )
            .await;
        let answer = answer.map_err(|source| self.unreachable(source))?;
        let entries: Vec<BlockEntry> = serde_json::from_value(answer).map_err(|error| {
            self.unreachable(CallError::BadAnswer {
                command: "query-block".to_owned(),
                why: error.to_string(),
            })
        })?;
        Ok(entries.into_iter().filter_map(BlockEntry::disk).collect())
    }

    async fn call<C: qapi::Command>(&self, command: &C) -> Result<C::Ok, VmError> {
        let result = self.client.qemu(command, self.limit).await;
        result.map_err(|source| self.unreachable(source))
    }

    fn unreachable(&self, source: CallError) -> VmError {
        VmError::Unreachable {
            qmp: self.qmp.clone(),
            source,
        }
    }
}

/// What is read of an entry of `query-block`.
#[derive(Debug, Deserialize)]
struct BlockEntry {
    #[serde(default)]
    device: String,
    qdev: Option<String>,
    inserted: Option<Inserted>,
}

#[derive(Debug, Deserialize)]
struct Inserted {
    #[serde(default)]
    ro: bool,
    #[serde(default)]
    file: String,
    #[serde(rename = "node-name")]
    node_name: Option<String>,
}

impl BlockEntry {
    /// The disk, unless it has no medium, is not attached to the guest, or is the firmware's flash.
    fn disk(self) -> Option<FoundDisk> {
        let inserted = self.inserted?;
        let qdev = self.qdev?;
        if qdev.contains("system.flash") {
            return None;
        }
        let path = qdev.strip_suffix("/virtio-backend").unwrap_or(&qdev);
        let device = path.strip_prefix("/machine/peripheral/").unwrap_or(path);
        Some(FoundDisk {
            device: device.to_owned(),
            aliases: [self.device]
                .into_iter()
                .chain(inserted.node_name)
                .filter(|name| !name.is_empty())
                .collect(),
            backing: Backing::Other {
                what: format!("QEMU serves {} itself", inserted.file),
                read_only: inserted.ro,
            },
        })
    }
}

/// The name of the event if it ends a hold, with what is worth telling of it.
#[must_use]
pub fn disturbance(event: &Value) -> Option<String> {
    let name = event.get("event")?.as_str()?;
    if !DISTURBING_EVENTS.contains(&name) {
        return None;
    }
    let data = event
        .get("data")
        .map(|data| format!(" {data}"))
        .unwrap_or_default();
    Some(format!("QEMU event {name}{data}"))
}

/// The event says that the program in the guest that had this virtio-serial port open has let go of it.
#[must_use]
pub fn port_closed(event: &Value, port: &str) -> bool {
    let data = event.get("data");
    let of = |key| data.and_then(|data| data.get(key));
    event.get("event").and_then(Value::as_str) == Some("VSERPORT_CHANGE")
        && of("id").and_then(Value::as_str) == Some(port)
        && of("open").and_then(Value::as_bool) == Some(false)
}

/// Two paths of one socket: by their text, or by what they lead to.
#[must_use]
pub fn same_socket(one: &Path, other: &Path) -> bool {
    if one == other {
        return true;
    }
    match (one.canonicalize(), other.canonicalize()) {
        (Ok(one), Ok(other)) => one == other,
        (Ok(_) | Err(_), _) => false,
    }
}

#[cfg(test)]
mod tests;
