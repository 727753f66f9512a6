//! What came out: lines that compare us with a peer, tables for people, `report.json` for programs.
//!
//! Called by the figures, which add lines, and by the command, which prints and writes them. A line is one quantity of one workload beside one
//! peer (or beside none). `contest` adds the lines of everything that `rounds` measured of a workload; `compare`
//! and `value` add single ones; `limit` says what the file itself allows.

mod line;
mod words;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::Result;
use serde_json::Value;

pub use line::{Goal, Limit, Line, Quantity};
pub use words::number;

use line::QUANTITIES;
use words::{aligned, reached, with_spread};

use super::rounds::Measured;
use super::statistics::{ratio, spread};

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

    /// Says of a workload's rates and processor time that none can do better than the contestant `by`, if it took part and ours, the
    /// first of `measured`, does not. Of several limits the tightest stays.
    pub fn limit(&mut self, figure: u8, workload: &str, measured: &[Measured], by: &str) {
        let Some((ours, peers)) = measured.split_first() else {
            return;
        };
        let named = |name: &str| peers.iter().find(|peer| peer.name == name);
        let Some(limit) = named(by) else {
            return;
        };
        for line in &mut self.lines {
            let (Some(goal), Some((name, _))) = (line.goal, &line.peer) else {
                continue;
            };
            let quantity = [Quantity::Rate, Quantity::Processor]
                .into_iter()
                .find(|quantity| quantity.unit() == line.unit);
            let (Some(quantity), Some(peer)) = (quantity, named(name)) else {
                continue;
            };
            if line.figure != figure || line.workload != workload || name == by {
                continue;
            }
            let allowed = quantity.values(limit);
            let reached = ratio(&quantity.values(ours), &allowed);
            let ratio = ratio(&allowed, &quantity.values(peer));
            let (Some(reached), Some(ratio)) = (reached, ratio) else {
                continue;
            };
            let found = Limit {
                by: by.to_owned(),
                ratio: ratio.median,
                reached: reached.median,
            };
            // What ours does better than is no limit.
            let holds = !goal.is_better(found.reached, 1.0);
            let is_tighter = |old: &Limit| goal.is_better(old.ratio, found.ratio);
            if holds && line.limit.as_ref().is_none_or(is_tighter) {
                line.limit = Some(found);
            }
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
            "\nGoals met: {met} of {}; not met but beyond what the file, or a client and a file, allow: {beyond}\n\n{}",
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

#[cfg(test)]
mod tests;
