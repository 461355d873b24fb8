//! Makes this host ask to join a cluster: what the join script starts once it has the program. Must never let a host
//! that is a member begin anew, and never leave settings in force with which it would found a cluster of its own.

use std::{
    fs,
    path::{Path, PathBuf},
};

use clap::Args;

use super::{
    aside::{self, Why},
    files, install,
    place::Place,
    plan::Plan,
    preflight,
    service::Service,
    settings::Settings,
    traces::{self, Data},
    voice::{EX_NOINPUT, EX_NOPERM, EX_TEMPFAIL, EX_UNAVAILABLE, EX_USAGE, Failure, Voice},
};
use crate::{
    clock::unix_time,
    cluster::{NodeId, Role},
    config::Config,
    join::{JOIN_FILE, Offer},
    storage::Identity,
};

/// Letters of a fingerprint: 32 pairs of digits with colons between them.
const FINGERPRINT: usize = 32 * 3 - 1;

/// What a host that joins is told.
#[derive(Debug, Args)]
#[command(after_help = super::EXIT_CODES)]
pub struct Options {
    /// Name or address by which the other members reach this host [default: the one that it dials them from]
    #[arg(long, value_name = "HOST")]
    address: Option<String>,
    /// Open all ports on this address alone [default: all interfaces]
    #[arg(long, value_name = "IP")]
    bind: Option<String>,
    /// Name of this host in the cluster [default: its host name]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// What the join script says about the cluster
    #[arg(long, value_name = "FILE")]
    offer: PathBuf,
    /// Folder of the programs of that cluster; they are moved from there
    #[arg(long, value_name = "DIR")]
    program: PathBuf,
    /// List the steps, and change nothing
    #[arg(long)]
    dry_run: bool,
    /// Show every command
    #[arg(short = 'z')]
    pub(super) debug: bool,
    /// For tests: end after this step, as if the process had been killed there
    #[arg(long, value_name = "STEP", hide = true)]
    stop_after: Option<String>,
}

impl Options {
    /// The settings that the options stand for.
    ///
    /// # Errors
    /// When one of them cannot be a name or an address.
    fn settings(&self) -> Result<[(&'static str, Option<&str>); 3], Failure> {
        let plain = |c: char| c.is_ascii_alphanumeric() || "._:-".contains(c);
        for value in [&self.address, &self.bind, &self.name].into_iter().flatten() {
            if value.is_empty() || !value.chars().all(plain) {
                return Err(Failure::new(EX_USAGE, format!("found \"{value}\", allowed: letters, digits and . _ : -")));
            }
        }
        Ok([
            ("BIND_ADDRESS", self.bind.as_deref()),
            ("HIGH_AVAILABILITY_ADDRESS", self.address.as_deref()),
            ("HIGH_AVAILABILITY_NAME", self.name.as_deref()),
        ])
    }
}

/// Does what the options say.
///
/// # Errors
/// When the script has expired, the data or a running node of this host is in the way, a port is in use, or a step
/// fails. The failure says which, what to do, and the exit code.
pub(super) fn run(options: &Options, voice: &Voice) -> Result<(), Failure> {
    let place = Place::find(voice)?;
    install::root(&place)?;
    let offer = Offer::read(&options.offer).map_err(|error| Failure::new(EX_NOINPUT, format!("{error:#}")))?;
    let now = unix_time();
    if now >= offer.until {
        let why = "this script has expired (or the clock of this host is wrong)";
        return Err(Failure::new(EX_NOPERM, why).hint("Get a new one: twistcli ha join-script, on the PRIMARY."));
    }
    let Settings { text, config, unset } =
        Settings::of_join(&offer, &place, traces::environment(&place)?.as_ref(), &options.settings()?, voice)?;
    let joining =
        Joining { offer: &offer, config: &config, service: Service { place: &place, config: &config, voice } };
    let Some(set_aside) = joining.existing()? else { return Ok(()) };
    if joining.service.daemon().is_none()
        && let Some(port) = preflight::busy_ports(&config).first()
    {
        let failure =
            Failure::new(EX_TEMPFAIL, format!("port {port} is in use by another program: nothing was changed"));
        return Err(failure.hint(format!("See: ss -ltnp 'sport = :{port}'")));
    }
    voice.say(&format!("Joining cluster {} (Twistlock HA {})", offer.cluster, offer.version));

    let (data, bin) = (config.data_folder.display(), place.bin());
    let mut plan = Plan::default();
    plan.step("program", format!("install the cluster's programs to {}", bin.display()), || {
        files::programs(&options.program, &place, true)
    });
    plan.step("stop", "stop the node, if it runs", || joining.service.stop());
    plan.step("user", format!("make the user {}, if it is not there", place.run_user(&config)), || {
        files::user(&place, voice)
    });
    // Before any data moves: whatever starts the node from now on, with these settings it founds no cluster.
    plan.step("config", format!("install {}, and keep the old one", place.config().display()), || {
        files::config(&place, &text)
    });
    if set_aside {
        let act = || aside::set(&config.data_folder, Why::Removed, voice);
        plan.step("aside", format!("set the data in {data} aside"), act);
    }
    plan.step("join-file", format!("make {data} and write {JOIN_FILE} there"), || joining.write_join(voice));
    plan.step("unit", "install the unit and its drop-in; without systemd, the rotation of the log", || {
        files::unit(&place, &config)
    });
    plan.step("start", "start the node and wait until it has asked to join", || joining.start_and_wait());
    plan.carry_out(options.dry_run, options.stop_after.as_deref(), voice)?;
    if !unset.is_empty() {
        voice.say(&format!("Not in this script, because they may be secrets: {}. Set them in", unset.join(" ")));
        voice.say(&format!("{} as on the other members, and restart this node.", place.config().display()));
        voice.say("(Until then METRICS_TOKEN is one that nobody knows.)");
    }
    Ok(())
}

struct Joining<'a> {
    offer: &'a Offer,
    config: &'a Config,
    service: Service<'a>,
}

