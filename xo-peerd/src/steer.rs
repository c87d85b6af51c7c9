//! Packet steering: the BPF programs, their attachment, their maps.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use aya::maps::{HashMap, MapData, MapError, PerCpuArray, RingBuf};
use aya::programs::tc::{NlOptions, TcAttachOptions, qdisc_add_clsact};
use aya::programs::{LinkOrder, ProgramError, SchedClassifier, TcAttachType};
use aya::{Ebpf, EbpfLoader};
use xo_bpf_abi::{
    Action, COUNTERS_MAP, EGRESS_PROGRAM, FLAG_PASS, FLAG_RULE, FLOWS_MAP, FlowEntry, FlowKey, HELD_MAP,
    HOPS_MAP, HeldHeader, INGRESS_PROGRAM, PATHS, Path, REWRITES_MAP, RewriteEntry,
};

mod carry;
pub(crate) mod pin;
mod ways;
mod xdp;

use self::pin::{Pins, Sizes};
use self::ways::Ways;
use crate::clock::now_ns;

/// Built by scripts/build-bpf.
static OBJECT: &[u8] =
    aya::include_bytes_aligned!(concat!(env!("CARGO_MANIFEST_DIR"), "/../xo-bpf/obj/xo.bpf.o"));

/// `BPF_NOEXIST`: insert only.
const NO_EXIST: u64 = 1;
/// `BPF_EXIST`: update only.
const EXIST: u64 = 2;
/// A daemon that takes longer to send on what was held is not there any more.
const ORDERED_FOR: Duration = Duration::from_millis(100);
/// As often as libbpf does.
const VERIFIER_ATTEMPTS: usize = 5;

/// Why steering failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SteerError {
    /// The table has no room.
    #[error("the table is full")]
    Full,
    /// Another flow has this entry.
    #[error("the entry belongs to another flow")]
    Exists,
    /// This flow has no entry.
    #[error("the flow has no entry, or it belongs to another flow")]
    NotOurs,
    /// The programs cannot be loaded.
    #[error("loading the BPF programs: {0}")]
    Load(String),
    /// The programs cannot be attached.
    #[error("interface {0}: {1}")]
    Attach(String, String),
    /// The kernel refused a map operation.
    #[error("BPF map: {0}")]
    Map(#[from] MapError),
}

/// Whose a rewrite entry is; names by their numbers.
pub(crate) struct RewriteOwner {
    /// The hand-off, given by `peer`, the machine that the connection came from.
    pub(crate) flow_id: u64,
    pub(crate) peer: u32,
    pub(crate) handler: u16,
    /// The hand-off with which it left its home.
    pub(crate) home_id: u64,
    pub(crate) home_peer: u32,
    /// See `RewriteEntry::hop`.
    pub(crate) hop: u32,
}

/// The loaded programs. Dropping it detaches them: packets then go where they went before.
pub(crate) struct Steer {
    flows: HashMap<MapData, FlowKey, FlowEntry>,
    rewrites: HashMap<MapData, FlowKey, RewriteEntry>,
    held: RingBuf<MapData>,
    counters: PerCpuArray<MapData, u64>,
    ways: Ways,
    /// Keys of the flow table and of the rewrites: nobody but us inserts, the programs may have removed some.
    known_flows: foldhash::HashSet<FlowKey>,
    known_rewrites: foldhash::HashSet<FlowKey>,
    /// Inserted less removed, by us.
    entries: u64,
    mode: &'static str,
    pins: Option<Pins>,
    programs: Ebpf,
}

