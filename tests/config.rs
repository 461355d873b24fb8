//! `twistlock.cfg` from the outside: the shipped example, the messages, and any bytes at all.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use proptest::prelude::*;
use twistlock_ha::config::{
    self, Config, ConfigErrors, FirstState, Loaded, LogFormat, LogLevel, MAX_FILE, MAX_LINE, MAX_REPORTED, Severity,
    service::{PortPair, Readiness},
};

fn read(text: &str) -> Result<Loaded, ConfigErrors> {
    config::parse(text, "twistlock.cfg", &|_| None)
}

/// The messages about a text that is not allowed.
fn problems(text: impl AsRef<[u8]>) -> Vec<String> {
    match config::parse(text, "twistlock.cfg", &|_| None) {
        Err(errors) => errors.to_string().lines().map(str::to_owned).collect(),
        Ok(loaded) => panic!("accepted: {loaded:?}"),
    }
}

/// The notes about a text that is allowed.
fn notes(text: &str) -> Vec<String> {
    read(text).expect("valid").notes.iter().map(ToString::to_string).collect()
}

#[test]
fn the_example_is_generated_and_says_nothing_but_the_defaults() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("twistlock.cfg.example");
    let expected = config::render(&Config::default());
    if std::env::var_os("UPDATE_EXPECT").is_some() {
        fs::write(&path, &expected).expect("write the example");
    }
    let example = fs::read_to_string(&path).expect("read the example");
    let differs = example.lines().zip(expected.lines()).find(|(is, should)| is != should);
    assert!(example == expected, "run this test again with UPDATE_EXPECT=1; first difference: {differs:?}");
    let loaded = config::load(&path).expect("valid");
    assert_eq!(loaded, Loaded { config: Config::default(), notes: vec![] });
    assert_eq!(config::check(&path), (format!("{}: valid", path.display()), config::EX_OK));
    assert!(example.lines().any(|line| line.len() == 45 && line.bytes().all(|byte| byte == b'#')));
    assert!(example.lines().all(|line| line.chars().count() <= 120));
}

#[test]
fn an_empty_file_gives_the_defaults() {
    let config = read("").expect("valid").config;
    assert_eq!(config, Config::default());
    assert_eq!(config.management_port_http, None);
    assert_eq!(config.management_port_https, Some(8083));
    assert_eq!(config.communication_port, Some(8084));
    assert_eq!(config.high_availability_port, Some(8086));
    assert_eq!(config.lease, Duration::from_millis(400));
    assert_eq!(config.control_socket_path(), Path::new("/var/lib/twistlock/control.sock"));
    assert!(!config.common_name().is_empty());
}

#[test]
fn every_kind_of_value_is_read() {
    let text = "\u{feff}# comment\r\n\
        MANAGEMENT_PORT_HTTP=\r\n\
        MANAGEMENT_PORT_HTTPS=\"443\"\n\
        COMMUNICATION_PORT=${COMMUNICATION_PORT:-9084} # Defenders\n\
        BIND_ADDRESS=127.0.0.2\n\
        CONSOLE_CN=console.example.org\n\
        DATA_FOLDER='/srv/twist lock'\n\
        CONTROL_SOCKET=${DATA_FOLDER-}/c\n\
        DATA_RECOVERY_ENABLED=false\n\
        HIGH_AVAILABILITY_ENABLED=true\n\
        HIGH_AVAILABILITY_STATE=SECONDARY\n\
        LOG_FORMAT=json\n\
        LOG_LEVEL=debug\n\
        LEASE_MS=1000\nTICK_MS=100\n\
        RAFT_LOG_SEGMENT_MB=8\n\
        CHECKPOINT_SECONDS=5\n\
        DATABASE_PAGE_SIZE=65536\n";
    let Loaded { config, notes } = config::parse(text, "f", &|_| None).expect("valid");
    assert_eq!(notes, []);
    let expected = Config {
        management_port_https: Some(443),
        communication_port: Some(9084),
        bind_address: Some("127.0.0.2".parse().expect("an address")),
        console_cn: Some("console.example.org".to_owned()),
        data_folder: PathBuf::from("/srv/twist lock"),
        control_socket: Some(PathBuf::from("/srv/twist lock/c")),
        data_recovery_enabled: false,
        high_availability_enabled: true,
        high_availability_state: FirstState::Secondary,
        log_format: LogFormat::Json,
        log_level: LogLevel::Debug,
        lease: Duration::from_secs(1),
        tick: Duration::from_millis(100),
        raft_log_segment_bytes: 8 << 20,
        checkpoint_interval: Duration::from_secs(5),
        database_page_size: 65536,
        ..Config::default()
    };
    assert_eq!(config, expected);
}

