//! `twistcli console export kubernetes`: the manifests of a Console or a pool for Kubernetes. Owns nothing of their
//! content: that is the Helm chart's, whose templates are built in. It fills them in as Helm would, and so they use
//! nothing of Helm's language but values, and `if`, `else` and `end` on lines of their own. Must never print a secret
//! on a terminal that did not ask for it.

use std::{
    fs::OpenOptions,
    io::{self, IsTerminal, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use clap::{Args, Subcommand};

use super::stop::Stop;

/// Defaults of all settings, one a line.
const VALUES: &str = include_str!("../../packaging/helm/twistlock-console/values.yaml");
/// What is made of them, in this order.
const TEMPLATES: [&str; 6] = [
    include_str!("../../packaging/helm/twistlock-console/templates/secret.yaml"),
    include_str!("../../packaging/helm/twistlock-console/templates/config.yaml"),
    include_str!("../../packaging/helm/twistlock-console/templates/services.yaml"),
    include_str!("../../packaging/helm/twistlock-console/templates/network.yaml"),
    include_str!("../../packaging/helm/twistlock-console/templates/disruption.yaml"),
    include_str!("../../packaging/helm/twistlock-console/templates/members.yaml"),
];
/// The name of `CONSOLE_CN` is `twistlock-console.NAMESPACE.svc`, of which a certificate takes 64 characters.
const LONGEST_NAMESPACE: usize = 42;

const KUBERNETES_HELP: &str = "\
Without --clustered-db: one Console with a volume. With it: a pool whose members find each other by the
names of their pods. docs/kubernetes.md says what to do next. The same is there as a Helm chart, in
packaging/helm.

A pool has a Secret, which is made anew each time: use --without-secret for an export over a pool that
runs. On a terminal it is left out.

Exit code: 0 done, 64 wrong command line, 74 the output cannot be written.

Examples:
  twistcli console export kubernetes --clustered-db --namespace twistlock -o pool.yaml
  twistcli console export kubernetes --clustered-db --size 5 | kubectl apply -f -";

/// Commands of `twistcli console`.
#[derive(Debug, Subcommand)]
pub(super) enum Console {
    /// Write what another system needs to run Consoles
    #[command(subcommand)]
    Export(Export),
}

/// Commands of `twistcli console export`.
#[derive(Debug, Subcommand)]
pub(super) enum Export {
    /// Write manifests for Kubernetes
    #[command(after_help = KUBERNETES_HELP)]
    Kubernetes(KubernetesArgs),
}

#[derive(Debug, Args)]
pub(super) struct KubernetesArgs {
    /// A pool of members that share the database
    #[arg(long)]
    clustered_db: bool,
    /// Members of the pool, from 3 to 7; better an odd number
    #[arg(long, value_name = "N", default_value = default_of("size"), requires = "clustered_db",
        value_parser = size)]
    size: String,
    /// Namespace, which must exist
    #[arg(long, value_name = "NAME", default_value = "twistlock", value_parser = namespace)]
    namespace: String,
    /// The image, made from packaging/container/Containerfile
    #[arg(long, value_name = "IMAGE", default_value = default_of("image"), value_parser = image)]
    image: String,
    /// Storage class of the volumes [default: that of the cluster]
    #[arg(long, value_name = "CLASS", value_parser = storage_class)]
    storage_class: Option<String>,
    /// Size of each member's volume for the database
    #[arg(long, value_name = "SIZE", default_value = default_of("storage"), value_parser = quantity)]
    storage: String,
    /// Size of each member's volume for backups
    #[arg(long, value_name = "SIZE", default_value = default_of("backupStorage"), value_parser = quantity)]
    backup_storage: String,
    /// Write to a new file, which only you can read, instead of standard output
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Leave the Secret out: the pool has it already
    #[arg(long, conflicts_with = "show_secret")]
    without_secret: bool,
    /// Show the Secret on a terminal, too
    #[arg(long)]
    show_secret: bool,
}

