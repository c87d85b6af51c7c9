//! Now and then: redirects that nobody speaks for any more.

use std::time::Duration;

use xo_bpf_abi::{FLAG_CLIENT_FIN, FLAG_CLIENT_RST};
use xo_proto::handoff::HostEvent;
use xo_proto::wire::HandoffId;

use super::HostFlow;
use crate::clock::now_ns;
use crate::engine::Engine;

/// A target is asked about a connection that its client has closed so long ago.
const ASK_AFTER: Duration = Duration::from_secs(5);
/// A redirect whose client has closed and which has been idle for this long has lost its target.
const ORPHAN_AFTER: Duration = Duration::from_secs(180);
/// So has one that has been idle for this long while the target's daemon cannot be reached.
const AWAY_AFTER: Duration = Duration::from_secs(1800);

impl Engine {
    /// Looks at all redirects.
    pub(crate) fn sweep_hosted(&mut self) {
        let now = now_ns();
        let news = self.hosted.iter().filter_map(|(id, flow)| Some((*id, self.news_of(*id, flow, now)?)));
        let news: Vec<_> = news.collect();
        for (id, event) in news {
            self.host_event(id, event);
        }
    }

    /// What has to be assumed, or asked, about a redirect. Daemons that died in the middle of a move may have left nobody who
    /// says by himself that a connection is over.
    fn news_of(&self, id: HandoffId, flow: &HostFlow, now: u64) -> Option<HostEvent> {
        // What a rule takes is not seen; a flow that ends has none.
        if !flow.is_away() || self.flower.has(id) {
            return None;
        }
        // No entry: the client has used its port for a new connection.
        let Some(entry) = self.steer.flow(&flow.key) else { return Some(HostEvent::Closed) };
        let idle = Duration::from_nanos(now.saturating_sub(entry.last_ns)).min(flow.since.elapsed());
        let closed = entry.flags & (FLAG_CLIENT_FIN | FLAG_CLIENT_RST) != 0;
        let away = self.connection_to(&flow.target).is_none();
        if closed && idle > ORPHAN_AFTER || away && idle > AWAY_AFTER {
            return Some(HostEvent::Closed);
        }
        // The target answers as it does when the channel has been away.
        (closed && idle > ASK_AFTER).then_some(HostEvent::PeerBack)
    }
}
