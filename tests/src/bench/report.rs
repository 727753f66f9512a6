//! What came out: lines that compare us with a peer, tables for people, `report.json` for programs.
//!
//! Called by the figures, which add lines, and by the command, which prints and writes them. A line is one quantity of one workload beside one
//! peer (or beside none). `contest` adds the lines of everything that `rounds` measured of a workload; `compare`
//! and `value` add single ones; `limit` says what the file itself allows.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::Result;
use serde_json::{Value, json};

use super::rounds::Measured;
use super::statistics::{Spread, ratio, spread};

/// What was measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quantity {
    /// Reads or writes per second.
    Rate,
    /// 99th percentile of the latency.
    LatencyP99,
    /// The backend's processor time per read or write.
    Processor,
    /// The backend's system calls per read or write.
    SystemCalls,
    /// The backend's sync calls per read or write.
    Syncs,
    /// The backend's sync calls per flush of the guest.
    SyncsPerFlush,
    /// Bytes that reached the device per read or write.
    Written,
    /// Bytes that were read from the device per read or write.
    BytesRead,
    /// Bytes that were written before the round to make ready for it and behind it, per read or write of the round.
    Prepared,
}

impl Quantity {
    /// The unit, as tables and the report name it.
    #[must_use]
    pub fn unit(self) -> &'static str {
        match self {
            Self::Rate => "IOPS",
            Self::LatencyP99 => "p99 us",
            Self::Processor => "CPU us per I/O",
            Self::SystemCalls => "system calls per I/O",
            Self::Syncs => "sync calls per I/O",
            Self::SyncsPerFlush => "sync calls per flush",
            Self::Written => "bytes written per I/O",
            Self::BytesRead => "bytes read per I/O",
            Self::Prepared => "bytes ahead and behind per I/O",
        }
    }

    fn values(self, measured: &Measured) -> Vec<f64> {
        match self {
            Self::Rate => measured.values(|turn| turn.per_second),
            Self::LatencyP99 => measured.values(|turn| turn.latency_p99_us),
            Self::Processor => measured.costs(|turn| turn.processor_us),
            Self::SystemCalls => measured.system_calls.into_iter().collect(),
            Self::Syncs => measured.syncs.into_iter().collect(),
            Self::SyncsPerFlush => measured.syncs_per_flush.into_iter().collect(),
            Self::Written => measured.costs(|turn| turn.written_bytes),
            Self::BytesRead => measured.costs(|turn| turn.read_bytes),
            Self::Prepared => measured.costs(|turn| turn.prepared_bytes),
        }
    }
}

/// All, in the order of the tables.
const QUANTITIES: &[Quantity] = &[
    Quantity::Rate,
    Quantity::LatencyP99,
    Quantity::Processor,
    Quantity::SystemCalls,
    Quantity::Syncs,
    Quantity::SyncsPerFlush,
    Quantity::Written,
    Quantity::BytesRead,
    Quantity::Prepared,
];

/// What a line should reach.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Goal {
    /// Ours by the peer's is at least so much.
    RatioAtLeast(f64),
    /// Ours by the peer's is at most so much.
    RatioAtMost(f64),
    /// Ours is at least so much.
    AtLeast(f64),
    /// Ours is at most so much.
    AtMost(f64),
}

impl Goal {
    fn text(self) -> String {
        match self {
            Self::RatioAtLeast(bound) => format!(">= {bound}x"),
            Self::RatioAtMost(bound) => format!("<= {bound}x"),
            Self::AtLeast(bound) => format!(">= {}", number(bound)),
            Self::AtMost(bound) => format!("<= {}", number(bound)),
        }
    }

    fn met(self, ours: f64, ratio: Option<f64>) -> Option<bool> {
        match self {
            Self::RatioAtLeast(bound) => ratio.map(|ratio| ratio >= bound),
            Self::RatioAtMost(bound) => ratio.map(|ratio| ratio <= bound),
            Self::AtLeast(bound) => Some(ours >= bound),
            Self::AtMost(bound) => Some(ours <= bound),
        }
    }
}

/// What nobody can exceed in this run, beside a goal.
#[derive(Clone, Debug, PartialEq)]
pub struct Limit {
    /// What sets it: `fio`, or `fio and client` (see `plain`).
    pub by: String,
    /// It by the peer's: a goal above this is beyond the file.
    pub ratio: f64,
    /// Ours by it.
    pub reached: f64,
}

