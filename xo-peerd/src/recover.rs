//! From one daemon's life to the next: flows that the kernel went on steering are found in the pinned maps.

use std::rc::Rc;
use std::time::{Duration, Instant};

use xo_bpf_abi::{Action, FlowEntry, FlowKey, RewriteEntry};
use xo_proto::handoff::{
    GuestEvent, Host, HostEvent, HostState, LIMITS, ShortcutEvent, Target, TargetEvent, TargetState,
};
use xo_proto::reason::Reason;
use xo_proto::wire::{HandoffId, PeerMessage, Refuse};
use xo_sys::tcp_repair::Ends;

use crate::engine::{Engine, ServedKey};
use crate::host::{HostFlow, RESTART_PATIENCE};
use crate::onward::{Origin, PATIENCE as DETOUR_PATIENCE};
use crate::restore::Entry;
use crate::steer;
use crate::target::Served;
use crate::timers::Timer;

/// How long a stopping daemon waits for hand-offs that are under way.
const STOP_PATIENCE: Duration = Duration::from_secs(1);

impl Engine {
    /// Takes over what an earlier daemon has left in the maps.
    pub(crate) fn recover(&mut self) {
        for (key, entry) in self.steer.all_rewrites() {
            self.recover_served(key, &entry);
        }
        let is_detour = |(_, e): &(FlowKey, FlowEntry)| e.action == Action::Deliver as u32;
        let (ends, flows): (Vec<_>, Vec<_>) = self.steer.all_flows().into_iter().partition(is_detour);
        for (key, entry) in flows {
            self.recover_hosted(key, &entry);
        }
        for (key, entry) in ends {
            self.recover_returned(key, &entry);
        }
        // What the ring holds for redirected flows.
        self.drain_held();
        if !self.hosted.is_empty() || !self.served.is_empty() || !self.gone.is_empty() {
            log::info!(
                "found {} connections offloaded from here and {} served here, {} that ended meanwhile",
                self.hosted.len(),
                self.served.len(),
                self.gone.len()
            );
        }
    }

    fn recover_hosted(&mut self, key: FlowKey, entry: &FlowEntry) {
        let Some(target) = self.state.named(entry.peer).cloned() else {
            log::error!("a flow entry of an unknown target: removed");
            let _ = self.steer.remove_flow(&key, entry.flow_id);
            return;
        };
        // With an address, what was held is on its way there: the target may rely on it.
        let redirected = entry.action == Action::Redirect as u32 || entry.to_port != 0;
        let ends = Ends {
            client: steer::address(key.remote, key.remote_port),
            local: steer::address(key.local, key.local_port),
            v6_socket: false,
        };
        let mut flow = HostFlow::new(Host::recovered(redirected), ends, target.name.clone(), target.address);
        flow.hop = entry.hop.into();
        if let Some((guest, served)) = self.by_flow.get(&key).and_then(|k| Some((k, self.served.get(k)?))) {
            flow.of_guest(guest.clone(), served.origin.next(target.address), served.host);
            if redirected {
                let guest = guest.clone();
                self.target_event(&guest, &TargetEvent::Guest(GuestEvent::Left));
            }
        }
        // Its library, if it is still there, brings the socket. The target knows whether it serves it.
        flow.unseen = true;
        let mut patience = LIMITS.doubt;
        if redirected {
            let to = steer::address(entry.to_addr, entry.to_port);
            flow.to = Some(to);
            patience = RESTART_PATIENCE;
            let hop = entry.hop.into();
            if entry.action == Action::Hold as u32
                && let Err(e) = self.steer.redirect(&key, entry.flow_id, (entry.peer, hop), to)
            {
                log::error!("redirecting {}: {e}", flow.client);
            }
        }
        self.at(Instant::now() + patience, Timer::HostDoubt(entry.flow_id));
        self.hosted.insert(entry.flow_id, Box::new(flow));
        if let Some(address) = target.address {
            self.want(&target.name, address);
        }
    }

