//! MySQL in a real machine: copies taken under load recover to everything that was acknowledged. Skipped aloud where Debian's unstable, which has it,
//! could not be had.

use anyhow::Result;
use vmshadow_tests::harness::database::Kind;
use vmshadow_tests::harness::{image, proof};

#[test]
fn copies_of_mysql_under_load_recover_everything_acknowledged() -> Result<()> {
    if !image::has_mysql()? {
        eprintln!("SKIPPED: no MySQL in target/mysql (`images/build.sh mysql`)");
        return Ok(());
    }
    proof::of(Kind::Mysql)
}
