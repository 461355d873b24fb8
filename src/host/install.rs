//! Installs, upgrades and uninstalls the node of a host. Must never change anything before all checks have passed,
//! delete a database, or found a cluster on a host that has a member's data.

use std::{fs, path::PathBuf};

use nix::unistd::Uid;

use super::{
    aside::{self, Why},
    files,
    options::Options,
    place::Place,
    plan::Plan,
    preflight,
    service::Service,
    settings::Settings,
    traces::{self, Data},
    voice::{EX_NOINPUT, EX_NOPERM, EX_UNAVAILABLE, EX_USAGE, Failure, Voice},
};
use crate::config::{self, Config, FirstState, host_name};

/// The component that can be installed.
const COMPONENT: &str = "console";
const TERMS: &str = "Twistlock HA comes under the Apache License 2.0, without warranty of any kind. It is an independent\n\
    implementation, not affiliated with the original vendor. The whole text: LICENSE, in the source, and\n\
    https://www.apache.org/licenses/LICENSE-2.0";

/// Does what the options say.
///
/// # Errors
/// When the command line is wrong, a check of this host blocks, a question is not answered with yes, or a step fails.
/// The failure says which, what to do, and the exit code.
pub(super) fn run(options: &Options, voice: &mut Voice) -> Result<(), Failure> {
    match options.component.as_deref() {
        Some(COMPONENT) => {}
        Some(other) => {
            let why = format!("found \"{other}\", allowed: flags, then the component \"{COMPONENT}\"");
            return Err(Failure::new(EX_USAGE, why));
        }
        None if options.uninstall => {}
        None => {
            let failure = Failure::new(EX_USAGE, "the component is missing");
            return Err(failure.hint(format!("Put it last: {COMPONENT} (--help tells the flags)")));
        }
    }
    let place = Place::find(voice)?;
    root(&place)?;
    voice.open_log();
    if place.packaged {
        let why = "twistlockd is installed as a Debian package on this host: nothing was changed";
        let upgrade = "Upgrade it: apt install ./twistlock-ha_*.deb    Uninstall it: apt remove twistlock-ha";
        return Err(Failure::new(EX_NOPERM, why).hint(upgrade));
    }
    if options.uninstall { uninstall(options, &place, voice) } else { install(options, &place, voice) }
}

/// Refuses to change a host unless root runs this.
///
/// # Errors
/// When somebody else runs it, and not for a test.
pub(super) fn root(place: &Place) -> Result<(), Failure> {
    if !place.is_real() || Uid::effective().is_root() {
        return Ok(());
    }
    Err(Failure::new(EX_NOPERM, "this needs root").hint("Try the same with: sudo"))
}

/// Finds the programs. They must run, and be of the same version as this program, which makes the checks.
fn find_programs(options: &Options, voice: &Voice) -> Result<PathBuf, Failure> {
    let folder = options.programs();
    let folder = fs::canonicalize(&folder)
        .map_err(|_| Failure::new(EX_NOINPUT, format!("--program: there is no folder {}", folder.display())))?;
    for name in files::PROGRAMS.into_iter().rev() {
        let path = folder.join(name);
        if !path.is_file() && name == files::FOR_OTHERS {
            let folder = folder.display();
            voice.warn(&format!("{name} is not in {folder}: no host becomes a Defender while this one is PRIMARY"));
            continue;
        }
        if !path.is_file() {
            let failure = Failure::new(EX_NOINPUT, format!("{name} is not in {}", folder.display()));
            return Err(failure.hint("Put it beside the other one, or name its folder: --program DIR"));
        }
        let Some(version) = voice.ask(&[&path.display().to_string(), "--version"]) else {
            let why = format!("{} does not run on this host ({})", path.display(), std::env::consts::ARCH);
            return Err(Failure::new(EX_UNAVAILABLE, why));
        };
        voice.say(&format!("Program: {version}"));
        if version.split_whitespace().last() != Some(crate::cluster::program_version()) {
            let failure =
                Failure::new(EX_UNAVAILABLE, format!("{} is of another version than this program", path.display()));
            return Err(failure.hint(format!("Run that one: {} host install", folder.join("twistlockd").display())));
        }
    }
    Ok(folder)
}

