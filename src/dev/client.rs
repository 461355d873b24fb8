//! The few requests that `dev` makes to the Console it started: is it there, sign the administrator up, write and read.

use std::{path::Path, time::Duration};

use anyhow::{Context, Result, bail};
use ureq::Agent;

use crate::https::{self, Limits, Trust};

/// Longest time for one request: everything is on this host.
const LIMIT: Duration = Duration::from_secs(5);

/// A client that trusts one authority only.
pub(super) struct Client(Agent);

impl Client {
    /// Reads the authority's certificate.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(super) fn new(ca: &Path) -> Result<Self> {
        let trust = Trust::file(ca).with_context(|| format!("read {}", ca.display()))?;
        Ok(Self(https::client(&trust, Limits { connect: LIMIT, request: LIMIT })))
    }

    /// True if the Console at `url` answers its health check.
    pub(super) fn ping(&self, url: &str) -> bool {
        self.0.get(format!("{url}/api/v1/_ping")).call().is_ok_and(|response| response.status() == 200)
    }

    /// Makes the first user. That there is one already is no error.
    ///
    /// # Errors
    /// When the Console does not answer or refuses.
    pub(super) fn sign_up(&self, url: &str, user: &str, password: &str) -> Result<()> {
        let initialized: serde_json::Value = self
            .0
            .get(format!("{url}/api/v1/settings/initialized"))
            .call()
            .and_then(|mut response| response.body_mut().read_json())
            .context("ask whether the Console has a user")?;
        if initialized["initialized"] == true {
            return Ok(());
        }
        let body = serde_json::json!({"username": user, "password": password});
        let mut response =
            self.0.post(format!("{url}/api/v1/signup")).send_json(body).context("sign the administrator up")?;
        if !response.status().is_success() {
            let text = response.body_mut().read_to_string().unwrap_or_default();
            bail!("sign the administrator up: {} {text}", response.status());
        }
        Ok(())
    }

    /// Logs in and returns the session's token.
    ///
    /// # Errors
    /// When the Console does not answer or refuses.
    pub(super) fn log_in(&self, url: &str, user: &str, password: &str) -> Result<String> {
        let body = serde_json::json!({"username": user, "password": password});
        let mut response = self.0.post(format!("{url}/api/v1/authenticate")).send_json(body).context("log in")?;
        let answer: serde_json::Value = response.body_mut().read_json().context("log in")?;
        answer["token"].as_str().map(str::to_owned).with_context(|| format!("log in: {answer}"))
    }

    /// Writes a tag. That it is there already is no error: an earlier attempt may have got through unseen.
    ///
    /// # Errors
    /// When the tag was not acknowledged.
    pub(super) fn write_tag(&self, url: &str, token: &str, name: &str) -> Result<()> {
        let body = serde_json::json!({"name": name, "color": "#2e7d32", "description": ""});
        let request = self.0.post(format!("{url}/api/v1/tags")).header("authorization", format!("Bearer {token}"));
        let status = request.send_json(body).context("write a tag")?.status();
        if status.is_success() || status == 409 { Ok(()) } else { bail!("write a tag: {status}") }
    }

    /// The names of the tags, up to 1000.
    ///
    /// # Errors
    /// When the Console does not answer as it should.
    pub(super) fn tags(&self, url: &str, token: &str) -> Result<Vec<String>> {
        let request = self.0.get(format!("{url}/api/v1/tags?limit=1000"));
        let mut response =
            request.header("authorization", format!("Bearer {token}")).call().context("read the tags")?;
        let tags: Vec<serde_json::Value> = response.body_mut().read_json().context("read the tags")?;
        Ok(tags.iter().filter_map(|tag| tag["name"].as_str().map(str::to_owned)).collect())
    }
}
