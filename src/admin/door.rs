//! The one door to everything that an administrator does to the cluster. Each method that changes something writes into
//! the audit what is to be done, by whom, and how it ended, refusals with their reason; the operation behind it cannot
//! be reached otherwise. Must never check or change anything itself.

use std::{net::IpAddr, sync::Arc, time::Duration};

use data_encoding::HEXLOWER;
use serde_json::{Value, json};
use tracing::warn;

use super::{
    AdminConfig, AdminError, Certificates, Custom, Invited, NewMember, Operations, PoolAddition, PoolCandidate,
    PoolRemoval, PoolSettings, PoolStatus, PoolWish, Ports, SwitchoverReport,
    audit::{Act, Actor, Audit, Outcome, Record},
    pool_settings,
};
use crate::{
    cluster::{Membership, NodeId, shared::webhook::Webhook},
    join::{JoinRequest, RequestState},
    node::{Handle, Status},
};

/// What most rows are about.
const CLUSTER: &str = "high availability";
/// What the rows of a pool's settings are about.
const POOL: &str = "clustered-db/settings";

/// The operations of an administrator.
pub struct Admin {
    operations: Operations,
    audit: Arc<dyn Audit>,
}

impl Admin {
    /// Prepares the operations of the node behind `handle`, each of which stands in `audit`.
    pub fn new(config: AdminConfig, handle: Handle, ports: Arc<dyn Ports>, audit: Arc<dyn Audit>) -> Self {
        Self { operations: Operations::new(config, handle, ports), audit }
    }

    /// Carries something out between its two lines of the audit.
    ///
    /// # Errors
    /// Those of the work.
    pub async fn audited<T, E>(&self, by: &Actor, act: Act, work: impl Future<Output = Result<T, E>>) -> Result<T, E>
    where
        Outcome: for<'e> From<&'e E>,
    {
        let record = self.begin(by, act).await;
        let result = work.await;
        record.end(Outcome::of(&result)).await;
        result
    }

    /// Writes down what is begun here and ends elsewhere.
    pub async fn begin(&self, by: &Actor, act: Act) -> Record {
        Record::begin(&self.audit, by, act).await
    }

    /// The latest picture of this node and what it knows of the others.
    pub fn status(&self) -> Arc<Status> {
        self.operations.status()
    }

    /// The newest membership that this node knows: newer than that of a status, has every change whose outcome is
    /// known.
    pub fn membership(&self) -> Arc<Membership> {
        self.operations.membership()
    }

    /// Refuses on a node that is not PRIMARY, and names the one that is.
    ///
    /// # Errors
    /// [`AdminError::NotPrimary`].
    pub fn check_primary(&self) -> Result<(), AdminError> {
        self.operations.check_primary()
    }

    /// `MANAGEMENT_PORT_HTTPS`, the same on all members.
    pub fn https_port(&self) -> Option<u16> {
        self.operations.config.https_port
    }

    /// Closes the Console, does the work, and opens it again. No switchover and no change of the membership comes
    /// between. The caller must see to it that the future is not dropped half-way, and audits what the work is.
    ///
    /// # Errors
    /// [`AdminError::NotPrimary`], or `Refused` while a switchover or a change of the membership is under way; nothing
    /// was done then.
    pub async fn with_console_closed<T>(
        &self,
        by: &str,
        what: &'static str,
        work: impl Future<Output = T>,
    ) -> Result<T, AdminError> {
        self.operations.with_console_closed(by, what, work).await
    }

    /// Makes a join token that is good for `valid`. When too many are open, the one that ends first is closed.
    ///
    /// # Errors
    /// [`AdminError::NotPrimary`]; `Refused` for another span than one second to seven days, or without an authority;
    /// `Unknown` if the role was lost before it was known whether it is in force.
    pub async fn invite(&self, valid: Duration, by: &Actor) -> Result<Invited, AdminError> {
        let act = Act::new("invite", CLUSTER).wish(&json!({ "validSec": valid.as_secs() }));
        let work = async {
            self.operations.in_ha_mode("a join script")?;
            self.operations.invite(valid, &by.name).await
        };
        self.audited(by, act, work).await
    }

    /// Closes all invitations: no token is good any more.
    ///
    /// # Errors
    /// [`AdminError::NotPrimary`]; `Unknown` if the role was lost before it was known whether it is in force.
    pub async fn uninvite(&self, by: &Actor) -> Result<(), AdminError> {
        self.audited(by, Act::new("uninvite", CLUSTER), self.operations.uninvite(&by.name)).await
    }