fn install(options: &Options, place: &Place, voice: &Voice) -> Result<(), Failure> {
    let programs = find_programs(options, voice)?;
    let Settings { text, config, .. } =
        Settings::of_install(options, place, traces::environment(place)?.as_ref(), voice)?;
    let service = Service { place, config: &config, voice };
    let member = fs::exists(config.data_folder.join("identity.json")).unwrap_or(true) && !options.drop;
    founds_no_second_cluster(options, place, &config, voice)?;
    preflight::check(&config, place, service.runs(), options.pass_over, voice)?;
    ask(options, &config, voice)?;
    // A host of a pool waits while it runs.
    let waits = config.high_availability_state == FirstState::Secondary
        && !config.clustered_db_enabled
        && !member
        && !config.data_folder.join(crate::join::JOIN_FILE).exists();

    let (data, bin) = (config.data_folder.display(), place.bin());
    let mut plan = Plan::default();
    plan.step("role", "move the PRIMARY role to another member, if this node has it", || {
        service.leave_role();
        Ok(())
    });
    plan.step("stop", "stop the node, if it runs", || service.stop());
    if options.drop {
        plan.step("aside", format!("set the data in {data} aside"), || {
            aside::set(&config.data_folder, Why::Dropped, voice)
        });
    }
    plan.step("user", format!("make the user {}, if it is not there", place.run_user(&config)), || {
        files::user(place, voice)
    });
    let folders = format!("make {data} and {} for it", config.data_recovery_volume.display());
    plan.step("folders", folders, || files::folders(place, &config, voice));
    if let Some(path) = &config.clustered_db_secret_file {
        let what = format!("let the user of the node alone read {}", path.display());
        plan.step("secret", what, || files::pool_secret(place, &config));
    }
    plan.step("program", format!("install the programs of {} to {}", programs.display(), bin.display()), || {
        files::programs(&programs, place, false)
    });
    plan.step("config", format!("install {}, and keep the old one", place.config().display()), || {
        files::config(place, &text)
    });
    plan.step("manual", "install the manual and the completion of twistcli", || files::manual(place, voice));
    plan.step("unit", "install the unit and its drop-in; without systemd, the rotation of the log", || {
        files::unit(place, &config)?;
        voice.say(&format!("Installed {} and {}", bin.join("twistlockd").display(), place.config().display()));
        Ok(())
    });
    if waits {
        plan.step("tell", "start nothing: this host has not joined yet", || {
            voice.say(
                "This host is to be a SECONDARY, and has not joined yet. On the PRIMARY, run: twistcli ha join-script",
            );
            voice.say("and run the line that it prints here. The node is installed, and not started.");
            Ok(())
        });
    } else {
        plan.step("start", "start the node and wait until it is ready", || {
            service.wait_until_ready(service.start()?)?;
            say_where(&config, member, voice);
            Ok(())
        });
    }
    plan.carry_out(options.dry_run, options.stop_after.as_deref(), voice)
}

/// Says where the Console and the status page of this host are.
fn say_where(config: &Config, member: bool, voice: &Voice) {
    let url = config.management_port_https.map(|port| format!("https://{}:{port}", host_name()));
    let url = url.map(|url| match config.clustered_db_enabled && !member {
        true => format!(" This host waits for a pool: sign up at {url} at once, or have a pool add it"),
        false => format!(" Console: {url} on the PRIMARY"),
    });
    voice.say(&format!("Done.{}", url.unwrap_or_default()));
    if let Some(port) = config.health_port {
        let url = format!("http://{}:{port}/status", host_name());
        voice.say(&format!("Status page of this host, also without a PRIMARY: {url}"));
    }
}

