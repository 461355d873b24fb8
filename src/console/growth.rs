//! Tests of lists with many rows: a page comes from an index, however far down it is, and cursors lead past each row
//! once. The last test prints how long pages take: `scripts/bench/growth.sh` gives it long tables.

use std::{
    env,
    time::{Duration, Instant},
};

use axum::{
    body::Body,
    extract::Request,
    http::{Method, StatusCode, header},
};
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, Row};

use super::{audits, events, store::Store, test_console::TestConsole};

const AUDITS: &str = "/api/v1/audits/mgmt?";
const EVENTS: &str = "/api/v1/high-availability/events?";
/// 2020-01-01, in seconds since 1970.
const BEGIN: i64 = 1_577_836_800;

/// A Console with long tables, and somebody who reads its lists.
struct Reader {
    test: TestConsole,
    auth: String,
}

/// A part of a list, with what its headers say.
#[derive(Debug)]
struct Part {
    rows: Vec<Value>,
    total: Option<usize>,
    next: Option<String>,
}

impl Reader {
    /// One row of the audit a second, three of which have the same time; every twentieth is by ann, and five by bob.
    /// Every hundredth event is a takeover.
    async fn start(audits: usize, events: usize) -> Self {
        let test = TestConsole::start().await;
        let auth = test.login().await;
        let store = &test.console.store;
        store.index().await.unwrap();
        // What is kept by default is less.
        let kept = json!({ "auditRows": 10_000_000, "eventRows": 1_000_000 });
        assert_eq!(test.call(Method::POST, "/api/v1/settings/retention", &auth, kept).await.0, StatusCode::OK);
        let numbers = "WITH RECURSIVE n (i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i + 1 < ?1)";
        let rows = format!(
            "{numbers} INSERT INTO audits (time, user, source, action, what, ok, difference) \
             SELECT {BEGIN} + i / 3 * 3, CASE WHEN i * 5 % ?1 < 5 THEN 'bob' WHEN i % 20 = 0 THEN 'ann' ELSE 'user' || (i % 7) END, \
             '192.0.2.' || (i % 250), 'replace', 'tag ''' || i || '''', i % 50 > 0, \
             '{{\"color\":{{\"old\":\"#000000\",\"new\":\"#' || printf('%06x', i) || '\"}},\"description\":{{\"old\":\"before\",\"new\":\"after\"}}}}' \
             FROM n"
        );
        store.write(sqlx::query(AssertSqlSafe(rows)).bind(audits as i64)).await.unwrap();
        let rows = format!(
            "{numbers} INSERT INTO events SELECT printf('%012x', i * 7919 % ?1), ({BEGIN} + i / 3) * 1000, kind, json_object('id', \
             printf('%012x', i * 7919 % ?1), 'time', strftime('%Y-%m-%dT%H:%M:%SZ', {BEGIN} + i / 3, 'unixepoch'), 'node', 'one', \
             'kind', kind, 'severity', 'info', 'sentence', 'this is number ' || i, 'fields', json_object('number', i)) \
             FROM (SELECT i, iif(i % 100 = 0, 'takeover', 'member') AS kind FROM n)"
        );
        store.write(sqlx::query(AssertSqlSafe(rows)).bind(events as i64)).await.unwrap();
        Self { test, auth }
    }

    fn store(&self) -> &Store {
        &self.test.console.store
    }

    async fn get(&self, path: &str) -> Part {
        let request = Request::builder().uri(path).header(header::AUTHORIZATION, &self.auth);
        let (status, headers, text) = self.test.send(request.body(Body::empty()).unwrap()).await;
        assert_eq!(status, StatusCode::OK, "{path}: {text}");
        let told = |name| headers.get(name).map(|value| value.to_str().unwrap().to_owned());
        let total = told("x-total-count").map(|total| total.parse().unwrap());
        Part { rows: serde_json::from_str(&text).unwrap(), total, next: told("x-next-cursor") }
    }

