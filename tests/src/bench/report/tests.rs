//! What the report says of made-up rounds.

use serde_json::json;

use super::line::{Goal, Line, Quantity};
use super::words::{number, reached, telling};
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
        report.limit(1, "read", &all, "fio");
        let line = report.lines().first().expect("the rate beside QSD raw");
        assert_eq!(line.is_beyond(), beyond, "{goal}");
        let said = reached(line).expect("a goal");
        assert_eq!(said.contains("beyond fio: that is 1.30x"), beyond, "{said}");
        assert_eq!(line.json()["limit"]["ratio"], 1.3);
        assert_eq!(line.json()["met"], json!(goal <= 1.2));
    }
    // The peer itself shows that equality can be reached.
    let slower = [
        one("vmshadow", 90.0),
        one("QSD raw", 100.0),
        one("fio", 95.0),
        one("relay", 89.0),
    ];
    let mut report = Report::default();
    let goals = [(Quantity::Rate, "QSD raw", Goal::RatioAtLeast(1.0))];
    report.contest(1, "read", &slower, &goals);
    report.limit(1, "read", &slower, "fio");
    let is_beyond = |report: &Report| report.lines().first().map(Line::is_beyond);
    assert_eq!(is_beyond(&report), Some(false));
    // What we exceed is no limit, whatever the goal.
    let goals = [(Quantity::Rate, "QSD raw", Goal::RatioAtLeast(1.5))];
    let mut report = Report::default();
    report.contest(1, "read", &slower, &goals);
    report.limit(1, "read", &slower, "relay");
    assert_eq!(is_beyond(&report), Some(false));
    report.limit(1, "read", &slower, "fio");
    assert_eq!(is_beyond(&report), Some(true));
    // Beside fio, which has no client, equality is not known to be within reach; beside a disk it is.
    let all = [
        one("vmshadow", 70.0),
        one("fio", 100.0),
        one("QSD raw", 100.0),
        one("relay", 80.0),
    ];
    for (peer, beyond) in [("fio", true), ("QSD raw", false)] {
        let goals = [(Quantity::Rate, peer, Goal::RatioAtLeast(0.9))];
        let mut report = Report::default();
        report.contest(1, "read", &all, &goals);
        report.limit(1, "read", &all, "relay");
        let line = report.lines().iter().find(|line| line.goal.is_some());
        assert_eq!(line.map(Line::is_beyond), Some(beyond), "{peer}");
    }
    // Of processor time less is better.
    let spending = |name: &str, processor_us: f64| {
        let mut measured = one(name, 100.0);
        for turn in &mut measured.turns {
            turn.processor_us = Some(processor_us);
        }
        measured
    };
    for (of_relay, beyond) in [(7.7, true), (7.4, false), (8.1, false)] {
        let all = [
            spending("vmshadow", 8.0),
            spending("QSD raw", 10.0),
            spending("relay", of_relay),
        ];
        let goals = [(Quantity::Processor, "QSD raw", Goal::RatioAtMost(0.75))];
        let mut report = Report::default();
        report.contest(1, "read", &all, &goals);
        report.limit(1, "read", &all, "relay");
        let line = report.lines().iter().find(|line| line.goal.is_some());
        assert_eq!(line.map(Line::is_beyond), Some(beyond), "{of_relay}");
    }
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
