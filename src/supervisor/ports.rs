//! The sockets of a workload: bind, open through the port guard, close for every holder. Must never call `listen`
//! itself: the guard does, so that no port is open without somebody who closes it.

use std::{
    io,
    net::{IpAddr, SocketAddr, TcpListener},
    os::fd::{AsFd, BorrowedFd},
};

use anyhow::Context;
use socket2::{SockRef, Socket};

use crate::{
    clients,
    guard::PortGuard,
    workload::{self, Endpoint},
};

/// Bound sockets. They are shut down for every holder when this is dropped.
#[derive(Debug)]
pub(super) struct Sockets {
    sockets: Vec<(Endpoint, Socket)>,
}

impl Sockets {
    /// Binds all ports; a client is still refused.
    pub(super) fn bind(address: IpAddr, endpoints: Vec<Endpoint>) -> anyhow::Result<Self> {
        let mut sockets = Vec::new();
        for endpoint in endpoints {
            let at = SocketAddr::new(address, endpoint.port);
            let socket = clients::bind(at).with_context(|| {
                format!("cannot bind {at}, a port of this node ({}); does another program use it?", endpoint.name)
            })?;
            sockets.push((endpoint, socket));
        }
        Ok(Self { sockets })
    }

    /// Opens the ports through the guard.
    pub(super) async fn open(&self, guard: &PortGuard) -> anyhow::Result<()> {
        guard.open(&self.descriptors()).await.with_context(|| format!("cannot open the ports of {}", workload::NAME))
    }

    /// Opens the ports beside these others, which are open.
    pub(super) async fn open_beside(&self, others: &Self, guard: &PortGuard) -> anyhow::Result<()> {
        let all = [others.descriptors(), self.descriptors()].concat();
        guard.change(&all).await.with_context(|| format!("cannot open the ports of {}", workload::SERVICE_NAME))
    }

    /// Has the guard let go of all others, which are shut down.
    pub(super) async fn alone(&self, guard: &PortGuard) -> io::Result<()> {
        guard.change(&self.descriptors()).await
    }

    fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        self.sockets.iter().map(|(_, socket)| socket.as_fd()).collect()
    }

    /// Listeners for the async runtime; only when the ports are open.
    pub(super) fn listeners(&self) -> io::Result<Vec<(Endpoint, tokio::net::TcpListener)>> {
        let one = |(endpoint, socket): &(Endpoint, Socket)| {
            let listener = TcpListener::from(socket.try_clone()?);
            Ok((endpoint.clone(), tokio::net::TcpListener::from_std(listener)?))
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
