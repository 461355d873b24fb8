//! Who asks the API of a cluster, and whom to trust there: from the command line, the environment, or the terminal.
//! Must never print a password or a token.

use std::{io::IsTerminal, path::PathBuf};

use clap::Args;

use super::{
    prompt::hidden,
    remote::Login,
    stop::{EX_NOINPUT, EX_USAGE, Stop},
};
use crate::https::Trust;

/// Data folder if none is named.
pub(super) const DEFAULT_DATA: &str = "/var/lib/twistlock";
/// Environment variable that names the data folder.
pub(super) const DATA_VARIABLE: &str = "TWISTLOCK_DATA";
/// Heading of the help.
pub(super) const THERE: &str = "A cluster elsewhere, by its Consoles";

/// Who asks, and whom to trust.
#[derive(Debug, Args)]
pub(super) struct LoginArgs {
    /// User of the Console's API [default: $TWISTLOCK_USER, else admin]
    #[arg(long, short, value_name = "NAME", help_heading = THERE)]
    user: Option<String>,
    /// The user's password [default: $TWISTLOCK_PASSWORD, else it is asked for]
    #[arg(long, short, value_name = "PASSWORD", conflicts_with = "token", help_heading = THERE)]
    password: Option<String>,
    /// A session's token, instead of user and password [default: $TWISTLOCK_TOKEN]
    #[arg(long, value_name = "TOKEN", help_heading = THERE)]
    token: Option<String>,
    /// Certificate of the authority that signed the Consoles' certificates [default: $TWISTLOCK_CACERT, else that of a
    /// cluster on this host and those that this host trusts]
    #[arg(long, value_name = "PATH", help_heading = THERE)]
    tlscacert: Option<PathBuf>,
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

    /// True if the command line or the environment names somebody to log in as.
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
pub(super) fn variable(name: &str) -> Option<String> {
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
            true => Err(Stop::tell(EX_USAGE, "the first line of standard input has no password")),
            false => Ok(password),
        };
    }
    let password = hidden(&format!("New password of {of}: "))?;
    if password != hidden("The same again: ")? {
        return Err(Stop::refuse("the two passwords differ"));
    }
    Ok(password)
}
