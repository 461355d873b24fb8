//! What a takeover leaves behind: events with their reason and duration, on the node that took over and, through another
//! takeover, in the replicated history.

use std::{cell::RefCell, time::Duration};

use base64::{Engine, engine::general_purpose::STANDARD};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use twistlock_ha::{
    control::{self, Call},
    dev::ClusterFile,
    events::{Event, Kind},
};

use super::{
    beside,
    cluster::{Cluster, LIMIT},
    writers::client,
};

/// The administrator, at the API of the node that is PRIMARY.
pub struct Api {
    pub file: ClusterFile,
    pub authorization: String,
}

impl Api {
    pub fn new(cluster: &Cluster) -> Self {
        let file = cluster.file();
        let authorization = format!("Basic {}", STANDARD.encode(format!("{}:{}", file.user, file.password)));
        Self { file, authorization }
    }

    pub fn get(&self, node: usize, path: &str) -> (u16, Value) {
        self.try_get(node, path).expect("the PRIMARY answers")
    }

    /// None while its ports are closed: the role comes a moment before them.
    fn try_get(&self, node: usize, path: &str) -> Option<(u16, Value)> {
        let client = client(&self.file.ca, Duration::from_secs(5));
        let call = client.get(format!("{}/api/v1/{path}", self.file.nodes[node].console_url));
        let mut answer = call.header("authorization", &self.authorization).call().ok()?;
        Some((answer.status().as_u16(), answer.body_mut().read_json().expect("JSON")))
    }

    pub fn post(&self, node: usize, path: &str, body: &Value) -> (u16, String) {
        let client = client(&self.file.ca, Duration::from_secs(15));
        let call = client.post(format!("{}/api/v1/{path}", self.file.nodes[node].console_url));
        let mut answer =
            call.header("authorization", &self.authorization).send_json(body).expect("the PRIMARY answers");
        (answer.status().as_u16(), answer.body_mut().read_to_string().expect("text"))
    }

    /// Waits until the history has so many takeovers from another node, and returns them, newest first.
    fn wait_takeovers(&self, cluster: &Cluster, count: usize) -> Vec<Event> {
        let read = || {
            let path = "high-availability/events?kind=takeover&limit=400";
            let Some((status, value)) = self.try_get(cluster.primary(), path) else { return Vec::new() };
            assert_eq!(status, 200, "{value}");
            let events: Vec<Event> = serde_json::from_value(value).expect("events");
            events.into_iter().filter(|event| event.fields.contains_key("from")).collect::<Vec<_>>()
        };
        let found = RefCell::new(Vec::new());
        cluster.wait_for("takeovers in the history", |_| {
            found.replace(read());
            found.borrow().len() >= count
        });
        found.into_inner()
    }
}

/// What a node has in its file.
fn local(cluster: &Cluster, node: usize, kind: Kind) -> Vec<Event> {
    let wanted = Call::get(format!("high-availability/events?limit=400&kind={}", kind.word()));
    control::ask(&cluster.node(node).control, &wanted, LIMIT).expect("events")
}

fn assert_took_over(event: &Event, from: &str, to: &str, reason: &str) {
    let field = |name: &str| event.fields[name].as_str().unwrap_or_default();
    assert_eq!((field("from"), field("to"), field("reason")), (from, to, reason), "{event:?}");
    let ms = event.fields["durationMs"].as_f64().expect("a number");
    assert!(ms > 0.0 && ms < LIMIT.as_secs_f64() * 1e3, "{event:?}");
    assert_eq!(event.node, to);
}

#[test]
fn a_takeover_is_in_the_history_with_reason_and_duration_and_survives_the_next_one() {
    let _beside = beside();
    let cluster = Cluster::start();
    let api = Api::new(&cluster);
    let name = |node: usize| cluster.node(node).name;
    let first = cluster.primary();
    cluster.signal(first, Signal::SIGKILL);
    cluster.wait_for("another PRIMARY", |statuses| {
        statuses.iter().flatten().any(|status| status.primary.is_some_and(|id| id != first as u64 + 1))
    });
    let killed = api.wait_takeovers(&cluster, 1);
    let second = cluster.primary();
    assert_took_over(&killed[0], &name(first), &name(second), "process_dead");
    assert_eq!(local(&cluster, second, Kind::Takeover)[0], killed[0], "the file says the same");
    cluster.wait_healthy();
    let operation = Call::post("high-availability/switchover").with(json!({}));
    let _: Value = control::ask(&cluster.node(second).control, &operation, LIMIT).expect("a switchover");
    let both = api.wait_takeovers(&cluster, 2);
    let third = cluster.primary();
    assert_took_over(&both[0], &name(second), &name(third), "handed_over");
    assert_eq!(both[1], killed[0], "the history has survived");
    // Frozen, so that nobody refuses a connection in its place.
    cluster.wait_healthy();
    cluster.freeze(third);
    cluster.wait_for("another PRIMARY", |statuses| {
        let others = statuses.iter().enumerate().filter(|(node, _)| *node != third).filter_map(|(_, s)| s.as_ref());
        others.into_iter().any(|status| status.primary.is_some_and(|id| id != third as u64 + 1))
    });
    cluster.signal(third, Signal::SIGCONT);
    let all = api.wait_takeovers(&cluster, 3);
    assert_took_over(&all[0], &name(third), &name(cluster.primary()), "not_heard");
    assert!(local(&cluster, third, Kind::Role).iter().any(|event| event.fields.get("from") == Some(&"Primary".into())));
    assert_eq!(api.get(cluster.primary(), "high-availability/events?limit=0").0, 400);
    assert_eq!(api.get(cluster.primary(), "high-availability/events?kind=odd").0, 400);
    for event in &all {
        println!("  {} {}", event.time, event.sentence);
    }
    println!("events: {}", cluster.finish(&[super::cluster::LEASE_LOST, super::cluster::FROZEN].concat()));
}