    /// What SQLite does for a statement.
    async fn plan(&self, sql: &str) -> String {
        let explain = sqlx::query(AssertSqlSafe(format!("EXPLAIN QUERY PLAN {sql}")));
        let steps = explain.fetch_all(&mut *self.store().read().await.unwrap()).await.unwrap();
        steps.iter().map(|step| step.get::<String, _>("detail")).collect::<Vec<_>>().join("; ")
    }
}

#[tokio::test]
async fn each_page_and_each_count_comes_from_an_index() {
    let reader = Reader::start(1, 1).await;
    for (statements, index, page) in [
        (audits::ALL, "audits_by_time", "USING INTEGER PRIMARY KEY (rowid<?)"),
        (audits::SINCE, "audits_by_time", "USING INDEX audits_by_time (time>? AND "),
        (audits::OF_USER, "audits_by_user", "USING INDEX audits_by_user (user=? AND time>? AND "),
    ] {
        let (plan, count) = (reader.plan(statements.page).await, reader.plan(statements.count).await);
        assert!(plan.starts_with(&format!("SEARCH audits {page}")) && plan.contains('<'), "{plan}");
        assert!(!plan.contains(';'), "nothing is sorted: {plan}");
        assert!(statements.page.contains("LIMIT +?"), "it is compiled each time: {}", statements.page);
        assert!(count.contains(&format!(" audits USING COVERING INDEX {index}")), "{count}");
    }
    for (statements, index) in [(events::ALL, "events_by_time ("), (events::OF_KIND, "events_by_kind (kind=? AND ")] {
        assert!(statements.page.contains("LIMIT +?"), "it is compiled each time: {}", statements.page);
        let (page, count) = (reader.plan(statements.page).await, reader.plan(statements.count).await);
        assert!(count.contains(&format!("SEARCH events USING COVERING INDEX {index}")), "{count}");
        assert!(page.contains(&format!("SEARCH events USING COVERING INDEX {index}")), "{page}");
        assert!(
            page.contains("(time,id)<(?,?))") && page.starts_with("SEARCH events USING PRIMARY KEY (id=?)"),
            "{page}"
        );
        // Of the rows of the page, and of nothing else.
        assert_eq!(page.matches("TEMP B-TREE").count(), 1, "{page}");
    }
}

#[tokio::test]
async fn cursors_lead_past_each_row_once_in_the_order_of_offsets() {
    let reader = Reader::start(200, 200).await;
    let since = BEGIN + 100;
    let (audits, event) = (format!("{AUDITS}since={since}&"), format!("{EVENTS}since=2020-01-01T00:00:20Z&"));
    for (path, limit) in [
        (AUDITS, 7),
        (&audits, 4),
        (&format!("{AUDITS}user=user1&"), 1),
        (&format!("{audits}user=user1&"), 50),
        (EVENTS, 7),
        (&event, 1),
        (&format!("{EVENTS}kind=takeover&"), 1),
    ] {
        let path = format!("{path}limit={limit}");
        let (mut cursor, mut seen) = ("first".to_owned(), 0);
        loop {
            let part = reader.get(&format!("{path}&cursor={cursor}")).await;
            let same = reader.get(&format!("{path}&offset={seen}")).await;
            seen += part.rows.len();
            assert_eq!((&part.rows, &part.next), (&same.rows, &same.next), "{path}: row {seen}");
            assert_eq!((part.total, part.next.is_none()), (None, same.total == Some(seen)), "{path}: row {seen}");
            match part.next {
                Some(next) => cursor = next,
                None => break,
            }
        }
        assert!(seen > 1, "{path}");
    }
}

#[tokio::test]
async fn a_row_that_is_written_meanwhile_moves_no_page() {
    let reader = Reader::start(20, 1).await;
    for path in [format!("{AUDITS}limit=5"), format!("{AUDITS}since=0&limit=5")] {
        let first = reader.get(&path).await;
        let second = reader.get(&format!("{path}&offset=5")).await;
        reader.test.login().await;
        let next = format!("{path}&cursor={}", first.next.unwrap());
        assert_eq!(reader.get(&next).await.rows, second.rows);
        assert_ne!(reader.get(&format!("{path}&offset=5")).await.rows, second.rows, "an offset counts from the newest");
    }
}