/// Runs `twistcli console`.
///
/// # Errors
/// When the output cannot be written.
pub(super) fn run(command: &Console) -> Result<(), Stop> {
    let Console::Export(Export::Kubernetes(args)) = command;
    let hidden = args.output.is_none() && io::stdout().is_terminal() && !args.show_secret;
    let secret = match args.clustered_db && !args.without_secret && !hidden {
        true => data_encoding::HEXLOWER.encode(&rand::random::<[u8; 32]>()),
        false => String::new(),
    };
    let text = manifests(args, &secret);
    match &args.output {
        Some(path) => write_privately(path, &text)?,
        None => io::stdout().write_all(text.as_bytes())?,
    }
    if args.clustered_db && hidden && !args.without_secret {
        eprintln!("twistcli: the Secret is not shown on a terminal: use -o FILE, a pipe, or --show-secret");
    }
    if args.clustered_db && matches!(args.size.as_str(), "4" | "6") {
        let odd = if args.size == "4" { "3" } else { "5" };
        eprintln!("twistcli: {} members tolerate no more failures than {odd} do: better an odd number", args.size);
    }
    Ok(())
}

fn write_privately(path: &Path, text: &str) -> io::Result<()> {
    let write = || {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()
    };
    write().map_err(|error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))
}

/// All manifests, as one stream of YAML documents.
fn manifests(args: &KubernetesArgs, secret: &str) -> String {
    let chosen = [
        (".Values.clusteredDb", if args.clustered_db { "true" } else { "" }),
        (".Values.poolSecret", secret),
        (".Values.size", &args.size),
        (".Values.image", &args.image),
        (".Values.storageClass", args.storage_class.as_deref().unwrap_or_default()),
        (".Values.storage", &args.storage),
        (".Values.backupStorage", &args.backup_storage),
        (".Release.Namespace", &args.namespace),
    ];
    let value = |name: &str| match chosen.iter().find(|(chosen, _)| *chosen == name) {
        Some((_, value)) => *value,
        None => default_of(name.trim_start_matches(".Values.")),
    };
    let filled = TEMPLATES.map(|template| fill(template, &value));
    filled.iter().filter(|text| !text.is_empty()).map(|text| format!("---\n{text}")).collect()
}

/// The default of a setting of the chart; empty if there is none.
fn default_of(name: &str) -> &'static str {
    let value = VALUES.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
    value.unwrap_or_default().trim_matches('"')
}

/// Fills a template in. A condition is true unless its value is empty.
fn fill<'a>(template: &str, value: &impl Fn(&str) -> &'a str) -> String {
    let mut text = String::new();
    let mut open: Vec<bool> = Vec::new();
    for line in template.lines() {
        match line.strip_prefix("{{- ").and_then(|rest| rest.strip_suffix(" }}")) {
            Some("else") => open.iter_mut().last().into_iter().for_each(|here| *here = !*here),
            Some("end") => drop(open.pop()),
            Some(condition) => open.push(!value(condition.trim_start_matches("if ")).is_empty()),
            None if open.iter().all(|here| *here) => {
                let mut parts = line.split("{{ ");
                text.push_str(parts.next().unwrap_or_default());
                for part in parts {
                    let (name, rest) = part.split_once(" }}").unwrap_or((part, ""));
                    text.push_str(value(name));
                    text.push_str(rest);
                }
                text.push('\n');
            }
            None => {}
        }
    }
    text
}

fn size(text: &str) -> Result<String, &'static str> {
    if matches!(text, "3" | "4" | "5" | "6" | "7") { Ok(text.to_owned()) } else { Err("a pool has 3 to 7 members") }
}

/// What Kubernetes takes for a name between dots.
fn is_label(text: &str) -> bool {
    let inside = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=63).contains(&text.len()) && text.bytes().all(inside) && !text.starts_with('-') && !text.ends_with('-')
}

fn namespace(text: &str) -> Result<String, String> {
    if is_label(text) && text.len() <= LONGEST_NAMESPACE {
        return Ok(text.to_owned());
    }
    Err(format!("it must be lower-case letters, digits and -, up to {LONGEST_NAMESPACE} of them"))
}

fn storage_class(text: &str) -> Result<String, String> {
    if text.len() <= 253 && text.split('.').all(is_label) {
        return Ok(text.to_owned());
    }
    Err("it must be a name of lower-case letters, digits, - and .".to_owned())
}

