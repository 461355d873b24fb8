//! The Console's sockets: bind, open through the port guard, close for every holder. Must never call `listen` itself:
//! the guard does, so that no port is open without somebody who closes it.

use std::{
    io,
    net::{IpAddr, SocketAddr, TcpListener},
    os::fd::AsFd,
};

use anyhow::Context;
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use crate::guard::PortGuard;

/// The ports of the configuration; none means that the listener is off.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ConsolePorts {
    /// `MANAGEMENT_PORT_HTTPS`.
    pub https: Option<u16>,
    /// `MANAGEMENT_PORT_HTTP`.
    pub http: Option<u16>,
    /// `COMMUNICATION_PORT`: reserved for Defenders.
    pub defender: Option<u16>,
}

/// What is spoken on a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Service {
    Https,
    Http,
    Defender,
}

impl ConsolePorts {
    fn services(self) -> impl Iterator<Item = (Service, u16)> {
        let all = [(Service::Https, self.https), (Service::Http, self.http), (Service::Defender, self.defender)];
        all.into_iter().filter_map(|(service, port)| Some((service, port?)))
    }
}

/// Bound sockets. They are shut down for every holder when this is dropped.
#[derive(Debug)]
pub(super) struct Sockets {
    sockets: Vec<(Service, Socket)>,
}

impl Sockets {
    /// Binds all ports; a client is still refused.
    pub(super) fn bind(address: IpAddr, ports: ConsolePorts) -> anyhow::Result<Self> {
        let mut sockets = Vec::new();
        for (service, port) in ports.services() {
            let at = SocketAddr::new(address, port);
            let socket = bind_one(at).with_context(|| {
                format!("cannot bind the Console port {at} ({service:?}); does another program use it?")
            })?;
            sockets.push((service, socket));
        }
        Ok(Self { sockets })
    }

    /// Opens the ports through the guard.
    pub(super) async fn open(&self, guard: &PortGuard) -> anyhow::Result<()> {
        let sockets: Vec<_> = self.sockets.iter().map(|(_, socket)| socket.as_fd()).collect();
        guard.open(&sockets).await.context("cannot open the Console ports")
    }

    /// Listeners for the async runtime; only when the ports are open.
    pub(super) fn listeners(&self) -> io::Result<Vec<(Service, tokio::net::TcpListener)>> {
        let one = |(service, socket): &(Service, Socket)| {
            let listener = TcpListener::from(socket.try_clone()?);
            Ok((*service, tokio::net::TcpListener::from_std(listener)?))
        };
        self.sockets.iter().map(one).collect()
    }
}

impl Drop for Sockets {
    fn drop(&mut self) {
        for (_, socket) in &self.sockets {
            // "Not connected" means that it never listened or that the guard was faster.
            let _ = SockRef::from(socket).shutdown(std::net::Shutdown::Both);
        }
    }
}

fn bind_one(at: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(at), Type::STREAM.nonblocking().cloexec(), Some(Protocol::TCP))?;
    if at.is_ipv6() {
        // The unspecified address means all interfaces of both families.
        socket.set_only_v6(!at.ip().is_unspecified())?;
    }
    // For connections of an earlier opening that the kernel still remembers. Never SO_REUSEPORT: with it a second
    // daemon could share the port unnoticed.
    socket.set_reuse_address(true)?;
    socket.bind(&at.into())?;
    Ok(socket)
}
