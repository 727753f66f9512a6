//! Edits of the superblock's bytes behind their checksums.
#![no_main]
#[path = "../edited_volume.rs"]
mod edited_volume;
#[path = "../../tests/harness/mod.rs"]
mod harness;

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    edited_volume::run(edited_volume::Target::Superblock, input);
});