    /// Refuses a join token that is not good (any more), and says no more than that to addresses that have tried too
    /// many of them. A good one is good wherever it comes from: others behind the same address must not keep a host
    /// away.
    ///
    /// # Errors
    /// [`AdminError::Denied`], [`AdminError::TooMany`] or [`AdminError::NotPrimary`].
    pub fn check_token(&self, token: &str, from: IpAddr) -> Result<(), AdminError> {
        self.operations.check_token(token, from)
    }

    /// A host asks to join; asking again with the same key gives the same answer, and is written down once.
    ///
    /// # Errors
    /// `Denied` and `TooMany` as [`Self::check_token`]; `Refused` when the host says something of itself that cannot
    /// be, or when too many ask; [`AdminError::NotPrimary`]; `Unknown` if the role was lost before it was known whether
    /// it is in force.
    pub async fn request(&self, token: &str, from: IpAddr, request: JoinRequest) -> Result<RequestState, AdminError> {
        let name: String = request.name.chars().filter(|c| !c.is_control()).take(64).collect();
        let by = Actor::host(&name, from);
        let wish = json!({ "address": request.address, "port": request.port, "version": request.version });
        let act = Act::new("ask to join", format!("host '{name}'")).wish(&wish);
        let asked = self.operations.request(token, from, request, || self.begin(&by, act.clone())).await;
        // Whoever guesses is slowed down, and so is what he leaves here.
        if let Err(error @ (AdminError::Denied(_) | AdminError::Refused(_))) = &asked.1
            && asked.0.is_none()
        {
            self.begin(&by, act.clone()).await.end(Outcome::from(error)).await;
        }
        if let Some(record) = asked.0 {
            record.end(Outcome::of(&asked.1)).await;
        }
        asked.1
    }

    /// Where a request stands; none if nobody made it or it has expired. Works on every member.
    pub fn request_state(&self, id: &str) -> Option<RequestState> {
        self.operations.request_state(id)
    }

    /// APPLY: takes all hosts that ask in. Returns their ids. With the fingerprints that somebody has `compared`: only
    /// if those are the hosts that ask.
    ///
    /// # Errors
    /// [`AdminError`]; `Refused` names everything that is in the way.
    pub async fn apply(&self, compared: Option<Vec<String>>, by: &Actor) -> Result<Vec<NodeId>, AdminError> {
        let act = Act::new("apply", CLUSTER).wish(&json!({ "fingerprints": compared }));
        let work = async {
            self.operations.in_ha_mode("APPLY")?;
            self.operations.apply(compared, &by.name).await
        };
        self.audited(by, act, work).await
    }

    /// Turns a request down, by the name of its host, its fingerprint (or the beginning of it) or its id.
    ///
    /// # Errors
    /// [`AdminError::NotPrimary`]; `Refused` when no request is meant, or more than one;
    /// `Unknown` if the role was lost before it was known whether it is in force.
    pub async fn reject(&self, request: &str, by: &Actor) -> Result<(), AdminError> {
        let act = Act::new("reject", format!("request to join '{request}'"));
        self.audited(by, act, self.operations.reject(request, &by.name)).await
    }

    /// Drops a member, by its name, its id or the beginning of its name. Returns what remains to be done about what it
    /// knows.
    ///
    /// # Errors
    /// [`AdminError`]; `Refused` when the rest has no majority that answers, unless `force`.
    pub async fn remove(&self, member: &str, force: bool, by: &Actor) -> Result<Option<String>, AdminError> {
        let act = Act::new("remove", format!("member '{member}'")).wish(&json!({ "force": force }));
        self.audited(by, act, self.operations.remove(member, force, &by.name)).await
    }

    /// A member is called or reached otherwise from now on.
    ///
    /// # Errors
    /// [`AdminError::NotPrimary`]; `Refused` when no member is meant, or more than one, when nothing would change, and
    /// when the name or the place is another member's; `Unknown` if the role was lost before it was known whether it is
    /// in force.
    pub async fn readdress(
        &self,
        member: &str,
        new_name: Option<String>,
        address: Option<String>,
        port: Option<u16>,
        by: &Actor,
    ) -> Result<(), AdminError> {
        let wish = json!({ "name": new_name, "address": address, "port": port });
        let act = Act::new("readdress", format!("member '{member}'")).wish(&wish);
        self.audited(by, act, self.operations.readdress(member, new_name, address, port, &by.name)).await
    }