/// One quantity of one workload.
#[derive(Clone, Debug)]
pub struct Line {
    /// Figure, 1 to 9.
    pub figure: u8,
    /// The workload, with the place.
    pub workload: String,
    /// Unit of the values.
    pub unit: String,
    /// Ours.
    pub ours: Spread,
    /// The peer's name and values.
    pub peer: Option<(String, Spread)>,
    /// Ours by the peer's.
    pub ratio: Option<Spread>,
    /// What it should reach.
    pub goal: Option<Goal>,
    /// What the file itself allows, where that was measured beside it.
    pub limit: Option<Limit>,
}

impl Line {
    /// `None` without a goal.
    #[must_use]
    pub fn met(&self) -> Option<bool> {
        self.goal?
            .met(self.ours.median, self.ratio.map(|ratio| ratio.median))
    }

    /// Not met, and neither does what sets the limit reach the goal; nor does the peer, which reaches equality.
    #[must_use]
    pub fn is_beyond(&self) -> bool {
        let bound = match self.goal {
            Some(Goal::RatioAtLeast(bound)) => bound,
            Some(Goal::RatioAtMost(_) | Goal::AtLeast(_) | Goal::AtMost(_)) | None => return false,
        };
        let is_below = |limit: &Limit| limit.ratio.max(1.0) < bound;
        self.met() == Some(false) && self.limit.as_ref().is_some_and(is_below)
    }

    fn json(&self) -> Value {
        let range = |spread: &Spread| json!([spread.low, spread.high]);
        json!({
            "figure": self.figure,
            "workload": self.workload,
            "unit": self.unit,
            "ours": self.ours.median,
            "ours_spread": range(&self.ours),
            "peer": self.peer.as_ref().map(|peer| &peer.0),
            "peer_value": self.peer.as_ref().map(|peer| peer.1.median),
            "peer_spread": self.peer.as_ref().map(|peer| range(&peer.1)),
            "ratio": self.ratio.map(|ratio| ratio.median),
            "ratio_spread": self.ratio.as_ref().map(range),
            "rounds": self.ours.rounds,
            "goal": self.goal.map(Goal::text),
            "met": self.met(),
            "limit": self.limit.as_ref().map(|limit| {
                json!({"by": limit.by, "ratio": limit.ratio, "ours_by_limit": limit.reached})
            }),
        })
    }
}

/// Everything that was measured.
#[derive(Clone, Debug, Default)]
pub struct Report {
    lines: Vec<Line>,
    notes: Vec<(u8, String)>,
    plots: Vec<(String, String)>,
}

impl Report {
    /// Adds a quantity beside a peer's, each with a value per round; nothing if either has none.
    #[allow(clippy::too_many_arguments, reason = "a line has as many parts")]
    pub fn compare(
        &mut self,
        figure: u8,
        workload: &str,
        unit: &str,
        ours: &[f64],
        peer: &str,
        peer_values: &[f64],
        goal: Option<Goal>,
    ) {
        let (Some(of_ours), Some(of_peer)) = (spread(ours), spread(peer_values)) else {
            return;
        };
        self.lines.push(Line {
            figure,
            workload: workload.to_owned(),
            unit: unit.to_owned(),
            ours: of_ours,
            peer: Some((peer.to_owned(), of_peer)),
            ratio: ratio(ours, peer_values),
            goal,
            limit: None,
        });
    }

    /// Adds a quantity that stands alone.
    pub fn value(
        &mut self,
        figure: u8,
        workload: &str,
        unit: &str,
        ours: &[f64],
        goal: Option<Goal>,
    ) {
        let Some(ours) = spread(ours) else { return };
        self.lines.push(Line {
            figure,
            workload: workload.to_owned(),
            unit: unit.to_owned(),
            ours,
            peer: None,
            ratio: None,
            goal,
            limit: None,
        });
    }

