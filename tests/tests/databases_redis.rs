//! Redis in a real machine: copies taken under load have everything that was acknowledged.

use anyhow::Result;
use vmshadow_tests::harness::database::Kind;
use vmshadow_tests::harness::proof;

#[test]
fn copies_of_redis_with_an_append_only_file_have_everything_acknowledged() -> Result<()> {
    proof::of(Kind::Redis)
}

#[test]
fn copies_of_redis_with_dumps_alone_have_everything_acknowledged() -> Result<()> {
    proof::of(Kind::RedisDump)
}
