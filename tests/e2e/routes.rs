//! Every route of the API that changes something, as the Console's own document lists them: each leaves its row in the audit
//! when it is done, and when it is refused. A new route fails here until it says how.

use std::{
    collections::BTreeSet,
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use twistlock_ha::{backup::Started, dev::ClusterFile, node::Status};

use super::{cluster::Cluster, writers::Pen};

/// How long a row may take: that of a backup comes with its end.
const LIMIT: Duration = Duration::from_secs(30);
const PASSWORD: &str = "Correct-Horse-7-Battery";
/// Routes whose success is not tried here, and why; each is refused here all the same, if a role can be.
const ELSEWHERE: &[(&str, &str)] = &[
    ("POST /signup", "once in a cluster's life, before there is anybody; its row is the first of every audit"),
    ("GET /authenticate/renew", "goes on with a session whose login has its row"),
    ("POST /high-availability/requests", "by a host with a join token: tests/join"),
    ("DELETE /high-availability/requests/{id}", "needs a host that asks: tests/join"),
    ("POST /high-availability/apply", "needs hosts that ask: tests/join"),
    ("DELETE /high-availability/members/{member}", "takes a member away: tests/join"),
    ("POST /clustered-db/settings", "needs a pool: tests/e2e/pool.rs finds its row"),
    ("POST /clustered-db/candidates", "needs hosts that wait: tests/e2e/waiting.rs"),
    ("POST /clustered-db/members", "needs hosts that wait: tests/e2e/waiting.rs finds its row"),
    ("DELETE /clustered-db/members/{address}", "takes a member of a pool away: tests/e2e/pool.rs finds its row"),
    ("PUT /high-availability/members/{member}/address", "needs a host that moves: tests/join"),
    ("POST /high-availability/switchover", "the same operation as of twistcli, which is looked at beside this"),
    ("POST /high-availability/rotate-ca", "all connections begin anew: the e2e test of rotations"),
    ("POST /high-availability/drill", "a drill is one row, which is looked at beside this"),
    ("POST /high-availability/drill/writes", "part of a drill, which has its row"),
    ("GET /high-availability/drill/writes", "part of a drill, which has its row"),
    ("POST /high-availability/drill/takeover", "part of a drill, which has its row"),
    ("POST /high-availability/drill/end", "writes the outcome into the row of the drill"),
    ("POST /settings/custom-certs", "needs a certificate of its own: the e2e test of certificates"),
    ("DELETE /settings/custom-certs", "needs one that was given: the e2e test of certificates"),
    ("POST /service/start", "needs a service: the e2e test of one"),
    ("POST /service/stop", "needs a service: the e2e test of one"),
    ("POST /service/restart", "needs a service: the e2e test of one"),
    ("POST /defenders/register", "by a host with a token: the e2e test of Defenders"),
    ("DELETE /defenders/{id}", "needs a Defender: the e2e test of Defenders"),
    ("POST /backups/{id}/restore", "replaces the database: the e2e test of backups finds its row in the new one"),
];

/// A route that changes something, or hands out what only few may have.
#[derive(Clone, Debug)]
struct Route {
    method: String,
    path: String,
    /// As its row has it; none if the handler decides.
    action: Option<String>,
    /// Who may; empty if nobody is asked for a role.
    roles: Vec<String>,
    body: bool,
}

impl Route {
    fn key(&self) -> String {
        format!("{} {}", self.method, self.path)
    }
}

fn routes(pen: &Pen, node: usize) -> Vec<Route> {
    let document: Value = serde_json::from_str(&pen.call(node, "GET", "/openapi.json", None).1).unwrap();
    let mut all = Vec::new();
    for (path, methods) in document["paths"].as_object().unwrap() {
        let Some(path) = path.strip_prefix("/api/v1") else { continue };
        for (method, operation) in methods.as_object().unwrap() {
            let reads = matches!(&**method, "get" | "head");
            let audit = operation["x-audit"].as_str();
            assert!(reads || audit.is_some(), "{method} {path} does not say what of it is in the audit");
            let Some(audit) = audit else { continue };
            let roles = operation["x-roles"].as_array().into_iter().flatten();
            all.push(Route {
                method: method.to_ascii_uppercase(),
                path: path.to_owned(),
                action: (audit != "handler").then(|| audit.to_owned()),
                roles: roles.map(|role| role.as_str().unwrap().to_owned()).collect(),
                body: !operation["requestBody"].is_null(),
            });
        }
    }
    all
}

struct Desk<'a> {
    node: usize,
    admin: Pen,
    file: &'a ClusterFile,
    tried: BTreeSet<String>,
}

