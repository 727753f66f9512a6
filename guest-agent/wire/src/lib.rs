//! Room to be filled by the next commits.