#[test]
fn variables_come_from_the_environment() {
    let text = "MANAGEMENT_PORT_HTTP=${HTTP-80}\nDATA_FOLDER=${FOLDER:-/fallback}\nLOG_LEVEL=${NONE-warn}\n";
    let env = |name: &str| match name {
        "HTTP" | "FOLDER" => Some(String::new()),
        _ => None,
    };
    let config = config::parse(text, "f", &env).expect("valid").config;
    assert_eq!(config.management_port_http, None);
    assert_eq!(config.data_folder, Path::new("/fallback"));
    assert_eq!(config.log_level, LogLevel::Warn);
}

#[test]
fn the_historical_line_means_the_name_of_the_host() {
    let line = "CONSOLE_CN=$(hostname --fqdn 2>/dev/null); if [[ $? == 1 ]]; then CONSOLE_CN=$(hostname); fi";
    assert_eq!(read(line).expect("valid").config.console_cn, None);
    let other = line.replace("--fqdn", "--ip-address");
    let message = &problems(&other)[0];
    assert!(message.starts_with("twistlock.cfg:1: CONSOLE_CN: found \"$(hostname --ip-address"), "{message}");
    assert!(message.contains("commands are never run"), "{message}");
}

#[test]
fn all_problems_are_reported_at_once() {
    let text = "MANAGEMENT_PORT_HTTPS=70000\n\
        COMMUNICATION_PORT = 8084\n\
        HIGH_AVAILABILITY_STATE=primary\n\
        DATA_FOLDER=relative\n\
        CONSOLE_CN=`id`\n\
        just words\n\
        DATABASE_PAGE_SIZE=1000\n\
        LOG_LEVEL='loud\n";
    let expected = [
        "twistlock.cfg:1: MANAGEMENT_PORT_HTTPS: found \"70000\", allowed: a port from 1 to 65535, or empty for off",
        "twistlock.cfg:2: found \"COMMUNICATION_PORT = 8084\", allowed: KEY=VALUE without blanks around the \"=\"",
        "twistlock.cfg:3: HIGH_AVAILABILITY_STATE: found \"primary\", allowed: PRIMARY or SECONDARY",
        "twistlock.cfg:4: DATA_FOLDER: found \"relative\", allowed: an absolute path without \"..\", up to 512 bytes",
        "twistlock.cfg:5: CONSOLE_CN: found \"`id`\", allowed: a value, ${VAR-default} or ${VAR:-default}; commands are \
         never run (write the value itself)",
        "twistlock.cfg:6: found \"just words\", allowed: KEY=VALUE or a comment that starts with #",
        "twistlock.cfg:7: DATABASE_PAGE_SIZE: found \"1000\", allowed: a power of two from 512 to 65536",
        "twistlock.cfg:8: LOG_LEVEL: found \"'loud\", allowed: a closing ' on the same line",
    ];
    assert_eq!(problems(text), expected);
}