impl Steer {
    /// Loads the programs and attaches them to the interfaces, first in order: by TCX, or by clsact on
    /// kernels before 6.6. With `pins`, they and their maps outlive this process, and those of an earlier one are taken
    /// over.
    pub(crate) fn load(
        interfaces: &[String],
        wanted: Sizes,
        pins: Option<Pins>,
    ) -> Result<Steer, SteerError> {
        let mut programs = load_object(pins.as_ref().map_or(wanted, Pins::sizes), pins.as_ref())?;
        let (mut mode, mut pins) = ("tcx", pins);
        for (name, hook) in [(INGRESS_PROGRAM, TcAttachType::Ingress), (EGRESS_PROGRAM, TcAttachType::Egress)]
        {
            let program = classifier(&mut programs, name)?;
            verified(|| program.load())?;
            for interface in interfaces {
                if let Some(pinned) = &pins {
                    match pinned.attach(program, interface, hook) {
                        Ok(()) => continue,
                        Err(e) => {
                            log::warn!("interface {interface}: {e}: connections will end with this daemon");
                            let _ = pinned.clear();
                            pins = None;
                        }
                    }
                }
                if !attach(program, interface, hook)? {
                    mode = "clsact";
                }
            }
        }
        let mut steer = Steer {
            flows: HashMap::try_from(map(&mut programs, FLOWS_MAP)?)?,
            rewrites: HashMap::try_from(map(&mut programs, REWRITES_MAP)?)?,
            held: RingBuf::try_from(map(&mut programs, HELD_MAP)?)?,
            counters: PerCpuArray::try_from(map(&mut programs, COUNTERS_MAP)?)?,
            ways: Ways::new(HashMap::try_from(map(&mut programs, HOPS_MAP)?)?)
                .map_err(|e| SteerError::Load(format!("netlink: {e}")))?,
            known_flows: foldhash::HashSet::default(),
            known_rewrites: foldhash::HashSet::default(),
            entries: 0,
            mode,
            pins,
            programs,
        };
        // The program's count of what it has removed may be an earlier daemon's.
        let (flows, rewrites) = (steer.all_flows(), steer.all_rewrites());
        let present = (flows.len() + rewrites.len()) as u64;
        steer.known_flows = flows.iter().map(|(key, _)| *key).collect();
        steer.known_rewrites = rewrites.iter().map(|(key, _)| *key).collect();
        for (_, entry) in flows.iter().filter(|(_, entry)| entry.action == Action::Redirect as u32) {
            steer.ways.learn(address(entry.to_addr, 0).ip());
        }
        steer.entries = present + steer.counters()[Path::Reused as usize];
        Ok(steer)
    }

    /// Lets restored sockets have the congestion windows of their records.
    pub(crate) fn carry_windows(&mut self) -> Result<(), SteerError> {
        carry::attach(&mut self.programs)
    }

    /// All entries of the flow table.
    pub(crate) fn all_flows(&self) -> Vec<(FlowKey, FlowEntry)> {
        self.flows.iter().filter_map(Result::ok).collect()
    }

    /// All entries of the rewrite table.
    pub(crate) fn all_rewrites(&self) -> Vec<(FlowKey, RewriteEntry)> {
        self.rewrites.iter().filter_map(Result::ok).collect()
    }

    /// Do programs and maps outlive this process?
    pub(crate) fn is_pinned(&self) -> bool {
        self.pins.is_some()
    }

    /// They do not any more.
    pub(crate) fn unpin(&mut self) {
        if let Some(pins) = self.pins.take()
            && let Err(e) = pins.clear()
        {
            log::error!("removing the pinned maps: {e}");
        }
    }

    /// Keeps the flow's packets from the local stack and for [`Steer::drain_held`].
    pub(crate) fn hold(&mut self, key: &FlowKey, flow_id: u64, peer: u32) -> Result<(), SteerError> {
        let entry = flow_entry(Action::Hold, flow_id, peer, [0; 4], 0);
        insert(&mut self.flows, key, &entry, NO_EXIST)?;
        self.known_flows.insert(*key);
        self.entries += 1;
        Ok(())
    }

    /// The flow's packets are held on, but it can only be redirected now: to this address.
    pub(crate) fn commit(
        &mut self,
        key: &FlowKey,
        flow_id: u64,
        (peer, hop): (u32, u32),
        to: SocketAddr,
    ) -> Result<(), SteerError> {
        self.direct(key, flow_id, (peer, hop), Action::Hold, to)
    }

    /// Turns a held flow into a redirected one, or points a redirected one elsewhere: one map update, so there is no
    /// moment in between. A flow that was held is redirected once the ring is empty: its packets queue there until then.
    pub(crate) fn redirect(
        &mut self,
        key: &FlowKey,
        flow_id: u64,
        (peer, hop): (u32, u32),
        to: SocketAddr,
    ) -> Result<(), SteerError> {
        self.direct(key, flow_id, (peer, hop), Action::Redirect, to)
    }

    /// That the client has closed stays known.
    fn direct(
        &mut self,
        key: &FlowKey,
        flow_id: u64,
        (peer, hop): (u32, u32),
        action: Action,
        to: SocketAddr,
    ) -> Result<(), SteerError> {
        let Some(held) = self.flow(key).filter(|e| e.flow_id == flow_id) else {
            return Err(SteerError::NotOurs);
        };
        self.ways.learn(to.ip());
        let mut entry = flow_entry(action, flow_id, peer, mapped(to.ip()), to.port().to_be());
        entry.flags = held.flags;
        entry.last_ns = held.last_ns;
        entry.hop = hop as u16;
        if action == Action::Redirect && held.action == Action::Hold as u32 {
            entry.ordered_until_ns = now_ns() + ORDERED_FOR.as_nanos() as u64;
        }
        // The program may have removed the entry meanwhile: the client's port then serves a new connection.
        insert(&mut self.flows, key, &entry, EXIST)
    }

