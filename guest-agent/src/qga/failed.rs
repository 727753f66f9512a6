//! Why a command was not done, in the classes and words of QEMU's agent, which clients know.
//!
//! Made by every family of commands, shown by `command`.

use std::io;

/// A refusal or a failure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Failed {
    /// QEMU's error class: `GenericError` or `CommandNotFound`.
    pub(super) class: &'static str,
    /// For people.
    pub(super) desc: String,
}

/// What a command answers: the value of `return`, or why there is none.
pub(super) type Outcome = Result<serde_json::Value, Failed>;

impl Failed {
    /// It was tried.
    pub(super) fn generic(desc: impl Into<String>) -> Self {
        Self {
            class: "GenericError",
            desc: desc.into(),
        }
    }

    /// There is no such command, or not now, or not for this client; libvirt calls both "unsupported".
    pub(super) fn command_not_found(desc: String) -> Self {
        Self {
            class: "CommandNotFound",
            desc,
        }
    }

    /// `what`, a colon, and the kernel's reason.
    pub(super) fn because(what: impl std::fmt::Display, error: &io::Error) -> Self {
        Self::generic(format!("{what}: {}", reason(error)))
    }

    /// QEMU's words for what this guest cannot do at all.
    pub(super) fn unsupported() -> Self {
        Self::generic("this feature or command is not currently supported")
    }
}

/// As strerror(3) says it: Rust adds the number.
pub(super) fn reason(error: &io::Error) -> String {
    let text = error.to_string();
    match text.rfind(" (os error ") {
        Some(at) => text.get(..at).unwrap_or(&text).to_owned(),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    //! Reasons read as the C library's.
    use super::*;

    #[test]
    fn a_reason_carries_no_number() {
        let error = io::Error::from_raw_os_error(2);
        assert_eq!(
            Failed::because("failed to open", &error).desc,
            "failed to open: No such file or directory"
        );
        assert_eq!(reason(&io::Error::other("plain")), "plain");
    }
}
