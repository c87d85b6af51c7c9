//! Slot table.
