//! Percentiles and tables of measured times.
//!
//! Called by the demo and the measuring commands.

use std::collections::BTreeMap;

/// Measured values by name, in the order in which the names first came.
#[derive(Clone, Debug, Default)]
pub struct Figures {
    order: Vec<String>,
    values: BTreeMap<String, Vec<f64>>,
}

/// Of one name.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Summary {
    /// How many were measured.
    pub count: usize,
    /// The median.
    pub p50: f64,
    /// The smallest value that 99 of 100 do not exceed.
    pub p99: f64,
    /// The largest.
    pub max: f64,
}

impl Figures {
    /// Adds one value.
    pub fn add(&mut self, name: &str, value: f64) {
        if !self.values.contains_key(name) {
            self.order.push(name.to_owned());
        }
        self.values.entry(name.to_owned()).or_default().push(value);
    }

    /// Every name with its summary.
    #[must_use]
    pub fn summaries(&self) -> Vec<(String, Summary)> {
        let summary = |name: &String| Some((name.clone(), summarise(self.values.get(name)?)?));
        self.order.iter().filter_map(summary).collect()
    }

    /// A table for people.
    #[must_use]
    pub fn table(&self) -> String {
        let mut text = format!(
            "{:32}{:>6}{:>10}{:>10}{:>10}\n",
            "ms", "n", "p50", "p99", "max"
        );
        for (name, summary) in self.summaries() {
            let Summary {
                count,
                p50,
                p99,
                max,
            } = summary;
            text += &format!("{name:32}{count:>6}{p50:>10.1}{p99:>10.1}{max:>10.1}\n");
        }
        text
    }
}

/// `None` without values.
fn summarise(values: &[f64]) -> Option<Summary> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    // Nearest rank: the value at ceil(count * percent / 100), counted from one.
    let at = |percent: usize| {
        sorted
            .get((sorted.len() * percent).div_ceil(100).max(1) - 1)
            .copied()
    };
    Some(Summary {
        count: sorted.len(),
        p50: at(50)?,
        p99: at(99)?,
        max: *sorted.last()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_nearest_ranks() {
        let mut figures = Figures::default();
        for value in (1..=50).rev() {
            figures.add("a", f64::from(value));
        }
        figures.add("b", 7.0);
        let summaries = figures.summaries();
        assert_eq!(
            summaries[0].1,
            Summary {
                count: 50,
                p50: 25.0,
                p99: 50.0,
                max: 50.0
            }
        );
        assert_eq!(
            summaries[1].1,
            Summary {
                count: 1,
                p50: 7.0,
                p99: 7.0,
                max: 7.0
            }
        );
    }
}
