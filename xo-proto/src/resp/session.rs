//! What the server keeps about a connection and another server would not know.

use super::commands::{Effect, HARMLESS_CLIENT};

/// A command's effect, its arguments looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    None,
    Multi,
    EndMulti,
    Watch,
    Unwatch,
    Select { first: bool },
    Reset,
    State,
}

impl Step {
    /// `count` is the number of arguments, the name included; `first` the one after the name. A command that ends a state
    /// must be written as the server demands: else it fails, and the state stays.
    pub(super) fn of(effect: Effect, count: u32, first: &[u8]) -> Step {
        match effect {
            Effect::None | Effect::Blocks | Effect::Script => Step::None,
            Effect::Multi => Step::Multi,
            Effect::EndMulti if count == 1 => Step::EndMulti,
            Effect::Unwatch if count == 1 => Step::Unwatch,
            Effect::Reset if count == 1 => Step::Reset,
            Effect::EndMulti | Effect::Unwatch | Effect::Reset => Step::None,
            Effect::Watch => Step::Watch,
            Effect::Select => Step::Select { first: count == 2 && first == b"0" },
            Effect::Client if HARMLESS_CLIENT.iter().any(|c| first.eq_ignore_ascii_case(c.as_bytes())) => {
                Step::None
            }
            Effect::Hello if count == 1 || (count == 2 && first == b"2") => Step::None,
            Effect::Client | Effect::Hello | Effect::State => Step::State,
        }
    }
}

/// State of a connection that can end again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Session {
    multi: bool,
    watch: bool,
    /// Another database than the first is selected.
    database: bool,
}

impl Session {
    /// Would something be lost if the connection moved?
    pub(super) fn holds(self) -> bool {
        self.multi || self.watch || self.database
    }

    /// A command has been given to the server.
    pub(super) fn follow(&mut self, step: Step) {
        match step {
            Step::Multi => self.multi = true,
            Step::EndMulti => (self.multi, self.watch) = (false, false),
            Step::Watch => self.watch = true,
            // Within a transaction these only wait for its end.
            Step::Unwatch if self.multi => {}
            Step::Select { first: true } if self.multi => {}
            Step::Unwatch => self.watch = false,
            Step::Select { first } => self.database = !first,
            Step::Reset => *self = Session::default(),
            Step::None | Step::State => {}
        }
    }
}
