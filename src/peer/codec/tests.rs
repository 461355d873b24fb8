//! The codec against itself (round trips) and against hostile bytes. Must never need a network.

use proptest::{collection::vec, prelude::*};
use raft::eraftpb::{ConfState, Entry, MessageType, Snapshot};

use super::{
    CodecError::TooLarge,
    raft_message::{MESSAGES, entry_type},
    report::ROLES,
    *,
};
use crate::{
    cluster::{
        ClusterId, Role,
        reach::{Claim, Reach, Standing},
        trust::{Holdings, KeyId},
    },
    peer::assembler::Assembler,
};

fn members() -> impl Strategy<Value = ConfState> {
    let list = || vec(any::<u64>(), 0..5);
    (list(), list(), list(), list(), any::<bool>()).prop_map(|(voters, learners, outgoing, next, auto_leave)| {
        ConfState { voters, learners, voters_outgoing: outgoing, learners_next: next, auto_leave, ..Default::default() }
    })
}

fn snapshot() -> impl Strategy<Value = Snapshot> {
    (members(), any::<u64>(), any::<u64>(), vec(any::<u8>(), 0..100)).prop_map(|(members, index, term, data)| {
        let mut snapshot = Snapshot::default();
        snapshot.mut_metadata().index = index;
        snapshot.mut_metadata().term = term;
        *snapshot.mut_metadata().mut_conf_state() = members;
        snapshot.data = data.into();
        snapshot
    })
}

fn entry() -> impl Strategy<Value = Entry> {
    let bytes = || vec(any::<u8>(), 0..300);
    (0u8..3, any::<u64>(), any::<u64>(), bytes(), bytes()).prop_map(|(kind, term, index, data, context)| Entry {
        entry_type: entry_type(kind).unwrap(),
        term,
        index,
        data: data.into(),
        context: context.into(),
        ..Default::default()
    })
}

fn message() -> impl Strategy<Value = Message> {
    let numbers = any::<[u64; 10]>();
    let entries = vec(entry(), 0..6);
    let rest = (any::<i64>(), any::<bool>(), vec(any::<u8>(), 0..64), proptest::option::of(snapshot()));
    (0..MESSAGES.len(), numbers, entries, rest).prop_map(|(kind, numbers, entries, rest)| {
        let [to, from, term, log_term, index, commit, commit_term, request_snapshot, reject_hint, deprecated_priority] =
            numbers;
        let (priority, reject, context, snapshot) = rest;
        let msg_type = MESSAGES[kind].0;
        let (entries, context) = (entries.into(), context.into());
        let mut message = Message { msg_type, to, from, term, log_term, index, entries, commit, ..Message::default() };
        message.snapshot = snapshot.into();
        message.context = context;
        (message.commit_term, message.request_snapshot) = (commit_term, request_snapshot);
        (message.reject, message.reject_hint) = (reject, reject_hint);
        (message.deprecated_priority, message.priority) = (deprecated_priority, priority);
        message
    })
}

fn hello() -> impl Strategy<Value = Hello> {
    let purpose =
        prop_oneof![Just(Purpose::Link), Just(Purpose::Snapshot), Just(Purpose::Key), Just(Purpose::Question)];
    let reached = proptest::option::of(("[0-9a-z.:-]{0,253}", any::<u16>(), any::<u64>()));
    let reached = reached.prop_map(|reached| reached.map(|(address, port, index)| Reached { address, port, index }));
    let texts = ("[0-9a-z.-]{0,64}", reached, proptest::option::of(any::<u32>()));
    let claim = any::<[u64; 3]>().prop_map(|[term, vote, last]| Standing::Whole(Claim { term, vote, last }));
    let standing = prop_oneof![Just(Standing::Unsaid), Just(Standing::Forgotten), claim];
    let numbers = (any::<[u64; 3]>(), standing, any::<bool>());
    (any::<u128>(), numbers, any::<u8>(), any::<[u32; 2]>(), purpose, texts).prop_map(
        |(
            cluster,
            ([from, to, incarnation], standing, compares),
            data_format,
            [lease_ms, promise_ms],
            purpose,
            (version, reached, level),
        )| Hello {
            protocol: PROTOCOL_VERSION,
            cluster: ClusterId(cluster),
            from,
            to,
            data_format,
            terms: LeaseTerms { lease_ms, promise_ms },
            purpose,
            incarnation,
            version,
            reached,
            level,
            standing: if level.is_some() { standing } else { Standing::Unsaid },
            compares: compares && level.is_some() && standing != Standing::Unsaid,
        },
    )
}

