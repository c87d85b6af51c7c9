//! A connection of another machine gets a socket here, and its entry in a steering table.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use xo_bpf_abi::FlowKey;
use xo_proto::conn::ConnRecord;
use xo_proto::reason::Reason;
use xo_proto::tls::TlsState;
use xo_proto::wire::{BeginOffload, HandoffId, TargetReady};
use xo_sys::tcp_repair::{self, Repaired};

use crate::clock::now_ns;
use crate::config::HandlerMode;
use crate::engine::{Engine, ServedKey};
use crate::exec::Reserve;
use crate::records::Choice;
use crate::steer::{RewriteOwner, SteerError, flow_key};

/// Ports tried for the end of a detour.
const PORTS: std::ops::Range<u16> = 32_768..61_000;
/// Sockets, or ports, tried before giving up.
const ATTEMPTS: u16 = 16;

/// An entry in a steering table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    /// In the rewrite table: a guest's source address.
    Rewrite(FlowKey),
    /// In the flow table: the end of the detour of a connection that has come home.
    Deliver(FlowKey),
}

/// Where and how a socket is to be made.
struct Plan {
    mode: HandlerMode,
    acceptor: Option<usize>,
    bind: SocketAddr,
    v6_socket: bool,
    /// Who is to do the record layer, for a program of its own.
    layer: Option<Choice>,
}

type Refusal = (Reason, String);

impl Engine {
    /// Restores a connection in repair mode and installs its entry; why not, is left in its `refusal`.
    pub(crate) fn restore(&mut self, key: &ServedKey) -> Result<(), Reason> {
        if self.is_stopping() {
            return Err(Reason::Stopping);
        }
        if self.served.get(key).is_some_and(|s| self.is_recalled(&s.origin)) {
            return Err(Reason::TargetUnwilling);
        }
        let mut begin = self.served.get_mut(key).and_then(|s| s.begin.take()).ok_or(Reason::Closed)?;
        let window = &mut begin.record.tcp.snd_cwnd;
        *window = (*window).min(self.config.handoff.carry.into());
        // Its sender would go on sending it.
        if !begin.record.tcp.unsent.is_empty() {
            return Err(Reason::NotClean);
        }
        if let Some(tls) = &begin.record.tls {
            self.takes_tls(key, tls, &begin.record.tcp.received)?;
        }
        self.plan(key, &begin).and_then(|plan| self.carry_out(key, &begin, plan)).map_err(|(reason, text)| {
            if let Some(served) = self.served.get_mut(key) {
                served.refusal = text;
            }
            reason
        })
    }

    /// A connection with TLS: can it be served here? Its client would lose it by a state that does not fit.
    fn takes_tls(&mut self, key: &ServedKey, tls: &TlsState, received: &[u8]) -> Result<(), Reason> {
        let served = self.served.get_mut(key).ok_or(Reason::Closed)?;
        if let Err(e) = tls.fits(received) {
            served.refusal = e.to_string();
            return Err(Reason::TlsState);
        }
        served.tls = Some(tls.clone());
        Ok(())
    }

