//! Channels between daemons. A channel is a TCP connection: ordered, nothing lost but its tail, and its two ends learn that
//! it is over each in its own time.

use std::collections::VecDeque;

use super::{Flaw, HandoffIndex, NodeIndex, Place, Ticks, World};
use crate::reason::Reason;

/// What daemons say; see `crate::wire`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "named as in the protocol")]
pub enum Message {
    Hello,
    Ping,
    Pong,
    Begin { handoff: HandoffIndex, start: bool },
    TargetReady { handoff: HandoffIndex, started: bool },
    Refuse { handoff: HandoffIndex, reason: Reason },
    HostReady { handoff: HandoffIndex, hop: u8 },
    Handed { handoff: HandoffIndex },
    Query { handoff: HandoffIndex },
    Abort { handoff: HandoffIndex },
    Closed { handoff: HandoffIndex },
    ClosedAck { handoff: HandoffIndex },
    Moved { first: HandoffIndex, hop: u8, at: Place },
    MovedAck { first: HandoffIndex, hop: u8 },
}

impl Message {
    pub(crate) fn is_about_a_handoff(self) -> bool {
        !matches!(self, Message::Hello | Message::Ping | Message::Pong)
    }
}

/// One end of a channel.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct End {
    /// Whose it is.
    pub node: NodeIndex,
    /// It has not been closed, by its daemon or with it.
    pub open: bool,
    /// The other side's `Hello` has come.
    pub greeted: bool,
    /// On its way here, with its age.
    pub inbox: VecDeque<(Ticks, Message)>,
    /// Nothing arrives for now.
    pub stalled: bool,
    /// The fastest message that arrived here.
    pub fastest: Option<Ticks>,
    /// Age of the probe under way.
    pub probe: Option<Ticks>,
    /// The last probe came back quickly.
    pub proven: bool,
}

/// A connection between two daemons; the first end is the one that dialled.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Channel {
    /// The dialling end, and the other.
    pub ends: [End; 2],
}

impl Channel {
    fn new(dialler: NodeIndex, other: NodeIndex) -> Channel {
        let end = |node| End {
            node,
            open: true,
            greeted: false,
            inbox: VecDeque::from([(0, Message::Hello)]),
            stalled: false,
            fastest: None,
            probe: None,
            proven: false,
        };
        Channel { ends: [end(dialler), end(other)] }
    }

    /// One that has been up for a while.
    pub(crate) fn proven(dialler: NodeIndex, other: NodeIndex) -> Channel {
        let mut channel = Channel::new(dialler, other);
        for end in &mut channel.ends {
            (end.greeted, end.proven, end.fastest) = (true, true, Some(0));
            end.inbox.clear();
        }
        channel
    }

    /// This node's end is closed; what is on its way from there still arrives.
    pub(crate) fn close(&mut self, node: NodeIndex) {
        for end in self.ends.iter_mut().filter(|e| e.node == node) {
            end.open = false;
            end.inbox.clear();
            (end.greeted, end.stalled, end.proven) = (false, false, false);
            (end.probe, end.fastest) = (None, None);
        }
    }

    pub(crate) fn age(&mut self, by: Ticks, stale: Ticks) {
        for end in &mut self.ends {
            for (age, _) in &mut end.inbox {
                *age = stale.min(*age + by);
            }
            end.probe = end.probe.map(|age| stale.min(age + by));
        }
    }

    /// Age of the oldest message that a target must get in time.
    pub(crate) fn slowest(&self) -> Ticks {
        let urgent = |m: &Message| matches!(m, Message::HostReady { .. } | Message::Query { .. });
        let ages = self.ends.iter().flat_map(|e| &e.inbox).filter(|(_, m)| urgent(m)).map(|(age, _)| *age);
        ages.max().unwrap_or(0)
    }

    /// Something is to happen at this end before time goes on.
    pub(crate) fn is_due(&self, end: usize) -> bool {
        let (this, other) = (&self.ends[end], &self.ends[1 - end]);
        this.open && !this.stalled && (!this.inbox.is_empty() || !other.open)
    }
}

impl World {
    /// The newest channel to a node whose `Hello` has come.
    pub(crate) fn connection_to(&self, from: NodeIndex, to: NodeIndex) -> Option<(usize, usize)> {
        self.nodes[from].daemon.as_ref()?;
        let usable = |c: &Channel, i: usize| {
            c.ends[i].node == from && c.ends[1 - i].node == to && c.ends[i].open && c.ends[i].greeted
        };
        (0..self.channels.len()).rev().find_map(|number| {
            let end = (0..2).find(|i| usable(&self.channels[number], *i))?;
            Some((number, end))
        })
    }

    /// Sends by the newest channel, if there is one.
    pub(crate) fn send(&mut self, from: NodeIndex, to: NodeIndex, message: Message) {
        if let Some((channel, end)) = self.connection_to(from, to) {
            self.send_by(channel, end, message);
        }
    }

    fn send_by(&mut self, channel: usize, from: usize, message: Message) {
        let other = &mut self.channels[channel].ends[1 - from];
        if other.open {
            other.inbox.push_back((0, message));
        }
    }