fn image(text: &str) -> Result<String, String> {
    let inside = |byte: u8| byte.is_ascii_alphanumeric() || b"-_./:@".contains(&byte);
    if (1..=255).contains(&text.len()) && text.bytes().all(inside) {
        return Ok(text.to_owned());
    }
    Err("it must be a name such as registry.example.com/twistlock-ha:1.0.0".to_owned())
}

fn quantity(text: &str) -> Result<String, String> {
    let number = ["Mi", "Gi", "Ti"].iter().find_map(|unit| text.strip_suffix(unit));
    let fits = |digits: &&str| {
        (1..=6).contains(&digits.len()) && digits.bytes().all(|byte| byte.is_ascii_digit()) && !digits.starts_with('0')
    };
    match number.filter(fits) {
        Some(_) => Ok(text.to_owned()),
        None => Err("it must be a whole number with its unit: Mi, Gi or Ti".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_use_only_what_is_filled_in() {
        let mut used = Vec::new();
        for template in TEMPLATES {
            let mut depth = 0;
            for line in template.lines() {
                let Some(at) = line.find("{{") else { continue };
                if let Some(word) = line.strip_prefix("{{- ").and_then(|rest| rest.strip_suffix(" }}")) {
                    match word.split_once(' ') {
                        Some(("if", name)) => {
                            depth += 1;
                            used.push(name.to_owned());
                        }
                        _ if word == "end" => depth -= 1,
                        _ => assert_eq!(word, "else", "{line}"),
                    }
                } else {
                    let name = line[at..].strip_prefix("{{ ").and_then(|rest| rest.split_once(" }}"));
                    let (name, rest) = name.unwrap_or_else(|| panic!("{line}"));
                    assert!(!rest.contains("{{"), "one value in a line: {line}");
                    used.push(name.to_owned());
                }
            }
            assert_eq!(depth, 0, "{template}");
        }
        used.retain(|name| name != ".Release.Namespace");
        for name in &used {
            let name = name.strip_prefix(".Values.").unwrap_or_else(|| panic!("{name}"));
            assert!(VALUES.lines().any(|line| line.starts_with(&format!("{name}: "))), "no default of {name}");
        }
        for line in VALUES.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
            let (name, value) = line.split_once(": ").unwrap_or_else(|| panic!("{line}"));
            assert!(used.contains(&format!(".Values.{name}")), "{name} is not used");
            assert!(!value.contains('#'), "{line}");
        }
    }

    #[test]
    fn branches_are_taken_as_helm_takes_them() {
        let template = "a\n{{- if .Values.x }}\nb: \"{{ .Values.y }}\"\n{{- if .Values.no }}\nc\n{{- else }}\nd\n{{- end }}\n\
                        {{- else }}\ne\n{{- end }}\nf\n";
        let fill = |x: &'static str| {
            fill(template, &move |name: &str| match name {
                ".Values.x" => x,
                ".Values.y" => "7",
                _ => "",
            })
        };
        assert_eq!(fill("true"), "a\nb: \"7\"\nd\nf\n");
        assert_eq!(fill(""), "a\ne\nf\n");
    }

    #[test]
    fn the_chart_is_of_this_version() {
        let chart = include_str!("../../packaging/helm/twistlock-console/Chart.yaml");
        let version = crate::cluster::program_version();
        assert!(chart.contains(&format!("\nversion: {version}\nappVersion: \"{version}\"\n")), "{chart}");
        assert_eq!(default_of("image"), format!("twistlock-ha:{version}"));
    }

    #[test]
    fn nothing_gets_into_a_manifest_that_could_end_a_value() {
        for bad in ["", "A", "a\"", "a\nb", "-a", "a-", "ä", &"a".repeat(43)] {
            assert!(namespace(bad).is_err(), "{bad:?}");
        }
        for bad in ["a\"", "a b", "", "a\n"] {
            assert!(image(bad).is_err() && storage_class(bad).is_err(), "{bad:?}");
        }
        for bad in ["10", "0Gi", "10G", "-1Gi", "1.5Gi", "10Gi\"", "9999999Gi", "Gi"] {
            assert!(quantity(bad).is_err(), "{bad:?}");
        }
        assert!(namespace("twistlock-2").is_ok() && quantity("512Mi").is_ok());
        assert!(image("registry:5000/a/b@sha256:00").is_ok() && storage_class("fast.ssd").is_ok());
    }
}