    /// Renews the ways to all targets: to be done every second.
    pub(crate) fn refresh_ways(&mut self) {
        self.ways.refresh();
    }

    /// Is readable when routes have changed: then it is time for [`Steer::routes_changed`].
    pub(crate) fn routes_fd(&self) -> RawFd {
        self.ways.fd()
    }

    /// Renews the ways to all targets if routes have changed.
    pub(crate) fn routes_changed(&mut self) {
        self.ways.changed();
    }

    /// Packets that come to this address go to the local stack under another: where a connection of this machine lives
    /// that comes home.
    pub(crate) fn deliver(
        &mut self,
        key: &FlowKey,
        flow_id: u64,
        peer: u32,
        to: SocketAddr,
    ) -> Result<(), SteerError> {
        let mut entry = flow_entry(Action::Deliver, flow_id, peer, mapped(to.ip()), to.port().to_be());
        entry.hop = 1;
        insert(&mut self.flows, key, &entry, NO_EXIST)?;
        self.known_flows.insert(*key);
        self.entries += 1;
        Ok(())
    }

    /// Says whether a redirected flow may have a flow rule (`FLAG_RULE`), and whether the program is to leave it to that (`FLAG_PASS`). A
    /// flow whose packets the program has not seen does not count as idle since.
    pub(crate) fn mark_rule(&mut self, key: &FlowKey, flow_id: u64, marks: u32) -> Result<(), SteerError> {
        let entry = self.flow(key).filter(|e| e.flow_id == flow_id).ok_or(SteerError::NotOurs)?;
        if entry.action != Action::Redirect as u32 && marks != 0 {
            return Err(SteerError::NotOurs);
        }
        let flags = entry.flags & !(FLAG_RULE | FLAG_PASS) | marks;
        insert(&mut self.flows, key, &FlowEntry { flags, last_ns: now_ns(), ..entry }, EXIST)
    }

    /// Notes for the next daemon that a connection is home for sure.
    pub(crate) fn note_home(&mut self, key: &FlowKey, flow_id: u64) -> Result<(), SteerError> {
        let entry = self.flow(key).filter(|e| e.flow_id == flow_id).ok_or(SteerError::NotOurs)?;
        insert(&mut self.flows, key, &FlowEntry { hop: 0, ..entry }, EXIST)
    }

    /// Notes that a connection has left (for the program, and for the next daemon), or that this machine is to speak for
    /// it once more.
    pub(crate) fn note_left(&mut self, key: &FlowKey, flow_id: u64, left: bool) -> Result<(), SteerError> {
        let entry = self.rewrite_entry(key).filter(|e| e.flow_id == flow_id).ok_or(SteerError::NotOurs)?;
        let left = u32::from(left);
        if entry.left == left {
            return Ok(());
        }
        insert(&mut self.rewrites, key, &RewriteEntry { left, ..entry }, EXIST)
    }

    /// Removes the flow's entry if it is still this flow's.
    pub(crate) fn remove_flow(&mut self, key: &FlowKey, flow_id: u64) -> Result<bool, SteerError> {
        let entry = self.flow(key);
        if entry.is_some_and(|e| e.flow_id != flow_id) {
            return Ok(false);
        }
        self.known_flows.remove(key);
        let removed = entry.is_some() && remove(&mut self.flows, key)?;
        self.entries -= u64::from(removed);
        Ok(removed)
    }

    /// The flow's entry.
    pub(crate) fn flow(&self, key: &FlowKey) -> Option<FlowEntry> {
        self.flows.get(key, 0).ok()
    }

    /// Gives packets of a restored connection the source address that its client knows.
    pub(crate) fn rewrite(
        &mut self,
        key: &FlowKey,
        owner: &RewriteOwner,
        from: SocketAddr,
    ) -> Result<(), SteerError> {
        let entry = RewriteEntry {
            flow_id: owner.flow_id,
            packets: 0,
            bytes: 0,
            last_ns: 0,
            from_addr: mapped(from.ip()),
            from_port: from.port().to_be(),
            handler: owner.handler,
            peer: owner.peer,
            home_id: owner.home_id,
            home_peer: owner.home_peer,
            hop: owner.hop,
            left: 0,
            pad: 0,
        };
        insert(&mut self.rewrites, key, &entry, NO_EXIST)?;
        self.known_rewrites.insert(*key);
        self.entries += 1;
        Ok(())
    }