    /// Adds everything of a workload; the first contestant is ours. A goal belongs to a quantity and a peer; one
    /// with the peer `""` is of our value alone.
    pub fn contest(
        &mut self,
        figure: u8,
        workload: &str,
        measured: &[Measured],
        goals: &[(Quantity, &str, Goal)],
    ) {
        let Some((ours, peers)) = measured.split_first() else {
            return;
        };
        let goal_of = |quantity: Quantity, name: &str| {
            let found = goals
                .iter()
                .find(|goal| goal.0 == quantity && goal.1 == name);
            found.map(|goal| goal.2)
        };
        for quantity in QUANTITIES {
            let values = quantity.values(ours);
            let own_goal = goal_of(*quantity, "");
            if own_goal.is_some() || peers.is_empty() {
                self.value(figure, workload, quantity.unit(), &values, own_goal);
            }
            for peer in peers {
                let goal = goal_of(*quantity, &peer.name);
                let of_peer = quantity.values(peer);
                self.compare(
                    figure,
                    workload,
                    quantity.unit(),
                    &values,
                    &peer.name,
                    &of_peer,
                    goal,
                );
            }
        }
    }

    /// Says of a workload's rates what the file itself allows, a value per round; the first of `measured` is ours.
    pub fn limit(
        &mut self,
        figure: u8,
        workload: &str,
        measured: &[Measured],
        by: &str,
        allowed: &[f64],
    ) {
        let Some((ours, peers)) = measured.split_first() else {
            return;
        };
        let rates = |one| Quantity::Rate.values(one);
        let Some(reached) = ratio(&rates(ours), allowed) else {
            return;
        };
        for line in &mut self.lines {
            let is_one = line.figure == figure
                && line.workload == workload
                && line.unit == Quantity::Rate.unit()
                && matches!(line.goal, Some(Goal::RatioAtLeast(_)));
            let Some((name, _)) = line.peer.as_ref().filter(|peer| is_one && peer.0 != by) else {
                continue;
            };
            let peer = peers.iter().find(|peer| peer.name == *name);
            line.limit = peer
                .and_then(|peer| ratio(allowed, &rates(peer)))
                .map(|ratio| Limit {
                    by: by.to_owned(),
                    ratio: ratio.median,
                    reached: reached.median,
                });
        }
    }

    /// Adds a sentence below a figure's table: what a comparison hides, why something was not measured.
    pub fn note(&mut self, figure: u8, sentence: impl Into<String>) {
        self.notes.push((figure, sentence.into()));
    }

    /// Adds a drawing, written as `NAME.svg`.
    pub fn plot(&mut self, name: &str, svg: String) {
        self.plots.push((name.to_owned(), svg));
    }

    /// The lines so far.
    #[must_use]
    pub fn lines(&self) -> &[Line] {
        &self.lines
    }

    /// The table of one figure, with its notes. Quantities that are zero for everybody are left out.
    #[must_use]
    pub fn table(&self, figure: u8, title: &str) -> String {
        let lines: Vec<&Line> = self
            .lines
            .iter()
            .filter(|line| line.figure == figure)
            .collect();
        let mut peers: Vec<&str> = Vec::new();
        for (name, _) in lines.iter().filter_map(|line| line.peer.as_ref()) {
            if !peers.contains(&name.as_str()) {
                peers.push(name);
            }
        }
        let mut rows: Vec<Vec<String>> = Vec::new();
        let mut heads = vec!["workload", "unit", "vmshadow"];
        heads.extend(&peers);
        heads.push("goal, reached");
        rows.push(heads.iter().map(|head| (*head).to_owned()).collect());
        let mut order: Vec<(&str, &str)> = Vec::new();
        let mut grouped: BTreeMap<(&str, &str), Vec<&Line>> = BTreeMap::new();
        for line in &lines {
            let key = (line.workload.as_str(), line.unit.as_str());
            if !grouped.contains_key(&key) {
                order.push(key);
            }
            grouped.entry(key).or_default().push(line);
        }
        let mut last = "";
        for key in order {
            let Some(group) = grouped.get(&key) else {
                continue;
            };
            let is_zero = |line: &&Line| {
                let peer = line.peer.as_ref().map_or(0.0, |peer| peer.1.median);
                line.goal.is_none() && line.ours.median == 0.0 && peer == 0.0
            };
            if group.iter().all(is_zero) {
                continue;
            }
            let ours = group
                .first()
                .map(|line| with_spread(&line.ours))
                .unwrap_or_default();
            let workload = if key.0 == last {
                String::new()
            } else {
                key.0.to_owned()
            };
            last = key.0;
            let mut row = vec![workload, key.1.to_owned(), ours];
            for name in &peers {
                let of_peer = group.iter().find_map(|line| {
                    let (_, value) = line.peer.as_ref().filter(|peer| peer.0 == *name)?;
                    let ratio = line.ratio.map(|ratio| format!(" ({:.2}x)", ratio.median));
                    Some(number(value.median) + &ratio.unwrap_or_default())
                });
                row.push(of_peer.unwrap_or_default());
            }
            let goals: Vec<String> = group.iter().filter_map(|line| reached(line)).collect();
            row.push(goals.join("; "));
            rows.push(row);
        }
        let mut text = format!("\nFigure {figure}: {title}\n\n{}", aligned(&rows));
        for (_, note) in self.notes.iter().filter(|note| note.0 == figure) {
            text += &format!("* {note}\n");
        }
        text
    }