fn accepted() -> impl Strategy<Value = HelloReply> {
    let of = |(level, datagrams): (Option<u32>, bool)| HelloReply::Accepted {
        level,
        datagrams: datagrams && level.is_some(),
    };
    (proptest::option::of(any::<u32>()), any::<bool>()).prop_map(of)
}

fn refusal() -> impl Strategy<Value = Refusal> {
    use RefusalCode::{Busy, Forgot, Other, Outdated, Removed};
    let code = prop_oneof![Just(Other), Just(Removed), Just(Busy), Just(Outdated), Just(Forgot)];
    (code, "[a-z ]{0,512}").prop_map(|(code, reason)| Refusal { code, reason })
}

fn report() -> impl Strategy<Value = NodeReport> {
    let lease = proptest::option::of(any::<u64>());
    let numbers = (any::<bool>(), any::<[u64; 4]>());
    let remembers = proptest::option::of(numbers.prop_map(|(forgotten, [term, vote, acked, committed])| Remembers {
        forgotten,
        reach: Reach { term, vote, acked, committed },
    }));
    let condition = prop_oneof![Just(Condition::Good), Just(Condition::Slow), Just(Condition::Bad)];
    let free = proptest::option::of((any::<u64>(), proptest::option::of((condition, remembers))));
    let more = proptest::option::of((any::<u32>(), any::<[u128; 3]>(), free)).prop_map(|more| {
        let holds = |[key, trusts, shows]: [KeyId; 3]| Holdings { key, trusts, shows };
        more.map(|(level, ids, free)| {
            let (free, disk) = free.map_or((None, None), |(free, disk)| (Some(free), disk));
            let (disk, memory) = disk.map_or((None, None), |(disk, memory)| (Some(disk), memory));
            ReportExtension { level, holds: holds(ids.map(KeyId)), free, disk, memory }
        })
    });
    (0..ROLES.len(), any::<[u64; 3]>(), lease, any::<bool>(), ("[0-9.]{0,64}", more)).prop_map(
        |(role, [epoch, applied, committed], lease_ms, full, (version, more))| {
            let state = ROLES[role];
            NodeReport { state, epoch, applied, committed, lease_ms, full, version, more }
        },
    )
}

fn frame() -> impl Strategy<Value = Frame> {
    prop_oneof![
        4 => message().prop_map(|message| Frame::Raft(Box::new(message))),
        1 => hello().prop_map(Frame::Hello),
        1 => report().prop_map(Frame::Report),
        1 => accepted().prop_map(Frame::HelloReply),
        1 => refusal().prop_map(|refusal| Frame::HelloReply(HelloReply::Refused(refusal))),
    ]
}

proptest! {
    #[test]
    fn frames_survive_the_round_trip_in_any_pieces(frames in vec(frame(), 1..5), sizes in vec(1usize..2000, 1..20)) {
        let bytes: Vec<u8> = frames.iter().flat_map(|frame| frame.encode().unwrap()).collect();
        let (mut assembler, mut got, mut rest) = (Assembler::default(), Vec::new(), &bytes[..]);
        for size in sizes.into_iter().cycle() {
            let (piece, next) = rest.split_at(size.min(rest.len()));
            assembler.push(piece);
            while let Some(frame) = assembler.next_frame().unwrap() {
                got.push(frame);
            }
            rest = next;
            if rest.is_empty() {
                break;
            }
        }
        prop_assert_eq!(got, frames);
    }

    #[test]
    fn no_input_panics(bytes in vec(any::<u8>(), 0..600), kind in 1u8..6) {
        let _ = Frame::decode(&bytes);
        let mut bytes = bytes;
        if let Some(first) = bytes.first_mut() {
            *first = kind;
        }
        let _ = Frame::decode(&bytes);
    }

    #[test]
    fn no_mutation_panics(
        frame in frame(),
        changes in vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        cut: prop::sample::Index,
    ) {
        let mut bytes = frame.encode().unwrap().split_off(LENGTH);
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        // What still decodes must be something that this program could have sent itself, or the beginning of what a
        // later one says.
        if let Ok(frame) = Frame::decode(&bytes) {
            let again = frame.encode().unwrap().split_off(LENGTH);
            let whole = matches!(frame, Frame::Raft(_));
            prop_assert!(again.len() == bytes.len() || !whole && again.len() < bytes.len());
        }
        bytes.truncate(cut.index(bytes.len()));
        let _ = Frame::decode(&bytes);
    }

    #[test]
    fn what_a_later_version_adds_is_passed_over(frame in frame(), more in vec(any::<u8>(), 1..40)) {
        let mut bytes = frame.encode().unwrap().split_off(LENGTH);
        // Behind everything that this program knows: before that there is no room for more.
        let complete = match &frame {
            Frame::Hello(hello) => hello.standing != Standing::Unsaid,
            Frame::HelloReply(reply) => !matches!(reply, HelloReply::Accepted { level: None, .. }),
            Frame::Report(report) => report.more.is_some_and(|more| more.memory.is_some()),
            Frame::Raft(_) => true,
        };
        bytes.extend_from_slice(&more);
        match (&frame, Frame::decode(&bytes)) {
            (Frame::Raft(_), read) => prop_assert_eq!(read, Err(Malformed("bytes left over"))),
            (_, read) if complete => prop_assert_eq!(read, Ok(frame)),
            _ => {}
        }
    }

    #[test]
    fn a_stream_of_noise_never_panics(pieces in vec(vec(any::<u8>(), 0..200), 0..10)) {
        let mut assembler = Assembler::default();
        for piece in pieces {
            assembler.push(&piece);
            while let Ok(Some(_)) = assembler.next_frame() {}
        }
    }
}

