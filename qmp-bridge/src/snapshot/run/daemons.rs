//! The vhost-blk daemons of a set: one command to all at once.
//!
//! Called by the rooms of `run`.

use super::super::document::Copy;
use super::super::plan::{DaemonVolumes, Plan};
use super::super::witness::DaemonCommit;
use super::failure::{Failure, internal, storage_failure};
use crate::storage::StorageClient;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinSet;
use vhost_blk_wire::command::{Command as StorageCommand, ExemptRanges};
use vhost_blk_wire::types::ByteRange;

/// The answers of all daemons, in their order.
type Answers<T> = Pin<Box<dyn Future<Output = Result<Vec<T>, Failure>> + Send>>;

/// A daemon and its part of the set.
pub(super) struct Daemon {
    pub(super) client: Arc<StorageClient>,
    pub(super) part: DaemonVolumes,
}

/// Runs a command at all daemons at once; the answers in the order of the daemons.
pub(super) fn all<C>(
    daemons: &[Daemon],
    limit: Duration,
    command: impl Fn(&DaemonVolumes) -> C,
) -> Answers<C::Return>
where
    C: StorageCommand + Send + Sync + 'static,
    C::Return: Send + 'static,
{
    let calls: Vec<(Arc<StorageClient>, C)> = daemons
        .iter()
        .map(|daemon| (Arc::clone(&daemon.client), command(&daemon.part)))
        .collect();
    Box::pin(async move {
        let mut running = JoinSet::new();
        for (index, (client, command)) in calls.into_iter().enumerate() {
            running.spawn(async move { (index, client.call(&command, limit).await) });
        }
        let mut answers = Vec::new();
        while let Some(joined) = running.join_next().await {
            let (index, result) = joined.map_err(|error| internal(&error.to_string()))?;
            answers.push((index, result.map_err(|error| storage_failure(&error))?));
        }
        answers.sort_by_key(|(index, _)| *index);
        Ok(answers.into_iter().map(|(_, answer)| answer).collect())
    })
}

/// The guest's unwatched areas on the volumes of one daemon.
pub(super) fn exempt_of(
    part: &DaemonVolumes,
    exempt: &[guest_agent_wire::types::DiskExtent],
) -> Vec<ExemptRanges> {
    part.volumes
        .iter()
        .filter_map(|volume| {
            let ranges: Vec<ByteRange> = exempt
                .iter()
                .filter(|extent| extent.serial == volume.serial && !extent.serial.is_empty())
                .map(|extent| ByteRange {
                    offset_bytes: extent.start_bytes,
                    length_bytes: extent.length_bytes,
                })
                .collect();
            (!ranges.is_empty()).then(|| ExemptRanges {
                volume: volume.volume.clone(),
                ranges,
            })
        })
        .collect()
}

pub(super) fn copies(plan: &Plan, commits: &[DaemonCommit]) -> Vec<Copy> {
    let mut copies = Vec::new();
    for (part, commit) in plan.parts.iter().zip(commits) {
        for committed in &commit.committed.volumes {
            let snapshot = &committed.snapshot;
            let Some(volume) = part.volumes.iter().find(|v| v.volume == snapshot.volume) else {
                continue;
            };
            copies.push(Copy {
                volume: snapshot.volume.clone(),
                volume_id: volume.id,
                serial: volume.serial.clone(),
                snapshot: snapshot.snapshot,
                control: part.control.clone(),
                size_bytes: snapshot.size_bytes,
                method: snapshot.method,
                created_unix_ms: snapshot.created_unix_ms,
                read_with: format!("vmshadow read {} --output FILE", snapshot.snapshot),
                left_out_bytes: 0,
            });
        }
    }
    copies
}
