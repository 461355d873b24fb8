//! Which cluster a command is for: the daemon of this host, or Consoles elsewhere; and who asks. Must never print a password
//! or a token.

use std::{io::IsTerminal, path::PathBuf};

use clap::Args;

use super::{
    door::{Door, Local},
    prompt::hidden,
    remote::{HTTPS_PORT, Login, Place, Remote},
    stop::{EX_NOINPUT, EX_USAGE, Stop},
};
use crate::{config, control, https::Trust};

/// Data folder when nothing else is said.
const DEFAULT_DATA: &str = "/var/lib/twistlock";
/// Environment variable that names the data folder.
const DATA_VARIABLE: &str = "TWISTLOCK_DATA";
/// The configuration file of an installed daemon.
const INSTALLED_CONFIG: &str = "/etc/twistlock/twistlock.cfg";
/// Addresses that are tried at most.
const MAX_ADDRESSES: usize = 16;

const HERE: &str = "This host's daemon (default)";
const THERE: &str = "A cluster elsewhere, by its Consoles";

/// Where a command goes: at most one of socket, folder, file and addresses.
#[derive(Debug, Args)]
pub(super) struct Target {
    /// The daemon's control socket
    #[arg(long, value_name = "PATH", group = "target", help_heading = HERE)]
    control: Option<PathBuf>,
    /// The daemon's data folder [default: $TWISTLOCK_DATA, else /var/lib/twistlock]
    #[arg(long, value_name = "DIR", group = "target", help_heading = HERE)]
    data: Option<PathBuf>,
    /// The daemon's configuration file, which names the data folder or the socket
    #[arg(long, value_name = "FILE", group = "target", help_heading = HERE)]
    config: Option<PathBuf>,
    /// https://HOST:PORT of a Console; several are tried in turn [default: $TWISTLOCK_ADDRESS]
    #[arg(long, value_name = "URL", group = "target", value_delimiter = ',', value_parser = Place::parse, help_heading = THERE)]
    address: Vec<Place>,
    #[command(flatten)]
    login: LoginArgs,
}

/// Who asks, and whom to trust.
#[derive(Debug, Args)]
pub(super) struct LoginArgs {
    /// User of the Console's API [default: $TWISTLOCK_USER, else admin]
    #[arg(long, short, value_name = "NAME", help_heading = THERE)]
    user: Option<String>,
    /// Its password [default: $TWISTLOCK_PASSWORD, else it is asked for]
    #[arg(long, short, value_name = "PASSWORD", conflicts_with = "token", help_heading = THERE)]
    password: Option<String>,
    /// A session's token, instead of user and password [default: $TWISTLOCK_TOKEN]
    #[arg(long, value_name = "TOKEN", help_heading = THERE)]
    token: Option<String>,
    /// Certificate of the authority that signed those of the Consoles [default: $TWISTLOCK_CACERT, else that of a
    /// cluster on this host and those that this host trusts]
    #[arg(long, value_name = "PATH", help_heading = THERE)]
    tlscacert: Option<PathBuf>,
}

impl Target {
    /// The way to the cluster. Asks for a password if it has to.
    ///
    /// # Errors
    /// When the configuration file, an address or the authority's certificate cannot be used, or nobody can be asked.
    pub(super) fn door(&self) -> Result<Door, Stop> {
        let places = if self.is_local() { Vec::new() } else { self.addresses()? };
        if places.is_empty() {
            return Ok(Door::Local(self.local()?));
        }
        Ok(Door::Remote(Remote::new(places, self.login.trust(None)?, self.login.resolve()?)))
    }

    /// The daemon of this host was named, whatever the environment says.
    pub(super) fn is_local(&self) -> bool {
        self.control.is_some() || self.data.is_some() || self.config.is_some()
    }

    /// The addresses that were named, if any.
    ///
    /// # Errors
    /// When the variable has one that cannot be used, or there are too many.
    pub(super) fn addresses(&self) -> Result<Vec<Place>, Stop> {
        let mut places = self.address.clone();
        if places.is_empty()
            && let Some(text) = variable("TWISTLOCK_ADDRESS")
        {
            let parsed = text.split(',').map(Place::parse).collect::<Result<_, _>>();
            places = parsed.map_err(|why| Stop::tell(EX_USAGE, &format!("TWISTLOCK_ADDRESS: {why}")))?;
        }
        match places.len() {
            0..=MAX_ADDRESSES => Ok(places),
            many => Err(Stop::tell(EX_USAGE, &format!("{many} addresses: {MAX_ADDRESSES} at most are tried"))),
        }
    }

