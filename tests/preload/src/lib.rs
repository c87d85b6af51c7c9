//! A bed of namespaces with real servers under the library, and clients that compare every byte.
//!
//! Each test raises its own bed; dropping it takes everything down, also when the test fails, and then shows what
//! the programs in it had to say.

pub mod bed;
pub mod client;
pub mod content;
pub mod counters;
pub mod ethtool;
pub mod framer;
pub mod gauge;
pub mod hazards;
pub mod hostile;
pub mod kinds;
pub mod load;
pub mod plain;
pub mod pool;
pub mod program;
pub mod random;
pub mod redis;
pub mod servers;
pub mod shards;
pub mod tls;
pub mod tls_programs;
pub mod tls_targets;
pub mod traffic;
pub mod wire;

pub use bed::Bed;
pub use client::{Connection, Response};