impl Joining<'_> {
    fn data(&self) -> &Path {
        &self.config.data_folder
    }

    /// Decides about what is in the data folder: true if it is to be set aside, none if there is nothing to do.
    fn existing(&self) -> Result<Option<bool>, Failure> {
        let data = self.data().display();
        let identity = match Identity::read(self.data()) {
            Ok(identity) => identity,
            // Data without an identity belongs to nobody that we know.
            Err(_) if !fs::exists(self.data().join("identity.json")).unwrap_or(true) => {
                return Ok(Some(Data::of(self.data()) != Data::Nothing));
            }
            Err(error) => {
                let failure = Failure::new(EX_TEMPFAIL, error);
                return Err(failure.hint(format!("Move {data} away, and run this script again.")));
            }
        };
        let node = identity.node;
        if identity.cluster == self.offer.cluster {
            // Those from the next id on were admitted after this script was made.
            if self.offer.members.contains(&node) || node >= self.offer.next_id {
                return self.stay(node).map(|()| None);
            }
            self.say(&format!("This host was node {node} of the cluster, and was removed from it: it begins anew."));
        } else {
            if let Some(daemon) = self.service.daemon() {
                let why =
                    format!("a node of another cluster ({}) runs on this host (pid {})", identity.cluster, daemon.pid);
                return Err(Failure::new(EX_NOPERM, why)
                    .hint("If this host is to leave that cluster: stop the node, then run this script again.")
                    .hint("Its data will be set aside, not deleted."));
            }
            self.say(&format!("This host has data of another cluster ({}).", identity.cluster));
        }
        Ok(Some(true))
    }

    fn say(&self, text: &str) {
        self.service.voice.say(text);
    }

    /// Ends the command on a host that is a member, as far as the script knows: with nothing to do, or with what an
    /// administrator can do.
    fn stay(&self, node: NodeId) -> Result<(), Failure> {
        let script = "get a new script from the PRIMARY: twistcli ha join-script";
        let Some(daemon) = self.service.daemon() else {
            let why =
                format!("this host is node {node} of this cluster already, but it does not run: nothing was changed");
            return Err(Failure::new(EX_TEMPFAIL, why)
                .hint("Start it:                     systemctl start twistlockd")
                .hint(format!("Or, if its data is lost, run: twistcli ha remove {node}   on the PRIMARY, and {script}"))
                .hint(format!("Or, if it has been removed:   {script}")));
        };
        if self.service.status().is_some_and(|status| status.role == Role::Removed) {
            let why = format!(
                "this host was node {node} of this cluster, and was removed after this script was made: nothing was changed"
            );
            return Err(Failure::new(EX_NOPERM, why).hint(format!("Now {script}")));
        }
        self.say(&format!(
            "This host is node {node} of this cluster already, and runs (pid {}): nothing to do.",
            daemon.pid
        ));
        Ok(())
    }

    fn write_join(&self, voice: &Voice) -> Result<(), Failure> {
        let place = self.service.place;
        if fs::exists(self.data().join("identity.json")).unwrap_or(true) {
            let data = self.data().display();
            let why =
                format!("{data} has an identity again: something starts the node of this host while this is done");
            return Err(Failure::new(EX_TEMPFAIL, why).hint("Stop it, and run this script again."));
        }
        files::folders(place, self.config, voice)?;
        let path = self.data().join(JOIN_FILE);
        let json = serde_json::to_vec(&self.offer.join).unwrap_or_default();
        files::place(&path, 0o600, &json, place.owner(&place.run_user(self.config)))?;
        voice.say(&format!("Wrote {} and {}", place.config().display(), path.display()));
        Ok(())
    }

    /// Waits until the cluster has the request, and shows what to compare on both sides.
    fn start_and_wait(&self) -> Result<(), Failure> {
        let mut started = self.service.start()?;
        let mut reason = String::new();
        let seen = self.service.wait(&mut started, || {
            let status = self.service.status()?;
            let shown = fingerprint(&status.reason).map(str::to_owned);
            reason = status.reason;
            match status.role {
                Role::RequestJoin => shown.map(|shown| (Role::RequestJoin, shown)),
                role @ (Role::Startup | Role::Startup2 | Role::Recovering | Role::Secondary | Role::Primary) => {
                    Some((role, String::new()))
                }
                _ => None,
            }
        });
        match seen {
            Some((Role::RequestJoin, shown)) => {
                let name = self.config.member_name();
                self.say(&format!("REQUEST_JOIN: this host has asked to join as {name}."));
                self.say(&format!("Fingerprint of its key: {shown}"));
                self.say("Compare it with the one that the Console shows, and click APPLY when all hosts have asked");
                self.say("(Manage > System > High Availability, or on the PRIMARY: twistcli ha apply).");
                Ok(())
            }
            Some((Role::Primary, _)) => {
                let cluster = Identity::read(self.data()).map(|own| own.cluster.to_string()).unwrap_or_default();
                let why = format!("this host has not joined: its node is PRIMARY of cluster {cluster}");
                let (config, wanted) = (self.service.place.config(), self.offer.cluster);
                let settings = format!("Something has started it with other settings than {}.", config.display());
                let stop = format!("If it is not cluster {wanted}: stop the node, and run this script again.");
                let failure = Failure::new(EX_UNAVAILABLE, why).hint(settings).hint(stop);
                Err(failure.hint("Its data will be set aside, not deleted."))
            }
            Some((role, _)) => {
                self.say(&format!("{role}: this host is a member of the cluster."));
                Ok(())
            }
            None => {
                self.service.show_log();
                let colon = if reason.is_empty() { "" } else { ": " };
                let why = format!("the node is installed, but it could not ask to join{colon}{reason}");
                Err(Failure::new(EX_UNAVAILABLE, why)
                    .hint("Its last lines are above. It goes on trying while it runs."))
            }
        }
    }
}

/// The fingerprint in a sentence.
fn fingerprint(text: &str) -> Option<&str> {
    let fits = |word: &&str| word.len() == FINGERPRINT && word.chars().all(|c| c == ':' || c.is_ascii_hexdigit());
    text.split([' ', '.', ',', '(', ')']).find(fits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fingerprint_is_found_in_its_sentence() {
        let print = ["AB"; 32].join(":");
        assert_eq!(fingerprint(&format!("asked; waits for APPLY, fingerprint {print}")), Some(print.as_str()));
        assert_eq!(fingerprint("waits for APPLY"), None);
    }
}
