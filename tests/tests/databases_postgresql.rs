//! PostgreSQL in a real machine.

use anyhow::{Result, ensure};
use vmshadow_tests::harness::database::{self, Kind};
use vmshadow_tests::harness::disk::FileSystem;
use vmshadow_tests::harness::requires;
use vmshadow_tests::harness::vm::VmBuilder;

#[test]
fn what_was_committed_survives_a_power_cut() -> Result<()> {
    if !requires::machines() {
        return Ok(());
    }
    let directory = tempfile::tempdir()?;
    let disk = directory.path().join("disk.raw");
    database::copy(&Kind::Postgresql.empty_disk()?, &disk)?;
    let machine = || {
        VmBuilder::new("postgresql")
            .with_databases()
            .file("a", &disk)
            .mounted("/mnt/a", FileSystem::Ext4)
            .boot()
    };
    let vm = machine()?;
    Kind::Postgresql.run(&vm, "start", "/mnt/a")?;
    let make = "create table t (x int); insert into t values (42)";
    Kind::Postgresql.ask(&vm, make)?;
    vm.power_cut()?;
    let vm = machine()?;
    Kind::Postgresql.run(&vm, "start", "/mnt/a")?;
    let found = Kind::Postgresql.ask(&vm, "select x from t")?;
    ensure!(found == "42", "{found}");
    Kind::Postgresql.run(&vm, "check", "/mnt/a")?;
    Ok(())
}
