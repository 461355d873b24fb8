//! One thousand files of settings: whoever reads one takes the same from it, and what a shell takes from it, too.

use std::{fmt::Write as _, fs, path::Path, process::Command};

use clap::Parser;
use proptest::{
    collection::vec,
    prelude::*,
    sample::select,
    strategy::ValueTree,
    test_runner::{Config as Rules, TestRng, TestRunner},
};

use super::{options::Options, place::Place, settings::Settings, voice::Voice};
use crate::{
    cluster::ClusterId,
    config::{self, Config, Draft, Loaded},
    join::{JoinFile, Offer},
};

/// How many files are made.
const FILES: usize = 1000;
/// Keys whose lines are made: two that every reader goes by, some of other kinds, and one that only other lines ask
/// for.
const KEYS: [&str; 7] = [
    "DATA_FOLDER",
    "DATA_RECOVERY_VOLUME",
    "CONSOLE_CN",
    "HIGH_AVAILABILITY_NAME",
    "LOG_LEVEL",
    "MY_BASE",
    "HEALTH_PORT",
];

#[derive(Parser)]
struct CommandLine {
    #[command(flatten)]
    options: Options,
}

fn options(words: &[&str]) -> Options {
    CommandLine::parse_from([&["install"], words].concat()).options
}

/// A value in one of the ways in which people write it, good or bad.
fn value(key: &'static str) -> BoxedStrategy<String> {
    let piece = select(vec![
        "/srv",
        "/tw",
        "a",
        "-b",
        "'/in quotes'",
        "\"/in quotes\"",
        "\"/srv\"",
        "'it'\\''s'",
        "\\ ",
        "\\$",
        "#x",
        "'#y'",
        "${MY_BASE:-/srv}",
        "${HOME:-/x}",
        "${TW_NONE:-/none}",
        "\"${TW_NONE-/q r}\"",
        "\"\\\"\"",
        "\"\\x\"",
        "*",
        "{a,b}",
        "\u{e4}",
        "\u{a0}",
        "=",
        "!",
        "%",
    ]);
    let bad = select(vec![
        "~/tw", "/a:~/b", "$HOME", "`id`", "$(id)", "\"", "'", "/a /b", "/a;", "a\tb", "\\", "${A", "a\u{7}",
    ]);
    let any = vec(piece, 0..4).prop_map(|pieces| pieces.concat());
    let good = match key {
        "LOG_LEVEL" => select(vec!["info", "debug", "'warn'", "\"error\"", "in'fo'", "${TW_NONE:-info}"])
            .prop_map(str::to_owned)
            .boxed(),
        "CONSOLE_CN" | "HIGH_AVAILABILITY_NAME" => {
            select(vec!["host1", "", "\"host1\"", "h'ost'1", "${TW_NONE-host2}", "host\\1"])
                .prop_map(str::to_owned)
                .boxed()
        }
        "MY_BASE" => any.boxed(),
        "HEALTH_PORT" => select(vec!["", "8087", "'8087'", "${TW_NONE:-8085}"]).prop_map(str::to_owned).boxed(),
        _ => any.prop_map(|rest| format!("/data{rest}")).boxed(),
    };
    let composed =
        select(vec!["/srv/tw", "\"/srv\"/tw", "${MY_BASE:-/srv}/tw", "/srv/a\\ b", ""]).prop_map(str::to_owned);
    prop_oneof![12 => good, 3 => composed, 1 => bad.prop_map(str::to_owned)].boxed()
}

fn line() -> impl Strategy<Value = String> {
    let indent = select([&["", "", "  ", "\t"].repeat(6)[..], &["\u{a0}"]].concat());
    let tail = select([&["", "", " # off", "\t#x", "   # big disk", " "].repeat(4)[..], &[" x"]].concat());
    let equals = select([&["="; 30][..], &["= ", " =", "+="]].concat());
    let setting = (indent, select(KEYS.to_vec()).prop_flat_map(|key| (Just(key), value(key))), equals, tail)
        .prop_map(|(indent, (key, value), equals, tail)| format!("{indent}{key}{equals}{value}{tail}"));
    let other = select(vec![
        "",
        "# a comment",
        "  # indented",
        "HIGH_AVAILABILITY_NAME= # off",
        "MY_BASE=",
        "MY_BASE=/mnt",
        "LOG_LEVEL=warn",
        "export MY_BASE=/x",
        "CONSOLE_CN=$(hostname --fqdn 2>/dev/null); if [[ $? == 1 ]]; then CONSOLE_CN=$(hostname); fi",
    ]);
    prop_oneof![4 => setting, 1 => other.prop_map(str::to_owned)]
}

fn file() -> impl Strategy<Value = String> {
    let (start, end) = (select(vec!["", "", "", "\u{feff}"]), select(vec!["\n", "\n", "\r\n"]));
    (start, end, vec(line(), 1..4)).prop_map(|(start, end, lines)| format!("{start}{}{end}", lines.join(end)))
}

/// What a shell has in each key after it has read each of these files, which are named by their numbers.
fn shell(folder: &Path, files: &[usize]) -> Vec<Vec<String>> {
    let keys = KEYS.iter().fold(String::new(), |mut all, key| {
        let _ = write!(all, " \"${{{key}-unset}}\"");
        all
    });
    // A file at a time in a shell of its own: one must not see what another has set.
    let script = format!("for n in {}; do (. ./$n.sh; printf '%s\\0' {keys}); done", join(files));
    let mut command = Command::new("bash");
    command.args(["--norc", "--noprofile", "-c", &script]).current_dir(folder).env_clear();
    command
        .env("HOME", std::env::var_os("HOME").unwrap_or_default())
        .env("LC_ALL", "C.UTF-8")
        .env("PATH", "/usr/bin:/bin");
    let output = command.output().expect("there is a bash");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).expect("text");
    let words: Vec<String> = text.split_terminator('\0').map(str::to_owned).collect();
    words.chunks(KEYS.len()).map(<[String]>::to_vec).collect()
}

