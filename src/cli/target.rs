//! Which cluster a command is for: the daemon of this host, or Consoles elsewhere.

use std::path::PathBuf;

use clap::Args;

use super::{
    client::ApiClient,
    daemon::Local,
    login::{DATA_VARIABLE, DEFAULT_DATA, LoginArgs, THERE, variable},
    place::{HTTPS_PORT, Place},
    remote::Remote,
    stop::{EX_USAGE, Stop},
};
use crate::{config, control};

/// The configuration file of an installed daemon.
const INSTALLED_CONFIG: &str = "/etc/twistlock/twistlock.cfg";
/// Most addresses that are tried.
const MAX_ADDRESSES: usize = 16;

const HERE: &str = "This host's daemon (default)";

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

impl Target {
    /// A client of the cluster that is meant. Asks for a password if it has to.
    ///
    /// # Errors
    /// When the configuration file, an address or the authority's certificate cannot be used, or nobody can be asked.
    pub(super) fn client(&self) -> Result<ApiClient, Stop> {
        let places = if self.is_local() { Vec::new() } else { self.addresses()? };
        if places.is_empty() {
            return Ok(ApiClient::Local(self.local()?));
        }
        Ok(ApiClient::Remote(Remote::new(places, self.login.trust(None)?, self.login.resolve()?)))
    }

    /// A client of the PRIMARY's Console: this host's daemon if it is PRIMARY and nobody is named to log in as.
    ///
    /// # Errors
    /// When it cannot be found, or there is no login.
    pub(super) fn console(&self) -> Result<ApiClient, Stop> {
        let client = self.client()?;
        let ApiClient::Local(local) = &client else { return Ok(client) };
        let status = local.status()?;
        if status.primary == Some(status.node) && !self.login.is_named() {
            // Whoever may use the socket may do all of it anyway: no password is asked for.
            return Ok(client);
        }
        local.consoles(&self.login).map(ApiClient::Remote)
    }

    /// True if the command line names the daemon of this host. The environment does not count then.
    pub(super) fn is_local(&self) -> bool {
        self.control.is_some() || self.data.is_some() || self.config.is_some()
    }

    /// The addresses that the command line or the environment names, if any.
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
            many => Err(Stop::tell(EX_USAGE, &format!("{many} addresses: at most {MAX_ADDRESSES} are tried"))),
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
        // Only for the port of the Console that is installed here: the rest of the file is the daemon's business.
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