#[test]
fn two_services_may_not_share_a_port() {
    assert_eq!(
        problems("COMMUNICATION_PORT=8083\n"),
        ["twistlock.cfg:1: COMMUNICATION_PORT: found \"8083\", allowed: a port that no other service has \
          (MANAGEMENT_PORT_HTTPS has this one)"]
    );
    assert_eq!(
        problems("COMMUNICATION_PORT=99\nMANAGEMENT_PORT_HTTP=99\n"),
        ["twistlock.cfg:2: MANAGEMENT_PORT_HTTP: found \"99\", allowed: a port that no other service has \
          (COMMUNICATION_PORT has this one)"]
    );
    // An empty port is no port.
    read("MANAGEMENT_PORT_HTTP=\nCOMMUNICATION_PORT=\n").expect("valid");
}

#[test]
fn high_availability_needs_its_port() {
    read("HIGH_AVAILABILITY_PORT=\n").expect("valid");
    assert_eq!(
        problems("HIGH_AVAILABILITY_ENABLED=true\nHIGH_AVAILABILITY_PORT=\n"),
        ["twistlock.cfg:2: HIGH_AVAILABILITY_PORT: found \"\", allowed: a port from 1 to 65535 while \
          HIGH_AVAILABILITY_ENABLED=true"]
    );
}

#[test]
fn a_lease_that_does_not_fit_the_election_is_refused() {
    read("LEASE_MS=425\n").expect("the longest one that fits");
    assert_eq!(
        problems("LEASE_MS=426\n"),
        ["twistlock.cfg:1: LEASE_MS: found \"426\", allowed: 100 to 425 with TICK_MS=25 and ELECTION_TICKS=20 \
          (4 * TICK_MS to (ELECTION_TICKS - 1) * TICK_MS - 50)"]
    );
    // Another key can be the reason: its line is named.
    let message = &problems("# comment\nELECTION_TICKS=10\n")[0];
    assert!(message.starts_with("twistlock.cfg:2: LEASE_MS: found \"400\", allowed: 100 to 175"), "{message}");
}

#[test]
fn a_socket_path_that_the_kernel_would_cut_is_refused() {
    let folder = "x".repeat(100);
    let message = &problems(format!("DATA_FOLDER=/{folder}\n"))[0];
    assert!(message.starts_with("twistlock.cfg:1: CONTROL_SOCKET: found \"/xxx"), "{message}");
}

#[test]
fn unknown_and_ignored_keys_are_noted_but_valid() {
    assert_eq!(
        notes("MANAGMENT_PORT_HTTPS=1\nFOO=bar\n"),
        [
            "warning: twistlock.cfg:1: MANAGMENT_PORT_HTTPS: unknown key, not used; did you mean MANAGEMENT_PORT_HTTPS?",
            "warning: twistlock.cfg:2: FOO: unknown key, not used",
        ]
    );
    assert_eq!(
        notes("SCAP_ENABLED=false\nDOCKER_SOCKET=/var/run/docker.sock\nSELINUX_LABEL=disable\nREAD_ONLY_FS=true\n"),
        ["info: twistlock.cfg:1: not used here: DOCKER_SOCKET, READ_ONLY_FS, SCAP_ENABLED, SELINUX_LABEL"]
    );
    assert_eq!(
        notes("LOG_LEVEL=warn\nLOG_LEVEL=debug\n"),
        ["warning: twistlock.cfg:2: LOG_LEVEL: set a second time; line 1 does not count"]
    );
    assert!(notes("CLUSTERED_DB_ENABLED=true\n").is_empty());
    assert_eq!(notes("CLUSTERED_DB_SECRET_FILE=/etc/pool\n").len(), 1);
}

#[test]
fn limits_hold() {
    let long = format!("# {}\nLOG_LEVEL=x\n", "a".repeat(MAX_LINE));
    assert_eq!(
        problems(long)[0],
        format!("twistlock.cfg:1: found \"{} bytes\", allowed: a line of up to 4096 bytes", MAX_LINE + 2)
    );
    let large = vec![b'\n'; MAX_FILE + 1];
    assert_eq!(problems(large), ["twistlock.cfg: found \"a larger file\", allowed: a file of up to 262144 bytes"]);
    let many = "LOG_LEVEL=x\n".repeat(MAX_REPORTED + 7);
    let lines = problems(many);
    assert_eq!((lines.len(), lines[MAX_REPORTED].as_str()), (MAX_REPORTED + 1, "... and 7 more problems"));
    let unknown = (0..MAX_REPORTED + 2).map(|n| format!("UNKNOWN_KEY_{n}=1\n")).collect::<String>();
    let notes = read(&unknown).expect("valid").notes;
    assert_eq!(notes.len(), MAX_REPORTED + 1);
    assert!(notes.iter().all(|note| note.severity == Severity::Warning));
    assert_eq!(notes[MAX_REPORTED].text, "twistlock.cfg: 2 more notes");
}