#[test]
fn limits_hold_on_both_sides() {
    let mut message = Message { msg_type: MessageType::MsgAppend, ..Message::default() };
    message.entries = vec![Entry { data: vec![0; MAX_FRAME].into(), ..Entry::default() }].into();
    assert_eq!(encode_raft(&message), Err(TooLarge("frame")));
    message.entries = vec![Entry::default(); MAX_ENTRIES + 1].into();
    assert_eq!(encode_raft(&message), Err(TooLarge("raft entries")));
    assert_eq!(frame_length((MAX_FRAME as u32 + 1).to_le_bytes()), Err(Malformed("frame too long")));
    assert_eq!(frame_length([0; 4]), Err(Malformed("empty frame")));
}

#[test]
fn a_count_beyond_the_frame_allocates_nothing() {
    let mut bytes = encode_raft(&Message { msg_type: MessageType::MsgAppend, ..Message::default() }).unwrap();
    let at = bytes.len() - 4;
    bytes[at..].copy_from_slice(&(MAX_ENTRIES as u32).to_le_bytes());
    assert_eq!(Frame::decode(&bytes[LENGTH..]), Err(Malformed("impossible count")));
}

#[test]
fn messages_that_raft_keeps_to_itself_do_not_travel() {
    for msg_type in [MessageType::MsgHup, MessageType::MsgPropose, MessageType::MsgUnreachable] {
        assert!(matches!(encode_raft(&Message { msg_type, ..Message::default() }), Err(Malformed(_))));
    }
}

fn plain_hello() -> Hello {
    Hello {
        protocol: PROTOCOL_VERSION,
        cluster: ClusterId(1),
        from: 1,
        to: 2,
        data_format: 1,
        terms: LeaseTerms { lease_ms: 400, promise_ms: 475 },
        purpose: Purpose::Link,
        incarnation: 5,
        version: "9.9".to_owned(),
        reached: None,
        level: None,
        standing: Standing::Unsaid,
        compares: false,
    }
}

#[test]
fn every_address_of_a_member_fits_into_a_hello_and_no_longer_one() {
    use crate::cluster::roster::check_host;
    let reached = |length| Reached { address: "x".repeat(length), port: 1, index: 1 };
    let encode = |length| encode_hello(&Hello { reached: Some(reached(length)), ..plain_hello() });
    assert!(check_host("n", &reached(MAX_ADDRESS).address, 1).is_ok());
    assert!(check_host("n", &reached(MAX_ADDRESS + 1).address, 1).is_err());
    assert_eq!(encode(MAX_ADDRESS + 1), Err(TooLarge("address")));
    let mut bytes = encode(MAX_ADDRESS).unwrap().split_off(LENGTH);
    // Length, address, port and index are the end.
    let at = bytes.len() - 8 - 2 - MAX_ADDRESS - 4;
    assert_eq!(bytes[at - 1], 1);
    bytes[at..at + 4].copy_from_slice(&(MAX_ADDRESS as u32 + 1).to_le_bytes());
    assert_eq!(Frame::decode(&bytes), Err(Malformed("byte string too long")));
    bytes[at - 1] = 2;
    assert_eq!(Frame::decode(&bytes), Err(Malformed("neither true nor false")));
}

