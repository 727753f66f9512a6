//! Which commands the guest's owner lets the host use: `--block-rpcs` and `--allow-rpcs`, as QEMU's agent calls them.
//!
//! Made by `agent` from the command line, asked by `command`.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::str::FromStr;

/// Command names, separated by commas.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Names(BTreeSet<String>);

impl FromStr for Names {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        let names = text.split(',').map(str::trim);
        Ok(Self(
            names
                .filter(|name| !name.is_empty())
                .map(str::to_owned)
                .collect(),
        ))
    }
}

/// What is blocked is blocked even if it is allowed.
#[derive(Clone, Debug, Default)]
pub struct Policy {
    block: Names,
    allow: Option<Names>,
}

impl Policy {
    /// All but `block`; only `allow` of these, if it is given.
    #[must_use]
    pub fn new(block: Names, allow: Option<Names>) -> Self {
        Self { block, allow }
    }

    /// The host may use this command.
    #[must_use]
    pub fn allows(&self, name: &str) -> bool {
        let allowed = self
            .allow
            .as_ref()
            .is_none_or(|names| names.0.contains(name));
        allowed && !self.block.0.contains(name)
    }

    /// Names that `exists` does not know: a misspelt one would leave open what its author meant to close.
    pub fn unknown(&self, exists: impl Fn(&str) -> bool) -> Vec<&str> {
        let allow = self.allow.iter().flat_map(|names| &names.0);
        let all = self.block.0.iter().chain(allow).map(String::as_str);
        all.filter(|name| !exists(name)).collect()
    }
}

#[cfg(test)]
mod tests {
    //! Lists, and what comes of them.
    use super::*;

    #[test]
    fn what_is_blocked_or_not_allowed_is_closed() {
        let names = |text: &str| -> Names { text.parse().unwrap_or_default() };
        let all = Policy::default();
        assert!(all.allows("guest-exec"));
        let blocking = Policy::new(names("guest-exec, guest-file-open"), None);
        assert!(!blocking.allows("guest-exec") && !blocking.allows("guest-file-open"));
        assert!(blocking.allows("guest-ping"));
        let narrow = Policy::new(names("guest-info"), Some(names("guest-ping,guest-info")));
        assert!(narrow.allows("guest-ping"));
        assert!(!narrow.allows("guest-info") && !narrow.allows("guest-exec"));
        assert_eq!(
            narrow.unknown(|name| name != "guest-info"),
            ["guest-info", "guest-info"]
        );
    }
}