#[test]
fn bytes_that_are_no_text_name_their_line() {
    let message = &problems(b"LOG_LEVEL=warn\nCONSOLE_CN=\xff\xfe\n")[0];
    assert!(message.starts_with("twistlock.cfg:2: found "), "{message}");
    assert!(message.ends_with("allowed: text in UTF-8"), "{message}");
}

#[test]
fn a_message_is_one_printable_line_of_bounded_length() {
    let message = problems(format!("LOG_LEVEL='\u{1b}[31m{}'\n", "x".repeat(3000)));
    assert_eq!(message.len(), 1);
    assert!(message[0].len() < 300 && !message[0].contains('\u{1b}'), "{message:?}");
}

#[test]
fn a_missing_file_is_no_input() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("none.cfg");
    let (report, code) = config::check(&path);
    assert_eq!(code, config::EX_NOINPUT);
    assert!(report.starts_with(&format!("{}: cannot be read: ", path.display())), "{report}");
    let path = folder.path().join("bad.cfg");
    fs::write(&path, "LOG_LEVEL=loud\n").expect("write");
    let (report, code) = config::check(&path);
    assert_eq!(code, config::EX_CONFIG);
    assert!(report.ends_with("bad.cfg:1: LOG_LEVEL: found \"loud\", allowed: error or warn or info or debug or trace"));
    fs::write(&path, "FOO=1\n").expect("write");
    let (report, code) = config::check(&path);
    assert_eq!(code, config::EX_OK);
    assert!(report.ends_with("bad.cfg: valid, with 1 warning"), "{report}");
}

fn port() -> impl Strategy<Value = Option<u16>> {
    proptest::option::of(1u16..)
}

fn path() -> impl Strategy<Value = PathBuf> {
    // Every character that may stand in a path, a quotation mark, a dollar and a back quote among them.
    "/[a-z][ -~äß]{0,60}".prop_filter("no climbing", |path| !path.contains("..")).prop_map(PathBuf::from)
}

prop_compose! {
    fn general()(
        http in port(), https in port(), defenders in port(), ha in 1u16..,
        address in proptest::option::of("127\\.0\\.0\\.[1-9]"),
        name in proptest::option::of("[a-z0-9.-]{1,64}"),
        folder in path(), backups in path(), socket in proptest::option::of(path()),
        flags in any::<[bool; 6]>(), level in 0usize..5,
    ) -> Config {
        let levels = [LogLevel::Error, LogLevel::Warn, LogLevel::Info, LogLevel::Debug, LogLevel::Trace];
        Config {
            management_port_http: http,
            management_port_https: https,
            communication_port: defenders,
            high_availability_port: Some(ha),
            bind_address: address.map(|address| address.parse().expect("an address")),
            console_cn: name,
            data_folder: folder,
            data_recovery_volume: backups,
            control_socket: socket,
            data_recovery_enabled: flags[0],
            systemd_enabled: flags[1],
            run_console_as_root: flags[2],
            high_availability_enabled: flags[3],
            fast_takeover: flags[5],
            high_availability_state: if flags[4] { FirstState::Primary } else { FirstState::Secondary },
            log_format: if flags[4] { LogFormat::Json } else { LogFormat::Human },
            log_level: levels[level],
            ..Config::default()
        }
    }
}

