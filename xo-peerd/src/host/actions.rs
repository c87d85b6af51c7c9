//! What the host's state machine says, done: to the flow table, to the socket, to the held packets.

use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use xo_bpf_abi::{FLAG_CLIENT_FIN, FLAG_CLIENT_RST};
use xo_proto::handoff::HostEvent;
use xo_proto::packet;
use xo_proto::reason::Reason;
use xo_proto::slot;
use xo_proto::wire::{BeginOffload, HandoffId, PeerMessage};
use xo_sys::tcp_repair;

use super::{HostFlow, MAX_QUEUES, decide};
use crate::clock::now_ns;
use crate::engine::Engine;
use crate::held::HeldPacket;
use crate::steer::SteerError;
use crate::timers::Timer;

impl Engine {
    pub(super) fn hold(&mut self, id: HandoffId) -> Result<(), Reason> {
        let flow = self.hosted.get_mut(&id).ok_or(Reason::Closed)?;
        // Repair mode does not keep the kernel from sending it: the client would acknowledge what the target, by the dump,
        // has not sent, and the target would ignore that for ever.
        let unsent = flow.socket.as_ref().map(|s| tcp_repair::unsent(s.as_raw_fd()));
        if !matches!(unsent, Some(Ok(0))) {
            return Err(Reason::NotClean);
        }
        let peer = self.state.number(&flow.target, flow.address);
        let result = self.steer.hold(&flow.key, id, peer).map_err(|e| match e {
            SteerError::Full | SteerError::Exists => Reason::TableFull,
            e => {
                log::error!("flow table: {e}");
                Reason::NotSteered
            }
        });
        flow.times.held = now_ns();
        result
    }

    pub(super) fn send_begin(&mut self, id: HandoffId) {
        let Some(flow) = self.hosted.get_mut(&id) else { return };
        let Some(record) = flow.record.take() else { return };
        let elapsed_ns = now_ns().saturating_sub(flow.times.dumped);
        let begin = BeginOffload {
            id,
            handler: flow.handler.clone(),
            record: *record,
            elapsed_ns,
            start: flow.machine.early(),
            sent_ns: now_ns(),
            home: flow.guest.as_ref().map(|(_, home)| home.clone()),
            moves: flow.moves,
        };
        flow.asked = Some(Instant::now());
        let message = PeerMessage::BeginOffload(Box::new(begin));
        self.send_about(id, &message);
        let PeerMessage::BeginOffload(begin) = message else { return };
        if let Some(flow) = self.hosted.get_mut(&id) {
            flow.record = Some(Box::new(begin.record));
            // While the target restores.
            flow.options =
                flow.socket.as_ref().and_then(|s| tcp_repair::options(s.as_raw_fd(), &flow.ends).ok());
            self.at(Instant::now() + self.config.handoff.timeout, Timer::HostDeadline(id));
        }
    }

    pub(super) fn redirect(&mut self, id: HandoffId, to: SocketAddr) -> Option<HostEvent> {
        // What was held goes first; what comes from now on until all of it has gone queues behind it.
        self.send_late(id, to);
        self.drain_held();
        let flow = self.hosted.get_mut(&id)?;
        let peer = self.state.number(&flow.target, flow.address);
        let hop = flow.hop;
        let failed = |client, e| {
            log::error!("redirecting {client}: {e}");
            Some(HostEvent::RedirectFailed)
        };
        // A target that gets an acknowledgement keeps the connection: the next daemon must not take it back.
        if !flow.held.is_empty()
            && let Err(e) = self.steer.commit(&flow.key, id, (peer, hop), to)
        {
            return failed(flow.client, e);
        }
        self.replay_held(id, Some(to));
        let flow = self.hosted.get_mut(&id)?;
        if let Err(e) = self.steer.redirect(&flow.key, id, (peer, hop), to) {
            return failed(flow.client, e);
        }
        flow.to = Some(to);
        flow.times.redirected = now_ns();
        self.drain_held();
        None
    }

    /// A packet that had passed the hook when HOLD was set may have reached the socket after the dump: it acknowledged
    /// what it took, so the target gets it from here.
    fn send_late(&mut self, id: HandoffId, to: SocketAddr) {
        let Some(flow) = self.hosted.get(&id) else { return };
        let (Some(socket), Some(record)) = (&flow.socket, &flow.record) else { return };
        match tcp_repair::arrived_since(socket.as_raw_fd(), record) {
            Ok(None) => {}
            Ok(Some(late)) => {
                log::debug!("{}: {} bytes came after the dump", flow.client, late.data.len());
                self.metrics.held(1);
                self.send_packet(flow.client, &packet::late_segment(record, to, &late));
            }
            Err(e) => log::error!("looking for late data of {}: {e}", flow.client),
        }
    }