    /// The socket of a connection that was found has been shown, or never will be: asks for what was put off.
    pub(crate) fn seen(&mut self, id: HandoffId) {
        let connected = self.connection_of(id).is_some();
        let Some(flow) = self.hosted.get_mut(&id) else { return };
        (flow.unseen, flow.questions) = (false, 0);
        let again = std::mem::take(&mut flow.put_off) && connected;
        if flow.state() == HostState::Doubt {
            self.at(Instant::now() + LIMITS.doubt, Timer::HostDoubt(id));
        }
        if again {
            self.host_event(id, HostEvent::PeerBack);
        }
    }

    /// The target's word on a connection whose socket the library may still show: not yet.
    pub(crate) fn puts_off(&mut self, id: HandoffId) -> bool {
        let Some(flow) = self.hosted.get_mut(&id).filter(|f| f.unseen) else { return false };
        flow.put_off = true;
        if flow.state() == HostState::Doubt {
            self.at(Instant::now() + LIMITS.answer, Timer::HostDoubt(id));
        }
        true
    }

    /// Is the library still waited for? Meanwhile the target is asked again and again, so that it does not give up what it
    /// has started.
    pub(crate) fn waits_for_library(&mut self, id: HandoffId) -> bool {
        let Some(flow) = self.hosted.get_mut(&id).filter(|f| f.unseen) else { return false };
        let left = RESTART_PATIENCE.saturating_sub(flow.since.elapsed());
        let redirected = flow.to.is_some();
        if left.is_zero() {
            if redirected {
                self.seen(id);
            }
            return redirected;
        }
        let again = flow.put_off && !redirected;
        if again {
            (flow.put_off, flow.questions) = (false, 0);
        }
        self.at(Instant::now() + left, Timer::HostDoubt(id));
        if again {
            self.host_event(id, HostEvent::PeerBack);
        }
        true
    }

    fn recover_served(&mut self, key: FlowKey, entry: &RewriteEntry) {
        let name = |number: u32| self.state.named(number).map(|n| n.name.clone());
        let names = (name(entry.peer), name(entry.home_peer), name(entry.handler.into()));
        let (Some(from), Some(home), Some(handler)) = names else {
            log::error!("a rewrite entry of an unknown host: removed");
            let _ = self.steer.remove_rewrite(&key, entry.flow_id);
            return;
        };
        let (client, local) =
            (steer::address(key.remote, key.remote_port), steer::address(key.local, key.local_port));
        let served_key: ServedKey = (Rc::from(from.as_str()), entry.flow_id);
        let origin = Origin::recovered(&home, entry.home_id, entry.hop, false);
        // It may not have been noted yet.
        let redirected = |e: FlowEntry| e.action == Action::Redirect as u32;
        let has_left = entry.left != 0 || self.steer.flow(&key).is_some_and(redirected);
        // A look-up that fails says nothing: the connection is watched like one that is there.
        if !has_left && matches!(self.diag.state(local, client), Ok(None)) {
            // It was in repair mode, or has ended meanwhile. Its entry goes when its host has been told.
            let place = Entry::Rewrite(key);
            if origin.is_detour() {
                self.gone.push((origin.name(), place, entry.flow_id));
            }
            self.gone.push((served_key, place, entry.flow_id));
            return;
        }
        let public = steer::address(entry.from_addr, entry.from_port);
        let machine = if has_left {
            Target::recovered_left(self.steer.flow(&key).is_some())
        } else {
            Target::recovered()
        };
        let mut served = Served::new(machine, origin, &handler, client, public);
        served.local = local;
        served.entrance = local;
        served.entry = Some(Entry::Rewrite(key));
        // Its home is told when it is connected.
        served.shortcut.on(ShortcutEvent::Confirmed);
        served.counted = true;
        served.watch();
        self.by_flow.insert(key, served_key.clone());
        self.insert_served(served_key.clone(), served);
        self.forget_served(&served_key);
    }