/// The bytes that a program of feature level 1 sends and expects, which knew no levels: nothing may stand behind them.
#[test]
fn a_program_without_levels_is_spoken_to_as_before() {
    let bytes = Frame::Hello(plain_hello()).encode().unwrap();
    assert_eq!(bytes.len(), LENGTH + 1 + 2 + 16 + 8 + 8 + 1 + 8 + 1 + 8 + 4 + 3 + 1);
    let Ok(Frame::Hello(hello)) = Frame::decode(&bytes[LENGTH..]) else { panic!("a hello") };
    assert_eq!(hello.feature_level(), 1);
    let accepted = Frame::HelloReply(HelloReply::Accepted { level: None, datagrams: false }).encode().unwrap();
    assert_eq!(accepted, [6, 0, 0, 0, kind::HELLO_REPLY, 1, 0, 0, 0, 0]);
    // One that has a level and knows no datagrams says so by saying nothing.
    let accepted = Frame::HelloReply(HelloReply::Accepted { level: Some(2), datagrams: true }).encode().unwrap();
    let older = Frame::decode(&accepted[LENGTH..accepted.len() - 1]);
    assert_eq!(older, Ok(Frame::HelloReply(HelloReply::Accepted { level: Some(2), datagrams: false })));
    let (state, version) = (Role::Secondary, "1".to_owned());
    let report =
        NodeReport { state, epoch: 1, applied: 2, committed: 3, lease_ms: None, full: false, version, more: None };
    assert_eq!(encode_report(&report).unwrap().len(), LENGTH + 1 + 1 + 24 + 9 + 1 + 4 + 1);
}

/// The first programs of feature level 2 told no free space. They read what they know, and are understood without it.
#[test]
fn a_program_that_tells_no_free_space_is_understood_and_understands() {
    let (state, version) = (Role::Secondary, "1".to_owned());
    let of = |free, disk| NodeReport {
        state,
        epoch: 1,
        applied: 2,
        committed: 3,
        lease_ms: None,
        full: false,
        version: version.clone(),
        more: Some(ReportExtension { level: 2, holds: Holdings::default(), free, disk, memory: None }),
    };
    let sent = [of(None, None), of(Some(5 << 30), None), of(Some(5 << 30), Some(Condition::Slow))];
    let bytes = sent.each_ref().map(|report| encode_report(report).unwrap());
    assert_eq!(bytes[0].len(), LENGTH + 1 + 1 + 24 + 9 + 1 + 4 + 1 + 4 + 48, "what they send");
    // Those after them told it, but not how the disk does.
    assert_eq!([bytes[1].len(), bytes[2].len()], [bytes[0].len() + 8, bytes[0].len() + 9]);
    for (report, bytes) in sent.into_iter().zip(&bytes) {
        assert_eq!(Frame::decode(&bytes[LENGTH..]), Ok(Frame::Report(report)));
    }
    for (old, new) in bytes.iter().zip(&bytes[1..]) {
        assert_eq!(new[LENGTH..][..old.len() - LENGTH], old[LENGTH..], "what they read of ours comes first");
    }
}

#[test]
fn another_version_of_the_protocol_names_itself() {
    let hello = Hello { protocol: 7, ..plain_hello() };
    let bytes = Frame::Hello(hello).encode().unwrap();
    assert_eq!(Frame::decode(&bytes[LENGTH..]), Err(CodecError::Version(7)));
}

#[test]
fn a_refusal_of_a_later_version_keeps_its_reason() {
    let refused = HelloReply::Refused(Refusal { code: RefusalCode::Busy, reason: "later".to_owned() });
    let mut bytes = Frame::HelloReply(refused).encode().unwrap();
    bytes[LENGTH + 1] = 200;
    let understood = Frame::HelloReply(HelloReply::Refused(Refusal::other("later")));
    assert_eq!(Frame::decode(&bytes[LENGTH..]), Ok(understood));
}

#[test]
fn the_largest_membership_fits_into_the_context_of_an_entry() {
    use crate::cluster::limits::MAX_ENCODED;
    let mut message = Message { msg_type: MessageType::MsgAppend, ..Message::default() };
    message.entries = vec![Entry { context: vec![b'x'; MAX_ENCODED].into(), ..Entry::default() }].into();
    let bytes = encode_raft(&message).unwrap();
    assert_eq!(Frame::decode(&bytes[LENGTH..]), Ok(Frame::Raft(Box::new(message.clone()))));
    message.entries[0].context = vec![b'x'; MAX_CONTEXT + 1].into();
    assert_eq!(encode_raft(&message), Err(TooLarge("entry context")));
}
