//! The API against its own document: schemathesis makes requests from it, good and bad ones, and checks each answer.

use std::{path::Path, process::Command, time::Instant};

use super::node::Node;

/// Where scripts/check.sh installs it.
const PROGRAM: &str = "target/schemathesis/bin/schemathesis";
/// Requests for each route and phase: some ten seconds in all.
const EXAMPLES: &str = "12";
/// What the document does not promise (that everything valid is accepted), and what would need a user of its own.
const NOT_CHECKED: &str = "positive_data_acceptance,ignored_auth,missing_required_header,use_after_free,\
                           ensure_resource_availability,object_level_authorization";

#[test]
fn schemathesis_finds_no_answer_that_the_document_does_not_describe() {
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join(PROGRAM);
    if !program.exists() {
        // As in the browser tests: CI installs what is needed, so there it is a mistake.
        assert!(!std::env::var("CI").is_ok_and(|ci| ci == "true"), "{PROGRAM} is missing");
        println!("skipped: {PROGRAM} is missing; scripts/check.sh installs it with pip where it can");
        return;
    }
    let node = Node::start();
    node.serve(1);
    node.hold_lease();
    node.signup();
    let url = format!("https://{}:{}", node.address, super::HTTPS);
    let begin = Instant::now();
    let output = Command::new(program)
        .args(["run", &format!("{url}/api/v1/openapi.json"), "--url", &url, "--checks", "all"])
        .args(["--exclude-checks", NOT_CHECKED, "--phases", "examples,coverage,fuzzing", "--max-examples", EXAMPLES])
        .args(["--seed", "1", "--no-color", "--workers", "2", "--continue-on-failure", "--warnings", "off"])
        // It would end its own session, or have no end.
        .args(["--exclude-path", "/api/v1/logout", "--exclude-path", "/api/v1/high-availability/stream"])
        .args(["--header", &format!("Authorization: {}", node.token())])
        .arg("--tls-verify")
        .arg(node.certificate())
        .env("SCHEMATHESIS_HOOKS", "")
        .current_dir(node.certificate().parent().unwrap())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    println!("{text}\nschemathesis took {:?}", begin.elapsed());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
