//! A service beside the Console of a dev cluster: what its nodes' configuration says of it. Must never start it: the
//! daemons do.

use std::{env, fs};

use anyhow::{Context, Result, ensure};
use clap::Args;

use super::layout::Layout;
use crate::config::{self, Draft};

/// `SERVICE_STOP_SECONDS`: whoever tries it out does not want to wait.
const STOP_SECONDS: &str = "2";

/// A service that is tried out.
#[derive(Args, Clone, Debug, Default)]
pub(super) struct ServiceOptions {
    /// Run this program beside the Console, on the PRIMARY alone. No shell reads it. It is started in its folder, which
    /// TWISTLOCK_FOLDER names: SQLite databases in there are replicated, OTHER FILES ARE NOT in this version
    #[arg(long, value_name = "COMMAND", requires = "service_ports")]
    service: Option<String>,
    /// Its ports, as in SERVICE_PORTS: 9000:9001 opens port 9000 and connects to 9001 of 127.0.0.1
    #[arg(long, value_name = "OUTSIDE:INSIDE", requires = "service")]
    service_ports: Option<String>,
    /// How it is known that it can be used, as in SERVICE_READY [default: its first port accepts connections]
    #[arg(long, value_name = "HOW", requires = "service")]
    service_ready: Option<String>,
}

impl ServiceOptions {
    /// Writes it into the configuration of all nodes; without one, they stay as they are.
    ///
    /// # Errors
    /// When the program is not found, or the configuration would not be allowed: then no file has changed.
    pub(super) fn apply(&self, layout: &Layout) -> Result<()> {
        let Some(command) = &self.service else { return Ok(()) };
        let command = absolute(command)?;
        let user = nix::unistd::User::from_uid(nix::unistd::geteuid()).ok().flatten();
        let user = user.context("this user has no name on this host")?.name;
        let mut files = Vec::new();
        for index in 0..layout.cluster.nodes.len() {
            let path = layout.config_path(index);
            let name = path.display().to_string();
            let mut draft = Draft::new(&config::read(&path)?, &name, &|_| None)?;
            draft.set("SERVICE_COMMAND", &command);
            draft.set("SERVICE_FOLDER", &path.with_file_name("service").display().to_string());
            draft.set("SERVICE_USER", &user);
            draft.set("SERVICE_STOP_SECONDS", STOP_SECONDS);
            draft.set("SERVICE_PORTS", self.service_ports.as_deref().unwrap_or_default());
            draft.set("SERVICE_READY", self.service_ready.as_deref().unwrap_or_default());
            let (text, _) = draft.finish(&name)?;
            files.push((path, text));
        }
        for (path, text) in files {
            fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
        }
        Ok(())
    }

    /// What is said of it, for people.
    pub(super) fn introduction(&self, layout: &Layout) -> Option<String> {
        let (command, ports) = (self.service.as_ref()?, self.service_ports.as_ref()?);
        let outside = ports.split(',').filter_map(|pair| pair.split(':').next()).collect::<Vec<_>>().join(", ");
        let addresses = layout.cluster.nodes.iter().map(|node| node.address.as_str()).collect::<Vec<_>>().join(", ");
        Some(format!(
            "service   {command}\n          port {outside} of whichever of {addresses} is PRIMARY\n          \
             its SQLite databases in DIR/nodeN/service are replicated, OTHER FILES ARE NOT in this version"
        ))
    }
}

/// The command with the whole path of its program, as a shell would find it.
fn absolute(command: &str) -> Result<String> {
    let (program, arguments) = command.trim().split_once(' ').unwrap_or((command.trim(), ""));
    ensure!(!program.is_empty(), "--service: the name of a program is allowed");
    let found = if program.contains('/') {
        fs::canonicalize(program).with_context(|| format!("--service: find {program}"))?
    } else {
        let path = env::var_os("PATH").unwrap_or_default();
        let all = env::split_paths(&path).map(|folder| folder.join(program));
        all.into_iter()
            .find(|path| path.is_file())
            .with_context(|| format!("--service: there is no program {program} in PATH"))?
    };
    Ok(format!("{} {arguments}", found.display()).trim_end().to_owned())
}

#[cfg(test)]
mod tests {
    use super::{super::layout::Shape, *};

    #[test]
    fn the_nodes_are_told_of_it_and_nothing_else_changes() {
        let folder = tempfile::tempdir().unwrap();
        let layout = Layout::open(&folder.path().join("dev"), Shape::default()).unwrap();
        let before = config::load(&layout.config_path(1)).unwrap().config;
        ServiceOptions::default().apply(&layout).unwrap();
        assert_eq!(config::load(&layout.config_path(1)).unwrap().config, before);
        let options = |ports: &str| ServiceOptions {
            service: Some("sh -c true".to_owned()),
            service_ports: Some(ports.to_owned()),
            service_ready: Some("tcp:9001".to_owned()),
        };
        let wrong = options("8083:9001").apply(&layout).unwrap_err().to_string();
        assert!(wrong.contains("SERVICE_PORTS") && wrong.contains("MANAGEMENT_PORT_HTTPS"), "{wrong}");
        assert_eq!(config::load(&layout.config_path(1)).unwrap().config, before);
        options("9000:9001").apply(&layout).unwrap();
        let after = config::load(&layout.config_path(1)).unwrap().config;
        assert!(after.service_command[0].ends_with("/sh") && after.service_command[1..] == ["-c", "true"]);
        assert_eq!(after.service_ports[0].to_string(), "9000:9001");
        assert_eq!(after.service_folder, Some(layout.config_path(1).with_file_name("service")));
        let said = options("9000:9001").introduction(&layout).unwrap();
        assert!(
            said.contains("port 9000 of whichever of 127.0.0.1, 127.0.0.2, 127.0.0.3")
                && said.contains("OTHER FILES ARE NOT")
        );
        assert!(absolute("no-such-program-here").is_err() && absolute("").is_err());
    }
}