    /// Every goal and whether it was met.
    #[must_use]
    pub fn summary(&self) -> String {
        let mut rows = vec![vec![
            "figure".to_owned(),
            "workload".to_owned(),
            "goal, reached".to_owned(),
        ]];
        let with_goals = || self.lines.iter().filter(|line| line.goal.is_some());
        for line in with_goals() {
            let goal = reached(line).unwrap_or_default();
            rows.push(vec![
                line.figure.to_string(),
                line.workload.clone(),
                format!("{} {goal}", line.unit),
            ]);
        }
        let met = with_goals().filter(|line| line.met() == Some(true)).count();
        let beyond = with_goals().filter(|line| line.is_beyond()).count();
        format!(
            "\nGoals met: {met} of {}; not met but beyond the file itself: {beyond}\n\n{}",
            with_goals().count(),
            aligned(&rows)
        )
    }

    /// `report.json`: a list of lines.
    #[must_use]
    pub fn json(&self) -> Value {
        self.lines.iter().map(Line::json).collect()
    }

    /// Writes `report.json` and the drawings into a directory.
    pub fn write(&self, directory: &Path) -> Result<()> {
        fs::create_dir_all(directory)?;
        let text = serde_json::to_string_pretty(&self.json())? + "\n";
        fs::write(directory.join("report.json"), text)?;
        for (name, svg) in &self.plots {
            fs::write(directory.join(format!("{name}.svg")), svg)?;
        }
        Ok(())
    }
}

