//! etcd in a real machine: copies taken under load have everything that was acknowledged.

use anyhow::Result;
use vmshadow_tests::harness::database::Kind;
use vmshadow_tests::harness::proof;

#[test]
fn copies_of_etcd_have_everything_acknowledged() -> Result<()> {
    proof::of(Kind::Etcd)
}
