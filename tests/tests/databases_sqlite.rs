//! SQLite in a real machine: copies of two databases on two disks, taken under load, have everything acknowledged and are of one
//! instant.

use anyhow::Result;
use vmshadow_tests::harness::proof;

#[test]
fn copies_of_sqlite_under_load_have_everything_acknowledged() -> Result<()> {
    proof::of_sqlite()
}
