//! Users, their roles and sessions, and what is audited of them.

use serde_json::{Value, json};

use super::node::{Node, PASSWORD};

const USERS: &str = "/api/v1/users";
const LOGIN: &str = "/api/v1/authenticate";

fn started() -> (Node, String) {
    let node = Node::start();
    node.serve(1);
    node.signup();
    let token = node.token();
    (node, token)
}

/// Status of a request without an interest in its answer.
fn status(node: &Node, method: &str, path: &str, auth: &str, body: Value) -> u16 {
    node.call_port(super::HTTPS, method, path, Some(auth), body).unwrap().0
}

#[test]
fn users_come_change_and_go_and_an_administrator_stays() {
    let (node, admin) = started();
    let user = |name: &str, role: &str| json!({"username": name, "password": PASSWORD, "role": role});
    for (name, role) in [("olga", "operator"), ("Ägidius / 7", "auditor")] {
        assert_eq!(status(&node, "POST", USERS, &admin, user(name, role)), 200);
    }
    let auth = Some(&*admin);
    node.fails(409, "POST", USERS, auth, user("olga", "auditor"));
    node.fails(422, "POST", USERS, auth, user("x", "Administrator"));
    node.fails(400, "POST", USERS, auth, user("a\r\nSet-Cookie: x=y", "auditor"));
    node.fails(400, "POST", USERS, auth, user("..", "auditor"));
    node.fails(404, "PUT", USERS, auth, json!({"username": "nobody"}));
    node.fails(404, "DELETE", "/api/v1/users/nobody", auth, Value::Null);
    let text = node.fails(409, "DELETE", "/api/v1/users/admin", auth, Value::Null);
    assert!(text.contains("themselves"), "{text}");
    let text = node.fails(409, "PUT", USERS, auth, json!({"username": "admin", "role": "auditor"}));
    assert!(text.contains("last Administrator"), "{text}");

    let reply = node.send("GET", &format!("{USERS}?limit=1&offset=1"), &[("authorization", &admin)], "");
    let page: Value = serde_json::from_str(&reply.text).unwrap();
    assert_eq!((reply.header("x-total-count"), &page[0]["username"]), ("3", &json!("olga")));
    assert!(!reply.text.contains("argon2"), "no hash leaves: {}", reply.text);

    // A second Administrator may take the first one's place.
    assert_eq!(status(&node, "PUT", USERS, &admin, json!({"username": "olga", "role": "admin"})), 200);
    let olga = node.basic("olga", PASSWORD);
    assert_eq!(status(&node, "DELETE", "/api/v1/users/%C3%84gidius%20%2F%207", &olga, Value::Null), 200);
    assert_eq!(status(&node, "DELETE", "/api/v1/users/admin", &olga, Value::Null), 200);
    node.fails(401, "GET", USERS, auth, Value::Null);
    node.fails(401, "GET", USERS, Some(&node.basic("admin", PASSWORD)), Value::Null);
}

#[test]
fn a_change_of_a_user_ends_the_sessions_and_the_old_password() {
    let (node, admin) = started();
    let basic = node.add_user("olga", "operator");
    let login = |password: &str| {
        let answer = node.ok("POST", LOGIN, None, json!({"username": "olga", "password": password}));
        format!("Bearer {}", answer["token"].as_str().unwrap())
    };
    let token = login(PASSWORD);
    let tag = json!({"name": "by olga"});
    node.ok("POST", "/api/v1/tags", Some(&token), tag.clone());
    assert_eq!(status(&node, "PUT", USERS, &admin, json!({"username": "olga", "role": "auditor"})), 200);
    node.fails(401, "GET", "/api/v1/tags", Some(&token), Value::Null);
    node.fails(403, "POST", "/api/v1/tags", Some(&basic), tag);

    let token = login(PASSWORD);
    let passwords = |old: &str, new: &str| json!({"oldPassword": old, "newPassword": new});
    let own = "/api/v1/users/password";
    node.fails(403, "PUT", own, Some(&token), passwords("wrong password", "battery staple"));
    node.fails(400, "PUT", own, Some(&token), passwords(PASSWORD, "short"));
    assert_eq!(status(&node, "PUT", own, &token, passwords(PASSWORD, "battery staple")), 200);
    node.fails(401, "GET", "/api/v1/tags", Some(&token), Value::Null);
    node.fails(401, "GET", "/api/v1/tags", Some(&basic), Value::Null);

    let token = login("battery staple");
    let strong = json!({"strongPassword": true});
    assert_eq!(status(&node, "POST", "/api/v1/settings/logon", &admin, strong), 200);
    node.fails(400, "PUT", own, Some(&token), passwords("battery staple", "battery staple 2"));
    assert_eq!(status(&node, "PUT", own, &token, passwords("battery staple", "Battery-staple 2")), 200);
    let token = login("Battery-staple 2");
    assert_eq!(status(&node, "DELETE", "/api/v1/users/olga", &admin, Value::Null), 200);
    node.fails(401, "GET", "/api/v1/tags", Some(&token), Value::Null);
}

