//! ASKS. A question of one member to another, over a connection of its own: mutual TLS between two nodes, one question,
//! one answer, both JSON. Owns the limits of that. Must never know what is asked, and never keep anybody waiting for a
//! member that does not answer.
//!
//! On the wire, after the hello: the topic (1 byte), and the question behind its length (4 bytes, little-endian). The
//! answer is 1, or 0 for a refusal with its reason as a JSON string, and the value behind its length. A program from
//! before there were questions refuses the connection, and counts as one that does not answer.

use std::{sync::Arc, time::Duration};

use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;
use thiserror::Error;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    sync::{Semaphore, mpsc::Receiver},
    time::timeout,
};
use tracing::debug;

use crate::{
    admin::BoxFuture,
    cluster::NodeId,
    peer::{PeerIdentity, Purpose, StreamCall, open_stream},
};

/// How long one question may take, from the connection to the end of the answer.
pub const PATIENCE: Duration = Duration::from_secs(3);
/// Longest question and longest answer, in bytes.
const LONGEST: usize = 2 << 20;
/// Questions that are answered at the same time; those behind them wait.
const AT_ONCE: usize = 4;

/// What a question is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Topic {
    /// The backups in a member's folder.
    Backups = 1,
    /// Rows for the audit, which only a PRIMARY takes.
    Audit = 2,
}

impl Topic {
    fn of(byte: u8) -> Option<Self> {
        [Self::Backups, Self::Audit].into_iter().find(|topic| *topic as u8 == byte)
    }
}

/// Why there is no answer.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum AskError {
    /// It is down, cannot be reached, takes too long or has an older program.
    #[error("does not answer: {0}")]
    Silent(String),
    /// It answered that it does not do this.
    #[error("refuses: {0}")]
    Refused(String),
}

/// What answers the questions of other members.
pub trait Answers: Send + Sync {
    /// The answer to `from`, which has proven who it is, or a sentence why there is none.
    fn answer(&self, from: NodeId, topic: Topic, question: Value) -> BoxFuture<'_, Result<Value, String>>;
}

/// Asks other members. Clones are handles of the same.
#[derive(Clone)]
pub struct Asker(Arc<PeerIdentity>);

impl std::fmt::Debug for Asker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Asker").field("me", &self.0.me).finish_non_exhaustive()
    }
}

impl Asker {
    /// For the node that has this identity.
    pub fn new(peers: Arc<PeerIdentity>) -> Self {
        Self(peers)
    }

    /// Asks a member, and waits for [`PATIENCE`] at most.
    ///
    /// # Errors
    /// [`AskError::Silent`] when the member is down, too slow, or of an older program: another attempt may succeed.
    /// [`AskError::Refused`] when it answers that it does not do this.
    pub async fn ask<T: DeserializeOwned>(
        &self,
        member: NodeId,
        topic: Topic,
        question: &impl Serialize,
    ) -> Result<T, AskError> {
        // Where it is reached by what it says itself.
        let known = self.0.roster.member(member);
        let known = known.ok_or_else(|| AskError::Silent("it is no member of the cluster".to_owned()))?;
        let question = serde_json::to_vec(question).map_err(|error| AskError::Refused(error.to_string()))?;
        let asked = async {
            let mut stream = open_stream(&self.0, &known, Purpose::Question)
                .await
                .map_err(|error| AskError::Silent(error.to_string()))?;
            exchange(&mut stream, topic, &question).await.map_err(|error| AskError::Silent(error.to_string()))?
        };
        let late = || AskError::Silent(format!("nothing came within {} s", PATIENCE.as_secs()));
        let answer = timeout(PATIENCE, asked).await.unwrap_or_else(|_| Err(late()))?;
        serde_json::from_value(answer)
            .map_err(|error| AskError::Refused(format!("its answer is not understood: {error}")))
    }
}

async fn exchange(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    topic: Topic,
    question: &[u8],
) -> std::io::Result<Result<Value, AskError>> {
    stream.write_u8(topic as u8).await?;
    write(stream, question).await?;
    let done = stream.read_u8().await? == 1;
    let value = read(stream).await?;
    Ok(match value {
        value if done => Ok(value),
        Value::String(why) => Err(AskError::Refused(why)),
        other => Err(AskError::Refused(other.to_string())),
    })
}

