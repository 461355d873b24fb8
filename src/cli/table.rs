//! The status as a table for people. Pure text: colours are asked for by the caller.

use std::fmt::Write;

use super::health::{Health, judge};
use crate::{
    cluster::Role,
    node::{MemberStatus, Status},
};

const HEADS: [&str; 9] = ["NODE", "ADDRESS", "STATE", "EPOCH", "APPLIED", "LAG", "LEASE", "LAST CONTACT", "VERSION"];
/// Columns of numbers are set flush right.
const RIGHT: [bool; 9] = [false, false, false, true, true, true, true, true, false];

/// ANSI colours, or nothing at all.
#[derive(Clone, Copy)]
struct Paint(bool);

impl Paint {
    fn text(self, code: &str, text: &str) -> String {
        if self.0 { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

/// Headline, table and advice, each line ended by a newline.
pub fn render(status: &Status, colour: bool) -> String {
    let paint = Paint(colour);
    let verdict = judge(status);
    let code = match verdict.health {
        Health::Healthy => "1;32",
        Health::Degraded => "1;33",
        Health::NoPrimary => "1;31",
    };
    let mut out = format!("{}\n\n", paint.text(code, &verdict.headline));
    let rows: Vec<[String; 9]> = status.members.iter().map(|member| row(member, status)).collect();
    let widths: Vec<usize> = (0..HEADS.len())
        .map(|column| {
            let cells = rows.iter().map(|row| row[column].chars().count());
            cells.chain([HEADS[column].len()]).max().unwrap_or(0)
        })
        .collect();
    out.push_str(&line(&HEADS, &widths, paint, "1"));
    for (row, member) in rows.iter().zip(&status.members) {
        let cells: Vec<&str> = row.iter().map(String::as_str).collect();
        out.push_str(&line(&cells, &widths, paint, state_colour(member.state)));
    }
    out.push_str("\n* this node; the lines of the others are as this node last heard of them\n");
    for advice in &verdict.advice {
        // Writing to a String cannot fail.
        let _ = writeln!(out, "{} {advice}", paint.text("1;33", "!"));
    }
    out
}

fn row(member: &MemberStatus, status: &Status) -> [String; 9] {
    let here = member.id == status.node;
    let contact = match member.last_contact_ms {
        _ if here => "-".into(),
        Some(ms) => format!("{} ago", duration(ms)),
        None => "never".into(),
    };
    [
        format!("{}{}", member.name, if here { "*" } else { "" }),
        member.address.clone(),
        member.state.to_string(),
        member.epoch.to_string(),
        member.applied.to_string(),
        member.lag.to_string(),
        member.lease_ms.map_or_else(|| "-".into(), |ms| format!("{ms} ms")),
        contact,
        if member.version.is_empty() { "-".into() } else { member.version.clone() },
    ]
}

/// Sets one line of the table. The state column, or the whole head line, is coloured.
fn line(cells: &[&str], widths: &[usize], paint: Paint, code: &str) -> String {
    let head = cells.first() == HEADS.first();
    let mut out = String::new();
    for (column, (cell, width)) in cells.iter().zip(widths).enumerate() {
        let padding = " ".repeat(width - cell.chars().count());
        let cell = if head || column == 2 { paint.text(code, cell) } else { (*cell).to_owned() };
        let (left, right) = if RIGHT[column] { (padding.as_str(), "") } else { ("", padding.as_str()) };
        let gap = if column == 0 { "" } else { "  " };
        let _ = write!(out, "{gap}{left}{cell}{right}");
    }
    out.truncate(out.trim_end().len());
    out.push('\n');
    out
}

fn state_colour(state: Role) -> &'static str {
    match state {
        Role::Primary => "1;32",
        Role::Secondary => "32",
        Role::Down | Role::Unknown | Role::Removed => "31",
        _ => "33",
    }
}

/// Milliseconds in the unit that reads best.
pub(super) fn duration(ms: u64) -> String {
    match ms {
        0..1_000 => format!("{ms} ms"),
        1_000..120_000 => format!("{} s", ms / 1_000),
        120_000..7_200_000 => format!("{} min", ms / 60_000),
        7_200_000..172_800_000 => format!("{} h", ms / 3_600_000),
        _ => format!("{} days", ms / 86_400_000),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::health::tests::healthy;

    #[test]
    fn the_table_is_what_the_manual_shows() {
        let mut status = healthy();
        status.members[2].state = Role::Down;
        status.members[2].last_contact_ms = None;
        status.members[2].lag = 7;
        let expected = "\
DEGRADED: node1 is PRIMARY (2 of 3 members up)

NODE    ADDRESS         STATE      EPOCH  APPLIED  LAG   LEASE  LAST CONTACT  VERSION
node1*  127.0.0.1:8086  PRIMARY        3      120    0  380 ms             -  0.1.0
node2   127.0.0.2:8086  SECONDARY      3      120    0       -     12 ms ago  0.1.0
node3   127.0.0.3:8086  DOWN           3      120    7       -         never  0.1.0

* this node; the lines of the others are as this node last heard of them
! node3 (127.0.0.3:8086) is DOWN, never heard of: check that its host is up and see `systemctl status twistlockd` there.
";
        assert_eq!(render(&status, false), expected);
    }

    #[test]
    fn colours_only_when_asked_for() {
        assert!(!render(&healthy(), false).contains('\x1b'));
        assert!(render(&healthy(), true).contains("\x1b[1;32mPRIMARY\x1b[0m"));
    }

    #[test]
    fn durations_read_well() {
        let texts = [0, 999, 1_000, 119_999, 120_000, 7_200_000, 172_800_000].map(duration);
        assert_eq!(texts, ["0 ms", "999 ms", "1 s", "119 s", "2 min", "2 h", "2 days"]);
    }
}