#[tokio::test]
async fn a_console_makes_the_indexes_that_its_database_lacks() {
    let reader = Reader::start(1, 1).await;
    let count = async || -> i64 {
        let names =
            "SELECT count(*) FROM sqlite_schema WHERE name IN ('audits_by_time', 'audits_by_user', 'events_by_kind')";
        sqlx::query_scalar(names).fetch_one(&mut *reader.store().read().await.unwrap()).await.unwrap()
    };
    assert_eq!(count().await, 3);
    for index in ["audits_by_time", "audits_by_user", "events_by_kind"] {
        reader.store().write(sqlx::query(AssertSqlSafe(format!("DROP INDEX {index}")))).await.unwrap();
    }
    assert_eq!((count().await, reader.get(AUDITS).await.total), (0, Some(4)), "it answers without them");
    reader.test.console.ready().await.unwrap();
    let begin = Instant::now();
    while count().await < 3 {
        assert!(begin.elapsed() < Duration::from_secs(20), "nobody has made them");
        tokio::task::yield_now().await;
    }
}

/// Milliseconds of an answer, the median of five.
async fn milliseconds(reader: &Reader, path: &str) -> f64 {
    let mut times = Vec::new();
    for _ in 0..5 {
        let begin = Instant::now();
        reader.get(path).await;
        times.push(begin.elapsed());
    }
    times.sort();
    times[2].as_secs_f64() * 1000.0
}

#[tokio::test]
async fn timed_pages_of_long_lists() {
    let size = |name, default| env::var(name).map_or(default, |size| size.parse().unwrap());
    let (audits, events) = (size("GROWTH_AUDITS", 500), size("GROWTH_EVENTS", 300));
    let reader = Reader::start(audits, events).await;
    let recent = BEGIN + audits as i64 - 120;
    println!("growth: {audits} rows of the audit, {events} events, pages of 50, in milliseconds");
    println!(
        "growth: {:<44} {:>9} {:>9} {:>9} {:>9} {:>9}",
        "", "rows", "offset 0", "cursor", "deep off.", "deep cur."
    );
    for (what, path) in [
        ("audit", AUDITS.to_owned()),
        ("audit of one who did much", format!("{AUDITS}user=user1&")),
        ("audit of one who did little", format!("{AUDITS}user=bob&")),
        ("audit since long ago", format!("{AUDITS}since={BEGIN}&")),
        ("audit of the last two minutes", format!("{AUDITS}since={recent}&")),
        ("audit of one who did much since long ago", format!("{AUDITS}user=user1&since={BEGIN}&")),
        ("events", EVENTS.to_owned()),
        ("events of a common kind", format!("{EVENTS}kind=member&")),
        ("events of a rare kind", format!("{EVENTS}kind=takeover&")),
        ("events since long ago", format!("{EVENTS}since=2020-01-01T00:00:00Z&")),
    ] {
        let path = format!("{path}limit=50");
        let total = reader.get(&path).await.total.unwrap();
        let deep = total.saturating_sub(60);
        let before = reader.get(&format!("{path}&offset={}", deep.saturating_sub(50))).await.next;
        let by_offset = format!("{path}&offset={}", if before.is_some() { deep.max(50) } else { 0 });
        let by_cursor = format!("{path}&cursor={}", before.as_deref().unwrap_or("first"));
        assert_eq!(reader.get(&by_offset).await.rows, reader.get(&by_cursor).await.rows, "{what}");
        let mut line = format!("growth: {what:<44} {total:>9}");
        for path in [format!("{path}&offset=0"), format!("{path}&cursor=first"), by_offset, by_cursor] {
            line.push_str(&format!(" {:>9.2}", milliseconds(&reader, &path).await));
        }
        println!("{line}");
    }
}
