//! A guest's words made safe to show: on a terminal, in a table, in a log.
//!
//! Called by `cli`, `daemon` and `snapshot::undo` where text leaves the bridge. Names, veto messages and mount points are chosen in
//! the guest, and a terminal obeys what it is shown. Documents keep the exact text; only what is shown is changed. Invariant:
//! nothing that comes out moves a cursor, begins a line of its own or hides or reorders what stands beside it.

use std::fmt::Write as _;

/// Longest text in one place; what is left out is counted.
const CHARACTERS_MAX: usize = 2_000;

/// On one line; what must not be shown is written as `\n`, `\u{1b}`.
pub(crate) fn plain(text: &str) -> String {
    let mut shown = String::with_capacity(text.len().min(CHARACTERS_MAX));
    for (count, character) in text.chars().enumerate() {
        if count == CHARACTERS_MAX {
            let left = text.chars().count() - count;
            write!(shown, ".. ({left} more)").unwrap_or(());
            break;
        }
        if is_hidden(character) {
            shown.extend(character.escape_default());
        } else {
            shown.push(character);
        }
    }
    shown
}

/// The same for text that may have several lines: later ones are moved in, so that none looks like one of ours.
pub(crate) fn lines(text: &str) -> String {
    let lines: Vec<String> = text.trim_end().lines().map(plain).collect();
    lines.join("\n    ")
}

/// The same for JSON, whose own escapes lose nothing. They can only stand in strings, since JSON has no such character
/// elsewhere but the line ends and blanks of its own.
pub(crate) fn json(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for character in text.chars() {
        if is_hidden(character) && !matches!(character, '\n' | '\r' | '\t') {
            // All of them are in the basic plane.
            write!(shown, "\\u{:04x}", u32::from(character)).unwrap_or(());
        } else {
            shown.push(character);
        }
    }
    shown
}

/// Control characters (C0, DEL, C1), line separators, and what reorders or hides (Unicode's bidirectional controls, zero-width).
fn is_hidden(character: char) -> bool {
    character.is_control()
        || matches!(character,
            '\u{061c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

#[cfg(test)]
mod tests {
    //! What a hostile guest would like to show.
    use super::*;

    /// Clears a screen, sets a title by C1, goes back a line, writes from right to left, forges a line.
    const HOSTILE: &str =
        "db\u{1b}[2J\u{9d}0;x\u{9c}\r\u{8}\u{202e}gpj\u{2066}\u{7f}\nset 1 kept\u{2028}z";

    #[test]
    fn nothing_that_a_terminal_obeys_is_shown() {
        for shown in [
            plain(HOSTILE),
            lines(HOSTILE).replace("\n    ", ""),
            json(HOSTILE).replace(['\n', '\r'], ""),
        ] {
            assert!(!shown.chars().any(is_hidden), "{shown:?}");
        }
        assert_eq!(plain("a\u{1b}[2J\n"), "a\\u{1b}[2J\\n");
        assert_eq!(plain("größe 5 µs – 日本"), "größe 5 µs – 日本");
    }

    #[test]
    fn a_forged_line_is_seen_to_be_one() {
        assert_eq!(lines("no\nset 1 kept\n"), "no\n    set 1 kept");
        assert!(!plain(HOSTILE).contains('\n'));
    }

    #[test]
    fn json_is_the_same_json() {
        let text = serde_json::to_string_pretty(&serde_json::json!({"name": HOSTILE})).unwrap();
        let shown = json(&text);
        assert_ne!(shown, text);
        let read = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
        assert_eq!(read(&shown), read(&text));
    }

    #[test]
    fn a_text_without_end_is_cut() {
        let shown = plain(&"x".repeat(1_000_000));
        assert!(shown.len() < CHARACTERS_MAX + 30 && shown.ends_with("(998000 more)"));
    }
}
