//! Writes a configuration as a file: `twistlock.cfg.example` is this with the defaults. Must give text that
//! [`super::parse`] reads back without a note.

use super::{
    Config, KEYS,
    keys::{CONSOLE_CN, HOST_NAME_LINE},
    line::quote,
};

const BANNER: &str = "#############################################";

/// The text of a `twistlock.cfg` with every key, explained.
pub fn render(config: &Config) -> String {
    let mut config = config.clone();
    let mut out = String::from(
        "# twistlock.cfg: settings of twistlockd. This file is read by a parser and never run by a shell.\n\
         # A line is KEY=VALUE, without blanks around the \"=\". Values may be quoted, and ${VAR-default} or\n\
         # ${VAR:-default} takes a variable of the environment. \"twistlockd check-config FILE\" tells what is wrong.\n",
    );
    let (mut section, mut group) = ("", "");
    for key in KEYS {
        if key.section != section {
            section = key.section;
            out.push_str(&format!("\n{BANNER}\n#     {section}\n{BANNER}\n"));
        }
        if key.group != group {
            group = key.group;
            out.push_str(&format!("\n##### {group} #####\n"));
        }
        for line in key.doc {
            out.push_str(&format!("# {line}\n"));
        }
        out.push_str(&format!("# Allowed: {}.\n", key.allowed()));
        let value = key.slot(&mut config).write();
        if key.name == CONSOLE_CN && value.is_empty() {
            out.push_str(HOST_NAME_LINE);
        } else {
            out.push_str(&format!("{}={}", key.name, quote(&value)));
        }
        out.push('\n');
    }
    out
}