async fn write(stream: &mut (impl AsyncWrite + Unpin), bytes: &[u8]) -> std::io::Result<()> {
    let length = u32::try_from(bytes.len()).ok().filter(|_| bytes.len() <= LONGEST);
    let length = length.ok_or_else(|| std::io::Error::other(format!("more than {LONGEST} bytes")))?;
    stream.write_u32_le(length).await?;
    stream.write_all(bytes).await?;
    stream.flush().await
}

async fn read(stream: &mut (impl AsyncRead + Unpin)) -> std::io::Result<Value> {
    let length = stream.read_u32_le().await? as usize;
    if length > LONGEST {
        return Err(std::io::Error::other(format!("{length} bytes come, {LONGEST} are taken")));
    }
    let mut bytes = Vec::new();
    stream.take(length as u64).read_to_end(&mut bytes).await?;
    serde_json::from_slice(&bytes).map_err(std::io::Error::other)
}

/// Answers other members until nobody can call any more.
pub async fn serve(answers: Arc<dyn Answers>, mut calls: Receiver<StreamCall>) {
    let places = Arc::new(Semaphore::new(AT_ONCE));
    while let Some(mut call) = calls.recv().await {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let answers = Arc::clone(&answers);
        tokio::spawn(async move {
            match timeout(PATIENCE, attend(answers.as_ref(), call.from, &mut call.stream)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => debug!(peer = call.from, %error, "a question of a member was not answered"),
                Err(_) => debug!(peer = call.from, "a question of a member took too long"),
            }
            drop(place);
        });
    }
}

async fn attend(
    answers: &dyn Answers,
    from: NodeId,
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
) -> std::io::Result<()> {
    let topic = stream.read_u8().await?;
    let question = read(stream).await?;
    let answer = match Topic::of(topic) {
        Some(topic) => answers.answer(from, topic, question).await,
        None => {
            Err(format!("this program knows no questions of kind {topic}: install the same version on all members"))
        }
    };
    let (done, value) = match answer {
        Ok(value) => (1, value),
        Err(why) => (0, Value::String(why)),
    };
    stream.write_u8(done).await?;
    write(stream, &serde_json::to_vec(&value)?).await?;
    stream.shutdown().await
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    struct Echo;

    impl Answers for Echo {
        fn answer(&self, from: NodeId, topic: Topic, question: Value) -> BoxFuture<'_, Result<Value, String>> {
            Box::pin(async move {
                match topic {
                    Topic::Backups => Ok(json!([from, question])),
                    Topic::Audit => Err("only the PRIMARY does this".to_owned()),
                }
            })
        }
    }

    async fn asked(topic: u8, question: &[u8]) -> std::io::Result<Result<Value, AskError>> {
        let (mut one, mut other) = tokio::io::duplex(64);
        let answering = tokio::spawn(async move { attend(&Echo, 3, &mut other).await });
        one.write_u8(topic).await?;
        write(&mut one, question).await?;
        let done = one.read_u8().await? == 1;
        let value = read(&mut one).await?;
        answering.await.unwrap()?;
        Ok(if done { Ok(value) } else { Err(AskError::Refused(value.as_str().unwrap().to_owned())) })
    }

    #[tokio::test]
    async fn a_question_gets_its_answer_or_the_reason_why_not() {
        assert_eq!(asked(1, b"{\"a\":1}").await.unwrap(), Ok(json!([3, { "a": 1 }])));
        let (mut one, mut other) = tokio::io::duplex(64);
        let answering = tokio::spawn(async move { attend(&Echo, 3, &mut other).await });
        let refused = exchange(&mut one, Topic::Audit, b"[]").await.unwrap();
        assert_eq!(refused, Err(AskError::Refused("only the PRIMARY does this".to_owned())));
        answering.await.unwrap().unwrap();
        let unknown = asked(9, b"null").await.unwrap().unwrap_err().to_string();
        assert!(unknown.contains("no questions of kind 9"), "{unknown}");
    }

    #[tokio::test]
    async fn what_is_too_long_torn_or_no_json_is_not_taken() {
        assert!(asked(1, b"{").await.is_err());
        assert!(write(&mut tokio::io::sink(), &vec![b' '; LONGEST + 1]).await.is_err());
        let mut long = &(LONGEST as u32 + 1).to_le_bytes()[..];
        assert!(read(&mut long).await.unwrap_err().to_string().contains("are taken"));
        let mut torn = &b"\x05\0\0\0[1"[..];
        assert!(read(&mut torn).await.is_err());
    }
}