    pub(super) fn take_back(&mut self, id: HandoffId) {
        let Some(flow) = self.hosted.get(&id) else { return };
        if let Some(socket) = &flow.socket
            && let Err(e) = tcp_repair::resume(socket.as_raw_fd())
        {
            log::error!("taking {} back: {e}", flow.client);
        }
        self.replay_all_here(id);
        self.remove_entry_of(id);
        self.replay_all_here(id);
    }

    /// HOLD or REDIRECT.
    pub(super) fn remove_entry_of(&mut self, id: HandoffId) {
        let Some(flow) = self.hosted.get(&id) else { return };
        if let Err(e) = self.steer.remove_flow(&flow.key, id) {
            log::error!("removing the flow entry of {}: {e}", flow.client);
        }
    }

    /// The target has lost the connection: the client is told by a RST with the right sequence number.
    pub(super) fn reset(&mut self, id: HandoffId) {
        let Some(flow) = self.hosted.get(&id) else { return };
        let entry = self.steer.flow(&flow.key);
        self.remove_entry_of(id);
        let Some(flow) = self.hosted.get_mut(&id) else { return };
        if entry.is_some_and(|e| e.flags & (FLAG_CLIENT_FIN | FLAG_CLIENT_RST) != 0) {
            // It has ended as connections do.
            return;
        }
        log::warn!("{} was lost on {}: reset", flow.client, flow.target);
        self.metrics.failed(Reason::PeerLost);
        let Some(record) = &mut flow.record else { return };
        let seen = flow.held.iter().filter_map(HeldPacket::acknowledgement);
        seen.for_each(|ack| record.tcp.acknowledged(ack));
        if let Some((guest, _)) = &flow.guest {
            // Not there any more: then the RST has the wrong source, and the client ignores it.
            let _ = self.steer.note_left(&flow.key, guest.1, false);
        }
        match tcp_repair::restore(record, flow.local, false, Duration::ZERO, &mut self.spare) {
            Ok(socket) => {
                if let Err(e) = socket.reset() {
                    log::error!("resetting {}: {e}", flow.client);
                }
            }
            Err(e) => log::error!("resetting {}: {e}", flow.client),
        }
    }
}

pub(super) fn dump(flow: &mut HostFlow) -> Result<(), Reason> {
    let socket = flow.socket.as_ref().ok_or(Reason::Closed)?;
    let result = tcp_repair::dump(socket.as_raw_fd(), &flow.ends, MAX_QUEUES);
    flow.times.dumped = now_ns();
    match result {
        Ok(mut record) => {
            record.local = flow.public;
            // Only while it may still be needed here: the record goes when the target has the connection.
            record.tls = flow.tls.take();
            if let Some(tls) = &record.tls
                && let Err(e) = tls.shorten(&mut record.tcp.received, flow.used)
            {
                log::error!("the first record of {}: {e}", flow.client);
                let _ = tcp_repair::resume(socket.as_raw_fd());
                return Err(Reason::TlsState);
            }
            flow.record = Some(Box::new(record));
            Ok(())
        }
        Err(e) => {
            log::debug!("{} cannot move: {e}", flow.client);
            Err(e.reason())
        }
    }
}

/// The verdict first: the events that emptying raises must find it.
pub(super) fn vacate(flow: &mut HostFlow) {
    if let Some(verdict) = flow.verdict.take() {
        decide(&verdict, slot::GONE);
    }
    if let Some(socket) = flow.socket.take()
        && let Err(e) = tcp_repair::vacate(socket.as_raw_fd())
    {
        log::error!("emptying the socket of {}: {e}", flow.client);
    }
}

pub(super) fn stay(flow: &mut HostFlow, reason: Reason) {
    if let Some(verdict) = flow.verdict.take() {
        decide(&verdict, slot::stay(reason));
    }
    if let Some(socket) = flow.socket.take() {
        // Edge-triggered servers have seen their edge; this raises a fresh one.
        let _ = tcp_repair::poke(socket.as_raw_fd());
    }
}