    /// No automatic takeover for so long. Returns when the pause ends, in seconds since 1970.
    ///
    /// # Errors
    /// [`AdminError::NotPrimary`]; `Refused` for another span than one minute to 24 hours;
    /// `Unknown` if the role was lost before it was known whether it is in force.
    pub async fn pause(&self, span: Duration, by: &Actor) -> Result<u64, AdminError> {
        let act = Act::new("pause", CLUSTER).wish(&json!({ "seconds": span.as_secs() }));
        self.audited(by, act, self.operations.pause(span, &by.name)).await
    }

    /// Ends a pause. While no primary is known, as when the only node that may be one is gone, it ends on this node
    /// alone: then this node may take over.
    ///
    /// # Errors
    /// [`AdminError::NotPrimary`] while another node is; `Unknown` if the role was lost before it was known whether it
    /// is in force.
    pub async fn resume(&self, by: &Actor) -> Result<(), AdminError> {
        self.audited(by, Act::new("resume", CLUSTER), self.operations.resume(&by.name)).await
    }

    /// What would be in the way of a switchover, and who would be PRIMARY. Changes nothing.
    ///
    /// # Errors
    /// [`AdminError::NotPrimary`], or `Refused` when `to` is no member, or more than one.
    pub fn check_switchover(&self, to: Option<&str>) -> Result<SwitchoverReport, AdminError> {
        self.operations.check_switchover(to)
    }

    /// Hands the primary role over, to the member named or the one that is furthest, and waits for the end.
    ///
    /// # Errors
    /// [`AdminError`]; `Refused` also when a check failed or the role has stayed here.
    pub async fn switchover(&self, to: Option<&str>, by: &Actor) -> Result<SwitchoverReport, AdminError> {
        let act = Act::new("switchover", CLUSTER).wish(&json!({ "to": to }));
        self.audited(by, act, self.operations.switchover(to, &by.name)).await
    }

    /// Begins a switchover for a caller that must not wait for its end, such as a request that the switchover itself
    /// would wait for. Returns with the checks; the switchover goes on by itself unless one of them has failed.
    ///
    /// # Errors
    /// [`AdminError::NotPrimary`], or `Refused` when `to` is no member, or more than one. A check that failed is in the
    /// report.
    pub async fn begin_switchover(
        self: &Arc<Self>,
        to: Option<&str>,
        by: &Actor,
    ) -> Result<SwitchoverReport, AdminError> {
        let act = Act::new("switchover", CLUSTER).wish(&json!({ "to": to }));
        let record = self.begin(by, act).await;
        let report = match self.operations.check_switchover(to) {
            Ok(report) => report,
            Err(error) => {
                record.end(Outcome::from(&error)).await;
                return Err(error);
            }
        };
        if let Some(why) = report.objections() {
            record.end(Outcome::Refused(why)).await;
            return Ok(report);
        }
        self.go_on(report.to.clone(), by.name.clone(), Some(record));
        Ok(report)
    }

    /// Begins a switchover as part of a drill, whose row covers it.
    ///
    /// # Errors
    /// [`AdminError::NotPrimary`]. A check that failed is in the report.
    pub fn begin_switchover_of_drill(self: &Arc<Self>, by: &str) -> Result<SwitchoverReport, AdminError> {
        let report = self.operations.check_switchover(None)?;
        if report.objections().is_none() {
            self.go_on(report.to.clone(), by.to_owned(), None);
        }
        Ok(report)
    }

    fn go_on(self: &Arc<Self>, to: Option<String>, by: String, record: Option<Record>) {
        let admin = Arc::clone(self);
        tokio::spawn(async move {
            let result = admin.operations.switchover(to.as_deref(), &by).await;
            if let Err(error) = &result {
                warn!(by, "the switchover did not come about: {error}");
            }
            if let Some(record) = record {
                record.end(Outcome::of(&result)).await;
            }
        });
    }

    /// The pool as this node sees it; `now` in seconds since 1970. Works on every member.
    ///
    /// # Errors
    /// `Refused` in HA mode.
    pub fn pool_status(&self, now: u64) -> Result<PoolStatus, AdminError> {
        self.operations.pool_status(now)
    }

    /// Where the pool is reached. Works on every member.
    ///
    /// # Errors
    /// `Refused` in HA mode.
    pub fn pool_settings(&self) -> Result<PoolSettings, AdminError> {
        self.operations.pool_settings()
    }

