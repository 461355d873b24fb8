//! Tells the Defenders that are connected when the authorities of the cluster change, so that none of them has to
//! connect again for it. Must never have all of them ask for certificates at the same moment.

use std::{sync::Arc, time::Duration};

use tokio::sync::watch;

use super::hub::{Hub, Trust};
use crate::{cluster::shared::Shared, console::store::Store, node::Status};

/// The longest span within which Defenders ask for other certificates.
const SPREAD: Duration = Duration::from_secs(60);
/// What part of the time in which an authority is only introduced they have for it.
const PART: u32 = 4;

/// The certificate of the authority that signs for Defenders that have one already; PEM.
pub(super) fn newest(shared: &Shared) -> Option<&str> {
    let coming = shared.coming.as_ref().map(|coming| &coming.authority);
    coming.or(shared.authority.as_ref()).map(|authority| authority.certificate.as_str())
}

/// What Defenders are to know of the authorities, and which of them signs.
#[derive(PartialEq, Eq)]
struct Known {
    bundle: String,
    newest: Option<String>,
}

impl Known {
    fn of(shared: &Shared) -> Self {
        Self { bundle: shared.trust_bundle(), newest: newest(shared).map(str::to_owned) }
    }

    /// The news for those who knew `before`.
    fn since(&self, before: &Self, shared: &Shared) -> Trust {
        let overlap = shared.coming.as_ref().map_or(SPREAD, |coming| Duration::from_secs(coming.overlap) / PART);
        let within = u64::try_from(overlap.min(SPREAD).as_millis()).unwrap_or(0);
        Trust { authorities: self.bundle.clone(), renew_within_ms: (self.newest != before.newest).then_some(within) }
    }
}

/// Follows the membership until the store is closed.
pub(in crate::console) async fn follow(store: Store, mut status: watch::Receiver<Arc<Status>>, hub: Arc<Hub>) {
    let mut known = Known::of(&status.borrow_and_update().membership.shared);
    let forever = async {
        while status.changed().await.is_ok() {
            let now = Arc::clone(&status.borrow_and_update());
            let shared = &now.membership.shared;
            let current = Known::of(shared);
            if current != known {
                let trust = current.since(&known, shared);
                tracing::info!(
                    renew = trust.renew_within_ms.is_some(),
                    "the Defenders that are connected are told of other authorities"
                );
                hub.announce_trust(trust);
                known = current;
            }
        }
    };
    tokio::select! {
        () = store.closing() => {}
        () = forever => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::{
        ClusterId, Membership,
        shared::authority::{IncomingAuthority, RetiredAuthority, SealedAuthority},
    };

    fn authority(certificate: &str) -> SealedAuthority {
        SealedAuthority { certificate: certificate.to_owned(), sealed_key: String::new(), key: None }
    }

    #[test]
    fn certificates_are_asked_for_when_another_authority_signs_and_not_again() {
        let mut shared = Membership::founded(ClusterId(1), Vec::new()).shared;
        shared.authority = Some(authority("old"));
        let news = |shared: &Shared, before: &Known| Known::of(shared).since(before, shared);
        let mut before = Known::of(&shared);
        shared.coming = Some(IncomingAuthority { authority: authority("new"), overlap: 8 });
        let told = news(&shared, &before);
        assert_eq!((told.authorities.as_str(), told.renew_within_ms), ("old\nnew\n", Some(2000)));
        before = Known::of(&shared);
        shared.coming = None;
        shared.authority = Some(authority("new"));
        shared.retired = Some(RetiredAuthority { certificate: "old".to_owned(), until: 1 });
        assert_eq!(news(&shared, &before), Trust { authorities: "new\nold\n".to_owned(), renew_within_ms: None });
        before = Known::of(&shared);
        shared.retired = None;
        assert_eq!(news(&shared, &before), Trust { authorities: "new\n".to_owned(), renew_within_ms: None });
        // A member was removed meanwhile: what was introduced is dropped, and the one before signs again.
        shared.coming = Some(IncomingAuthority { authority: authority("third"), overlap: 86_400 });
        before = Known::of(&shared);
        shared.coming = None;
        assert_eq!(news(&shared, &before).renew_within_ms, Some(60_000));
    }
}