prop_compose! {
    /// The keys of a service, without the command that brings the rules over them into force.
    fn any_service()(
        folder in proptest::option::of(path()), user in proptest::option::of("[a-z_][a-z0-9_.-]{0,31}"),
        ports in proptest::collection::btree_map(1u16.., (1u16.., any::<bool>()), 0..8),
        ready in 0usize..4, seconds in 1u64..=300, restarts in 0u32..=100,
        files in proptest::collection::vec("[a-z*]{1,20}(/[a-z*]{1,9})?", 0..9),
    ) -> Config {
        let pair = |(outside, (inside, proxy))| PortPair { outside, inside, proxy };
        let ways = [None, Some(Readiness::Notify), Some(Readiness::Tcp(9000)),
            Some(Readiness::Http { port: 80, path: "/alive?x=$1&y".to_owned() })];
        Config {
            service_folder: folder,
            service_user: user,
            service_ports: ports.into_iter().map(pair).collect(),
            service_ready: ways[ready].clone(),
            service_ready_limit: Duration::from_secs(12 * seconds),
            service_stop_limit: Duration::from_secs(seconds),
            service_restarts: restarts,
            service_local_files: files,
            ..Config::default()
        }
    }
}

prop_compose! {
    fn any_config()(
        base in general(), tick in 30u64..=1000, ticks in 10u32..=200, lease in any::<prop::sample::Index>(),
        deadline in 500u64..=60_000, page in 9u32..=16, segment in 4u64..=64, wal in 1u64..=4096, seconds in 1u64..=3600,
        limit in 64u64..=1_048_576, service in any_service(),
    ) -> Config {
        let shortest = (4 * tick).max(100);
        let longest = (tick * u64::from(ticks - 1) - 50).min(60_000);
        Config {
            tick: Duration::from_millis(tick),
            election_ticks: ticks,
            lease: Duration::from_millis(shortest + lease.index((longest - shortest + 1) as usize) as u64),
            demotion_deadline: Duration::from_millis(deadline),
            database_page_size: 1 << page,
            raft_log_segment_bytes: segment << 20,
            raft_log_limit: limit << 20,
            checkpoint_bytes: wal << 20,
            checkpoint_interval: Duration::from_secs(seconds),
            service_folder: service.service_folder,
            service_user: service.service_user,
            service_ports: service.service_ports,
            service_ready: service.service_ready,
            service_ready_limit: service.service_ready_limit,
            service_stop_limit: service.service_stop_limit,
            service_restarts: service.service_restarts,
            service_local_files: service.service_local_files,
            ..base
        }
    }
}

fn ports_differ(config: &Config) -> bool {
    let ports = [
        config.management_port_http,
        config.management_port_https,
        config.communication_port,
        config.high_availability_port,
    ];
    let mut ports: Vec<u16> = ports.into_iter().flatten().collect();
    let all = ports.len();
    ports.sort_unstable();
    ports.dedup();
    ports.len() == all
}

/// Text that gets past the first checks more often than random bytes do.
fn nearly_valid() -> impl Strategy<Value = String> {
    let key = prop::sample::select(config::KEYS.iter().map(|key| key.name).collect::<Vec<_>>());
    let value = "[ -~\t]{0,12}|\\$\\{[A-Z]{1,3}:?-[a-z/0-9]{0,5}\\}|['\"][ -~]{0,8}['\"]|[0-9]{0,6}";
    let line = (key, "[=]|[ ]?=[ ]?", value).prop_map(|(key, equals, value)| format!("{key}{equals}{value}\n"));
    proptest::collection::vec(line, 0..30).prop_map(|lines| lines.concat())
}