    /// Changes where the pool is reached. The address of the load balancer is one of the names of all Consoles'
    /// certificates from now on. Returns the settings as they are kept.
    ///
    /// # Errors
    /// [`AdminError::NotPrimary`]; `Refused` in HA mode, for an address that cannot be in a certificate, and for
    /// another address of the seed when it is not alone; `Unknown` if the role was lost before it was known whether it
    /// is in force.
    pub async fn configure_pool(&self, wish: PoolWish, by: &Actor) -> Result<PoolSettings, AdminError> {
        let was = pool_settings(&self.membership());
        let next = PoolSettings {
            load_balancer_address: wish
                .load_balancer_address
                .clone()
                .unwrap_or_else(|| was.load_balancer_address.clone()),
            seed_console_address: wish.seed_console_address.clone().unwrap_or_else(|| was.seed_console_address.clone()),
        };
        let act = Act::new("configure", POOL).change(&was, &next);
        self.audited(by, act, self.operations.configure_pool(wish, &by.name)).await
    }

    /// Meets hosts that wait, before they are added. Changes nothing on either side; a refusal is written down.
    ///
    /// # Errors
    /// [`AdminError::NotPrimary`]; `Refused` in HA mode, and with everything that is in the way of adding them.
    pub async fn look_at_hosts(&self, hosts: &[NewMember], by: &Actor) -> Result<Vec<PoolCandidate>, AdminError> {
        let seen = self.operations.look_at_hosts(hosts).await;
        if let Err(error @ AdminError::Refused(_)) = &seen {
            self.begin(by, Act::new("look at", hosts_named(hosts))).await.end(Outcome::from(error)).await;
        }
        seen
    }

    /// Takes hosts that wait into a pool: all or none, as members without a vote. It goes on if whoever asks goes away.
    /// Asked again, it tells those that were taken in and do not know it.
    ///
    /// # Errors
    /// [`AdminError`]; `Refused` in HA mode, with everything that is in the way, and for a host that has neither proven
    /// that it knows the pool's secret nor the fingerprint that was given.
    pub async fn add_to_pool(self: &Arc<Self>, hosts: Vec<NewMember>, by: &Actor) -> Result<PoolAddition, AdminError> {
        let (admin, by) = (Arc::clone(self), by.clone());
        let act = Act::new("add", hosts_named(&hosts)).wish(&json!({ "members": hosts }));
        let adding = tokio::spawn(async move {
            let work = admin.operations.add_to_pool(&hosts, &by.name);
            admin.audited(&by, act, Box::pin(work)).await
        });
        let lost = |error| AdminError::Unknown(format!("the operation ended without a result: {error}"));
        adding.await.unwrap_or_else(|error| Err(lost(error)))
    }

    /// Drops the member of a pool that is at this address, with or without its port. Returns what the pool tolerates
    /// then, and what remains to be done.
    ///
    /// # Errors
    /// [`AdminError`]; `Refused` in HA mode, when there is no such member, when it is PRIMARY, and when the rest would
    /// have no majority that answers.
    pub async fn remove_from_pool(&self, address: &str, by: &Actor) -> Result<PoolRemoval, AdminError> {
        let act = Act::new("remove", format!("member '{address}'"));
        self.audited(by, act, self.operations.remove_from_pool(address, &by.name)).await
    }

    /// Has the members replace the cluster key. Returns when that has begun.
    ///
    /// # Errors
    /// [`AdminError::NotPrimary`]; `Refused` while something is being replaced already;
    /// `Unknown` if the role was lost before it was known whether it is in force.
    pub async fn rotate_cluster_key(&self, by: &Actor) -> Result<(), AdminError> {
        self.audited(by, Act::new("rotate", "cluster key"), self.operations.rotate_cluster_key(&by.name)).await
    }

    /// Has the members replace the certificate authority; the new one is trusted for so long before it signs. Returns
    /// when that has begun.
    ///
    /// # Errors
    /// [`AdminError::NotPrimary`]; `Refused` for another span than one second to 90 days, without an authority, or
    /// while something is being replaced already; `Unknown` if the role was lost before it was known whether it is in
    /// force.
    pub async fn rotate_authority(&self, overlap: Duration, by: &Actor) -> Result<(), AdminError> {
        let act = Act::new("rotate", "certificate authority").wish(&json!({ "overlapSec": overlap.as_secs() }));
        self.audited(by, act, self.operations.rotate_authority(overlap, &by.name)).await
    }

    /// The certificates of this node, and what is known of those of all Consoles. Works on every member.
    pub fn certificates(&self) -> Certificates {
        self.operations.certificates()
    }

    /// Signs the request of a Defender, of which only the key counts. Blocks. The caller writes down what was signed.
    ///
    /// # Errors
    /// [`AdminError::NotPrimary`]; `Refused` when the request is not sound, or the authority cannot be used here.
    pub fn certify_defender(&self, csr: &str, id: &str, name: &str, by: super::Signer) -> Result<String, AdminError> {
        self.operations.certify_defender(csr, id, name, by)
    }

