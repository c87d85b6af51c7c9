//! Who does the record layer of connections with TLS whose handlers are programs of their own (`exec`, `pool`): the kernel
//! (`ktls.rs`) or XO (`relay.rs`). Either has all that it needs before the connection's host is told that it can be served here.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use mio::Waker;
use serde::Deserialize;
use xo_proto::reason::Reason;
use xo_proto::tls::{Session, TlsState, Version};
use xo_sys::tcp_repair::Repaired;

use crate::config::{Config, HandlerMode};
use crate::engine::{Engine, ServedKey};
use crate::ktls::{Farewell, Kept, KernelTls};
use crate::relay::{Relay, Relayed};

/// Who is to do it (`tls_records`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Records {
    /// The kernel for TLS 1.2, as far as it can; XO for TLS 1.3, where a client may change its key.
    #[default]
    Auto,
    /// The kernel.
    Kernel,
    /// XO.
    Library,
}

/// Who does it here.
pub(crate) struct RecordLayers {
    wanted: Records,
    kernel: KernelTls,
    /// None where nobody needs it.
    pub(crate) relay: Option<Relay>,
}

/// Who will do it for a connection.
pub(crate) enum Choice {
    /// The kernel; plain bytes that wait.
    Kernel(u32),
    /// XO; the same.
    Relay(Box<Session>, u32),
}

/// The record layer of a connection that is served here. Dropped, the connection is cut off, so that its client can tell.
pub(crate) enum Layer {
    /// The kernel's.
    Kernel(Kept),
    /// XO's.
    Relay(Relayed),
}

type Refusal = (Reason, String);

impl RecordLayers {
    /// As the configuration wants it, and this kernel can.
    ///
    /// # Errors
    /// Of starting the thread.
    pub(crate) fn start(config: &Config, engine: &Arc<Waker>) -> io::Result<RecordLayers> {
        let wanted = config.tls_records;
        let kernel = KernelTls::probe(wanted);
        let is_program = |m: &HandlerMode| matches!(m, HandlerMode::Exec { .. } | HandlerMode::Pool { .. });
        let needed = wanted != Records::Kernel && config.handlers.iter().any(|h| is_program(&h.mode));
        let relay = needed.then(|| Relay::start(Arc::clone(engine))).transpose()?;
        Ok(RecordLayers { wanted, kernel, relay })
    }

    /// For `status`.
    pub(crate) fn name(&self) -> &'static str {
        match self.wanted {
            Records::Kernel => "kernel",
            Records::Auto if self.kernel.is_some() => "kernel_tls12",
            Records::Auto | Records::Library => "library",
        }
    }

    /// Is it the kernel, for connections like this one?
    pub(crate) fn is_kernel(&self, tls: &TlsState) -> bool {
        match self.wanted {
            Records::Kernel => true,
            Records::Auto => tls.version == Version::Tls12 && self.kernel.has(tls),
            Records::Library => false,
        }
    }

    /// Who is to do it for a connection; `received` are the records that wait in it.
    ///
    /// # Errors
    /// Why nobody can.
    pub(crate) fn choose(&self, tls: &TlsState, received: &[u8]) -> Result<Choice, String> {
        if self.is_kernel(tls) {
            match self.kernel.takes(tls, received) {
                Err(why) if self.wanted == Records::Kernel => return Err(why),
                // Something waits that no kernel can follow.
                Err(_) => {}
                Ok(waiting) => return Ok(Choice::Kernel(waiting)),
            }
        }
        let mut session = Session::new(tls).map_err(|e| e.to_string())?;
        session.receive(received);
        let waiting = session.data().len() as u32;
        // What waits is received once more, from the socket.
        let session = Session::new(tls).map_err(|e| e.to_string())?;
        Ok(Choice::Relay(Box::new(session), waiting))
    }
}

impl Layer {
    /// `kernel` or `library`.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Layer::Kernel(_) => "kernel",
            Layer::Relay(_) => "library",
        }
    }

    /// Plain bytes that could be read at first.
    pub(crate) fn waiting(&self) -> u32 {
        match self {
            Layer::Kernel(kept) => kept.waiting,
            Layer::Relay(relayed) => relayed.waiting,
        }
    }

    /// What its handler is given instead of its socket, if it is not that.
    pub(crate) fn take_end(&mut self) -> Option<OwnedFd> {
        match self {
            Layer::Kernel(_) => None,
            Layer::Relay(relayed) => relayed.take_end(),
        }
    }

    /// The connection is live, and on its way to its handler.
    pub(crate) fn begin(&mut self) {
        if let Layer::Relay(relayed) = self {
            relayed.begin();
        }
    }

    /// A connection in the kernel's hands cannot be emptied in place.
    pub(crate) fn is_kernel(&self) -> bool {
        matches!(self, Layer::Kernel(_))
    }
}

impl Engine {
    /// Gives a restored connection its record layer.
    ///
    /// # Errors
    /// Why it cannot be had.
    pub(crate) fn give_layer(
        &mut self,
        key: &ServedKey,
        restored: &Repaired,
        choice: Choice,
    ) -> Result<(), Refusal> {
        let served = self.served.get_mut(key).ok_or((Reason::Closed, String::new()))?;
        let tls = served.tls.take().ok_or((Reason::Closed, String::new()))?;
        served.layer = Some(match (choice, &mut self.records.relay) {
            (Choice::Kernel(waiting), _) => Layer::Kernel(Kept::install(restored, &tls, waiting)?),
            (Choice::Relay(session, waiting), Some(relay)) => {
                let relayed = relay.prepare(key, restored, served.client, (session, waiting));
                Layer::Relay(relayed.map_err(|e| (Reason::TargetUnwilling, format!("a socket pair: {e}")))?)
            }
            (Choice::Relay(..), None) => return Err((Reason::TlsUnsupported, "there is no relay".into())),
        });
        Ok(())
    }

    /// A connection's handler has closed it, in good order.
    pub(crate) fn say_goodbye(&mut self, key: &ServedKey) {
        let Some(served) = self.served.get_mut(key) else { return };
        let kept = match served.layer.take() {
            Some(Layer::Relay(relayed)) => return relayed.say_goodbye(),
            Some(Layer::Kernel(kept)) => kept,
            None => return,
        };
        let now = Instant::now();
        let mut farewell = Farewell::of(kept, served.client, now);
        if !farewell.go_on(now) {
            self.farewells.push(farewell);
        }
    }

    /// Every tick.
    pub(crate) fn look_at_farewells(&mut self, now: Instant) {
        self.farewells.retain_mut(|f| !f.go_on(now));
    }
}

#[cfg(test)]
mod tests;
