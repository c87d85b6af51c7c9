//! How a connection ends: `close_notify` of either side, alerts.

use std::sync::atomic::Ordering;

use libc::c_int;
use xo_proto::tls::{Control, alert};
use xo_sys::{fdpass, raw};

use super::Layer;
use super::common::Direction;
use super::write::push;

impl Layer {
    /// The server closes its last descriptor: `close_notify`, as far as that can be had at once. What the client has sent last
    /// is dropped if it is no data: closing a socket in which something waits resets it.
    pub(crate) fn close(&self, fd: c_int) {
        if !self.common.leave() {
            return;
        }
        self.say_goodbye(fd);
        if let Some(mut incoming) = self.receive.try_lock()
            && self.broken.load(Ordering::Acquire) == 0
            && self.common.claim(Direction::Receive)
        {
            while let Some(Control::Close | Control::Alert) = incoming.control() {
                let dropped = incoming.done();
                if self.drop_records(fd, dropped).is_err() {
                    return;
                }
            }
        }
    }

    /// `close_notify`, once, as far as the kernel takes it at once.
    pub(crate) fn say_goodbye(&self, fd: c_int) {
        self.last_words(fd, false, alert::CLOSE_NOTIFY);
    }

    fn last_words(&self, fd: c_int, fatal: bool, description: u8) {
        if self.broken.load(Ordering::Acquire) != 0 || self.said_goodbye.load(Ordering::Acquire) {
            return;
        }
        if let Some(mut outgoing) = self.send.try_lock()
            && self.common.claim(Direction::Send)
            && outgoing.alert(fatal, description).is_ok()
        {
            self.said_goodbye.store(true, Ordering::Release);
            push(fd, &mut outgoing);
        }
    }

    /// The client has sent what is no TLS of this connection: it is told, and that is the end.
    pub(super) fn give_up(&self, fd: c_int, description: u8) -> i32 {
        self.last_words(fd, true, description);
        // What is left in it would reset it when it is closed, and the client might not see the alert.
        while raw::discard(fd, raw::readable_bytes(fd).max(1)).is_ok_and(|n| n > 0) {}
        log::warn!("a connection's record cannot be read (alert {description}): it ends");
        fdpass::shut(fd);
        self.fail(libc::ECONNRESET)
    }
}