    /// A host wants to speak to a target.
    pub(crate) fn may_dial(&self, from: NodeIndex, to: NodeIndex) -> bool {
        let Some(daemon) = &self.nodes[from].daemon else { return false };
        let is_between = |c: &Channel| c.ends[0].node == from && c.ends[0].open && c.ends[1].node == to;
        // Targets are dialled beforehand where connections move between them; of two, one dials the other.
        let wanted = self.setup.guests && from < to && to >= self.setup.hosts;
        self.nodes[to].daemon.is_some()
            && !daemon.pause.contains_key(&to)
            && !self.channels.iter().any(is_between)
            && (wanted || !self.setup.guests && daemon.hosted.keys().any(|h| self.handoffs[*h].target == to))
    }

    pub(crate) fn dial(&mut self, from: NodeIndex, to: NodeIndex) {
        self.channels.push(Channel::new(from, to));
    }

    /// An end notices that its channel is over.
    pub(crate) fn channel_failed(&mut self, channel: usize, end: usize) {
        let this = &self.channels[channel].ends[end];
        let (node, greeted, peer) = (this.node, this.greeted, self.channels[channel].ends[1 - end].node);
        self.channels[channel].close(node);
        self.drop_dead_channels();
        if end == 0 {
            let pause = self.setup.rules.ticks(self.setup.rules.redial);
            if let Some(daemon) = self.daemon(node) {
                daemon.pause.insert(peer, pause);
            }
        }
        if greeted {
            self.peer_lost(node, peer);
            self.closed_again(node, Some(peer));
        }
    }

    pub(crate) fn drop_dead_channels(&mut self) {
        self.channels.retain(|c| c.ends.iter().any(|e| e.open));
    }

    /// The next thing arrives at an end: a message, or the end of all messages.
    pub(crate) fn deliver(&mut self, channel: usize, end: usize) {
        let this = &mut self.channels[channel].ends[end];
        let Some((age, message)) = this.inbox.pop_front() else { return self.channel_failed(channel, end) };
        let node = this.node;
        let peer = self.channels[channel].ends[1 - end].node;
        match message {
            Message::Hello => self.peer_up(channel, end),
            Message::Ping => {
                self.is_fresh(channel, end, age);
                self.send_by(channel, end, Message::Pong);
            }
            Message::Pong => {
                let sample = self.setup.rules.ticks(self.setup.rules.limits.sample);
                let this = &mut self.channels[channel].ends[end];
                this.proven |= this.probe.take().is_some_and(|age| age <= sample);
            }
            Message::Begin { handoff, start } => {
                let fresh = self.is_fresh(channel, end, age);
                self.on_begin(node, handoff, start, fresh);
            }
            Message::Query { handoff } => {
                let fresh = self.is_fresh(channel, end, age);
                self.on_query(node, handoff, fresh);
            }
            Message::HostReady { handoff, hop } => self.on_host_ready(node, peer, handoff, hop),
            Message::Abort { handoff } => self.on_abort(node, handoff),
            Message::ClosedAck { handoff } => self.on_closed_ack(node, handoff),
            Message::TargetReady { handoff, started } => {
                self.on_target_ready((node, peer), handoff, started, age)
            }
            Message::Refuse { handoff, reason } => self.on_refuse(node, peer, handoff, reason),
            Message::Handed { handoff } => self.on_handed(node, peer, handoff),
            Message::Closed { handoff } => self.on_closed(node, peer, handoff),
            Message::Moved { first, hop, at } => self.on_moved(node, peer, first, hop, at),
            Message::MovedAck { first, hop } => self.on_moved_ack(node, first, hop),
        }
    }

    fn peer_up(&mut self, channel: usize, end: usize) {
        let this = &mut self.channels[channel].ends[end];
        this.greeted = true;
        let node = this.node;
        let peer = self.channels[channel].ends[1 - end].node;
        if end == 0 {
            self.channels[channel].ends[0].probe = Some(0);
            self.send_by(channel, end, Message::Ping);
        }
        self.tell_gone(node, peer);
        self.peer_back(node, peer);
    }

    /// As `xo_proto::fresh`, but that no sample grows old.
    fn is_fresh(&mut self, channel: usize, end: usize, age: Ticks) -> bool {
        let limit = self.setup.rules.ticks(self.setup.rules.limits.fresh);
        let by_channel = self.is_flawed(Flaw::SamplesByChannel);
        let peer = self.channels[channel].ends[1 - end].node;
        let this = &mut self.channels[channel].ends[end];
        let (node, own) = (this.node, this.fastest);
        if by_channel {
            this.fastest = Some(own.map_or(age, |f| f.min(age)));
        }
        let Some(daemon) = self.daemon(node) else { return false };
        let shared = daemon.fastest.get(&peer).copied();
        daemon.fastest.insert(peer, shared.map_or(age, |f| f.min(age)));
        let fastest = if by_channel { own } else { shared };
        fastest.is_some_and(|f| age.saturating_sub(f) <= limit)
    }
}