    /// The end of the detour of a connection that has come home, or that was about to.
    fn recover_returned(&mut self, key: FlowKey, entry: &FlowEntry) {
        let Some(from) = self.state.named(entry.peer).cloned() else {
            log::error!("a detour from an unknown machine: removed");
            let _ = self.steer.remove_flow(&key, entry.flow_id);
            return;
        };
        let client = steer::address(key.remote, key.remote_port);
        let entrance = steer::address(key.local, key.local_port);
        let public = steer::address(entry.to_addr, entry.to_port);
        let served_key: ServedKey = (Rc::from(from.name.as_str()), entry.flow_id);
        let waits = entry.hop != 0;
        let its = self.steer.flow(&steer::flow_key(client, public)).filter(|_| waits);
        let away = its.and_then(|e| {
            let flow = self.hosted.get(&e.flow_id).filter(|f| f.is_away())?;
            Some((e.flow_id, flow.hop))
        });
        if away.is_some() && matches!(self.diag.state(public, client), Ok(None)) {
            return self.gone.push((served_key, Entry::Deliver(key), entry.flow_id));
        }
        let (id, hop) = away.unwrap_or((0, 1));
        let origin = Origin::recovered(&self.config.node, id, hop + 1, true);
        let mut served = Served::new(Target::recovered(), origin, "", client, public);
        served.entrance = entrance;
        served.entry = Some(Entry::Deliver(key));
        if away.is_none() {
            self.note_home(&key, &served_key);
            served.counted = true;
            served.shortcut.on(ShortcutEvent::Confirmed);
            served.shortcut.on(ShortcutEvent::MovedAck);
            self.at(Instant::now() + DETOUR_PATIENCE, Timer::Detour(served_key.clone()));
        }
        self.insert_served(served_key, served);
    }

    /// A host is connected again: connections that ended while there was no daemon here are not its any more.
    pub(crate) fn tell_gone(&mut self, node: &str) {
        let its = self.gone.extract_if(.., |((host, _), ..)| **host == *node).collect::<Vec<_>>();
        for ((host, id), place, owner) in its {
            let refuse = Refuse { id, reason: Reason::PeerLost, detail: "ended meanwhile".into() };
            if let Some(index) = self.connection_to(&host) {
                self.send_to(index, &PeerMessage::Refuse(refuse));
            }
            let removed = match place {
                Entry::Rewrite(key) => self.steer.remove_rewrite(&key, owner),
                Entry::Deliver(key) => self.steer.remove_flow(&key, owner),
            };
            if let Err(e) = removed {
                log::error!("removing a steering entry: {e}");
            }
        }
    }

    /// SIGTERM or SIGINT: hand-offs under way are finished; the second time, at once.
    pub(crate) fn begin_stop(&mut self) {
        if self.stop_by.is_some() {
            self.stop_by = Some(Instant::now());
            return;
        }
        self.stop_by = Some(Instant::now() + STOP_PATIENCE);
    }

    /// No new hand-offs.
    pub(crate) fn is_stopping(&self) -> bool {
        self.stop_by.is_some()
    }

    /// Is it time to go?
    pub(crate) fn may_stop(&self) -> bool {
        // Asked in each turn of the loop: connections are looked through only while there is something to wait for.
        let Some(stop_by) = self.stop_by else { return false };
        if Instant::now() >= stop_by {
            return true;
        }
        let settled = [HostState::Redirected, HostState::Offloaded, HostState::Released];
        let under_way = self.hosted.values().any(|f| !settled.contains(&f.state()))
            || self.served.values().any(|s| {
                use TargetState as S;
                !matches!(s.state(), S::Served | S::Left | S::Closing | S::Done)
            });
        !under_way
    }

    /// The last thing: what the kernel goes on doing stays, if there is something; else nothing stays.
    pub(crate) fn leave(&mut self) {
        self.leave_pools();
        let (hosted, served) = (self.hosted.len(), self.served.len() + self.gone.len());
        if hosted + served == 0 {
            self.flower.close(false);
            self.steer.unpin();
            self.state.remove();
        } else if self.steer.is_pinned() {
            self.flower.close(true);
            log::info!(
                "{hosted} connections offloaded from here and {served} served here go on; the next xo-peerd finds them"
            );
        } else {
            self.flower.close(false);
            log::warn!(
                "{hosted} connections offloaded from here and {served} served here end: steering is not pinned"
            );
            self.state.remove();
        }
    }
}
