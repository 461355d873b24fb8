//! One established link in one direction, as the consensus loop's thread sees it: TLS over a non-blocking socket.
//! Owns the order in which frames leave. Must never block, and never hold more than its limits.

use std::{
    collections::VecDeque,
    io::{self, BufRead, ErrorKind, Read, Write},
    net::{Shutdown, SocketAddr},
};

use mio::net::TcpStream;
use rustls::Connection;

use super::{assembler::Assembler, codec::Frame};
use crate::pki::EXTENSIBLE;

/// Frames that may wait in the control queue of a link.
const CONTROL_FRAMES: usize = 1024;
/// Frames that may wait in the bulk queue of a link, besides its limit in bytes.
const BULK_FRAMES: usize = 4096;
/// Encrypted bytes that rustls may hold for a link: what a control frame may have to wait for, besides the kernel's
/// buffer.
const TLS_BUFFER: usize = 64 << 10;
/// Bytes read from one link in one poll. More stays for the next one, so that ticks and the other links get their turn.
const READ_BUDGET: usize = 1 << 20;
/// Bytes per read from a socket.
pub(super) const SCRATCH: usize = 64 << 10;

/// An authenticated connection, on its way from the handshake to the loop.
pub(super) struct Established {
    pub socket: std::net::TcpStream,
    pub tls: Connection,
    /// Where the other node takes datagrams, if it does.
    pub datagrams: Option<SocketAddr>,
}

/// Why a link ended. `clean`: the other node said so by TLS close_notify.
#[derive(Debug)]
pub(super) struct Loss {
    pub clean: bool,
    pub reason: String,
}

impl Loss {
    fn unclean(reason: impl ToString) -> Self {
        Self { clean: false, reason: reason.to_string() }
    }
}

/// Which queue a frame takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    /// Heartbeats, votes, answers, reports: small, and always first.
    Control,
    /// Entries and snapshot metadata, in order among themselves.
    Bulk,
}

/// Frames that wait for a socket. Control frames overtake bulk frames, never the rest of one under way.
pub(super) struct Queues {
    control: VecDeque<Vec<u8>>,
    bulk: VecDeque<Vec<u8>>,
    bulk_bytes: usize,
    bulk_limit: usize,
}

impl Queues {
    pub fn new(bulk_limit: usize) -> Self {
        Self { control: VecDeque::new(), bulk: VecDeque::new(), bulk_bytes: 0, bulk_limit }
    }

    /// Takes the frame, or returns false if its queue is full. One bulk frame always fits, whatever its size.
    pub fn push(&mut self, class: Class, frame: Vec<u8>) -> bool {
        match class {
            Class::Control if self.control.len() < CONTROL_FRAMES => self.control.push_back(frame),
            Class::Bulk if self.bulk.is_empty() || self.bulk_has_room(frame.len()) => {
                self.bulk_bytes += frame.len();
                self.bulk.push_back(frame);
            }
            _ => return false,
        }
        true
    }

    fn bulk_has_room(&self, length: usize) -> bool {
        self.bulk.len() < BULK_FRAMES && self.bulk_bytes + length <= self.bulk_limit
    }

    fn pop(&mut self) -> Option<Vec<u8>> {
        self.control.pop_front().or_else(|| {
            let frame = self.bulk.pop_front()?;
            self.bulk_bytes -= frame.len();
            Some(frame)
        })
    }
}

/// A link that this node dialled: it only sends. The other node never sends data on it, only its farewell.
pub(super) struct Sending {
    pub socket: TcpStream,
    tls: Connection,
    queues: Queues,
    /// The frame under way and how much of it TLS has taken.
    frame: Vec<u8>,
    taken: usize,
    /// Set by an event, cleared when the socket has no more.
    pub readable: bool,
    /// A write failed; the next poll reports it.
    pub failed: Option<Loss>,
    /// The other node takes frames that go on behind what it knows.
    pub extensible: bool,
}

impl Sending {
    pub fn new(link: Established, queues: Queues) -> Self {
        let mut tls = link.tls;
        tls.set_buffer_limit(Some(TLS_BUFFER));
        let extensible = tls.alpn_protocol() == Some(EXTENSIBLE);
        let socket = TcpStream::from_std(link.socket);
        Self { socket, tls, queues, frame: Vec::new(), taken: 0, readable: true, failed: None, extensible }
    }

    /// Queues a frame and writes what the socket takes. False if the queue is full: the frame is dropped.
    pub fn send(&mut self, class: Class, frame: Vec<u8>) -> bool {
        let queued = self.failed.is_none() && self.queues.push(class, frame);
        if queued {
            self.flush();
        }
        queued
    }

    /// Writes until nothing is left or the socket takes no more.
    pub fn flush(&mut self) {
        if self.failed.is_none()
            && let Err(error) = self.try_flush()
        {
            self.failed = Some(Loss::unclean(error));
        }
    }

    fn try_flush(&mut self) -> io::Result<()> {
        loop {
            let more = self.fill()?;
            if !write_tls(&mut self.tls, &mut self.socket)? || !more {
                return Ok(());
            }
        }
    }

    /// Hands frames to TLS up to its buffer limit. True if something is left for when the buffer is empty again.
    fn fill(&mut self) -> io::Result<bool> {
        loop {
            while self.taken < self.frame.len() {
                match self.tls.writer().write(&self.frame[self.taken..])? {
                    0 => return Ok(true),
                    count => self.taken += count,
                }
            }
            self.taken = 0;
            match self.queues.pop() {
                Some(frame) => self.frame = frame,
                None => {
                    self.frame = Vec::new();
                    return Ok(false);
                }
            }
        }
    }