fn join(files: &[usize]) -> String {
    files.iter().map(usize::to_string).collect::<Vec<_>>().join(" ")
}

fn offer() -> Offer {
    let join = JoinFile { token: String::new(), addresses: Vec::new(), ca: String::new(), adopted: false };
    let config = config::render(&Config::default());
    Offer {
        join,
        cluster: ClusterId(7),
        members: vec![1],
        next_id: 2,
        until: 0,
        version: String::new(),
        config,
        withheld: Vec::new(),
    }
}

/// What the readers take from a file that is the given one, or the installed one.
fn every_reader_agrees(
    place: &Place,
    path: &Path,
    loaded: &Result<Loaded, config::ConfigErrors>,
) -> Result<(), String> {
    let voice = Voice::silent();
    let name = path.display().to_string();
    let installed = place.config();
    fs::create_dir_all(installed.parent().unwrap()).unwrap();
    let _ = fs::remove_file(&installed);
    let given = Settings::of_install(&options(&["--config", &name]), place, None, &voice);
    fs::copy(path, &installed).unwrap();
    let example = place.at("/example.cfg");
    fs::write(&example, config::render(&Config::default())).unwrap();
    let kept = Settings::of_install(&options(&["-j", "--config", &example.display().to_string()]), place, None, &voice);
    let joining = Settings::of_join(&offer(), place, None, &[], &voice);
    let Ok(loaded) = loaded else {
        let refused = given.is_err() && kept.is_err() && joining.is_err() && config::check(path).1 == config::EX_CONFIG;
        return if refused { Ok(()) } else { Err("not refused by all".to_owned()) };
    };
    let mut expected = loaded.config.clone();
    expected.data_folder = place.at(&expected.data_folder);
    expected.data_recovery_volume = place.at(&expected.data_recovery_volume);
    let (given, kept, joining) = match (given, kept, joining) {
        (Ok(given), Ok(kept), Ok(joining)) if config::check(path).1 == config::EX_OK => (given, kept, joining),
        _ => return Err("not accepted by all".to_owned()),
    };
    let own = |config: &Config| {
        (
            config.data_folder.clone(),
            config.data_recovery_volume.clone(),
            config.console_cn.clone(),
            config.member_name(),
        )
    };
    // The daemon that is started later has nobody's environment.
    let written = config::parse(&kept.text, "written", &|_| None).map(|loaded| loaded.config);
    for (who, config) in
        [("--config", &given.config), ("-j", &kept.config), ("the file of -j", &written.map_err(|e| e.to_string())?)]
    {
        if *config != expected {
            return Err(format!("{who} takes\n{config:?}\ninstead of\n{expected:?}"));
        }
    }
    // A join takes the folders and names of the host, unless the file leaves them to the cluster's.
    if own(&joining.config) == own(&expected) { Ok(()) } else { Err(format!("a join takes {:?}", joining.config)) }
}

#[test]
fn a_thousand_files_mean_the_same_to_every_reader_and_to_a_shell() {
    let folder = tempfile::tempdir().unwrap();
    let mut rules = Rules { failure_persistence: None, ..Rules::default() };
    rules.max_shrink_iters = 0;
    let mut runner = TestRunner::new_with_rng(rules, TestRng::deterministic_rng(Default::default()));
    let place = Place::below(&folder.path().join("host"));
    let env = |name: &str| std::env::var(name).ok();
    let mut accepted: Vec<(usize, String)> = Vec::new();
    for number in 0..FILES {
        let text = file().new_tree(&mut runner).unwrap().current();
        let path = folder.path().join(number.to_string());
        fs::write(&path, &text).unwrap();
        let loaded = config::load(&path);
        if let Err(why) = every_reader_agrees(&place, &path, &loaded) {
            panic!("file {number}: {why}\n{text:?}");
        }
        if loaded.is_ok() {
            // A shell knows neither the mark at the beginning nor the ends of lines of other systems.
            let unix = text.trim_start_matches('\u{feff}').replace("\r\n", "\n");
            fs::write(path.with_extension("sh"), unix).unwrap();
            accepted.push((number, text));
        }
    }
    assert!((FILES / 3..FILES * 9 / 10).contains(&accepted.len()), "{} of {FILES} are accepted", accepted.len());
    let numbers: Vec<usize> = accepted.iter().map(|(number, _)| *number).collect();
    let taken = shell(folder.path(), &numbers);
    assert_eq!(taken.len(), accepted.len());
    for ((number, text), taken) in accepted.iter().zip(taken) {
        let draft = Draft::new(text.as_bytes(), "file", &env).unwrap();
        for (key, shell) in KEYS.iter().zip(taken) {
            // The one command that is understood is not run.
            if *key != "CONSOLE_CN" || !text.contains("$(hostname") {
                assert_eq!(draft.get(key).unwrap_or("unset"), shell, "{key} of file {number}: {text:?}");
            }
        }
    }
    println!("{} of {FILES} files are accepted", accepted.len());
}
