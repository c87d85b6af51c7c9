//! Interfaces and addresses of this machine, by rtnetlink; asked at start only.

use std::collections::HashMap;
use std::io;
use std::net::IpAddr;

use futures_util::TryStreamExt;
use netlink_packet_route::address::AddressAttribute;
use netlink_packet_route::link::{LinkAttribute, LinkFlags};

/// An address and the interface that has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Address {
    /// Interface name.
    pub(crate) interface: String,
    /// MTU of the interface, bytes.
    pub(crate) mtu: usize,
    /// The address.
    pub(crate) ip: IpAddr,
}

/// Unicast addresses other machines can reach, of interfaces that are up; in the kernel's order.
pub(crate) fn addresses() -> io::Result<Vec<Address>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    runtime.block_on(ask()).map_err(io::Error::other)
}

async fn ask() -> Result<Vec<Address>, rtnetlink::Error> {
    let (connection, handle, _) = rtnetlink::new_connection().map_err(|_| rtnetlink::Error::RequestFailed)?;
    tokio::spawn(connection);
    let mut links = HashMap::new();
    let mut dump = handle.link().get().execute();
    while let Some(link) = dump.try_next().await? {
        let flags = link.header.flags;
        if !flags.contains(LinkFlags::Up) || flags.contains(LinkFlags::Loopback) {
            continue;
        }
        let (mut name, mut mtu) = (None, 1500);
        for attribute in link.attributes {
            match attribute {
                LinkAttribute::IfName(n) => name = Some(n),
                LinkAttribute::Mtu(n) => mtu = n as usize,
                _ => {}
            }
        }
        if let Some(name) = name {
            links.insert(link.header.index, (name, mtu));
        }
    }
    let mut found = Vec::new();
    let mut dump = handle.address().get().execute();
    while let Some(message) = dump.try_next().await? {
        let Some((interface, mtu)) = links.get(&message.header.index) else { continue };
        let attribute = |local: bool| {
            message.attributes.iter().find_map(|a| match a {
                AddressAttribute::Local(ip) if local => Some(*ip),
                AddressAttribute::Address(ip) if !local => Some(*ip),
                _ => None,
            })
        };
        // On point-to-point links IFA_ADDRESS is the other end.
        if let Some(ip) = attribute(true).or_else(|| attribute(false)).filter(reachable) {
            found.push(Address { interface: interface.clone(), mtu: *mtu, ip });
        }
    }
    Ok(found)
}

fn reachable(ip: &IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => !ip.is_link_local() && !ip.is_loopback(),
        IpAddr::V6(ip) => !ip.is_unicast_link_local() && !ip.is_loopback(),
    }
}
