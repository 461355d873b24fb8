//! `twistcli tags`: the labels that the Console keeps.

use clap::Subcommand;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    args::DONE_OR_REFUSED,
    columns::{self, Cell, Paint, print_json, say},
    lists,
    remote::segment,
    stop::Stop,
    target::Target,
};
use crate::control::Call;

const ADD_HELP: &str = "\
Exit code: 0 done, 64 wrong command line, 69 nobody answers, 75 refused, 77 the login is refused.

Examples:
  twistcli tags add prod --tag-color '#2e7d32' --description 'in production'";

/// Commands of `twistcli tags`.
#[derive(Debug, Subcommand)]
pub(super) enum Tags {
    /// List all tags
    #[command(after_help = DONE_OR_REFUSED)]
    List {
        #[command(flatten)]
        target: Target,
        /// Print them as JSON
        #[arg(long)]
        json: bool,
    },
    /// Create a tag
    #[command(after_help = ADD_HELP)]
    Add {
        #[command(flatten)]
        target: Target,
        /// Its name
        #[arg(value_name = "NAME")]
        name: String,
        /// Its colour, as #2e7d32
        #[arg(long = "tag-color", value_name = "COLOUR", default_value = "")]
        tag_color: String,
        /// What it is for
        #[arg(long, value_name = "TEXT", default_value = "")]
        description: String,
    },
    /// Delete a tag
    #[command(after_help = DONE_OR_REFUSED)]
    Delete {
        #[command(flatten)]
        target: Target,
        /// Its name
        #[arg(value_name = "NAME")]
        name: String,
    },
}

/// A row of the list.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Tag {
    name: String,
    color: String,
    description: String,
}

/// Carries a command out.
///
/// # Errors
/// When nobody answers, or it is refused.
pub(super) fn run(command: &Tags, paint: Paint) -> Result<(), Stop> {
    match command {
        Tags::List { target, json } => {
            let found = lists::all(&target.console()?, "tags")?;
            if *json { print_json(&found) } else { Ok(columns::print(&table(&found, paint)?)?) }
        }
        Tags::Add { target, name, tag_color, description } => {
            let body = json!({ "name": name, "color": tag_color, "description": description });
            target.console()?.have_done(&Call::post("tags").with(body))?;
            say(&format!("The tag {name} is created."))
        }
        Tags::Delete { target, name } => {
            target.console()?.have_done(&Call::delete(format!("tags/{}", segment(name))))?;
            say(&format!("The tag {name} is deleted."))
        }
    }
}

fn table(found: &[Value], paint: Paint) -> Result<String, Stop> {
    let rows = lists::rows::<Tag>(found)?;
    let rows: Vec<Vec<Cell>> =
        rows.into_iter().map(|tag| vec![tag.name.into(), tag.color.into(), tag.description.into()]).collect();
    Ok(columns::table(&[("TAG", false), ("COLOUR", false), ("DESCRIPTION", false)], &rows, paint))
}
