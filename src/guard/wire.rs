//! Messages between the daemon and its port guard: one datagram each over a Unix SEQPACKET pair, descriptors by
//! SCM_RIGHTS. Never interprets what it carries.
//!
//! Layout: `kind u8`, three zero bytes, `sequence u32` little-endian. Both ends are the same program, so there is no
//! version.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};

use crate::little_endian::u32_at;

/// Most descriptors in one message.
pub(super) const MAX_DESCRIPTORS: usize = 16;
const LENGTH: usize = 8;

/// What a message says. Five to seven come from the guard, the others go to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// The lease memory file and, optionally, the consensus listener to keep open.
    Start = 1,
    /// Bound Console sockets: watch them, then make them listen.
    Open = 2,
    /// Console sockets that listen already: watch them. Sent to a guard that replaces a dead one.
    Hold = 3,
    /// Close the duplicates of all Console sockets, and forget the service.
    Release = 4,
    /// The message with this sequence number was carried out.
    Done = 5,
    /// The message with this sequence number could not be carried out; the guard holds no Console socket now.
    Refused = 6,
    /// The lease deadline passed: the guard has shut the Console sockets down.
    Lapsed = 7,
    /// All sockets that are to be open from now on, those that it watches already included: watch these instead, and
    /// make them listen. Refused if it watches none.
    Change = 8,
    /// What ends the service when a 1 is written to it: watch it, instead of another one.
    Cgroup = 9,
    /// The process that ends the service when it is told to: watch it, instead of another one.
    Keeper = 10,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Self> {
        use Kind::{Cgroup, Change, Done, Hold, Keeper, Lapsed, Open, Refused, Release, Start};
        let all = [Start, Open, Hold, Release, Done, Refused, Lapsed, Change, Cgroup, Keeper];
        all.into_iter().find(|kind| *kind as u8 == byte)
    }
}

/// A received message.
#[derive(Debug)]
pub(super) struct Message {
    pub(super) kind: Kind,
    pub(super) sequence: u32,
    pub(super) descriptors: Vec<OwnedFd>,
}

/// The two ends: the daemon's and the guard's.
pub(super) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

/// Sends one message without waiting: the buffer of the pair holds many more messages than are ever under way.
pub(super) fn send(socket: impl AsFd, kind: Kind, sequence: u32, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut bytes = [0; LENGTH];
    bytes[0] = kind as u8;
    bytes[4..].copy_from_slice(&sequence.to_le_bytes());
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many descriptors for one message"));
    }
    sendmsg(socket, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)?;
    Ok(())
}

/// Receives one message; none when the other end is closed. Waits for it: poll first to avoid that.
pub(super) fn receive(socket: impl AsFd) -> io::Result<Option<Message>> {
    let mut bytes = [0; LENGTH];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        match recvmsg(&socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => {}
            // What a SEQPACKET socket reports when the peer died with unread messages in its queue.
            Err(rustix::io::Errno::CONNRESET) => return Ok(None),
            other => break other?,
        }
    };
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            descriptors.extend(received);
        }
    }
    if received.bytes == 0 {
        return Ok(None);
    }
    let malformed = |what| io::Error::new(io::ErrorKind::InvalidData, what);
    if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) || received.bytes != LENGTH {
        return Err(malformed("a message between daemon and port guard has the wrong size"));
    }
    let kind = Kind::from_byte(bytes[0]).ok_or_else(|| malformed("unknown message between daemon and port guard"))?;
    let sequence = u32_at(&bytes, 4);
    Ok(Some(Message { kind, sequence, descriptors }))
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Read};

    use super::*;

    #[test]
    fn a_message_carries_its_descriptors() {
        let (left, right) = pair().unwrap();
        let file = File::open("/proc/self/comm").unwrap();
        send(&left, Kind::Open, 7, &[file.as_fd(), file.as_fd()]).unwrap();
        let message = receive(&right).unwrap().unwrap();
        assert_eq!((message.kind, message.sequence, message.descriptors.len()), (Kind::Open, 7, 2));
        let mut text = String::new();
        File::from(message.descriptors.into_iter().next().unwrap()).read_to_string(&mut text).unwrap();
        assert!(!text.is_empty());
    }

    #[test]
    fn a_closed_end_is_the_end() {
        let (left, right) = pair().unwrap();
        send(&left, Kind::Release, 1, &[]).unwrap();
        drop(left);
        assert_eq!(receive(&right).unwrap().unwrap().kind, Kind::Release);
        assert!(receive(&right).unwrap().is_none());
    }

    #[test]
    fn a_message_of_another_size_is_refused() {
        let (left, right) = pair().unwrap();
        rustix::net::send(&left, b"12345678910", SendFlags::empty()).unwrap();
        assert!(receive(&right).is_err());
    }
}
