//! Who is notified of events: the webhooks of the cluster. Must never give a secret back.

use tracing::info;

use super::{AdminError, Operations};
use crate::cluster::{Change, shared::webhook::Webhook};

impl Operations {
    /// The webhooks, without their secrets; true where there is one.
    pub(super) fn webhooks(&self) -> Vec<(Webhook, bool)> {
        let without = |webhook: &Webhook| (Webhook { secret: None, ..webhook.clone() }, webhook.secret.is_some());
        self.membership().shared.webhooks.iter().map(without).collect()
    }

    /// Sends events there from now on, and nowhere else. A webhook without a secret keeps the one that its name and
    /// address have, unless that is empty.
    ///
    /// # Errors
    /// [`AdminError::NotPrimary`]; `Refused` for too many, or for a name or an address that cannot be;
    /// `Unknown` if the role was lost before it was known whether it is in force.
    pub(super) async fn set_webhooks(&self, mut webhooks: Vec<Webhook>, by: &str) -> Result<(), AdminError> {
        self.primary()?;
        let _one = self.changing.lock().await;
        let known = self.membership().shared.webhooks.clone();
        for webhook in &mut webhooks {
            let same = known.iter().find(|known| (&known.name, &known.url) == (&webhook.name, &webhook.url));
            webhook.secret = webhook.secret.take().or_else(|| same.and_then(|same| same.secret.clone()));
            webhook.secret.take_if(|secret| secret.is_empty());
        }
        let names: Vec<_> = webhooks.iter().map(|webhook| webhook.name.clone()).collect();
        self.change(Change::Notify { webhooks }).await?;
        info!(by, webhooks = ?names, "events are sent to these webhooks from now on");
        Ok(())
    }
}