proptest! {
    #[test]
    fn a_written_configuration_is_read_back(config in any_config().prop_filter("ports", ports_differ)) {
        let text = config::render(&config);
        let loaded = config::parse(&text, "f", &|_| None).map_err(|errors| TestCaseError::fail(errors.to_string()))?;
        prop_assert_eq!(loaded, Loaded { config, notes: vec![] });
    }

    #[test]
    fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..4096)) {
        let _ = config::parse(bytes, "f", &|_| None);
    }

    #[test]
    fn no_text_panics(text in nearly_valid(), variable in "[ -~ä\n]{0,9}") {
        match config::parse(&text, "f", &|_| Some(variable.clone())) {
            Ok(loaded) => for note in loaded.notes {
                prop_assert!(!note.to_string().contains('\n'));
            },
            Err(errors) => prop_assert!(errors.to_string().lines().count() <= MAX_REPORTED + 1),
        }
    }

    #[test]
    fn no_mutation_of_the_example_panics(at in any::<prop::sample::Index>(), byte: u8, cut in any::<prop::sample::Index>()) {
        let mut bytes = config::render(&Config::default()).into_bytes();
        let index = at.index(bytes.len());
        bytes[index] = byte;
        bytes.truncate(cut.index(bytes.len()));
        let _ = config::parse(bytes, "f", &|_| None);
    }
}

#[test]
fn a_secret_is_read_and_never_shown() {
    let loaded = read("METRICS_TOKEN=0123456789abcdefXYZ\n").expect("valid");
    let token = loaded.config.metrics_token.as_ref().expect("a token");
    assert_eq!(token.reveal(), "0123456789abcdefXYZ");
    assert!(!format!("{loaded:?}").contains("0123456789abcdef"));
    for wrong in ["tooshort", "0123456789 abcdef", "0123456789abcdef\u{e9}"] {
        let told = problems(format!("METRICS_TOKEN=\"{wrong}\"\n")).join("\n");
        assert!(told.starts_with("twistlock.cfg:1: METRICS_TOKEN: ") && !told.contains(wrong), "{told}");
    }
}

#[test]
fn the_health_port_is_its_own() {
    let told = problems("HEALTH_PORT=8086\n");
    assert!(told[0].contains("HEALTH_PORT") && told[0].contains("HIGH_AVAILABILITY_PORT has this one"), "{told:?}");
    let at = |text| read(text).expect("valid").config.health_address().map(|address| address.to_string());
    assert_eq!(at("").as_deref(), Some("[::]:8085"), "it is on by itself");
    assert_eq!(at("HEALTH_PORT=\n"), None);
    assert_eq!(at("HEALTH_PORT=8087\n").as_deref(), Some("[::]:8087"));
    assert_eq!(at("HEALTH_PORT=8087\nBIND_ADDRESS=192.0.2.1\n").as_deref(), Some("192.0.2.1:8087"));
    let own = at("HEALTH_PORT=8087\nBIND_ADDRESS=192.0.2.1\nHEALTH_ADDRESS=127.0.0.1\n");
    assert_eq!(own.as_deref(), Some("127.0.0.1:8087"));
}

/// A file of an earlier version stays valid and means what it meant.
#[test]
fn the_default_health_port_gives_way_and_an_old_one_stays_open_to_everybody() {
    let loaded = read("COMMUNICATION_PORT=8085\n").expect("valid: another service has the port by name");
    assert_eq!(loaded.config.health_port, None);
    assert!(loaded.notes[0].text.contains("COMMUNICATION_PORT: it has port 8085"), "{:?}", loaded.notes);
    assert!(problems("COMMUNICATION_PORT=8085\nHEALTH_PORT=8085\n")[0].contains("HEALTH_PORT"));

    let stranger = "192.0.2.77".parse().unwrap();
    let answers = |text: &str| read(text).expect("valid").config.health_allow.has(stranger);
    assert!(!answers("") && answers("HEALTH_PORT=8087\n"), "as before HEALTH_ALLOW came");
    assert!(!answers("HEALTH_PORT=8087\nHEALTH_ALLOW=members\n"));
    assert!(answers("HEALTH_ALLOW=members,192.0.2.0/24\n"));
    let told = problems("HEALTH_ALLOW=members,192.0.2.1/24\n");
    assert!(told[0].starts_with("twistlock.cfg:1: HEALTH_ALLOW: ") && told[0].contains("networks"), "{told:?}");
}