    /// Every Console's certificate is good for these names, too, from now on: each member makes its own anew, and
    /// serves it at once. Returns the list as it is kept.
    ///
    /// # Errors
    /// [`AdminError::NotPrimary`]; `Refused` for a name that the cluster uses itself, or one that cannot be in a
    /// certificate; `Unknown` if the role was lost before it was known whether it is in force.
    pub async fn set_console_names(&self, names: Vec<String>, by: &Actor) -> Result<Vec<String>, AdminError> {
        let of = |names: &[String]| json!({ "consoleSAN": names });
        let act = Act::new("set", "settings/certs").change(&of(&self.membership().shared.console_names), &of(&names));
        self.audited(by, act, self.operations.set_console_names(names, &by.name)).await
    }

    /// All Consoles serve this certificate from now on: the chain and the private key as one PEM text.
    ///
    /// # Errors
    /// [`AdminError`]; `Refused` when it cannot be used, with all names that it lacks.
    pub async fn set_certificate(&self, pem: &str, by: &Actor) -> Result<Custom, AdminError> {
        // Nothing of a text that holds a key.
        let act = Act::new("set", "settings/custom-certs");
        self.audited(by, act, self.operations.set_certificate(pem, &by.name)).await
    }

    /// All Consoles serve certificates of the cluster's own authority again.
    ///
    /// # Errors
    /// [`AdminError::NotPrimary`]; `Refused` if none was given; `Unknown` if the role was lost before it was known
    /// whether it is in force.
    pub async fn remove_certificate(&self, by: &Actor) -> Result<(), AdminError> {
        let act = Act::new("delete", "settings/custom-certs");
        self.audited(by, act, self.operations.remove_certificate(&by.name)).await
    }

    /// The webhooks, without their secrets; true where there is one.
    pub fn webhooks(&self) -> Vec<(Webhook, bool)> {
        self.operations.webhooks()
    }

    /// Sends events there from now on, and nowhere else. A webhook without a secret keeps the one that its name and
    /// address have, unless that is empty.
    ///
    /// # Errors
    /// [`AdminError::NotPrimary`]; `Refused` for too many, or for a name or an address that cannot be;
    /// `Unknown` if the role was lost before it was known whether it is in force.
    pub async fn set_webhooks(&self, webhooks: Vec<Webhook>, by: &Actor) -> Result<(), AdminError> {
        let before = self.webhooks();
        let old: Vec<Value> = before.iter().map(|(webhook, signed)| noted(webhook, *signed)).collect();
        // One that is given without a secret keeps the one that it has.
        let keeps = |new: &Webhook| {
            before.iter().any(|(old, signed)| *signed && (&old.name, &old.url) == (&new.name, &new.url))
        };
        let signed = |new: &Webhook| new.secret.as_ref().map_or_else(|| keeps(new), |secret| !secret.is_empty());
        let new: Vec<Value> = webhooks.iter().map(|webhook| noted(webhook, signed(webhook))).collect();
        let act = Act::new("set", "notifications").change(&json!({ "webhooks": old }), &json!({ "webhooks": new }));
        self.audited(by, act, self.operations.set_webhooks(webhooks, &by.name)).await
    }

    /// Has `send` tell everybody who would be notified of events.
    pub async fn test_notifications<T>(&self, by: &Actor, send: impl Future<Output = T>) -> T {
        let record = self.begin(by, Act::new("test", "notifications")).await;
        let sent = send.await;
        record.end(Outcome::Done).await;
        sent
    }
}

/// What the rows about hosts that are added are about.
fn hosts_named(hosts: &[NewMember]) -> String {
    let names: Vec<&str> = hosts.iter().map(|host| host.address.as_str()).collect();
    format!("member '{}'", names.join("', '"))
}

/// What an audit says of a webhook: no secret, and of its address the host, and a mark by which another one is seen.
fn noted(webhook: &Webhook, signed: bool) -> Value {
    let Webhook { name, url, ca, severity, .. } = webhook;
    let host = url.split(['/', '?', '#']).take(3).collect::<Vec<_>>().join("/");
    let mark = HEXLOWER.encode(&ring::digest::digest(&ring::digest::SHA256, url.as_bytes()).as_ref()[..4]);
    json!({ "name": name, "host": host, "urlDigest": mark, "severity": severity, "ca": ca.is_some(), "signed": signed })
}