    fn plan(&mut self, key: &ServedKey, begin: &BeginOffload) -> Result<Plan, Refusal> {
        let origin = self.served.get(key).map(|s| &s.origin).ok_or((Reason::Closed, String::new()))?;
        let (client, public) = (begin.record.client, begin.record.local);
        if origin.here {
            let away = |id: &HandoffId| self.hosted.get(id).is_some_and(|f| f.is_away() && f.local == public);
            if !away(&origin.id) {
                return Err((Reason::PeerLost, "its home does not know it".into()));
            }
        } else if origin.is_detour() && self.connection_to(&origin.node).is_none() {
            return Err((Reason::PeerUnreachable, format!("no connection to its home, {}", origin.node)));
        }
        let mode = if origin.here {
            HandlerMode::Attach { port: public.port(), tls: begin.record.tls.is_some() }
        } else {
            let handler = self.config.handlers.iter().find(|h| h.name == begin.handler);
            handler.map(|h| h.mode.clone()).ok_or_else(|| {
                let text = format!("no handler '{}' in the configuration", begin.handler);
                (Reason::NoHandler, text)
            })?
        };
        let (here, tls) = (origin.here, begin.record.tls.is_some());
        let no_tls = |text: String| (Reason::TlsUnsupported, text);
        let mut layer = None;
        let (bind, listener, acceptor) = match &mode {
            HandlerMode::Attach { port, tls: true } if !tls => {
                let text = format!("port {port} has TLS, the connection has none");
                return Err((Reason::NoHandler, text));
            }
            HandlerMode::Attach { port, tls: handshake } => {
                let (number, listener) =
                    self.pick_acceptor(*port, client, [tls, *handshake]).ok_or_else(|| {
                        if tls {
                            return no_tls(format!("no process with a record layer listens on port {port}"));
                        }
                        (Reason::NoHandler, format!("no process under the library listens on port {port}"))
                    })?;
                let ip = specific(listener.ip(), client, &self.config.addresses);
                (ip.map(|ip| SocketAddr::new(ip, *port)), listener, Some(number))
            }
            HandlerMode::Exec { .. } | HandlerMode::Pool { .. } => {
                if let Some(tls) = &begin.record.tls {
                    layer = Some(self.records.choose(tls, &begin.record.tcp.received).map_err(no_tls)?);
                }
                self.keep_room(key, &mode)?;
                let any = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
                let ip = specific(any, client, &self.config.addresses);
                (ip.map(|ip| SocketAddr::new(ip, public.port())), SocketAddr::new(any, 0), None)
            }
        };
        let bind = if here { Some(public) } else { bind }.ok_or_else(|| {
            (Reason::RestoreFailed, "no address of the client's family in `addresses`".to_owned())
        })?;
        Ok(Plan { mode, acceptor, bind, v6_socket: listener.is_ipv6() && client.is_ipv4(), layer })
    }

    /// What giving the connection to its handler will take: once its host is told that it can be served here, there is no
    /// way back.
    fn keep_room(&mut self, key: &ServedKey, mode: &HandlerMode) -> Result<(), Refusal> {
        let Some(served) = self.served.get_mut(key) else { return Ok(()) };
        if matches!(mode, HandlerMode::Pool { .. }) {
            served.seat = Some(self.pools.take_seat(&served.handler)?);
        } else {
            let reserve = Reserve::take();
            served.reserve =
                Some(reserve.map_err(|e| (Reason::TargetUnwilling, format!("starting a process: {e}")))?);
        }
        Ok(())
    }

    fn carry_out(&mut self, key: &ServedKey, begin: &BeginOffload, mut plan: Plan) -> Result<(), Refusal> {
        let gone = || (Reason::Closed, String::new());
        let (begun_ns, late) = self.served.get(key).map(|s| (s.begun_ns, s.late)).ok_or_else(gone)?;
        let here = self.served.get(key).is_some_and(|s| s.origin.here);
        let t0 = now_ns();
        // What the message waited on its way is part of it: a client drops what a slow clock has stamped (RFC 7323, 5.3).
        let elapsed = late + Duration::from_nanos(begin.elapsed_ns + t0.saturating_sub(begun_ns));
        let restored = if here {
            let at_home =
                tcp_repair::restore(&begin.record, plan.bind, plan.v6_socket, elapsed, &mut self.spare);
            at_home.map_err(refused)?
        } else {
            self.restore_guest(&begin.record, &plan, elapsed)?
        };
        let local = restored.local();
        if here && local != plan.bind {
            return Err((Reason::RestoreFailed, format!("{} is taken", plan.bind)));
        }
        if let Some(choice) = plan.layer.take() {
            self.give_layer(key, &restored, choice)?;
        }
        let t1 = now_ns();
        let (entrance, entry) = if here {
            self.end_of_detour(key, &begin.record)?
        } else {
            self.rewrite_source(key, &begin.record, local)?
        };
        let t2 = now_ns();
        let served = self.served.get_mut(key).ok_or_else(gone)?;
        served.ready = Some(TargetReady {
            id: key.1,
            local: entrance,
            restore_ns: t1 - t0,
            rewrite_ns: t2 - t1,
            total_ns: t2.saturating_sub(begun_ns),
            started_ns: None,
        });
        served.restored = Some(restored);
        served.local = local;
        served.entrance = entrance;
        served.entry = Some(entry);
        served.handshake = matches!(plan.mode, HandlerMode::Attach { tls: true, .. });
        served.mode = Some(plan.mode);
        served.acceptor = plan.acceptor;
        self.by_flow.insert(flow_key(begin.record.client, local), key.clone());
        Ok(())
    }

