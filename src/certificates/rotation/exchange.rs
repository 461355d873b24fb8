//! How a cluster key goes from one member to another: over a TLS connection of the two nodes, to whoever is a member
//! and can name the key. Must never send a key to anybody else, or take one for another.
//!
//! The caller sends the id of the key (16 bytes, little-endian); the answer is 1 and the key, or 0.

use std::{path::PathBuf, time::Duration};

use anyhow::{Context, Result, ensure};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::mpsc::Receiver,
    time::timeout,
};
use tracing::{debug, info};

use crate::{
    cluster::{Member, trust::KeyId},
    peer::{PeerIdentity, Purpose, StreamCall, open_stream},
    pki::{ClusterKey, ClusterKeys},
};

/// How long one side may take for all of it.
const LIMIT: Duration = Duration::from_secs(2);

/// Answers members that want a cluster key, one after the other, until nobody can call any more.
pub async fn serve(certificates: PathBuf, mut calls: Receiver<StreamCall>) {
    while let Some(mut call) = calls.recv().await {
        match timeout(LIMIT, answer(&certificates, &mut call)).await {
            Ok(Ok(Some(id))) => info!(peer = call.from, key = %id, "a member was given the cluster key"),
            Ok(Ok(None)) => debug!(peer = call.from, "a member wants a cluster key that is not here"),
            Ok(Err(error)) => debug!(peer = call.from, "a member could not be given a cluster key: {error:#}"),
            Err(_) => debug!(peer = call.from, "a member took too long to fetch a cluster key"),
        }
    }
}

async fn answer(certificates: &std::path::Path, StreamCall { stream, .. }: &mut StreamCall) -> Result<Option<KeyId>> {
    let id = KeyId(stream.read_u128_le().await?);
    // Two small files.
    let keys = ClusterKeys::load(certificates)?;
    let found = keys.find(id);
    match found {
        Some(key) => {
            stream.write_u8(1).await?;
            stream.write_all(key.bytes()).await?;
        }
        None => stream.write_u8(0).await?,
    }
    stream.shutdown().await?;
    Ok(found.map(|_| id))
}

/// Fetches a key from another member.
pub(super) async fn fetch(peers: &PeerIdentity, member: &Member, id: KeyId) -> Result<ClusterKey> {
    let mut stream = open_stream(peers, member, Purpose::Key).await?;
    let ask = async {
        stream.write_u128_le(id.0).await?;
        stream.flush().await?;
        ensure!(stream.read_u8().await? == 1, "it does not have it");
        let mut key = [0; 32];
        stream.read_exact(&mut key).await?;
        Ok(ClusterKey::new(key))
    };
    let key = timeout(LIMIT, ask).await.context("it takes too long")??;
    ensure!(key.id() == id, "it sent another key");
    Ok(key)
}