    /// Removes the rewrite if it is still this flow's.
    pub(crate) fn remove_rewrite(&mut self, key: &FlowKey, flow_id: u64) -> Result<bool, SteerError> {
        let entry = self.rewrite_entry(key);
        if entry.is_some_and(|e| e.flow_id != flow_id) {
            return Ok(false);
        }
        self.known_rewrites.remove(key);
        let removed = entry.is_some() && remove(&mut self.rewrites, key)?;
        self.entries -= u64::from(removed);
        Ok(removed)
    }

    /// Has the connection an entry in either table? A system call only where one has been made.
    pub(crate) fn has_entry(&self, key: &FlowKey) -> bool {
        (self.known_flows.contains(key) && self.flow(key).is_some())
            || (self.known_rewrites.contains(key) && self.rewrite_entry(key).is_some())
    }

    /// The flow's rewrite.
    pub(crate) fn rewrite_entry(&self, key: &FlowKey) -> Option<RewriteEntry> {
        self.rewrites.get(key, 0).ok()
    }

    /// Is readable when the ring has something: then it is time for [`Steer::drain_held`].
    pub(crate) fn held_fd(&self) -> RawFd {
        self.held.as_raw_fd()
    }

    /// Gives out what the ring holds, oldest first. No system call. A packet is in the ring until `out` has returned: redirected flows wait
    /// for that (`FlowEntry::ordered_until_ns`).
    pub(crate) fn drain_held(&mut self, out: &mut dyn FnMut(&HeldHeader, &[u8])) {
        while let Some(item) = self.held.next() {
            let Some((header, packet)) = item.split_at_checked(size_of::<HeldHeader>()) else { continue };
            // SAFETY: as many bytes as the type has; it is plain data, and read_unaligned asks no alignment.
            let header = unsafe { header.as_ptr().cast::<HeldHeader>().read_unaligned() };
            if let Some(packet) = packet.get(..header.len as usize) {
                out(&header, packet);
            }
        }
    }

    /// Entries in both tables. The program removes those of reused ports, and counts that.
    pub(crate) fn flow_entries(&self) -> u64 {
        self.entries.saturating_sub(self.counters()[Path::Reused as usize])
    }

    /// Packets by path, summed over CPUs.
    pub(crate) fn counters(&self) -> [u64; PATHS as usize] {
        let mut all = [0; PATHS as usize];
        for (path, sum) in (0..).zip(&mut all) {
            *sum = self.counters.get(&path, 0).map_or(0, |cpus| cpus.iter().sum());
        }
        all
    }

    /// How the programs are attached.
    pub(crate) fn mode(&self) -> &'static str {
        self.mode
    }
}

/// The key of a connection, seen from this machine.
pub(crate) fn flow_key(remote: SocketAddr, local: SocketAddr) -> FlowKey {
    FlowKey {
        remote: mapped(remote.ip()),
        local: mapped(local.ip()),
        remote_port: remote.port().to_be(),
        local_port: local.port().to_be(),
    }
}

/// Four words in network byte order, as the programs compare them.
fn mapped(ip: IpAddr) -> [u32; 4] {
    let octets = match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
        IpAddr::V6(ip) => ip.octets(),
    };
    let mut words = [0; 4];
    for (word, bytes) in words.iter_mut().zip(octets.as_chunks::<4>().0) {
        *word = u32::from_ne_bytes(*bytes);
    }
    words
}

/// An address as the maps hold it.
pub(crate) fn address(ip: [u32; 4], port: u16) -> SocketAddr {
    let mut octets = [0; 16];
    for (to, word) in octets.as_chunks_mut::<4>().0.iter_mut().zip(ip) {
        *to = word.to_ne_bytes();
    }
    SocketAddr::new(IpAddr::from(octets).to_canonical(), u16::from_be(port))
}

fn flow_entry(action: Action, flow_id: u64, peer: u32, to_addr: [u32; 4], to_port: u16) -> FlowEntry {
    FlowEntry {
        flow_id,
        packets: 0,
        bytes: 0,
        last_ns: 0,
        action: action as u32,
        flags: 0,
        to_addr,
        to_port,
        hop: 0,
        peer,
        ordered_until_ns: 0,
    }
}