    /// True while frames wait for the socket.
    pub fn is_busy(&self) -> bool {
        self.failed.is_none() && (self.tls.wants_write() || !self.frame.is_empty())
    }

    /// Looks for the other node's farewell or the end of the connection.
    pub fn watch(&mut self, scratch: &mut [u8]) -> Option<Loss> {
        let refuse = &mut |_: &[u8]| Err(Loss::unclean("data came back on a link that only sends"));
        match receive(&mut self.socket, &mut self.tls, scratch, refuse) {
            Ok(more) => {
                self.readable = more;
                None
            }
            Err(loss) => Some(loss),
        }
    }

    /// Says farewell. Call [`Sending::flush`] until it is no longer busy.
    pub fn farewell(&mut self) {
        self.tls.send_close_notify();
        self.flush();
    }

    /// Ends the connection in an orderly manner, as far as that is possible without waiting.
    pub fn close(self) {
        let _ = self.socket.shutdown(Shutdown::Write);
    }
}

/// A link that the other node dialled: it only receives.
pub(super) struct Receiving {
    pub socket: TcpStream,
    tls: Connection,
    assembler: Assembler,
    /// Set by an event, cleared when the socket has no more.
    pub readable: bool,
}

impl Receiving {
    pub fn new(link: Established) -> Self {
        let socket = TcpStream::from_std(link.socket);
        Self { socket, tls: link.tls, assembler: Assembler::default(), readable: true }
    }

    /// Reads what is there, up to the budget, and gives each frame to `take`.
    pub fn receive(
        &mut self,
        scratch: &mut [u8],
        take: &mut dyn FnMut(Frame) -> Result<(), String>,
    ) -> Result<(), Loss> {
        let assembler = &mut self.assembler;
        self.readable = receive(&mut self.socket, &mut self.tls, scratch, &mut |piece| {
            assembler.push(piece);
            while let Some(frame) = assembler.next_frame().map_err(Loss::unclean)? {
                take(frame).map_err(Loss::unclean)?;
            }
            Ok(())
        })?;
        Ok(())
    }

    /// Says farewell and closes.
    pub fn close(mut self) {
        self.tls.send_close_notify();
        let _ = write_tls(&mut self.tls, &mut self.socket);
        let _ = self.socket.shutdown(Shutdown::Write);
    }
}

/// Writes encrypted bytes. True if all are gone, false if the socket takes no more now.
fn write_tls(tls: &mut Connection, socket: &mut TcpStream) -> io::Result<bool> {
    while tls.wants_write() {
        match tls.write_tls(socket) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(true)
}

type Take<'a> = dyn FnMut(&[u8]) -> Result<(), Loss> + 'a;

/// Reads and decrypts until the socket has no more (false) or the budget is used up (true).
fn receive(socket: &mut TcpStream, tls: &mut Connection, scratch: &mut [u8], take: &mut Take) -> Result<bool, Loss> {
    // What the handshake left behind in TLS gives no event on the socket.
    digest(tls, take)?;
    let mut budget = READ_BUDGET;
    while budget > 0 {
        let count = match socket.read(scratch) {
            Ok(0) => return Err(Loss::unclean("connection closed without a farewell")),
            Ok(count) => count,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => return Err(Loss::unclean(error)),
        };
        budget = budget.saturating_sub(count);
        let mut rest = &scratch[..count];
        while !rest.is_empty() {
            if tls.read_tls(&mut rest).map_err(Loss::unclean)? == 0 {
                return Err(Loss::unclean("TLS takes no more input"));
            }
            digest(tls, take)?;
        }
    }
    Ok(true)
}

/// Decrypts what TLS has, gives it to `take`, and notices the farewell.
fn digest(tls: &mut Connection, take: &mut Take) -> Result<(), Loss> {
    let state = tls.process_new_packets().map_err(Loss::unclean)?;
    let mut waiting = state.plaintext_bytes_to_read();
    while waiting > 0 {
        let mut reader = tls.reader();
        let piece = reader.fill_buf().map_err(Loss::unclean)?;
        let count = piece.len();
        take(piece)?;
        reader.consume(count);
        waiting = waiting.saturating_sub(count.max(1));
    }
    if state.peer_has_closed() {
        return Err(Loss { clean: true, reason: "the other node closed the link".to_owned() });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_overtakes_bulk_and_bulk_is_bounded() {
        let mut queues = Queues::new(10);
        assert!(queues.push(Class::Bulk, vec![1; 20]), "one frame always fits");
        assert!(!queues.push(Class::Bulk, vec![2; 1]), "the limit is reached");
        assert!(queues.push(Class::Control, vec![3]));
        assert_eq!(queues.pop(), Some(vec![3]));
        assert_eq!(queues.pop(), Some(vec![1; 20]));
        assert!(queues.push(Class::Bulk, vec![4; 5]) && queues.push(Class::Bulk, vec![5; 5]));
        assert!(!queues.push(Class::Bulk, vec![6]));
        for _ in 0..CONTROL_FRAMES {
            assert!(queues.push(Class::Control, vec![0]));
        }
        assert!(!queues.push(Class::Control, vec![0]));
    }
}
