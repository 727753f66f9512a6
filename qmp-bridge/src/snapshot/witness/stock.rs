//! What the witnesses say where QEMU's own agent froze the guest. Pure.
//!
//! Called by `witness`. The agent answers a number to `freeze` and a number to `thaw`, no more; COORDINATION.md 3.2 argues what
//! follows from them. Invariant: what only our agent could have said is not taken as said.

use super::{Observations, Testimony, Witnesses, check_host_times, hear_counts};
use crate::guest::{StockGuest, StockSystem, VssWriter};
use std::collections::BTreeSet;

/// Types that have nothing to freeze, so that the agent does not count them.
const READ_ONLY_TYPES: [&str; 5] = ["squashfs", "erofs", "iso9660", "cramfs", "CDFS"];
/// What VSS snapshots.
const VSS_TYPES: [&str; 3] = ["NTFS", "ReFS", "CSVFS"];

pub(super) fn hear(said: &Observations<'_>, stock: &StockGuest) -> Witnesses {
    let (objections, mut supports) = hear_counts(said);
    if stock.system == StockSystem::Unix {
        supports.push("the guest named no area that is not watched (swap is watched)".to_owned());
    }
    Witnesses {
        filesystems: hear_filesystems(said, stock),
        writers: hear_writers(said, stock),
        time: hear_time(said, stock),
        host: Testimony::from_objections(objections, supports),
    }
}

fn hear_filesystems(said: &Observations<'_>, stock: &StockGuest) -> Testimony {
    let mut objections = Vec::new();
    let mut supports = Vec::new();
    let (Some(frozen), Some(thawed)) = (stock.frozen, stock.thawed) else {
        let why = said.thaw_failure.unwrap_or("the agent did not say");
        return Testimony::from_objections(vec![format!("thaw: {why}")], supports);
    };
    if frozen == 0 {
        objections.push("no file system was frozen".to_owned());
    }
    if frozen != thawed {
        objections.push(format!("{frozen} were frozen, {thawed} were thawed"));
    }
    let expected: BTreeSet<&str> = stock
        .filesystems
        .iter()
        .filter(|f| !said.left_out.contains(&f.mountpoint))
        .filter(|f| match stock.system {
            StockSystem::Unix => !READ_ONLY_TYPES.contains(&f.fstype.as_str()),
            StockSystem::Windows => VSS_TYPES.contains(&f.fstype.as_str()),
        })
        .map(|f| f.name.as_str())
        .collect();
    let list = || {
        let all = stock.filesystems.iter();
        let all = all.map(|f| format!("{} ({})", f.mountpoint, f.fstype));
        all.collect::<Vec<_>>().join(", ")
    };
    let count = u64::try_from(expected.len()).unwrap_or(u64::MAX);
    match stock.system {
        StockSystem::Unix if frozen == count => supports.push(format!(
            "qemu-ga: {frozen} frozen and thawed, which are all that it lists: {}",
            list()
        )),
        StockSystem::Unix => objections.push(format!(
            "qemu-ga: {frozen} frozen, but it lists {count}: {}; which of them were not, it does not say",
            list()
        )),
        // VSS takes every fixed volume or fails, those without a letter, too, which may not be in the list.
        StockSystem::Windows if frozen >= count => supports.push(format!(
            "qemu-ga: VSS held {frozen} volumes until the thaw; it lists {}",
            list()
        )),
        StockSystem::Windows => objections.push(format!(
            "qemu-ga: VSS held {frozen} volumes, but {count} of those listed can be held: {}",
            list()
        )),
    }
    for point in said.left_out {
        supports.push(format!("{point}: left out by request"));
    }
    Testimony::from_objections(objections, supports)
}

fn hear_writers(said: &Observations<'_>, stock: &StockGuest) -> Testimony {
    if stock.system == StockSystem::Unix {
        return Testimony::not_heard(
            "QEMU's agent knows no writers here; whether a hook ran, it does not say",
        );
    }
    if let Some(why) = said.thaw_failure {
        return Testimony::from_objections(vec![format!("VSS: {why}")], Vec::new());
    }
    let Some(writers) = &stock.vss_writers else {
        let why = stock.vss_writers_not_heard.as_deref();
        return Testimony::not_heard(&format!(
            "VSS's writers took part, but what they said is not known: {}",
            why.unwrap_or("nobody asked")
        ));
    };
    let mut objections = Vec::new();
    let mut supports = Vec::new();
    for writer in writers {
        let line = format!(
            "{}: {} ({})",
            writer.name,
            writer.state_name(),
            writer.last_error
        );
        if VssWriter::took_part(writer) {
            supports.push(line);
        } else {
            objections.push(line);
        }
    }
    Testimony::from_objections(objections, supports)
}

fn hear_time(said: &Observations<'_>, stock: &StockGuest) -> Testimony {
    let (mut objections, mut supports) = check_host_times(said);
    match (stock.system, said.thaw_failure) {
        (_, Some(why)) => objections.push(format!("guest: {why}")),
        (StockSystem::Windows, None) => {
            supports.push("guest: VSS's own 10 s did not run out before the thaw".to_owned());
        }
        (StockSystem::Unix, None) => supports.push(
            "guest: its clock is not heard and it keeps no limit; the host's hold counts from the sending of the freeze"
                .to_owned(),
        ),
    }
    Testimony::from_objections(objections, supports)
}
