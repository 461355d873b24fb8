//! What `dev` shows: the introduction, and the nodes as a table that is redrawn in place on a terminal, or else one
//! line for each change. Must never decide anything.

use std::{
    fmt::Write as _,
    io::{self, IsTerminal, Write as _},
    time::Instant,
};

use super::layout::{ClusterFile, Layout};
use crate::{cluster::Role, node::Status};

/// One node as it is shown.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Row {
    pub(super) name: String,
    pub(super) url: String,
    pub(super) pid: Option<u32>,
    pub(super) state: Role,
    pub(super) epoch: u64,
    pub(super) applied: u64,
    pub(super) lag: u64,
}

/// Puts together what is known of each node.
pub(super) fn rows(cluster: &ClusterFile, answers: &[Option<Status>]) -> Vec<Row> {
    let newest = answers.iter().flatten().map(|status| status.committed).max().unwrap_or(0);
    let row = |(node, status): (&super::layout::NodeFile, &Option<Status>)| {
        let status = status.as_ref().filter(|_| node.pid.is_some());
        let applied = status.map_or(0, |status| status.applied);
        Row {
            name: node.name.clone(),
            url: node.console_url.clone(),
            pid: node.pid,
            state: status.map_or(Role::Down, |status| status.role),
            epoch: status.map_or(0, |status| status.epoch),
            applied,
            lag: if status.is_some() { newest.saturating_sub(applied) } else { 0 },
        }
    };
    cluster.nodes.iter().zip(answers).map(row).collect()
}

/// The name and number of the primary in this picture.
fn primary(rows: &[Row]) -> Option<&Row> {
    rows.iter().find(|row| row.state == Role::Primary)
}

/// Standard output, as terminal or as file.
pub(super) struct Screen {
    terminal: bool,
    quiet: bool,
    start: Instant,
    shown: Vec<Row>,
    /// Lines of the table on the terminal, to be drawn over.
    lines: usize,
}

impl Screen {
    /// A screen that has shown nothing yet. `quiet` keeps changes from being shown.
    pub(super) fn new(quiet: bool) -> Self {
        let terminal = io::stdout().is_terminal();
        Self { terminal, quiet, start: Instant::now(), shown: Vec::new(), lines: 0 }
    }

    /// Prints lines that stay. What a reader who went away misses is no reason to stop the cluster.
    pub(super) fn say(&mut self, text: &str) {
        let mut out = String::new();
        self.erase(&mut out);
        out.push_str(text);
        out.push('\n');
        put(&out);
        if self.terminal {
            // The table comes again under the new line.
            self.shown.clear();
        }
    }

    /// An event with its time.
    pub(super) fn event(&mut self, text: &str) {
        if !self.quiet {
            let seconds = self.start.elapsed().as_secs_f64();
            self.say(&format!("{seconds:8.2} s  {text}"));
        }
    }

    /// Shows the nodes if anything changed.
    pub(super) fn show(&mut self, rows: &[Row]) {
        if self.quiet || self.shown == rows {
            return;
        }
        if self.terminal {
            let mut out = String::new();
            self.erase(&mut out);
            let table = table(rows);
            self.lines = table.lines().count();
            out.push_str(&table);
            put(&out);
        } else {
            for (now, before) in rows.iter().zip(self.shown.clone()) {
                if now.state != before.state {
                    self.event(&format!("{}: {} -> {} (epoch {})", now.name, before.state, now.state, now.epoch));
                }
            }
        }
        self.shown = rows.to_vec();
    }

    fn erase(&mut self, out: &mut String) {
        if self.lines > 0 {
            // Writing to a String cannot fail. Up to the first line of the table, then clear to the end of the screen.
            let _ = write!(out, "\x1b[{}A\x1b[J", self.lines);
            self.lines = 0;
        }
    }
}

fn put(text: &str) {
    let mut out = io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

fn table(rows: &[Row]) -> String {
    let mut out = format!(
        "\n{:<6} {:<24} {:>8}  {:<10} {:>6} {:>9} {:>6}\n",
        "NODE", "CONSOLE", "PID", "STATE", "EPOCH", "APPLIED", "LAG"
    );
    for row in rows {
        let pid = row.pid.map_or_else(|| "-".into(), |pid| pid.to_string());
        let _ = writeln!(
            out,
            "{:<6} {:<24} {pid:>8}  {:<10} {:>6} {:>9} {:>6}",
            row.name, row.url, row.state, row.epoch, row.applied, row.lag
        );
    }
    out
}

/// What a newcomer needs: where the Console is, who may log in, and what to try.
/// `twistcli` is how the administration tool is called here.
pub(super) fn introduction(layout: &Layout, rows: &[Row], restart: &str, twistcli: &str) -> String {
    let cluster = &layout.cluster;
    let (url, pid) = primary(rows).map_or(("", None), |row| (row.url.as_str(), row.pid));
    let pid = pid.map_or_else(|| "PID".into(), |pid| pid.to_string());
    let (ca, user, password) = (cluster.ca.display(), &cluster.user, &cluster.password);
    let dir = layout.dir().display();
    let status = match layout.status_pages().as_slice() {
        [] => String::new(),
        pages => format!("status    {} (on every node, also without a PRIMARY)\n", pages.join(" ")),
    };
    let data = cluster.nodes.first().map(|node| node.data.display().to_string()).unwrap_or_default();
    format!(
        "\
Console   {url}
{status}login     {user} / {password}
CA        {ca}
files     {dir} (cluster.json, nodeN/log)

Try in another terminal:
  write a tag     curl --cacert {ca} -u {user}:{password} -H 'content-type: application/json' \\
                    -d '{{\"name\":\"first\",\"color\":\"#2e7d32\",\"description\":\"\"}}' {url}/api/v1/tags
  read the tags   curl --cacert {ca} -u {user}:{password} {url}/api/v1/tags
  lose a primary  kill -9 {pid}     ({restart}; the tags are then served by another address)
  watch a node    {twistcli} ha status --data {data} --watch

Ctrl-C stops them all."
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_aligned() {
        let row = Row {
            name: "node1".into(),
            url: "https://127.0.0.1:8083".into(),
            pid: Some(4711),
            state: Role::Primary,
            epoch: 2,
            applied: 17,
            lag: 0,
        };
        let down = Row { name: "node2".into(), pid: None, state: Role::Down, ..row.clone() };
        let expected = "
NODE   CONSOLE                       PID  STATE       EPOCH   APPLIED    LAG
node1  https://127.0.0.1:8083       4711  PRIMARY         2        17      0
node2  https://127.0.0.1:8083          -  DOWN            2        17      0
";
        assert_eq!(table(&[row, down]), expected);
    }
}
