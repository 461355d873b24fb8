//! Lists of the API: fetched page by page, and sorted into rows. Must never ask without end.

use std::io;

use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{client::ApiClient, stop::Stop};
use crate::control::Call;

/// Rows in one page: the most that the API gives.
const PAGE: usize = 1000;
/// Pages that are read at most.
const MAX_PAGES: usize = 100;

/// A whole list.
///
/// # Errors
/// When nobody answers as they should.
pub(super) fn all(client: &ApiClient, path: &str) -> Result<Vec<Value>, Stop> {
    let mut found: Vec<Value> = Vec::new();
    let joint = if path.contains('?') { '&' } else { '?' };
    for page in 0..MAX_PAGES {
        let rows: Vec<Value> = client.call(&Call::get(format!("{path}{joint}limit={PAGE}&offset={}", page * PAGE)))?;
        let last = rows.len() < PAGE;
        found.extend(rows);
        if last {
            return Ok(found);
        }
    }
    eprintln!("twistcli: the list goes on: these are the first {}", PAGE * MAX_PAGES);
    Ok(found)
}

/// JSON as the rows of a table.
///
/// # Errors
/// When it is something else.
pub(super) fn rows<T: DeserializeOwned>(values: &[Value]) -> Result<Vec<T>, Stop> {
    let rows = values.iter().map(T::deserialize).collect::<Result<_, _>>();
    rows.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error).into())
}
