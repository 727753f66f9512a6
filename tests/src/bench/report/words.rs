//! Lines in words: numbers, whether a goal was reached, columns.
//!
//! `report` makes its tables of them. It decides nothing.

use super::line::{Goal, Line};
use crate::bench::statistics::Spread;

/// `>= 1.5x QSD raw: 1.92 [1.85 to 2.01], met`.
pub(super) fn reached(line: &Line) -> Option<String> {
    let goal = line.goal?;
    let peer = line.peer.as_ref().map_or("", |peer| peer.0.as_str());
    let reached = match goal {
        Goal::RatioAtLeast(_) | Goal::RatioAtMost(_) => line.ratio.map(|ratio| {
            let median = telling(goal, ratio.median, format!("{:.2}", ratio.median));
            format!("{median} [{:.2} to {:.2}]", ratio.low, ratio.high)
        }),
        Goal::AtLeast(_) | Goal::AtMost(_) => Some(with_spread(&line.ours)),
    };
    let verdict = match (line.met(), &line.limit) {
        (Some(true), _) => "met".to_owned(),
        (Some(false), Some(limit)) if line.is_beyond() => format!(
            "beyond {}: that is {:.2}x, ours {:.2}x of it",
            limit.by, limit.ratio, limit.reached
        ),
        (Some(false), _) => "NOT MET".to_owned(),
        (None, _) => "not known".to_owned(),
    };
    let mut text = goal.text();
    if !peer.is_empty() {
        text += &format!(" {peer}");
    }
    Some(format!(
        "{text}: {}, {verdict}",
        reached.unwrap_or_else(|| "-".to_owned())
    ))
}

/// The short form of a value, unless that is on the other side of its goal than the value: then as many digits as tell.
pub(super) fn telling(goal: Goal, value: f64, short: String) -> String {
    let met = |value| goal.met(value, Some(value));
    let tells = |text: &String| {
        text.parse()
            .is_ok_and(|shown: f64| met(shown) == met(value))
    };
    if tells(&short) {
        return short;
    }
    let longer = (3..9).map(|digits| format!("{value:.digits$}"));
    longer.into_iter().find(tells).unwrap_or(short)
}

pub(super) fn with_spread(spread: &Spread) -> String {
    let around = (spread.high - spread.low) / 2.0 / spread.median * 100.0;
    if spread.rounds < 2 || spread.high <= 0.0 {
        return number(spread.median);
    }
    if around.is_finite() && around < 100.0 {
        return format!("{} +-{around:.0}%", number(spread.median));
    }
    // Something that happens in some rounds only.
    format!(
        "{} [{} to {}]",
        number(spread.median),
        number(spread.low),
        number(spread.high)
    )
}

/// Three digits, whole numbers as they are, thousands as `k`, millions as `M`.
#[must_use]
pub fn number(value: f64) -> String {
    let (scaled, suffix) = match value.abs() {
        size if size >= 1e6 => (value / 1e6, "M"),
        size if size >= 1e4 => (value / 1e3, "k"),
        _ => (value, ""),
    };
    let digits = match scaled.abs() {
        size if size >= 100.0 || (suffix.is_empty() && size.fract() == 0.0) => 0,
        size if size >= 10.0 => 1,
        _ => 2,
    };
    format!("{scaled:.digits$}{suffix}")
}

/// A table in Markdown whose columns also stand below each other as plain text.
pub(super) fn aligned(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        let lengths = rows
            .iter()
            .filter_map(|row| row.get(column))
            .map(|cell| cell.chars().count());
        lengths.max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for (number, row) in rows.iter().enumerate() {
        let cells = row
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:width$}"));
        text += &format!("| {} |\n", cells.collect::<Vec<_>>().join(" | "));
        if number == 0 {
            let rules = widths.iter().map(|width| "-".repeat(width + 2));
            text += &format!("|{}|\n", rules.collect::<Vec<_>>().join("|"));
        }
    }
    text
}
