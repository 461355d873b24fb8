//! `twistcli users`: who may log in, and as what. Must never put a password on the command line or into the output.

use clap::{Args, Subcommand, ValueEnum};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    args::DONE_OR_REFUSED,
    client::ApiClient,
    columns::{self, Cell, Paint, print_json, say},
    lists,
    login::new_password,
    quantity::date,
    remote::{Login, segment},
    stop::{EX_USAGE, Stop, confirm},
    target::Target,
};
use crate::control::Call;

const PASSWD_HELP: &str = "\
The current password is the one that you log in with: --password, $TWISTLOCK_PASSWORD, or it is asked for.
The new one is asked for twice; where standard input is no terminal, its first line is the new password.

Exit code: 0 done, 64 wrong command line, 69 nobody answers, 75 refused, 77 the login is refused.

Examples:
  twistcli users passwd
  twistcli users passwd --user ann --address https://console:8083";

const ADD_HELP: &str = "\
The password is asked for twice; where standard input is no terminal, its first line is the password.

Exit code: 0 done, 64 wrong command line, 69 nobody answers, 75 refused, 77 the login is refused.

Examples:
  twistcli users add ann --role operator
  pwgen 20 1 | twistcli users add ci --role defenderManager --address https://console:8083";

/// Commands of `twistcli users`.
#[derive(Debug, Subcommand)]
pub(super) enum Users {
    /// List all users with their roles
    #[command(after_help = DONE_OR_REFUSED)]
    List {
        #[command(flatten)]
        target: Target,
        /// Print them as JSON
        #[arg(long)]
        json: bool,
    },
    /// Create a user
    #[command(after_help = ADD_HELP)]
    Add {
        #[command(flatten)]
        target: Target,
        #[command(flatten)]
        named: Named,
        /// What the user may do
        #[arg(long, value_name = "ROLE")]
        role: Role,
    },
    /// Give a user another role; ends the user's sessions
    #[command(after_help = DONE_OR_REFUSED)]
    SetRole {
        #[command(flatten)]
        target: Target,
        #[command(flatten)]
        named: Named,
        /// What the user may do from now on
        #[arg(value_name = "ROLE")]
        role: Role,
    },
    /// Give a user another password; ends the user's sessions
    #[command(after_help = ADD_HELP)]
    SetPassword {
        #[command(flatten)]
        target: Target,
        #[command(flatten)]
        named: Named,
    },
    /// Give yourself another password; ends all of your sessions
    #[command(after_help = PASSWD_HELP)]
    Passwd {
        #[command(flatten)]
        target: Target,
    },
    /// Delete a user; ends the user's sessions
    #[command(after_help = DONE_OR_REFUSED)]
    Delete {
        #[command(flatten)]
        target: Target,
        #[command(flatten)]
        named: Named,
        /// Do not ask; needed where standard input is no terminal
        #[arg(long, short)]
        yes: bool,
    },
}

/// The user that a command is about.
#[derive(Debug, Args)]
pub(super) struct Named {
    /// Name of the user
    #[arg(value_name = "USER")]
    who: String,
}

/// What users may do, as the API has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "camelCase")]
pub(super) enum Role {
    /// Administrator: everything
    Admin,
    /// Operator: what the Console manages, not the cluster
    Operator,
    /// Auditor: look at everything, change nothing
    Auditor,
    /// Defender Manager: let hosts ask to join
    DefenderManager,
}

impl Role {
    fn name(self) -> &'static str {
        match self {
            Self::Admin => "admin",
            Self::Operator => "operator",
            Self::Auditor => "auditor",
            Self::DefenderManager => "defenderManager",
        }
    }
}

/// A row of the list.
#[derive(Deserialize)]
#[serde(default)]
#[derive(Default)]
struct Account {
    username: String,
    role: String,
    created: u64,
}

/// Carries a command out.
///
/// # Errors
/// When nobody answers, or it is refused.
pub(super) fn run(command: &Users, paint: Paint) -> Result<(), Stop> {
    match command {
        Users::List { target, json } => list(&target.console()?, *json, paint),
        Users::Add { target, named: Named { who }, role } => {
            let client = target.console()?;
            let body = json!({ "username": who, "password": new_password(who)?, "role": role.name() });
            client.have_done(&Call::post("users").with(body))?;
            say(&format!("{who} is created, with the role {}.", role.name()))
        }
        Users::SetRole { target, named: Named { who }, role } => {
            let body = json!({ "username": who, "role": role.name() });
            target.console()?.have_done(&Call::put("users").with(body))?;
            say(&format!("{who} has the role {}. All sessions of {who} have ended.", role.name()))
        }
        Users::SetPassword { target, named: Named { who } } => {
            let client = target.console()?;
            let body = json!({ "username": who, "password": new_password(who)? });
            client.have_done(&Call::put("users").with(body))?;
            say(&format!("{who} has a new password. All sessions of {who} have ended."))
        }
        Users::Passwd { target } => {
            let remote = match target.client()? {
                ApiClient::Remote(remote) => remote,
                ApiClient::Local(local) => local.consoles(target.login())?,
            };
            let Login::Password { user, password } = &remote.login else {
                return Err(Stop::tell(
                    EX_USAGE,
                    "a token is not enough, as the current password is needed: give --user",
                ));
            };
            let body = json!({ "oldPassword": password, "newPassword": new_password(user)? });
            remote.call(&Call::put("users/password").with(body))?;
            say(&format!("{user} has a new password. All sessions of {user} have ended."))
        }
        Users::Delete { target, named: Named { who }, yes } => {
            let client = target.console()?;
            confirm(&format!("Delete the user {who}?"), *yes)?;
            client.have_done(&Call::delete(format!("users/{}", segment(who))))?;
            say(&format!("{who} is deleted."))
        }
    }
}

fn list(client: &ApiClient, json: bool, paint: Paint) -> Result<(), Stop> {
    let found: Vec<Value> = lists::all(client, "users")?;
    if json {
        return print_json(&found);
    }
    let rows = lists::rows::<Account>(&found)?;
    let rows: Vec<Vec<Cell>> = rows
        .iter()
        .map(|row| vec![row.username.as_str().into(), row.role.as_str().into(), date(row.created).into()])
        .collect();
    Ok(columns::print(&columns::table(&[("USER", false), ("ROLE", false), ("CREATED", false)], &rows, paint))?)
}
