//! The TOML file that names VMs and how to reach them.
//!
//! Read by both programs. Unknown keys are refused: a misspelt `agent` would silently lower every set's level.

use crate::error::Error;
use crate::guest::AgentAddress;
use crate::snapshot::document::VmTarget;
use serde::Deserialize;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// The file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Config {
    /// State directory.
    pub state_dir: Option<PathBuf>,
    /// VMs, as `[[vm]]`.
    pub vm: Vec<VmEntry>,
}

/// A VM.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct VmEntry {
    /// Name, unique in the file.
    pub name: String,
    /// QEMU's QMP socket.
    pub qmp: PathBuf,
    /// The agent: the host end of its virtio-serial port, [vsock](AgentAddress), or `qga:SOCKET`.
    pub agent: Option<AgentAddress>,
    /// Control sockets of its vhost-blk daemons, at least one.
    pub vhost_blk: Vec<PathBuf>,
}

impl Config {
    /// Reads and checks the file.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn read(path: &Path) -> Result<Self, Error> {
        let config = std::fs::read_to_string(path)
            .map_err(|e| e.to_string())
            .and_then(|text| Self::parse(&text));
        config.map_err(|why| Error::Config {
            path: path.to_owned(),
            why,
        })
    }

    fn parse(text: &str) -> Result<Self, String> {
        let config: Self = toml::from_str(text).map_err(|error| error.to_string())?;
        let mut names = BTreeSet::new();
        for vm in &config.vm {
            if vm.vhost_blk.is_empty() {
                return Err(format!("VM {}: vhost-blk names no control socket", vm.name));
            }
            if !names.insert(vm.name.as_str()) {
                return Err(format!("VM {} is named twice", vm.name));
            }
        }
        Ok(config)
    }

    /// The VM of that name, or the only one.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Usage`] if no name was given and there are several.
    pub fn vm(&self, name: Option<&str>) -> Result<VmTarget, Error> {
        let entry = match (name, self.vm.as_slice()) {
            (Some(name), vms) => vms
                .iter()
                .find(|vm| vm.name == name)
                .ok_or_else(|| Error::NotFound(format!("no VM {name} in the configuration")))?,
            (None, [only]) => only,
            (None, _) => {
                let text = "several VMs are configured: choose one by --vm";
                return Err(Error::Usage(text.to_owned()));
            }
        };
        Ok(VmTarget {
            name: entry.name.clone(),
            qmp: entry.qmp.clone(),
            agent: entry.agent.clone(),
            vhost_blk: entry.vhost_blk.clone(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_misspelt_key_is_refused() {
        let text = "[[vm]]\nname = 'a'\nqmp = '/q'\nagnet = '/a'\nvhost-blk = ['/c']\n";
        assert!(Config::parse(text).unwrap_err().contains("agnet"));
    }

    #[test]
    fn an_agent_may_be_on_vsock_and_its_address_must_be_one() {
        let vm = |agent: &str| {
            let text =
                format!("[[vm]]\nname = 'a'\nqmp = '/q'\nagent = '{agent}'\nvhost-blk = ['/c']\n");
            Config::parse(&text)
        };
        let config = vm("hybrid-vsock:/run/v:9").unwrap();
        let agent = config.vm(None).unwrap().agent.unwrap();
        assert_eq!(agent.to_string(), "hybrid-vsock:/run/v:9");
        assert!(vm("vsock:guest").unwrap_err().contains("vsock:CID"));
    }

    #[test]
    fn two_vms_of_one_name_are_refused() {
        let vm = "[[vm]]\nname = 'a'\nqmp = '/q'\nvhost-blk = ['/c']\n";
        assert!(Config::parse(&format!("{vm}{vm}")).is_err());
        assert!(Config::parse(vm).is_ok());
    }

    #[test]
    fn the_only_vm_needs_no_name() {
        let text = "[[vm]]\nname = 'a'\nqmp = '/q'\nvhost-blk = ['/c']\n";
        let config = Config::parse(text).unwrap();
        assert_eq!(config.vm(None).unwrap().name, "a");
        assert!(matches!(config.vm(Some("b")), Err(Error::NotFound(_))));
    }
}
