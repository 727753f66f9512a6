//! Placeholder entry point; the room is filled by the next commits.
fn main() {}
