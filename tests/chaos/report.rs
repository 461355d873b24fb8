//! What a run has shown, as a table and as JSON. Must never leave out what went wrong.

use std::{collections::BTreeMap, time::Duration};

use serde_json::{Value as Json, json};

use crate::faults::Kind;

/// What the faults of one kind did.
#[derive(Default)]
struct Row {
    count: usize,
    /// Longest times without an acknowledged change, and times until all was well after the end: of faults that came alone.
    outages: Vec<Duration>,
    recoveries: Vec<Duration>,
}

/// The sums of a run.
#[derive(Default)]
pub struct Report {
    rows: BTreeMap<Kind, Row>,
    /// Episodes of several faults at once.
    together: Row,
    /// Name and value of each sum.
    pub totals: Vec<(&'static str, u64)>,
    /// Sentences of the checks at the end.
    pub notes: Vec<String>,
    pub violations: Vec<String>,
}

impl Report {
    /// Adds an episode.
    pub fn add(&mut self, kinds: &[Kind], outage: Duration, recovery: Option<Duration>) {
        for kind in kinds {
            self.rows.entry(*kind).or_default().count += 1;
        }
        let row = match kinds {
            [] => return,
            [kind] => self.rows.entry(*kind).or_default(),
            _ => {
                self.together.count += 1;
                &mut self.together
            }
        };
        row.outages.push(outage);
        row.recoveries.extend(recovery);
    }

    fn all(&self) -> Vec<(&str, &Row)> {
        let together = (self.together.count > 0).then_some(("several at once", &self.together));
        self.rows.iter().map(|(kind, row)| (kind.name(), row)).chain(together).collect()
    }

    /// The table and the sums, for people.
    pub fn text(&self) -> String {
        let mut text = format!(
            "{:<17} {:>5}  {:>22}  {:>22}\n",
            "fault", "count", "outage min/med/max s", "recovery min/med/max s"
        );
        for (name, row) in self.all() {
            let (outage, recovery) = (spread(&row.outages), spread(&row.recoveries));
            text.push_str(&format!("{name:<17} {:>5}  {:>22}  {:>22}\n", row.count, tell(outage), tell(recovery)));
        }
        let totals: Vec<String> = self.totals.iter().map(|(name, value)| format!("{name} {value}")).collect();
        text.push_str(&format!("{}\n", totals.join(", ")));
        for note in &self.notes {
            text.push_str(&format!("{note}\n"));
        }
        for violation in &self.violations {
            text.push_str(&format!("VIOLATION: {violation}\n"));
        }
        text
    }

    /// The same for programs.
    pub fn json(&self, seed: u64, seconds: u64) -> Json {
        let times = |all: &[Duration]| spread(all).map(|all| all.map(|time| time.as_secs_f64()));
        let rows = self.all().into_iter().map(|(name, row)| {
            json!({"fault": name, "count": row.count, "outage_s": times(&row.outages), "recovery_s": times(&row.recoveries)})
        });
        let totals: serde_json::Map<_, _> =
            self.totals.iter().map(|(name, value)| (name.replace(' ', "_"), json!(value))).collect();
        json!({
            "seed": seed, "seconds": seconds, "faults": rows.collect::<Vec<_>>(), "totals": totals,
            "notes": self.notes, "violations": self.violations,
        })
    }
}

/// Least, middle and greatest.
fn spread(all: &[Duration]) -> Option<[Duration; 3]> {
    let mut all = all.to_vec();
    all.sort();
    Some([*all.first()?, all[all.len() / 2], *all.last()?])
}

fn tell(spread: Option<[Duration; 3]>) -> String {
    let seconds = |time: Duration| format!("{:.2}", time.as_secs_f64());
    spread.map_or("-".into(), |all| all.map(seconds).join(" / "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_fault_is_counted_and_only_single_ones_are_timed() {
        let mut report = Report::default();
        let seconds = Duration::from_secs;
        for (kinds, outage) in
            [(&[Kind::Stop][..], 3), (&[Kind::Stop], 1), (&[Kind::Stop, Kind::Loss], 9), (&[Kind::Stop], 2), (&[], 99)]
        {
            report.add(kinds, seconds(outage), Some(seconds(4)));
        }
        report.violations.push("something".into());
        let text = report.text();
        let line = |name: &str| {
            text.lines().find(|line| line.starts_with(name)).unwrap().split_whitespace().collect::<Vec<_>>().join(" ")
        };
        assert_eq!(line("stop"), "stop 4 1.00 / 2.00 / 3.00 4.00 / 4.00 / 4.00");
        assert_eq!(line("loss"), "loss 1 - -");
        assert_eq!(line("several at once"), "several at once 1 9.00 / 9.00 / 9.00 4.00 / 4.00 / 4.00");
        assert_eq!(line("VIOLATION"), "VIOLATION: something");
        let json = report.json(5, 60);
        assert_eq!(
            (&json["seed"], &json["faults"][0]["count"], &json["violations"][0]),
            (&json!(5), &json!(4), &json!("something"))
        );
    }
}
