//! The status as a table for people. Pure text: colours are asked for by the caller.

use std::fmt::Write;

use super::{
    columns::{self, Cell, Head, Paint},
    next, progress,
    quantity::{clock, date, duration, size},
};
use crate::{
    cluster::{
        Role,
        roster::{Pause, Removed},
        shared::Request,
    },
    node::{
        MemberStatus, Status, SyncProgress,
        verdict::{Health, judge, paused},
    },
};

/// How long a removed member is shown.
const SHOW_REMOVED_S: u64 = 24 * 3600;

const HEADS: [Head; 9] = [
    ("NODE", false),
    ("ADDRESS", false),
    ("STATE", false),
    ("EPOCH", true),
    ("APPLIED", true),
    ("LAG", true),
    ("LEASE", true),
    ("LAST CONTACT", true),
    ("VERSION", false),
];

/// Headline, table and advice; each line ends with a newline. `now` in seconds since 1970.
pub fn render(status: &Status, colour: bool, now: u64) -> String {
    let paint = Paint(colour);
    let verdict = judge(status, now);
    let code = match verdict.health {
        Health::Healthy => "1;32",
        Health::Degraded => "1;33",
        Health::NoPrimary => "1;31",
    };
    let mut out = format!("{}\n", paint.text(code, &verdict.headline));
    if let Some(pause) = paused(status, now) {
        // Writing to a String cannot fail.
        let _ = writeln!(out, "{}", paint.text("1;37;41", &pause_line(pause, status, now)));
    }
    // A host that is no member knows nothing about the others.
    let rows = if status.role == Role::Removed { Vec::new() } else { rows(status, now) };
    if !rows.is_empty() {
        out.push_str(&table(&rows, paint));
    }
    status.members.iter().filter_map(copy).for_each(|copy| out.push_str(&copy));
    for line in progress::lines(status) {
        let _ = writeln!(out, "{} {line}", paint.text("1;36", "~"));
    }
    for request in &status.membership.shared.requests {
        let _ = writeln!(
            out,
            "{} asks to join until {}; clock {}; fingerprint\n    {}",
            request.name,
            date(request.until),
            clock(request.clock_ms),
            request.fingerprint
        );
    }
    for advice in &verdict.advice {
        let _ = writeln!(out, "{} {advice}", paint.text("1;33", "!"));
    }
    for step in next::steps(status, now) {
        let _ = writeln!(out, "{} {step}", paint.text("1", "Next:"));
    }
    out
}

/// All hosts that belong to the cluster, ask to, or did until lately: the state of each, and its cells.
fn rows(status: &Status, now: u64) -> Vec<(Role, [String; 9])> {
    let mut rows: Vec<(Role, [String; 9])> =
        status.members.iter().map(|member| (member.state, row(member, status))).collect();
    rows.extend(status.membership.shared.requests.iter().map(|request| (Role::RequestJoin, request_row(request))));
    rows.extend(removed_lately(status, now).map(|removed| (Role::Removed, removed_row(removed))));
    rows
}

fn table(rows: &[(Role, [String; 9])], paint: Paint) -> String {
    let cells = |(state, row): &(Role, [String; 9])| {
        let code = |column| if column == 2 { state_colour(*state) } else { "" };
        row.iter().enumerate().map(|(column, text)| Cell::coloured(code(column), text)).collect()
    };
    let rows: Vec<Vec<Cell>> = rows.iter().map(cells).collect();
    let table = columns::table(&HEADS, &rows, paint);
    format!("\n{table}\n* this node; the other lines show what this node last heard from them\n")
}

fn pause_line(pause: &Pause, status: &Status, now: u64) -> String {
    let name = status.membership.get(pause.primary).map_or("nobody", |member| member.name.as_str());
    let left = duration((pause.until - now) * 1000);
    format!(
        "PAUSED until {} (for {left}): if {name} fails, nobody takes over. End it: twistcli ha resume",
        date(pause.until)
    )
}

/// Removed members are shown for a while, unless another member has their name.
fn removed_lately(status: &Status, now: u64) -> impl Iterator<Item = &Removed> {
    let again = |removed: &Removed| status.membership.roster.members.iter().any(|member| member.name == removed.name);
    let lately = move |removed: &&Removed| now.saturating_sub(removed.at) < SHOW_REMOVED_S;
    status.membership.roster.removed.iter().filter(lately).filter(move |removed| !again(removed))
}