    /// The daemon of this host.
    ///
    /// # Errors
    /// The problems of the configuration file.
    pub(super) fn local(&self) -> Result<Local, Stop> {
        if let Some(path) = &self.control {
            let data = path.parent().map(PathBuf::from).unwrap_or_default();
            return Ok(Local { socket: path.clone(), data, https_port: HTTPS_PORT });
        }
        if let Some(file) = &self.config {
            let config =
                config::load(file).map_err(|errors| Stop::tell(errors.exit_code(), &errors.to_string()))?.config;
            let https_port = config.management_port_https.unwrap_or(HTTPS_PORT);
            return Ok(Local { socket: config.control_socket_path(), data: config.data_folder, https_port });
        }
        let named = self.data.clone().or_else(|| variable(DATA_VARIABLE).map(PathBuf::from));
        // Only to learn the port of the Console that is installed here: what else is in it is the daemon's business.
        let installed =
            || config::load(INSTALLED_CONFIG.as_ref()).ok().and_then(|loaded| loaded.config.management_port_https);
        let https_port = if named.is_none() { installed() } else { None };
        let data = named.unwrap_or_else(|| DEFAULT_DATA.into());
        Ok(Local { socket: data.join(control::SOCKET_NAME), data, https_port: https_port.unwrap_or(HTTPS_PORT) })
    }

    /// Who asks and whom to trust, for commands of this host that need the API.
    pub(super) fn login(&self) -> &LoginArgs {
        &self.login
    }
}

impl LoginArgs {
    /// Whom to trust. `own` is the authority of the cluster of this host, if the command is about that one.
    ///
    /// # Errors
    /// When the file that was named cannot be used.
    pub(super) fn trust(&self, own: Option<PathBuf>) -> Result<Trust, Stop> {
        let named = self.tlscacert.clone().or_else(|| variable("TWISTLOCK_CACERT").map(PathBuf::from));
        if let Some(path) = named {
            let unusable = |error| {
                let text =
                    format!("{}: {error}\n  --tlscacert names the certificate of an authority, PEM", path.display());
                Stop::tell(EX_NOINPUT, &text)
            };
            return Trust::file(&path).map_err(unusable);
        }
        let data = || variable(DATA_VARIABLE).map_or_else(|| DEFAULT_DATA.into(), PathBuf::from);
        let own = own.unwrap_or_else(|| data().join("certificates").join("ca.pem"));
        // Most users cannot read it, and most hosts have none.
        Ok(Trust::system().and(Trust::file(&own).unwrap_or_default()))
    }

    /// Somebody is named to log in as, on the command line or in the environment.
    pub(super) fn is_named(&self) -> bool {
        let named = self.user.is_some() || self.password.is_some() || self.token.is_some();
        named
            || ["TWISTLOCK_USER", "TWISTLOCK_PASSWORD", "TWISTLOCK_TOKEN"]
                .into_iter()
                .any(|name| variable(name).is_some())
    }

    /// Token, or user and password. Asks for the password on the terminal if it is nowhere else.
    ///
    /// # Errors
    /// When there is nobody to ask.
    pub(super) fn resolve(&self) -> Result<Login, Stop> {
        let explicit = self.user.is_some() || self.password.is_some();
        let token = self.token.clone().or_else(|| if explicit { None } else { variable("TWISTLOCK_TOKEN") });
        if let Some(token) = token {
            return Login::token(&token).map_err(|why| Stop::tell(EX_USAGE, why));
        }
        let user = self.user.clone().or_else(|| variable("TWISTLOCK_USER")).unwrap_or_else(|| "admin".to_owned());
        let password = match self.password.clone().or_else(|| variable("TWISTLOCK_PASSWORD")) {
            Some(password) => password,
            None => hidden(&format!("Password of {user}: "))?,
        };
        Ok(Login::Password { user, password })
    }
}

/// The value of an environment variable, unless it is empty.
fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// A password that is to be set: asked for twice on a terminal, else the first line of standard input.
///
/// # Errors
/// When there is none, or the two differ.
pub(super) fn new_password(of: &str) -> Result<String, Stop> {
    if !std::io::stdin().is_terminal() {
        let mut line = String::new();
        std::io::stdin().read_line(&mut line)?;
        let password = line.trim_end_matches(['\r', '\n']).to_owned();
        return match password.is_empty() {
            true => Err(Stop::tell(EX_USAGE, "standard input has no password in its first line")),
            false => Ok(password),
        };
    }
    let password = hidden(&format!("New password of {of}: "))?;
    if password != hidden("The same again: ")? {
        return Err(Stop::refuse("the two are not the same"));
    }
    Ok(password)
}
