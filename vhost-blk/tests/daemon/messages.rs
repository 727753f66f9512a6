//! What a front end may say while a ring runs, and what it is refused.
