//! How hosts come into the cluster: invitations, requests, admission. Must never let in more hosts than
//! a complete cluster has.

use serde::{Deserialize, Serialize};

use super::Membership;
use crate::cluster::{
    limits::{Impossible, MAX_PEM},
    roster::{Admission, NodeId, check_host},
    shared::Request,
};

/// A host that is to be admitted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Newcomer {
    /// [`Roster::next_id`](crate::cluster::roster::Roster::next_id) or above: its certificate was signed for this id.
    pub id: NodeId,
    /// [`Request::id`].
    pub request: String,
    /// The node's certificate, PEM.
    pub certificate: String,
    /// The certificate of its Console, PEM.
    pub console_certificate: String,
}

/// A host that waited, and with what it is taken in. Nobody needs the request afterwards but for its names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Adoption {
    pub request: Request,
    pub newcomer: Newcomer,
}

impl Membership {
    pub(super) fn request(&mut self, request: &Request) -> Result<(), Impossible> {
        check_host(&request.name, &request.address, request.port)?;
        self.shared.requests.retain(|open| open.in_force(request.at));
        // The same host asks again, for example because its first answer was lost: the newest request counts.
        self.shared.requests.retain(|open| open.fingerprint != request.fingerprint);
        let place = (&request.address, request.port);
        let twin =
            self.shared.requests.iter().find(|open| open.name == request.name || (&open.address, open.port) == place);
        if let Some(twin) = twin {
            return Err(Impossible(format!(
                "another host asks to join as {} ({}) already: reject one of the two",
                twin.name,
                twin.place()
            )));
        }
        if self.roster.members.len() + self.shared.requests.len() >= self.roster.size.most {
            return Err(Impossible(format!(
                "{} members and {} requests to join make a complete cluster: remove or reject one first",
                self.roster.members.len(),
                self.shared.requests.len()
            )));
        }
        request.check()?;
        let Request { name, address, port, .. } = request.clone();
        let mut joined = self.roster.clone();
        joined.push(self.roster.next_id, (name, address, port), None)?;
        joined.check()?;
        self.shared.requests.push(request.clone());
        Ok(())
    }

    pub(super) fn admit(&mut self, hosts: &[Newcomer]) -> Result<(), Impossible> {
        let (members, requests) = (self.roster.members.len(), self.shared.requests.len());
        if !self.roster.size.permits(members + requests) || hosts.len() != requests || hosts.is_empty() {
            return Err(Impossible(format!(
                "{members} members and {requests} requests to join do not make {}: run the join script on the \
                 missing hosts first",
                self.roster.size
            )));
        }
        for host in hosts {
            let place = self.shared.requests.iter().position(|request| request.id == host.request);
            let place = place.ok_or_else(|| Impossible("a request to join is gone: look again".to_owned()))?;
            let request = self.shared.requests.remove(place);
            self.take_in(&request, host)?;
        }
        self.shared.invitations.clear();
        Ok(())
    }

    pub(super) fn adopt(&mut self, hosts: &[Adoption]) -> Result<(), Impossible> {
        let (size, requests) = (self.roster.size, self.shared.requests.len());
        if !size.is_pool() || hosts.is_empty() {
            return Err(Impossible(format!("a cluster of {size} members takes hosts in by the join script")));
        }
        if self.roster.members.len() + requests + hosts.len() > size.most {
            return Err(Impossible(format!(
                "{} members, {requests} requests to join and {} more hosts are more than the {} that a pool may have",
                self.roster.members.len(),
                hosts.len(),
                size.most
            )));
        }
        for Adoption { request, newcomer } in hosts {
            check_host(&request.name, &request.address, request.port)?;
            request.check()?;
            self.take_in(request, newcomer)?;
        }
        Ok(())
    }

    fn take_in(&mut self, request: &Request, host: &Newcomer) -> Result<(), Impossible> {
        if host.id < self.roster.next_id {
            return Err(Impossible(format!("node id {} was given to another host meanwhile: try again", host.id)));
        }
        let Request { name, address, port, id, .. } = request.clone();
        if host.certificate.len().max(host.console_certificate.len()) > MAX_PEM {
            return Err(Impossible(format!("a certificate of {name} is longer than {MAX_PEM} bytes")));
        }
        let (certificate, console_certificate) = (host.certificate.clone(), host.console_certificate.clone());
        let admission = Admission { request: id, certificate, console_certificate };
        self.roster.push(host.id, (name, address, port), Some(admission))?;
        self.roster.next_id = host.id + 1;
        Ok(())
    }
}