/// Refuses a fresh start of a PRIMARY where a cluster exists: it would make a second cluster, and leave the others
/// without this member. The data can be elsewhere than the new settings say.
fn founds_no_second_cluster(options: &Options, place: &Place, config: &Config, voice: &Voice) -> Result<(), Failure> {
    let stays = options.keep && !options.drop;
    let own = Data::of(&config.data_folder);
    let traces = traces::find(place)?;
    let begins = config.clustered_db_enabled || config.high_availability_state == FirstState::Primary;
    if !begins || (stays && matches!(own, Data::Member(2..))) {
        return Ok(());
    }
    let new = traces::Trace { folder: config.data_folder.clone(), named_by: "the new settings".to_owned() };
    for trace in std::iter::once(new).chain(traces) {
        let data = Data::of(&trace.folder);
        let (folder, by) = (trace.folder.display(), &trace.named_by);
        let whose = match data {
            Data::Member(count @ 2..) => format!("{folder} (named by {by}) belongs to a cluster of {count} members"),
            Data::Unclear => format!("{folder} (named by {by}) has data of a node that cannot be read"),
            Data::Member(_) if trace.folder != config.data_folder => {
                voice.warn(&format!("the data in {folder} will not be used any more"));
                continue;
            }
            _ => continue,
        };
        let name = host_name();
        let begins = match config.clustered_db_enabled {
            true => "CLUSTERED_DB_ENABLED=true would have this host wait for another one",
            false => "HIGH_AVAILABILITY_STATE=PRIMARY would begin a new one",
        };
        let why = format!("{whose}, and {begins}");
        return Err(Failure::new(EX_NOPERM, why)
            .hint("To upgrade or repair this node as the member it is:  install.sh -j console")
            .hint(format!("To make it PRIMARY, on the node that is:             twistcli ha switchover --to {name}"))
            .hint(format!(
                "To replace it: twistcli ha remove {name}, then the line that \"twistcli ha join-script\" prints"
            ))
            .hint("If the other members are lost for good:              twistlockd recover --force-new-cluster")
            .hint(format!("If nobody needs this data any more:                  move {folder} away"))
            .hint("Nothing was changed."));
    }
    Ok(())
}

fn ask(options: &Options, config: &Config, voice: &Voice) -> Result<(), Failure> {
    if options.dry_run {
        return Ok(());
    }
    if !voice.accepts() {
        voice.say(TERMS);
        if !voice.confirm("Do you accept the terms?") {
            return Err(Failure::new(EX_NOPERM, "the terms were not accepted: nothing was changed"));
        }
    }
    let data = config.data_folder.display();
    let question = format!("Drop the database in {data}? It is set aside, and this node begins empty.");
    if options.drop && config.data_folder.is_dir() && !voice.confirm(&question) {
        return Err(Failure::new(EX_NOPERM, "not confirmed: nothing was changed"));
    }
    Ok(())
}

fn uninstall(options: &Options, place: &Place, voice: &Voice) -> Result<(), Failure> {
    let installed = place.bin().join("twistlockd").exists() || place.has_unit(voice) || place.config().exists();
    if !installed {
        voice.say("Twistlock HA is not installed here: nothing to do");
        return Ok(());
    }
    let mut config = match config::load(&place.config()) {
        Ok(loaded) => loaded.config,
        // The folders are needed only to see who counts on this host, and for the last line.
        Err(errors) => {
            voice.warn(&format!("the settings are not used: {errors}"));
            Config::default()
        }
    };
    config.data_folder = place.at(&config.data_folder);
    config.data_recovery_volume = place.at(&config.data_recovery_volume);
    if let Data::Member(count @ 2..) = Data::of(&config.data_folder) {
        voice.warn(&format!(
            "this host is one of {count} members, and the others go on counting it: on the PRIMARY, run: twistcli ha remove {}",
            host_name()
        ));
    }
    if !options.dry_run && !voice.confirm("Uninstall the node of this host?") {
        return Err(Failure::new(EX_NOPERM, "not confirmed: nothing was changed"));
    }
    let service = Service { place, config: &config, voice };
    let mut plan = Plan::default();
    plan.step("role", "move the PRIMARY role to another member, if this node has it", || {
        service.leave_role();
        Ok(())
    });
    plan.step("stop", "stop the node, if it runs", || service.stop());
    plan.step("files", "remove the unit, the manual, the completion, the rotation of the log and the programs", || {
        files::uninstall(place, voice)
    });
    plan.step("tell", "leave data, backups and settings where they are", || {
        voice.say(&format!(
            "Uninstalled. Left in place: the data in {}, the backups in {}, the settings in {}",
            config.data_folder.display(),
            config.data_recovery_volume.display(),
            place.config().display()
        ));
        Ok(())
    });
    plan.carry_out(options.dry_run, options.stop_after.as_deref(), voice)
}