#[test]
fn each_change_and_each_login_is_audited() {
    let (node, admin) = started();
    node.fails(401, "POST", LOGIN, None, json!({"username": "=cmd()", "password": "wrong password"}));
    node.ok("POST", "/api/v1/tags", Some(&admin), json!({"name": "a", "color": "#000000"}));
    node.ok("PUT", "/api/v1/tags/a", Some(&admin), json!({"name": "a", "color": "#ffffff"}));
    let auditor = node.add_user("anna", "auditor");
    node.fails(409, "POST", "/api/v1/tags", Some(&admin), json!({"name": "a"}));

    let audits = "/api/v1/audits/mgmt";
    let rows = node.ok("GET", audits, Some(&auditor), Value::Null);
    let rows: Vec<_> = rows.as_array().unwrap().iter().collect();
    let told = |row: &Value| {
        let text = |field: &str| row[field].as_str().unwrap().to_owned();
        format!("{} {} {} {}", text("user"), text("action"), text("what"), row["ok"])
    };
    let expected = [
        "anna login  true",
        "admin create tag false",
        "admin create user 'anna' true",
        "admin replace tag 'a' true",
        "admin create tag 'a' true",
        "=cmd() login  false",
        "admin login session true",
        "admin signup user 'admin' true",
    ];
    assert_eq!(rows.iter().map(|row| told(row)).collect::<Vec<_>>(), expected);
    assert_eq!(
        (&rows[1]["outcome"], &rows[1]["difference"]),
        (&json!("refused: tag 'a' exists already"), &Value::Null)
    );
    assert_eq!(rows[3]["difference"], json!({"color": {"old": "#000000", "new": "#ffffff"}}));
    assert_eq!(rows[0]["source"], "127.0.0.1");

    let auth = [("authorization", &*auditor)];
    let reply = node.send("GET", &format!("{audits}?user=admin&limit=2"), &auth, "");
    let page: Value = serde_json::from_str(&reply.text).unwrap();
    assert_eq!((reply.header("x-total-count"), page.as_array().unwrap().len()), ("6", 2));
    let later = rows[0]["time"].as_i64().unwrap() + 1000;
    assert_eq!(node.ok("GET", &format!("{audits}?since={later}"), Some(&auditor), Value::Null), json!([]));
    let reply = node.send("GET", &format!("{audits}?format=csv"), &auth, "");
    assert!(reply.header("content-type").starts_with("text/csv"));
    assert!(reply.text.contains("\"'=cmd()\""), "no formula: {}", reply.text);
    assert_eq!(reply.text.lines().count(), expected.len() + 1);
}

#[test]
fn the_log_is_for_those_who_may_see_it() {
    let (node, admin) = started();
    let lines = node.ok("GET", "/api/v1/logs/console?lines=5", Some(&admin), Value::Null);
    assert!(lines.as_array().is_some_and(|lines| lines.len() <= 5));
    node.fails(400, "GET", "/api/v1/logs/console?lines=0", Some(&admin), Value::Null);
    node.fails(400, "GET", "/api/v1/logs/console?lines=2001", Some(&admin), Value::Null);
    let operator = node.add_user("olga", "operator");
    node.fails(403, "GET", "/api/v1/logs/console", Some(&operator), Value::Null);
}