impl Desk<'_> {
    fn rows(&self) -> Vec<Value> {
        let (status, text) = self.admin.call(self.node, "GET", "/audits/mgmt?limit=20", None);
        assert_eq!(status, 200, "{text}");
        serde_json::from_str(&text).unwrap()
    }

    fn newest(&self) -> i64 {
        self.rows().first().and_then(|row| row["id"].as_i64()).unwrap_or(0)
    }

    /// The row that was written since, with this action and outcome.
    fn wait_row(&self, since: i64, key: &str, (user, action, ok): (&str, &str, bool)) -> Value {
        let begin = Instant::now();
        loop {
            let rows = self.rows();
            let new = rows.iter().filter(|row| row["id"].as_i64().unwrap() > since);
            let mut fitting = new.filter(|row| row["action"] == action && row["user"] == user && row["ok"] == ok);
            if let Some(row) = fitting.next() {
                assert!(fitting.next().is_none(), "{key} leaves more than one row: {rows:#?}");
                return row.clone();
            }
            assert!(begin.elapsed() < LIMIT, "{key} leaves no row {action:?} of {user}, ok: {ok}: {rows:#?}");
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Has something done, and finds its row.
    fn done(&mut self, key: &str, action: &str, path: &str, body: Option<Value>) -> String {
        let since = self.newest();
        let method = key.split(' ').next().unwrap();
        let (status, text) = self.admin.call(self.node, method, path, body);
        assert!((200..300).contains(&status), "{key}: {status} {text}");
        let row = self.wait_row(since, key, (&self.file.user, action, true));
        assert!(row["outcome"].is_null() || row["outcome"] == "done", "{key}: {row}");
        self.tried.insert(key.to_owned());
        text
    }

    fn changes_of_the_console(&mut self) {
        let user = json!({ "username": "of-routes", "password": PASSWORD, "role": "operator" });
        self.done("POST /users", "create", "/users", Some(user));
        self.done("PUT /users", "change", "/users", Some(json!({ "username": "of-routes", "role": "auditor" })));
        for method in ["POST", "PUT"] {
            self.done(&format!("{method} /settings/logon"), "set", "/settings/logon", Some(json!({})));
        }
        self.done("POST /settings/retention", "set", "/settings/retention", Some(json!({})));
        self.done("POST /defenders/policy", "set", "/defenders/policy", Some(json!({ "paths": [] })));
        self.done("POST /defenders/tokens", "invite", "/defenders/tokens", Some(json!({})));
        self.done("POST /defenders/install-script", "invite", "/defenders/install-script", Some(json!({})));
        self.done("GET /scripts/defender.sh", "invite", "/scripts/defender.sh", None);
        self.done("POST /settings/defenders", "set", "/settings/defenders", Some(json!({})));
        let tag = json!({ "name": "of-routes", "color": "#336699", "description": "" });
        self.done("POST /tags", "create", "/tags", Some(tag.clone()));
        self.done("PUT /tags/{name}", "replace", "/tags/of-routes", Some(tag));
        self.done("DELETE /tags/{name}", "delete", "/tags/of-routes", None);
    }

    fn operations(&mut self) {
        let (_, now) = self.admin.call(self.node, "GET", "/settings/certs", None);
        let names = serde_json::from_str::<Value>(&now).unwrap()["consoleSAN"].clone();
        let more = [names.as_array().unwrap().as_slice(), &["routes.example".into()]].concat();
        for names in [json!(more), names] {
            self.done("POST /settings/certs", "set", "/settings/certs", Some(json!({ "consoleSAN": names })));
        }
        let pause = Some(json!({ "minutes": 1 }));
        self.done("POST /high-availability/pause", "pause", "/high-availability/pause", pause);
        self.done("POST /high-availability/resume", "resume", "/high-availability/resume", None);
        self.done("POST /high-availability/rotate-key", "rotate", "/high-availability/rotate-key", None);
        let webhooks = Some(json!({ "webhooks": [] }));
        self.done("POST /settings/notifications", "set", "/settings/notifications", webhooks);
        self.done("POST /settings/notifications/test", "test", "/settings/notifications/test", None);
        let invite = "/high-availability/join-script";
        self.done("GET /high-availability/join-script", "invite", invite, None);
        self.done("GET /scripts/console.sh", "invite", "/scripts/console.sh", None);
        self.done("DELETE /high-availability/join-script", "uninvite", invite, None);
    }

    fn backups(&mut self) {
        let made = self.done("POST /backups", "create", "/backups", Some(json!("of-routes")));
        let made: Started = serde_json::from_str(&made).unwrap();
        let path = format!("/backups/{}", made.id);
        self.done("POST /backups/{id}/verify", "verify", &format!("{path}/verify"), None);
        let renamed = self.done("PATCH /backups/{id}", "rename", &path, Some(json!("renamed")));
        let renamed: Value = serde_json::from_str(&renamed).unwrap();
        let path = format!("/backups/{}", renamed["id"].as_str().unwrap());
        let since = self.newest();
        assert_eq!(self.admin.download(self.node, &path).0, 200);
        self.wait_row(since, "GET /backups/{id}", (&self.file.user, "download", true));
        self.tried.insert("GET /backups/{id}".to_owned());
        self.done("DELETE /backups/{id}", "delete", &path, None);
    }

    /// What whoever may only look at the audit is refused: all that needs another role.
    fn refused(&self, all: &[Route], auditor: &Pen) -> usize {
        let mut tried = 0;
        for route in all.iter().filter(|route| !route.roles.is_empty()) {
            if route.roles.iter().any(|role| role == "auditor") {
                continue;
            }
            let parts = route.path.split('/').map(|part| if part.starts_with('{') { "not-there" } else { part });
            let (since, path) = (self.newest(), parts.collect::<Vec<_>>().join("/"));
            let body = route.body.then(|| json!([]));
            let (status, text) = auditor.call(self.node, &route.method, &path, body);
            assert_eq!(status, 403, "{}: {text}", route.key());
            let action = route.action.as_deref();
            let action = action.unwrap_or_else(|| panic!("{} is refused without a row", route.key()));
            let row = self.wait_row(since, &route.key(), ("of-routes", action, false));
            let why = row["outcome"].as_str().unwrap();
            assert!(why.starts_with("refused: this needs the role "), "{}: {row}", route.key());
            assert!(!path.contains("not-there") || row["what"].as_str().unwrap().contains("not-there"), "{row}");
            tried += 1;
        }
        tried
    }

    /// One's own password and session, as a user whom nobody misses.
    fn sessions(&mut self) {
        let user = ClusterFile { user: "of-routes".to_owned(), password: PASSWORD.to_owned(), ..self.file.clone() };
        let since = self.newest();
        let pen = Pen::new(&user);
        self.wait_row(since, "POST /authenticate", ("of-routes", "login", true));
        let wrong = json!({ "oldPassword": "not the one of now", "newPassword": format!("{PASSWORD}-2") });
        let right = json!({ "oldPassword": PASSWORD, "newPassword": format!("{PASSWORD}-2") });
        for (body, ok) in [(json!([]), false), (wrong, false), (right, true)] {
            let since = self.newest();
            let (status, text) = pen.call(self.node, "PUT", "/users/password", Some(body));
            assert_eq!(status == 200, ok, "{status} {text}");
            self.wait_row(since, "PUT /users/password", ("of-routes", "change", ok));
        }
        let pen = Pen::new(&ClusterFile { password: format!("{PASSWORD}-2"), ..user });
        let since = self.newest();
        assert_eq!(pen.call(self.node, "POST", "/logout", None).0, 200);
        self.wait_row(since, "POST /logout", ("of-routes", "logout", true));
        let keys = ["POST /authenticate", "PUT /users/password", "POST /logout"];
        self.tried.extend(keys.map(str::to_owned));
        self.done("DELETE /users/{name}", "delete", "/users/of-routes", None);
    }
}

/// See the module.
pub fn each_leaves_its_rows(cluster: &Cluster) {
    let (file, node) = (cluster.file(), cluster.primary());
    let mut desk = Desk { node, admin: Pen::new(&file), file: &file, tried: BTreeSet::new() };
    let all = routes(&desk.admin, node);
    desk.changes_of_the_console();
    let rekeyed = |status: &Status| status.membership.shared.rekey.is_none();
    cluster.wait_for("the end of an earlier rotation", |all| all.iter().flatten().all(rekeyed));
    desk.operations();
    desk.backups();
    let user = ClusterFile { user: "of-routes".to_owned(), password: PASSWORD.to_owned(), ..file.clone() };
    let refused = desk.refused(&all, &Pen::new(&user));
    desk.sessions();

    let keys: BTreeSet<String> = all.iter().map(Route::key).collect();
    let known: BTreeSet<String> =
        ELSEWHERE.iter().map(|(key, _)| (*key).to_owned()).chain(desk.tried.clone()).collect();
    assert_eq!(known.len(), ELSEWHERE.len() + desk.tried.len(), "a route that is tried needs no reason why not");
    assert_eq!(keys, known, "each route that changes something is tried, or has a reason why not");
    println!("  {} routes change something, {} were done, {refused} refused", keys.len(), desk.tried.len());
}