/// `>= 1.5x QSD raw: 1.92 [1.85 to 2.01], met`.
fn reached(line: &Line) -> Option<String> {
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
            "beyond the file: {} itself is {:.2}x, ours {:.2}x of that",
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
fn telling(goal: Goal, value: f64, short: String) -> String {
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

fn with_spread(spread: &Spread) -> String {
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
fn aligned(rows: &[Vec<String>]) -> String {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Report {
        let mut report = Report::default();
        let goal = Some(Goal::RatioAtLeast(1.5));
        report.compare(
            1,
            "read",
            "IOPS",
            &[160.0, 150.0, 170.0],
            "QSD raw",
            &[100.0; 3],
            goal,
        );
        report.compare(
            1,
            "read",
            "IOPS",
            &[160.0, 150.0, 170.0],
            "fio",
            &[200.0; 3],
            None,
        );
        report.value(1, "read", "resident MiB", &[70.0], Some(Goal::AtMost(64.0)));
        report
    }

    #[test]
    fn a_goal_is_met_by_the_median_of_the_rounds_ratios() {
        let report = sample();
        let met: Vec<_> = report.lines().iter().map(Line::met).collect();
        assert_eq!(met, [Some(true), None, Some(false)]);
    }

    #[test]
    fn the_report_is_a_list_with_the_promised_names() {
        let json = sample().json();
        let first = &json[0];
        for name in [
            "figure",
            "workload",
            "unit",
            "ours",
            "peer",
            "peer_value",
            "ratio",
            "goal",
            "met",
        ] {
            assert!(!first[name].is_null(), "{name} is missing in {first}");
        }
        assert_eq!(first["ratio"], 1.6);
        assert_eq!(first["ratio_spread"], json!([1.55, 1.65]));
        assert_eq!(json[2]["peer"], Value::Null);
    }

    #[test]
    fn a_table_has_a_column_for_each_peer_and_says_what_was_met() {
        let table = sample().table(1, "title");
        assert!(table.contains("| vmshadow "), "{table}");
        assert!(table.contains("100 (1.60x)"), "{table}");
        assert!(
            table.contains(">= 1.5x QSD raw: 1.60 [1.55 to 1.65], met"),
            "{table}"
        );
        assert!(table.contains("<= 64: 70, NOT MET"), "{table}");
        let widths: Vec<_> = table
            .lines()
            .filter(|line| line.starts_with('|'))
            .map(str::len)
            .collect();
        assert!(widths.windows(2).all(|pair| pair[0] == pair[1]), "{table}");
    }

    #[test]
    fn a_table_leaves_out_what_is_zero_for_everybody() {
        let mut report = sample();
        report.compare(
            1,
            "read",
            "bytes written",
            &[0.0; 3],
            "QSD raw",
            &[0.0; 3],
            None,
        );
        report.compare(1, "read", "syncs", &[0.0; 3], "QSD raw", &[1.0; 3], None);
        let table = report.table(1, "title");
        assert!(!table.contains("bytes written"), "{table}");
        assert!(table.contains("syncs"), "{table}");
    }

    #[test]
    fn a_quantity_that_was_not_measured_makes_no_line() {
        let mut report = Report::default();
        report.compare(1, "read", "IOPS", &[], "QSD raw", &[1.0], None);
        report.value(1, "read", "IOPS", &[], None);
        assert!(report.lines().is_empty());
    }

    #[test]
    fn rounding_does_not_tell_of_a_goal_that_was_not_met() {
        let goal = Goal::RatioAtLeast(1.2);
        let short = |value: f64| telling(goal, value, format!("{value:.2}"));
        assert_eq!(short(1.196), "1.196");
        assert_eq!(short(1.204), "1.20");
        assert_eq!(short(1.18), "1.18");
        assert_eq!(short(1.19999), "1.19999");
    }

    #[test]
    fn a_goal_above_what_the_file_gives_is_told_apart() {
        let one = |name: &str, rate: f64| {
            let turn = crate::bench::rounds::Turn {
                ios: 1,
                flushes: 0,
                per_second: rate,
                latency_us: 1.0,
                latency_p99_us: 1.0,
                latency_max_us: 1.0,
                processor_us: None,
                written_bytes: None,
                read_bytes: None,
                prepared_bytes: None,
            };
            Measured {
                name: name.to_owned(),
                turns: vec![turn],
                system_calls: None,
                syncs: None,
                syncs_per_flush: None,
            }
        };
        let all = [
            one("vmshadow", 120.0),
            one("QSD raw", 100.0),
            one("fio", 130.0),
        ];
        for (goal, beyond) in [(1.5, true), (1.25, false), (1.1, false)] {
            let mut report = Report::default();
            let goals = [(Quantity::Rate, "QSD raw", Goal::RatioAtLeast(goal))];
            report.contest(1, "read", &all, &goals);
            report.limit(1, "read", &all, "fio", &[130.0]);
            let line = report.lines().first().expect("the rate beside QSD raw");
            assert_eq!(line.is_beyond(), beyond, "{goal}");
            let said = reached(line).expect("a goal");
            assert_eq!(said.contains("fio itself is 1.30x"), beyond, "{said}");
            assert_eq!(line.json()["limit"]["ratio"], 1.3);
            assert_eq!(line.json()["met"], json!(goal <= 1.2));
        }
        // The peer itself shows that equality can be reached.
        let slower = [one("vmshadow", 90.0), one("QSD raw", 100.0)];
        let mut report = Report::default();
        let goals = [(Quantity::Rate, "QSD raw", Goal::RatioAtLeast(1.0))];
        report.contest(1, "read", &slower, &goals);
        report.limit(1, "read", &slower, "fio", &[80.0]);
        assert_eq!(report.lines().first().map(Line::is_beyond), Some(false));
    }

    #[test]
    fn numbers_have_three_digits() {
        assert_eq!(number(0.0), "0");
        assert_eq!(number(64.0), "64");
        assert_eq!(number(1.234), "1.23");
        assert_eq!(number(57_123.0), "57.1k");
        assert_eq!(number(4096.0), "4096");
        assert_eq!(number(2_340_000.0), "2.34M");
    }
}
