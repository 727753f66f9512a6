//! In which order a guest's file systems freeze and thaw, by its kernel's own account, and what a set is called that covers one
//! which cannot freeze.
//!
//! Called by the scenario.

use anyhow::{Result, ensure};
use vmshadow_tests::harness::site::Site;

use super::nothing_is_frozen;

/// A file system in a file on disk `b`, and a note of the kernel's for each freeze and thaw: with the device's number when it begins
/// (in `struct super_block` it stands behind two pointers), with the result when it ends.
const SETUP: &str = r#"set -e
truncate -s 32M /mnt/b/inner
mkfs.ext4 -q /mnt/b/inner
mkdir /mnt/inner
mount -o loop /mnt/b/inner /mnt/inner
cd /sys/kernel/tracing
[ -e kprobe_events ] || mount -t tracefs tracefs .
cd /sys/kernel/tracing
echo 'p:freeze freeze_super device=+16(%di):u32' >kprobe_events
echo 'r:frozen freeze_super result=$retval:s32' >>kprobe_events
echo 'p:thaw thaw_super device=+16(%di):u32' >>kprobe_events
echo 'r:thawed thaw_super result=$retval:s32' >>kprobe_events
echo 1 >events/kprobes/enable"#;

/// `freeze MAJOR:MINOR`, `frozen RESULT` and so on.
const TOLD: &str = r#"awk 'match($0, / (freeze|frozen|thaw|thawed): /) {
    what = substr($0, RSTART + 1, RLENGTH - 3)
    number = $0; sub(/.*=/, "", number)
    print what, (what ~ /n$|d$/) ? number : int(number / 1048576) ":" number % 1048576
}' /sys/kernel/tracing/trace"#;

/// Disk `b` gets a FAT of 4 MiB, by hand: no program of the guest's makes one. In front the sector that describes it, then its only table.
const FAT: &str = r#"set -e
disk=$(findmnt -no SOURCE /mnt/b)
umount /mnt/inner /mnt/b
{
    printf '\353\074\220VMSHADOW\000\002\004\001\000\001\000\002\000\040\370\010\000'
    head -c 488 /dev/zero
    printf '\370\377\377'
    head -c 65536 /dev/zero
} >$disk
mount -t vfat $disk /mnt/b"#;

/// What lies in a file before what the file lies on, `/` behind its equals, and back.
pub(crate) fn freeze_in_order(site: &Site) -> Result<()> {
    site.vm.shell(SETUP)?;
    let set = site.create(&[])?;
    let told = site.vm.shell(TOLD)?;
    let mut told: Vec<String> = told.lines().map(str::to_owned).collect();
    for point in ["/", "/mnt/a", "/mnt/b", "/mnt/inner"] {
        let number = site.vm.shell(&format!("mountpoint -d {point}"))?;
        for line in &mut told {
            if let Some(what) = line.strip_suffix(&format!(" {}", number.trim())) {
                *line = format!("{what} {point}");
            }
        }
    }
    // These two freeze, and thaw, at the same time.
    for together in [2..6, 10..14] {
        if let Some(lines) = told.get_mut(together) {
            lines.sort();
        }
    }
    let expected = [
        "freeze /mnt/inner",
        "frozen 0",
        "freeze /mnt/a",
        "freeze /mnt/b",
        "frozen 0",
        "frozen 0",
        "freeze /",
        "frozen 0",
        "thaw /",
        "thawed 0",
        "thaw /mnt/a",
        "thaw /mnt/b",
        "thawed 0",
        "thawed 0",
        "thaw /mnt/inner",
        "thawed 0",
    ];
    ensure!(told == expected, "{told:#?}\n{:#?}", set.answer);
    nothing_is_frozen(site)
}

/// A set of its disk is no better than a crash, and says why; without its disk it is what it was.
pub(crate) fn without_a_freeze_are_told(site: &Site) -> Result<()> {
    site.vm.shell(FAT)?;
    let refused = site.try_create(&[])?;
    site.was_refused(&refused, &["HOLD_BROKEN"])?;
    let why = refused.at("/reason/message")?.to_string();
    ensure!(why.contains("vfat has no freeze operation"), "{why}");
    let set = site.try_create(&["--best-effort"])?.succeeded()?;
    for answer in [&refused, &set] {
        ensure!(answer.at("/level-reached")? == "crash", "{answer:#?}");
        let witness = answer.at("/witnesses/filesystems")?;
        let evidence = witness["evidence"].to_string();
        ensure!(
            witness["value"] == "disagrees" && evidence.contains("/mnt/b: not frozen (errno 95)"),
            "{answer:#?}"
        );
        // The others were held all the same.
        for point in ["/", "/mnt/a"] {
            let held = format!("\"{point}: FIFREEZE 0, FITHAW 0\"");
            ensure!(evidence.contains(&held), "{answer:#?}");
        }
    }
    site.create(&["--exclude-disk", "b"])?;
    nothing_is_frozen(site)
}