    /// A connection that was here before may still have entries under its address: it then gets another port.
    fn restore_guest(
        &mut self,
        record: &ConnRecord,
        plan: &Plan,
        elapsed: Duration,
    ) -> Result<Repaired, Refusal> {
        let mut bind = plan.bind;
        for _ in 0..ATTEMPTS {
            if bind.port() != 0 && self.has_entry(record.client, bind) {
                bind.set_port(0);
            }
            let restored = tcp_repair::restore(record, bind, plan.v6_socket, elapsed, &mut self.spare)
                .map_err(refused)?;
            if !self.has_entry(record.client, restored.local()) {
                return Ok(restored);
            }
            bind.set_port(0);
        }
        Err((Reason::TableFull, "no port is free for this client".into()))
    }

    fn has_entry(&mut self, client: SocketAddr, local: SocketAddr) -> bool {
        self.steer.has_entry(&flow_key(client, local))
    }

    fn rewrite_source(
        &mut self,
        key: &ServedKey,
        record: &ConnRecord,
        local: SocketAddr,
    ) -> Result<(SocketAddr, Entry), Refusal> {
        let flow = flow_key(record.client, local);
        let served = self.served.get(key).ok_or((Reason::Closed, String::new()))?;
        let (origin, handler) = (&served.origin, &served.handler);
        let owner = RewriteOwner {
            flow_id: key.1,
            peer: self.state.number(&key.0, None),
            handler: self.state.number(handler, None) as u16,
            home_id: origin.id,
            home_peer: self.state.number(&origin.node, None),
            hop: origin.hop,
        };
        self.steer.rewrite(&flow, &owner, record.local).map_err(not_steered)?;
        Ok((local, Entry::Rewrite(flow)))
    }

    /// Packets that come by a detour must not come to the address that the client knows: its entry leads there.
    fn end_of_detour(
        &mut self,
        key: &ServedKey,
        record: &ConnRecord,
    ) -> Result<(SocketAddr, Entry), Refusal> {
        let peer = self.state.number(&key.0, None);
        let span = PORTS.end - PORTS.start;
        for attempt in 0..ATTEMPTS {
            let port = PORTS.start + (key.1 as u16).wrapping_add(attempt.wrapping_mul(4099)) % span;
            let entrance = SocketAddr::new(record.local.ip(), port);
            let flow = flow_key(record.client, entrance);
            match self.steer.deliver(&flow, key.1, peer, record.local) {
                Ok(()) => return Ok((entrance, Entry::Deliver(flow))),
                Err(SteerError::Exists) => {}
                Err(e) => return Err(not_steered(e)),
            }
        }
        Err((Reason::TableFull, "no port is free for the detour".into()))
    }

    /// Removes a connection's entry from its steering table.
    pub(crate) fn remove_entry(&mut self, key: &ServedKey) {
        let Some(served) = self.served.get_mut(key) else { return };
        let known_as = flow_key(served.client, served.local);
        let result = match served.entry.take() {
            Some(Entry::Rewrite(flow)) => self.steer.remove_rewrite(&flow, key.1),
            Some(Entry::Deliver(flow)) => self.steer.remove_flow(&flow, key.1),
            None => return,
        };
        if let Err(e) = result {
            log::error!("removing the steering entry of a connection of {}: {e}", key.0);
        }
        if self.by_flow.get(&known_as) == Some(key) {
            self.by_flow.remove(&known_as);
        }
    }
}

fn refused(e: tcp_repair::RepairError) -> Refusal {
    (Reason::RestoreFailed, e.to_string())
}

fn not_steered(e: SteerError) -> Refusal {
    let reason = match e {
        SteerError::Full | SteerError::Exists => Reason::TableFull,
        _ => Reason::RestoreFailed,
    };
    (reason, e.to_string())
}

/// The address to restore on: the listener's own if it has one, else ours of the client's family.
fn specific(listener: IpAddr, client: SocketAddr, addresses: &[IpAddr]) -> Option<IpAddr> {
    let listener = listener.to_canonical();
    let wildcard =
        listener == IpAddr::V4(Ipv4Addr::UNSPECIFIED) || listener == IpAddr::V6(Ipv6Addr::UNSPECIFIED);
    if wildcard {
        addresses.iter().copied().find(|a| a.is_ipv4() == client.is_ipv4())
    } else {
        Some(listener)
    }
}