const SERVICE: &str = "BIND_ADDRESS=127.0.0.1\nSERVICE_COMMAND='/usr/bin/site --port 9001'\nSERVICE_FOLDER=/srv/site\n\
    SERVICE_USER=site\nSERVICE_PORTS=443:9001\n";

#[test]
fn a_service_is_described_by_its_keys() {
    let config = read(SERVICE).expect("valid").config;
    assert_eq!(config.service_command, ["/usr/bin/site", "--port", "9001"]);
    assert_eq!(config.service_ports, [PortPair { outside: 443, inside: 9001, proxy: false }]);
    assert_eq!((config.service_ready, config.service_restarts), (None, 5));
    let config = read("SERVICE_READY=http://127.0.0.1:9001/alive\nSERVICE_FOLDER=/srv/site\n").expect("valid").config;
    assert_eq!(config.service_ready, Some(Readiness::Http { port: 9001, path: "/alive".to_owned() }));
    assert!(config.service_command.is_empty(), "keys alone start nothing");
}

/// Not all of its files are replicated: nobody is to rely on it.
#[test]
fn a_service_that_others_could_reach_is_refused_in_this_version() {
    for address in ["", "BIND_ADDRESS=192.0.2.1"] {
        let told = problems(SERVICE.replace("BIND_ADDRESS=127.0.0.1", address));
        assert_eq!(told.len(), 1, "{told:?}");
        assert!(
            told[0].starts_with("twistlock.cfg:2: SERVICE_COMMAND: ") && told[0].contains("and no other file of it"),
            "{told:?}"
        );
    }
}

#[test]
fn what_is_missing_or_in_the_way_of_a_service_is_told() {
    let told = problems("BIND_ADDRESS=127.0.0.1\nSERVICE_COMMAND=/usr/bin/site\n").join("\n");
    for key in ["SERVICE_FOLDER", "SERVICE_USER", "SERVICE_READY"] {
        assert!(told.contains(&format!("twistlock.cfg:2: {key}: ")), "{told}");
    }
    let wrong = [
        ("SERVICE_PORTS=443:9001", "SERVICE_PORTS=8083:9001", "MANAGEMENT_PORT_HTTPS has 8083"),
        ("SERVICE_PORTS=443:9001", "SERVICE_PORTS=443:8085", "HEALTH_PORT has 8085"),
        ("SERVICE_PORTS=443:9001", "SERVICE_PORTS=9001:9001", "two ports that differ"),
        ("SERVICE_PORTS=443:9001", "SERVICE_PORTS=443:9001,443:9002", "up to 8 of OUTSIDE:INSIDE"),
        ("SERVICE_FOLDER=/srv/site", "SERVICE_FOLDER=/var/lib/twistlock/site", "not inside DATA_FOLDER"),
        ("SERVICE_FOLDER=/srv/site", "SERVICE_FOLDER=/var/lib", "not inside DATA_FOLDER"),
        ("SERVICE_USER=site", "SERVICE_USER=a:b", "the name of a user"),
        ("SERVICE_COMMAND='/usr/bin/site --port 9001'", "SERVICE_COMMAND=site", "an absolute path and arguments"),
    ];
    for (good, bad, why) in wrong {
        let told = problems(SERVICE.replace(good, bad));
        assert!(told.len() == 1 && told[0].contains(why), "{bad}: {told:?}");
    }
}

#[test]
fn check_config_says_what_this_host_lacks_for_a_service() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("good.cfg");
    fs::write(&path, SERVICE.replace("SERVICE_USER=site", "SERVICE_USER=no-such-user-here")).expect("write");
    let (report, code) = config::check(&path);
    assert_eq!(code, config::EX_OK);
    for part in
        ["its other files are not in this version", "there is no file /usr/bin/site", "no user no-such-user-here"]
    {
        assert!(report.contains(part), "{report}");
    }
    fs::write(&path, SERVICE.replace("SERVICE_COMMAND", "# SERVICE_COMMAND")).expect("write");
    assert!(config::check(&path).0.ends_with(": valid"), "without a service there is nothing to say");
}
