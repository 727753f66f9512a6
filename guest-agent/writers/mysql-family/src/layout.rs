//! Where a server's files lie.
//!
//! Made by the statements of each server, asked by the writer.

use std::path::{Path, PathBuf};

/// A server's files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// The server's.
    pub version: String,
    /// Data directory.
    pub data: PathBuf,
    /// Other directories that a copy must hold for the server to start from it.
    pub elsewhere: Vec<PathBuf>,
}

impl Layout {
    /// Of what a server tells: its data directory, other directories, and files, of which the directory counts. Most are relative to the
    /// data directory, and in it.
    #[must_use]
    pub fn new(
        version: String,
        data: String,
        directories: impl IntoIterator<Item = String>,
        files: impl IntoIterator<Item = String>,
    ) -> Self {
        let data = PathBuf::from(data);
        let parents = files.into_iter();
        let parents = parents.filter_map(|path| Path::new(&path).parent().map(Path::to_path_buf));
        let directories = directories.into_iter().map(PathBuf::from);
        let mut elsewhere: Vec<PathBuf> = directories
            .chain(parents)
            .map(|path| data.join(path))
            .filter(|path| !path.starts_with(&data))
            .collect();
        elsewhere.sort();
        elsewhere.dedup();
        Self {
            version,
            data,
            elsewhere,
        }
    }

    /// All of them.
    #[must_use]
    pub fn paths(&self) -> Vec<PathBuf> {
        [&self.data]
            .into_iter()
            .chain(&self.elsewhere)
            .cloned()
            .collect()
    }
}
