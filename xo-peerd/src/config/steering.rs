//! `[steering]`: where programs run, sizes of tables, and which flows get a rule of tc-flower.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use toml::Spanned;
use xo_proto::worth::Worth;

use super::{ConfigError, Fail, default_pins};

/// Longest queue of flow rules.
const MAX_FLOWER_QUEUE: u32 = 1 << 20;
/// How packets are steered.
#[derive(Clone, Debug)]
pub(crate) struct Steering {
    /// Where packets are steered.
    pub(crate) mode: SteeringMode,
    /// Entries in the flow table, and in the rewrite table.
    pub(crate) max_flows: u32,
    /// Room for held packets, bytes; a power of two.
    pub(crate) hold_bytes: u32,
    /// Where programs and maps are pinned, to outlive the daemon; `None`: they end with it.
    pub(crate) pin_directory: Option<PathBuf>,
    /// Who carries out flow rules.
    pub(crate) flower: FlowerMode,
    /// Rules that may wait to be put in.
    pub(crate) flower_queue: usize,
    /// Flows that get a rule.
    pub(crate) flower_after: Worth,
}

/// Where packets are steered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum SteeringMode {
    /// By the programs at tc.
    #[default]
    Tc,
    /// Plain segments of redirected flows by XDP before that.
    Xdp,
}

/// Who carries out flow rules (tc-flower).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum FlowerMode {
    /// The NIC.
    #[default]
    Hardware,
    /// The kernel: for tests.
    Software,
    /// Nobody: there are none.
    Off,
}

impl Default for Steering {
    fn default() -> Self {
        Steering {
            mode: SteeringMode::default(),
            max_flows: 65_536,
            hold_bytes: 4 << 20,
            pin_directory: None,
            flower: FlowerMode::default(),
            flower_queue: 1024,
            flower_after: Worth::Bytes(2 << 20),
        }
    }
}

/// The section of the file.
#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub(super) struct FileSteering {
    mode: Option<SteeringMode>,
    max_flows: Option<Spanned<u32>>,
    hold_bytes: Option<Spanned<u32>>,
    pin_directory: Option<Spanned<PathBuf>>,
    flower: Option<FlowerMode>,
    flower_queue: Option<Spanned<u32>>,
    flower_after: Option<Spanned<String>>,
}

impl FileSteering {
    pub(super) fn checked(self, node: &str, fail: Fail<'_>) -> Result<Steering, ConfigError> {
        let mut steering = Steering { pin_directory: default_pins(node), ..Steering::default() };
        steering.mode = self.mode.unwrap_or_default();
        if let Some(directory) = self.pin_directory {
            let at = directory.span().start;
            steering.pin_directory = match directory.into_inner() {
                none if none == Path::new("none") => None,
                path if path.starts_with("/sys/fs/bpf/") => Some(path),
                path => {
                    let message = format!("pin_directory {}: \"none\", or below /sys/fs/bpf", path.display());
                    return Err(fail(at, message));
                }
            };
        }
        if let Some(n) = self.max_flows {
            if *n.get_ref() == 0 {
                return Err(fail(n.span().start, "max_flows is at least 1".into()));
            }
            steering.max_flows = n.into_inner();
        }
        if let Some(n) = self.hold_bytes {
            if !n.get_ref().is_power_of_two() || *n.get_ref() < 1 << 17 {
                return Err(fail(n.span().start, "hold_bytes is a power of two, at least 131072".into()));
            }
            steering.hold_bytes = n.into_inner();
        }
        steering.flower = self.flower.unwrap_or_default();
        if let Some(n) = self.flower_queue {
            if !(1..=MAX_FLOWER_QUEUE).contains(n.get_ref()) {
                return Err(fail(n.span().start, format!("flower_queue is 1 to {MAX_FLOWER_QUEUE}")));
            }
            steering.flower_queue = n.into_inner() as usize;
        }
        if let Some(text) = self.flower_after {
            steering.flower_after = Worth::parse(text.get_ref())
                .map_err(|e| fail(text.span().start, format!("flower_after is {e}")))?;
        }
        Ok(steering)
    }
}