/// How far a member has copied the database.
fn copy(member: &MemberStatus) -> Option<String> {
    const WIDTH: u64 = 30;
    let SyncProgress { bytes, total, unchanged } = member.sync?;
    let had = if unchanged > 0 { format!(", {} were there", size(unchanged)) } else { String::new() };
    let part = |of: u64| (u128::from(bytes.min(total)) * u128::from(of) / u128::from(total.max(1))) as u64;
    let done = part(WIDTH);
    Some(format!(
        "{} copies the database  [{}{}] {:>3} %  {} of {}{had}\n",
        member.name,
        "#".repeat(done as usize),
        "-".repeat((WIDTH - done) as usize),
        part(100),
        size(bytes),
        size(total)
    ))
}

fn request_row(request: &Request) -> [String; 9] {
    let address = request.place();
    let [epoch, applied, lag, lease, contact] = [(); 5].map(|()| "-".to_owned());
    let (name, version) = (request.name.clone(), request.version.clone());
    [name, address, Role::RequestJoin.to_string(), epoch, applied, lag, lease, contact, version]
}

fn removed_row(removed: &Removed) -> [String; 9] {
    let [address, epoch, applied, lag, lease, contact, version] = [(); 7].map(|()| "-".to_owned());
    [removed.name.clone(), address, Role::Removed.to_string(), epoch, applied, lag, lease, contact, version]
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

fn state_colour(state: Role) -> &'static str {
    match state {
        Role::Primary => "1;32",
        Role::Secondary => "32",
        Role::Down | Role::Unknown | Role::Removed => "31",
        _ => "33",
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::node::verdict::tests::healthy;

    /// A host that asks.
    pub(in crate::cli) fn request(name: &str) -> Request {
        Request {
            id: format!("secret of {name}"),
            name: name.into(),
            address: "192.0.2.7".into(),
            port: 8086,
            version: "0.1.0".into(),
            level: crate::cluster::feature_level(),
            fingerprint: format!("AB:CD:{name}"),
            csr: String::new(),
            console_csr: String::new(),
            console_names: Vec::new(),
            clock_ms: -12,
            at: 0,
            until: 86_400,
        }
    }

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

* this node; the other lines show what this node last heard from them
! node3 (127.0.0.3:8086) is DOWN, never heard of: check that its host is up and see `systemctl status twistlockd` there.
";
        assert_eq!(render(&status, false, 0), expected);
    }

    #[test]
    fn colours_only_when_asked_for() {
        assert!(!render(&healthy(), false, 0).contains('\x1b'));
        assert!(render(&healthy(), true, 0).contains("\x1b[1;32mPRIMARY\x1b[0m"));
    }

    #[test]
    fn a_cluster_in_the_making_shows_all_that_is_under_way() {
        let mut status = healthy();
        status.members.pop();
        status.membership.roster.members.pop();
        status.members[1].state = Role::Startup2;
        status.members[1].voter = false;
        status.members[1].sync = Some(SyncProgress { bytes: 1 << 30, total: 3 << 30, unchanged: 960 << 20 });
        status.membership.roster.members[1].voter = false;
        status.membership.shared.requests.push(request("host7"));
        status.membership.roster.removed.push(Removed {
            id: 3,
            name: "node3".into(),
            at: 1_000,
            address: String::new(),
        });
        status.membership.roster.pause = Some(Pause { until: 3_600, primary: 1 });
        let expected = "\
DEGRADED: node1 is PRIMARY (1 of 2 members up)
PAUSED until 1970-01-01 01:00 UTC (for 30 min): if node1 fails, nobody takes over. End it: twistcli ha resume

NODE    ADDRESS         STATE         EPOCH  APPLIED  LAG   LEASE  LAST CONTACT  VERSION
node1*  127.0.0.1:8086  PRIMARY           3      120    0  380 ms             -  0.1.0
node2   127.0.0.2:8086  STARTUP2          3      120    0       -     12 ms ago  0.1.0
host7   192.0.2.7:8086  REQUEST_JOIN      -        -    -       -             -  0.1.0
node3   -               REMOVED           -        -    -       -             -  -

* this node; the other lines show what this node last heard from them
node2 copies the database  [##########--------------------]  33 %  1.0 GiB of 3.0 GiB, 960.0 MiB were there
host7 asks to join until 1970-01-02 00:00 UTC; clock 12 ms behind; fingerprint
    AB:CD:host7
! node2 (127.0.0.2:8086) is in STARTUP2: it becomes SECONDARY by itself when it has caught up.
Next: 1 host asks to join; compare the fingerprint, then `twistcli ha apply`
Next: wait until the newcomers have caught up: `twistcli ha status --watch`
Next: when the maintenance is done, `twistcli ha resume`
";
        assert_eq!(render(&status, false, 1_800), expected);
        assert!(!render(&status, false, 3_600).contains("PAUSED"));
        assert!(!render(&status, false, 1_000 + SHOW_REMOVED_S).contains("REMOVED"));
        assert!(!render(&status, false, 1_800).contains("secret"));
    }
}