fn load_object(sizes: Sizes, pins: Option<&Pins>) -> Result<Ebpf, SteerError> {
    let cpus = aya::util::nr_cpus().map_or(1, |n| n as u32);
    let mut loader = EbpfLoader::new();
    loader
        .map_max_entries(FLOWS_MAP, sizes.flows)
        .map_max_entries(REWRITES_MAP, sizes.flows)
        .map_max_entries(HELD_MAP, sizes.ring)
        .map_max_entries("SCRATCH", cpus);
    if let Some(pins) = pins {
        for name in [FLOWS_MAP, REWRITES_MAP, HELD_MAP, COUNTERS_MAP] {
            loader.map_pin_path(name, pins.map(name));
        }
    }
    loader.load(OBJECT).map_err(|e| SteerError::Load(chain(&e)))
}

fn classifier<'e>(programs: &'e mut Ebpf, name: &str) -> Result<&'e mut SchedClassifier, SteerError> {
    let program = programs.program_mut(name).ok_or_else(|| SteerError::Load(format!("no program {name}")))?;
    program.try_into().map_err(|e: ProgramError| SteerError::Load(e.to_string()))
}

fn map(programs: &mut Ebpf, name: &str) -> Result<aya::maps::Map, SteerError> {
    programs.take_map(name).ok_or_else(|| SteerError::Load(format!("no map {name}")))
}

/// Returns whether it was TCX.
fn attach(program: &mut SchedClassifier, interface: &str, hook: TcAttachType) -> Result<bool, SteerError> {
    let tcx = TcAttachOptions::TcxOrder(LinkOrder::first());
    if program.attach_with_options(interface, hook, tcx).is_ok() {
        return Ok(true);
    }
    // EEXIST: somebody else's clsact does as well; what really is wrong, the attachment tells.
    let _ = qdisc_add_clsact(interface);
    program
        .attach_with_options(interface, hook, TcAttachOptions::Netlink(NlOptions::default()))
        .map(|_| false)
        .map_err(|e| SteerError::Attach(interface.to_owned(), chain(&e)))
}

fn insert<V: aya::Pod>(
    map: &mut HashMap<MapData, FlowKey, V>,
    key: &FlowKey,
    value: &V,
    flags: u64,
) -> Result<(), SteerError> {
    map.insert(key, value, flags).map_err(|e| match errno(&e) {
        Some(libc::E2BIG | libc::ENOMEM) => SteerError::Full,
        Some(libc::EEXIST) => SteerError::Exists,
        Some(libc::ENOENT) => SteerError::NotOurs,
        _ => e.into(),
    })
}

fn remove<V: aya::Pod>(map: &mut HashMap<MapData, FlowKey, V>, key: &FlowKey) -> Result<bool, SteerError> {
    match map.remove(key) {
        Ok(()) => Ok(true),
        Err(MapError::KeyNotFound) => Ok(false),
        Err(e) if errno(&e) == Some(libc::ENOENT) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

fn errno(e: &MapError) -> Option<i32> {
    let source: &dyn std::error::Error = e;
    let mut next = Some(source);
    while let Some(e) = next {
        if let Some(io) = e.downcast_ref::<io::Error>() {
            return io.raw_os_error();
        }
        next = e.source();
    }
    None
}

/// An error with its causes. Of what the verifier says only the end, where the complaint is.
/// Loads a program. The verifier gives up with EAGAIN when the thread has a signal or other work waiting (`bpf_check`,
/// kernel/bpf/verifier.c), and wants to be asked again.
fn verified(mut load: impl FnMut() -> Result<(), ProgramError>) -> Result<(), SteerError> {
    let mut result = load();
    for _ in 0..VERIFIER_ATTEMPTS {
        match &result {
            Err(ProgramError::LoadError { io_error, .. }) if io_error.kind() == io::ErrorKind::WouldBlock => {
                result = load()
            }
            _ => break,
        }
    }
    result.map_err(|e| SteerError::Load(chain(&e)))
}

fn chain(e: &dyn std::error::Error) -> String {
    let mut text = e.to_string();
    let mut next = e.source();
    while let Some(e) = next {
        text = format!("{text}: {e}");
        next = e.source();
    }
    let lines: Vec<_> = text.lines().collect();
    match lines.as_slice() {
        [first, .., a, b, c, d] => format!("{first} ... {a} {b} {c} {d}"),
        _ => text,
    }
}

#[cfg(test)]
mod tests;
