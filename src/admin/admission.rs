//! From a request to join to a member. Owns the checks of both sides of APPLY; must never sign a name that the newcomer
//! has chosen, or admit some of the hosts only.

use std::net::IpAddr;

use super::{Admin, AdminError};
use crate::{
    cluster::NodeId,
    join::{JoinRequest, RequestState},
};

/// Requests that were turned down lately.
#[derive(Debug, Default)]
pub(super) struct Rejections;

impl Admin {
    /// A host asks to join; asking again with the same key gives the same answer.
    ///
    /// # Errors
    /// [`AdminError`].
    pub async fn request(
        &self,
        _token: &str,
        _from: IpAddr,
        _request: JoinRequest,
    ) -> Result<RequestState, AdminError> {
        self.primary()?;
        Err(AdminError::Refused(String::new()))
    }

    /// Where a request stands; none if nobody made it or it has expired. Works on every member.
    pub fn request_state(&self, _id: &str) -> Option<RequestState> {
        None
    }

    /// APPLY: takes all hosts that ask in. Returns their ids.
    ///
    /// # Errors
    /// [`AdminError`]; `Refused` names everything that is in the way.
    pub async fn apply(&self, _by: &str) -> Result<Vec<NodeId>, AdminError> {
        self.primary()?;
        Err(AdminError::Refused(String::new()))
    }

    /// Turns a request down, by the name of its host, its fingerprint (or the beginning of it) or its id.
    ///
    /// # Errors
    /// [`AdminError`].
    pub async fn reject(&self, _request: &str, _by: &str) -> Result<(), AdminError> {
        self.primary()?;
        Err(AdminError::Refused(String::new()))
    }
}
