//! PostgreSQL in a real machine: copies taken under load recover to everything that was acknowledged, also those that are not of
//! one instant.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use vmshadow_tests::harness::database::Kind;
use vmshadow_tests::harness::disk::{self, FileSystem};
use vmshadow_tests::harness::load::Load;
use vmshadow_tests::harness::oracle::{self, Window};
use vmshadow_tests::harness::proof;
use vmshadow_tests::harness::requires;
use vmshadow_tests::harness::site::Site;
use vmshadow_tests::harness::vm::{Vm, VmBuilder};
use vmshadow_tests::harness::wait;

const POSTGRESQL: Kind = Kind::Postgresql;
/// Clients of the load.
const CLIENTS: usize = 3;

#[test]
fn copies_of_postgresql_under_load_recover_everything_acknowledged() -> Result<()> {
    proof::of(POSTGRESQL)
}

/// The cluster lies on disk `a`, a tablespace with the load's rows on `b`. A set has `a` alone; the tablespace is copied file by file
/// to `c` while the load writes to it, and a checkpoint behind that makes the copies useless to a server that knows nothing of
/// the bracket: it would begin there.
#[test]
fn disks_copied_at_different_times_recover_by_the_bracket() -> Result<()> {
    if !requires::machines() {
        return Ok(());
    }
    let disks = ["a", "b", "c"].map(|name| (name, FileSystem::Ext4));
    let site = Site::start_in_databases_guest("bracket", &disks)?;
    start_with_tablespace(&site)?;
    start_writer(&site, "")?;
    let refused = site.try_create(&["--disk", "a"])?;
    site.was_refused(&refused, &["WRITER_VETO"])?;
    ensure!(
        refused
            .document
            .to_string()
            .contains("INCONSISTENTSNAPSHOT"),
        "{refused:#?}"
    );
    end_writer(&site)?;
    start_writer(&site, "--online-backup split")?;

    let load = Load::start_clients(&site.vm, POSTGRESQL.name(), CLIENTS)?;
    load.wait_for_more(20 * CLIENTS)?;
    let mut create = site
        .bridge
        .start(&["create", "--disk", "a"], Some("prepared"))?;
    create.wait_stopped()?;
    site.vm.shell("cp -a /mnt/b/space /mnt/c/")?;
    load.wait_for_more(20 * CLIENTS)?;
    POSTGRESQL.ask(&site.vm, "CHECKPOINT")?;
    let asked_us = site.vm.guest()?.boottime_us()?;
    create.go_on()?;
    let set = create.wait(Duration::from_secs(120))?.succeeded()?;
    let window = Window {
        asked_us,
        // /proc/uptime is cut to hundredths.
        answered_us: site.vm.guest()?.boottime_us()? + 10_000,
        // The recovery ends behind the hold.
        hold_ms: 0,
    };
    ensure!(set.at("/level-reached")? == "application", "{set:#?}");
    load.wait_for_more(20 * CLIENTS)?;
    let acks = load.stop(&site.vm)?;
    // What an archive would have.
    POSTGRESQL.ask(&site.vm, "SELECT pg_switch_wal()")?;
    site.vm.shell(
        "mkdir /mnt/c/wal && cp -a /mnt/a/postgresql/pg_wal/0* /mnt/c/wal/ && umount /mnt/c",
    )?;

    let cluster = read(&site, &set.document)?;
    let archive = &site.disks.get(2).context("no c")?.base;
    let labels = set.at("/writers/0/post/components/0/metadata")?;
    let second = restore(&cluster, archive, labels)?;
    // Later than the position at the freeze: the backup ended behind the thaw.
    let end = json!({"lsn": labels["stop_lsn"]});
    let found = POSTGRESQL.judge(&site.vm, &second, "/mnt/cluster", &end, CLIENTS)?;
    for (client, found) in found.iter().enumerate() {
        oracle::compare(found, client, &acks, &window)
            .with_context(|| format!("client {client}: {found:?}, {window:?}, {labels}"))?;
    }
    second.power_cut()
}

fn start_with_tablespace(site: &Site) -> Result<()> {
    POSTGRESQL.run(&site.vm, "make", "/mnt/a")?;
    POSTGRESQL.run(&site.vm, "start", "/mnt/a")?;
    site.vm.shell(
        "mkdir /mnt/b/space && chown postgres:postgres /mnt/b/space && chmod 700 /mnt/b/space",
    )?;
    for words in [
        // Instead of an archive.
        "ALTER SYSTEM SET wal_keep_size = 80",
        "SELECT pg_reload_conf()",
        // Rows and what they must agree with lie on two disks.
        "CREATE TABLE latest (client INT PRIMARY KEY, id BIGINT)",
        "CREATE TABLESPACE space LOCATION \\$\\$/mnt/b/space\\$\\$",
        "ALTER ROLE postgres SET default_tablespace = space",
    ] {
        POSTGRESQL.ask(&site.vm, words)?;
    }
    Ok(())
}

fn start_writer(site: &Site, options: &str) -> Result<()> {
    let command =
        format!("postgresql-writer --connection 'host=/run/postgresql user=postgres' {options}");
    let command = format!("su -s /bin/sh -c \"exec {command}\" postgres");
    site.writer(&command, POSTGRESQL.writer())
}

fn end_writer(site: &Site) -> Result<()> {
    site.vm.shell("killall -9 postgresql-writer")?;
    wait::until("the writer to be gone", wait::STEP, || {
        let writers = site.bridge.run(&["list", "writers"])?.succeeded()?;
        let is_gone = !writers.document.to_string().contains(POSTGRESQL.writer());
        Ok(is_gone.then_some(()))
    })
}

/// The set's one copy, in a file.
fn read(site: &Site, set: &Value) -> Result<PathBuf> {
    let snapshot = set.pointer("/copies/0/snapshot").and_then(Value::as_str);
    let file = site.directory().join("cluster.raw");
    let output = file.to_str().context("path")?;
    site.bridge
        .run(&["read", snapshot.context("no copy")?, "--output", output])?
        .succeeded()?;
    Ok(file)
}

/// A second machine in which the cluster is ready to be recovered as far as the backup needs it, from the log in the archive.
fn restore(cluster: &Path, archive: &Path, labels: &Value) -> Result<Vm> {
    let mut second = VmBuilder::new("second").with_databases();
    for (name, file) in [("cluster", cluster), ("archive", archive)] {
        disk::run("e2fsck", &["-fn"], file)?;
        second = second
            .file(name, file)
            .mounted(&format!("/mnt/{name}"), FileSystem::Ext4);
    }
    let second = second.boot()?;
    let label = labels["backup_label"].as_str().context("no label")?;
    ensure!(label.contains("LABEL: vmshadow"), "{label}");
    let map = labels["tablespace_map"].as_str().context("no map")?;
    // It lies elsewhere now.
    let moved = map.replace("/mnt/b/space", "/mnt/archive/space");
    ensure!(moved != map, "{map}");
    let settings = "restore_command = 'cp /mnt/archive/wal/%f %p'\nrecovery_target = 'immediate'\n\
                    recovery_target_action = 'promote'\nhot_standby = off\n";
    let mut words =
        "set -e\ncd /mnt/cluster/postgresql\nrm -f postmaster.pid\ntouch recovery.signal\n"
            .to_owned();
    for (file, text) in [
        ("backup_label", label),
        ("tablespace_map", moved.as_str()),
        ("postgresql.auto.conf", settings),
    ] {
        words += &format!("cat >>{file} <<'END'\n{text}END\n");
    }
    second.shell(&format!("{words}chown postgres:postgres *"))?;
    Ok(second)
}
