//! What `twistcli console export kubernetes` writes: good for the API of Kubernetes, the same as the Helm chart, and a
//! configuration that the daemon takes.

use std::{
    fs,
    io::Write,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Command, Output, Stdio},
};

use serde_json::{Value, json};

use crate::terminal::Terminal;

/// Where scripts/check.sh installs the schemas, and Helm as a library.
const PYTHON: &str = "target/kubernetes/bin/python";

fn export(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_twistcli"));
    command.args(["console", "export", "kubernetes"]).args(arguments).output().unwrap()
}

fn text(arguments: &[&str]) -> String {
    let output = export(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// The value that a line of a manifest begins with.
fn value_of<'a>(manifests: &'a str, key: &str) -> Vec<&'a str> {
    manifests.lines().filter_map(|line| line.trim().strip_prefix(key)?.strip_prefix(": ")).collect()
}

/// The manifests as JSON, checked; none where the schemas are missing.
fn checked(manifests: &str, values: &Value) -> Option<Vec<Value>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    if !root.join(PYTHON).exists() {
        // As in the browser tests: CI installs what is needed, so there it is a mistake.
        assert!(!std::env::var("CI").is_ok_and(|ci| ci == "true"), "{PYTHON} is missing");
        println!("skipped: {PYTHON} is missing; scripts/check.sh installs it with pip where it can");
        return None;
    }
    let mut child = Command::new(root.join(PYTHON))
        .args(["tests/cli/kubernetes.py", "packaging/helm/twistlock-console", &values.to_string()])
        .current_dir(root)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(manifests.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{manifests}");
    Some(serde_json::from_slice(&output.stdout).unwrap())
}

/// Has the daemon read the configuration of a pod.
fn check_config(manifests: &str) {
    let start = manifests.find("  twistlock.cfg: |\n").unwrap();
    let lines = manifests[start..].lines().skip(1).map_while(|line| line.strip_prefix("    "));
    let config = lines.map(|line| format!("{line}\n")).collect::<String>();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("twistlock.cfg");
    fs::write(&file, &config).unwrap();
    let mut daemon = Command::new(env!("CARGO_BIN_EXE_twistlockd"));
    daemon.arg("check-config").arg(&file).env("TWISTLOCK_POD_ADDRESS", "twistlock-console-0.twistlock-members");
    let output = daemon.output().unwrap();
    assert!(output.status.success(), "{config}\n{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn manifests_are_those_of_the_chart_and_good_for_the_api() {
    let alone = text(&[]);
    assert!(!alone.contains("kind: Secret") && !alone.contains("{{") && !alone.contains("CLUSTERED"), "{alone}");
    check_config(&alone);
    let pool = text(&["--clustered-db", "--size", "5", "--storage-class", "fast", "--storage", "9Gi"]);
    check_config(&pool);
    let secret = value_of(&pool, "secret")[0].trim_matches('"');
    assert_eq!(secret.len(), 64, "{pool}");
    assert_ne!(text(&["--clustered-db"]), text(&["--clustered-db"]), "each pool has a secret of its own");
    let Some(found) = checked(&alone, &json!({})) else { return };
    let kinds = |found: &[Value]| found.iter().map(|one| one["kind"].as_str().unwrap().to_owned()).collect::<Vec<_>>();
    assert_eq!(kinds(&found), ["ConfigMap", "NetworkPolicy", "Service", "Service", "StatefulSet"]);
    assert_eq!(found[4]["spec"]["replicas"], 1);
    let values =
        json!({ "clusteredDb": true, "size": 5, "storageClass": "fast", "storage": "9Gi", "poolSecret": secret });
    let found = checked(&pool, &values).unwrap();
    let all = ["ConfigMap", "NetworkPolicy", "PodDisruptionBudget", "Secret", "Service", "Service", "StatefulSet"];
    assert_eq!(kinds(&found), all);
    a_pod_has_no_rights(&found[6]["spec"]);
    assert_eq!(found[6]["spec"]["replicas"], 5);
    assert_eq!(found[6]["spec"]["volumeClaimTemplates"][0]["spec"]["storageClassName"], "fast");
    // Members find each other before one of them is Ready.
    let headless = found.iter().find(|one| one["metadata"]["name"] == found[6]["spec"]["serviceName"]).unwrap();
    assert_eq!(
        (&headless["spec"]["clusterIP"], &headless["spec"]["publishNotReadyAddresses"]),
        (&json!("None"), &json!(true))
    );
}

/// As the standard "restricted" of Kubernetes asks for, and more.
fn a_pod_has_no_rights(set: &Value) {
    let pod = &set["template"]["spec"];
    let (of_pod, of_container) = (&pod["securityContext"], &pod["containers"][0]["securityContext"]);
    assert_eq!(of_pod["runAsNonRoot"], true);
    assert_eq!(of_pod["seccompProfile"]["type"], "RuntimeDefault");
    assert_eq!(pod["automountServiceAccountToken"], false);
    let expected = json!({
        "allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true, "capabilities": { "drop": ["ALL"] },
    });
    assert_eq!(of_container, &expected);
}

#[test]
fn a_secret_is_written_only_where_it_is_asked_for() {
    let on_terminal = |more: &[&str]| {
        let command = [env!("CARGO_BIN_EXE_twistcli"), "console", "export", "kubernetes", "--clustered-db"];
        Terminal::run(&[&command[..], more].concat(), &[]).wait_end().1
    };
    let hidden = on_terminal(&[]);
    assert!(hidden.contains("kind: StatefulSet") && !hidden.contains("kind: Secret"), "{hidden}");
    assert!(hidden.contains("the Secret is not shown on a terminal"), "{hidden}");
    assert!(on_terminal(&["--show-secret"]).contains("kind: Secret"));
    assert!(!text(&["--clustered-db", "--without-secret"]).contains("kind: Secret"));
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("pool.yaml");
    let arguments = ["--clustered-db", "-o", file.to_str().unwrap()];
    assert_eq!(text(&arguments), "");
    assert!(fs::read_to_string(&file).unwrap().contains("kind: Secret"));
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    let again = export(&arguments);
    let said = String::from_utf8(again.stderr).unwrap();
    assert!(again.status.code() == Some(74) && said.contains("pool.yaml: File exists"), "{said}");
    let even = export(&["--clustered-db", "--size", "4"]);
    assert!(String::from_utf8(even.stderr).unwrap().contains("4 members tolerate no more failures than 3 do"));
}
