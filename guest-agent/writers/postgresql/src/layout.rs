//! Where a server's files lie.
//!
//! Made by `session` from what the server says, and from the links in its data directory, which it does not tell.

use guest_agent_wire::metadata::{Component, FileSet, Metadata, Restoring, Source};
use std::path::PathBuf;

/// The component of the whole cluster: databases of one server share their log, so none can be restored alone.
pub(crate) const COMPONENT: &str = "cluster";

/// A server's files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Version of the server.
    pub version: String,
    /// `data_directory`.
    pub data: PathBuf,
    /// Where the log lies: `pg_wal` in the data directory, or what that links to.
    pub wal: PathBuf,
    /// Name and directory of each tablespace outside the data directory.
    pub tablespaces: Vec<(String, PathBuf)>,
    /// Configuration files; on Debian they lie elsewhere than the data.
    pub configuration: Vec<PathBuf>,
}

impl Layout {
    /// Everything that a copy must hold for the server to start from it.
    #[must_use]
    pub fn paths(&self) -> Vec<PathBuf> {
        let tablespaces = self.tablespaces.iter().map(|(_, path)| path);
        [&self.data, &self.wal]
            .into_iter()
            .chain(tablespaces)
            .cloned()
            .collect()
    }

    /// The metadata document.
    #[must_use]
    pub fn metadata(&self, restoring: Restoring) -> Metadata {
        let tree = |path: &PathBuf| FileSet::tree(path.to_string_lossy());
        let mut cluster = Component::database("", COMPONENT);
        cluster.selectable_for_restore = true;
        cluster.database_files = [&self.data]
            .into_iter()
            .chain(self.tablespaces.iter().map(|(_, path)| path))
            .map(tree)
            .collect();
        cluster.log_files = vec![tree(&self.wal)];
        let mut configuration = Component::file_group("", "configuration");
        configuration.selectable_for_restore = true;
        configuration.files = self
            .configuration
            .iter()
            .filter(|path| !path.starts_with(&self.data))
            .filter_map(|path| {
                let name = path.file_name()?.to_string_lossy();
                Some(FileSet::new(path.parent()?.to_string_lossy(), name))
            })
            .collect();
        let has_configuration = !configuration.files.is_empty();
        let data = self.data.to_string_lossy();
        Metadata {
            version: self.version.clone(),
            source: Source::TransactedDb,
            restore_method: Some(restoring),
            // A running server's: one that finds them would take itself for running.
            excludes: vec![FileSet::new(&*data, "postmaster.*")],
            // Sorts and hashes of statements that will not go on.
            exclude_from_snapshot: vec![FileSet::tree(format!("{data}/base/pgsql_tmp"))],
            components: [Some(cluster), has_configuration.then_some(configuration)]
                .into_iter()
                .flatten()
                .collect(),
            ..Metadata::default()
        }
    }
}
