//! MariaDB in a real machine: copies taken under load recover to everything that was acknowledged.

use anyhow::Result;
use vmshadow_tests::harness::database::Kind;
use vmshadow_tests::harness::proof;

#[test]
fn copies_of_mariadb_under_load_recover_everything_acknowledged() -> Result<()> {
    proof::of(Kind::Mariadb)
}
