//! What errors of QEMU's agent are read as.

use super::*;
use serde_json::json;

fn code(desc: &str) -> (ErrorCode, bool) {
    let error = json!({"class": "GenericError", "desc": desc});
    match refused("guest-fsfreeze-thaw", &error) {
        GuestError::Refused(error) => (error.code, error.retryable),
        GuestError::Link(_) | GuestError::BadAnswer { .. } | GuestError::VersionMismatch { .. } => {
            panic!("not a refusal")
        }
    }
}

#[test]
fn writes_that_could_not_be_held_are_a_broken_hold_whoever_vss_blames() {
    for desc in [
        "couldn't hold writes: fsfreeze is limited up to 10 seconds: ",
        "couldn't hold writes: fsfreeze is limited up to 10 seconds: unknown error (0x80042314)",
        // VSS_E_UNEXPECTED_PROVIDER_ERROR, after the provider's own time was up.
        "couldn't hold writes: fsfreeze is limited up to 10 seconds: (error 8004230f)",
        "failed to do snapshot set: (error: 0x80042314)",
    ] {
        assert_eq!(code(desc), (ErrorCode::HoldBroken, true), "{desc}");
    }
}

#[test]
fn other_failures_of_vss_keep_their_own_names() {
    let cases = [
        (
            "failed to do snapshot set: 0x800423F4",
            ErrorCode::WriterVeto,
            false,
        ),
        (
            "failed to do snapshot set: 0x800423f3",
            ErrorCode::WriterVeto,
            true,
        ),
        (
            "failed to gather writer status: (80042319)",
            ErrorCode::WriterNotResponding,
            true,
        ),
        (
            "failed to start snapshot set: 0x80042316",
            ErrorCode::SnapshotSetInProgress,
            true,
        ),
        (
            "failed to do snapshot set: 0x80042313",
            ErrorCode::FlushWritesTimeout,
            true,
        ),
        (
            "couldn't receive Frozen event from VSS provider: Unspecified error",
            ErrorCode::FlushWritesTimeout,
            true,
        ),
        (
            "DoSnapshotSet exited without Frozen event: Unspecified error",
            ErrorCode::FreezeFailed,
            true,
        ),
        (
            "unexpected error in VSS provider: ",
            ErrorCode::FreezeFailed,
            false,
        ),
        (
            "failed to add E:\\ to snapshot set: Incorrect function.",
            ErrorCode::FreezeFailed,
            false,
        ),
    ];
    for (desc, expected, retryable) in cases {
        assert_eq!(code(desc), (expected, retryable), "{desc}");
    }
    let GuestError::Refused(error) = refused(
        "guest-fsfreeze-freeze",
        &json!({"class": "GenericError", "desc": "failed to do snapshot set: 0x80042306"}),
    ) else {
        panic!("not a refusal");
    };
    assert!(error.message.contains("VSS_E_PROVIDER_VETO"), "{error}");
}

#[test]
fn a_hook_that_failed_in_a_linux_guest_is_a_veto() {
    let desc = "fsfreeze hook has failed with status 1";
    assert_eq!(code(desc), (ErrorCode::WriterVeto, false));
    let desc = "failed to freeze /mnt/a: Input/output error";
    assert_eq!(code(desc), (ErrorCode::FreezeFailed, false));
}

#[test]
fn what_is_not_recognised_is_no_promise_of_another_try() {
    assert_eq!(code("something else"), (ErrorCode::Internal, false));
    assert_eq!(code(""), (ErrorCode::Internal, false));
    let nothing = refused("guest-info", &json!(17));
    assert!(nothing.to_string().contains("guest-info"), "{nothing}");
}
