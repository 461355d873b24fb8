//! How long members take to answer, while steps are measured. Must never hold more than a few spans, nor have a say in
//! anything.

use std::collections::VecDeque;

use raft::eraftpb::{Message, MessageType};

use crate::{
    cluster::NodeId,
    telemetry::steps::{self, Begun, Step},
};

/// Spans that may be under way; more are not measured.
const MOST: usize = 256;

/// Entries that are under way, up to an index, to or from a member, oldest first.
#[derive(Default)]
pub(super) struct Spans {
    sent: VecDeque<(NodeId, u64, Begun)>,
    received: VecDeque<(NodeId, u64, Begun)>,
}

impl Spans {
    /// A message has come.
    pub fn heard(&mut self, message: &Message) {
        if !steps::begin().runs() {
            return;
        }
        match (message.get_msg_type(), message.entries.last()) {
            (MessageType::MsgAppend, Some(last)) => begin(&mut self.received, message.from, last.index),
            (MessageType::MsgAppendResponse, _) => {
                end(&mut self.sent, message.from, message.index, Step::MemberAnswer);
            }
            _ => {}
        }
    }

    /// A message is about to be sent.
    pub fn sends(&mut self, message: &Message) {
        if !steps::begin().runs() {
            return;
        }
        match (message.get_msg_type(), message.entries.last()) {
            (MessageType::MsgAppend, Some(last)) => begin(&mut self.sent, message.to, last.index),
            (MessageType::MsgAppendResponse, _) => end(&mut self.received, message.to, message.index, Step::OwnAnswer),
            _ => {}
        }
    }
}

fn begin(spans: &mut VecDeque<(NodeId, u64, Begun)>, member: NodeId, index: u64) {
    // Those that were never answered make room.
    if spans.len() >= MOST {
        spans.pop_front();
    }
    spans.push_back((member, index, steps::begin()));
}

fn end(spans: &mut VecDeque<(NodeId, u64, Begun)>, member: NodeId, index: u64, step: Step) {
    spans.retain(|(of, last, begun)| {
        let answered = *of == member && *last <= index;
        if answered {
            begun.end(step);
        }
        !answered
    });
}
