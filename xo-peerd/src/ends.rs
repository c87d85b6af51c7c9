//! How the end of a connection that is served here is noticed: nobody says when the kernel has forgotten it.

use std::time::{Duration, Instant};

use xo_proto::handoff::{TargetEvent, TargetState};

use crate::acceptor::Place;
use crate::engine::{Engine, ServedKey};
use crate::target::Served;

/// First and longest pause between two looks whether the kernel has forgotten a closed connection.
const FIRST_LOOK: Duration = Duration::from_millis(10);
const LONGEST_LOOK: Duration = Duration::from_secs(1);

impl Served {
    /// A connection from elsewhere that a handler has.
    pub(crate) fn is_guest(&self) -> bool {
        self.state() == TargetState::Served && !self.origin.here && !self.over
    }

    /// Looks from now on whether the kernel still knows it: nobody will say when it is closed.
    pub(crate) fn watch(&mut self) {
        self.ending = Some((Instant::now(), LONGEST_LOOK));
    }
}

impl Engine {
    /// Starts to look whether the kernel has forgotten the connection.
    pub(crate) fn expect_end(&mut self, key: &ServedKey) {
        if let Some(served) = self.served.get_mut(key) {
            served.over = true;
            served.ending.get_or_insert_with(|| (Instant::now(), FIRST_LOOK));
        }
    }

    /// Every tick: connections whose handler has closed them, and those that are closing.
    pub(crate) fn look_for_ends(&mut self, now: Instant) {
        self.reap_children();
        let over = self.abandoned.extract_if(.., |place| place.closed(&self.libraries)).collect::<Vec<_>>();
        over.into_iter().for_each(|place| place.free(&mut self.libraries));
        let mut gone = Vec::new();
        for (key, served) in &mut self.served {
            if served.state() != TargetState::Served || served.origin.here {
                continue;
            }
            if served.place.closed(&self.libraries) {
                // The process has room for another one.
                std::mem::replace(&mut served.place, Place::None).free(&mut self.libraries);
                served.over = true;
                served.ending.get_or_insert((now, FIRST_LOOK));
            }
            let Some((when, pause)) = served.ending else { continue };
            if now < when {
                continue;
            }
            match self.diag.state(served.local, served.client) {
                Ok(None) => gone.push(key.clone()),
                Ok(Some(_)) => served.ending = Some((now + pause, (pause * 2).min(LONGEST_LOOK))),
                Err(e) => {
                    log::error!("sock_diag: {e}");
                    served.ending = Some((now + LONGEST_LOOK, LONGEST_LOOK));
                }
            }
        }
        for key in gone {
            self.ended(&key);
        }
    }

    /// Now and then: connections whose end nobody reported.
    pub(crate) fn sweep_served(&mut self, now: Instant) {
        self.closed_again(None);
        for served in self.served.values_mut() {
            if served.state() == TargetState::Served
                && !served.origin.here
                && served.ending.is_none()
                && matches!(self.diag.state(served.local, served.client), Ok(None))
            {
                served.ending = Some((now, FIRST_LOOK));
            }
        }
    }

    fn ended(&mut self, key: &ServedKey) {
        if let Some(served) = self.served.get_mut(key) {
            let place: Place = std::mem::replace(&mut served.place, Place::None);
            place.free(&mut self.libraries);
            served.layer = None;
        }
        self.target_event(key, &TargetEvent::SocketGone);
    }
}
