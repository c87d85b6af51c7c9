//! The programs of the committed object, loaded as the daemon loads them, run on one frame at a time by
//! BPF_PROG_TEST_RUN.

use aya::programs::{TestRun, TestRunOptions};
use xo_bpf_abi::PATH_NAMES;

use super::super::*;

/// Where `struct __sk_buff` has its fields (linux/bpf.h).
const SK_BUFF: usize = 192;
const GSO_SEGS: usize = 164;
const GSO_SIZE: usize = 176;

/// Room for what comes out; the kernel takes no frame longer than a page.
const LONGEST: usize = 4096;

/// A program.
#[derive(Clone, Copy, Debug)]
pub(super) enum Hook {
    /// `xo_ingress`
    Ingress,
    /// `xo_egress`
    Egress,
}

/// What a program says about a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Verdict {
    /// `TC_ACT_UNSPEC`: to the next program, and on.
    Pass,
    /// `TC_ACT_SHOT`
    Drop,
    /// `TC_ACT_REDIRECT`
    Redirect,
}

/// Loaded programs that are attached to nothing.
pub(super) struct Bench {
    pub(super) steer: Steer,
}

impl Bench {
    pub(super) fn new() -> Bench {
        Bench::with(64, 1 << 20)
    }

    pub(super) fn with(max_flows: u32, ring_bytes: u32) -> Bench {
        Bench {
            steer: Steer::load(&[], Sizes { flows: max_flows, ring: ring_bytes }, None)
                .expect("the programs; tests run as root"),
        }
    }

    /// Runs a program on a frame; its verdict, and the frame as it left it.
    pub(super) fn run(&mut self, hook: Hook, frame: &[u8]) -> (Verdict, Vec<u8>) {
        self.run_aggregate(hook, frame, 0)
    }

    /// The same for an aggregate of segments with this much payload.
    pub(super) fn run_aggregate(&mut self, hook: Hook, frame: &[u8], gso_size: u32) -> (Verdict, Vec<u8>) {
        let name = match hook {
            Hook::Ingress => INGRESS_PROGRAM,
            Hook::Egress => EGRESS_PROGRAM,
        };
        let mut context = [0; SK_BUFF];
        if gso_size > 0 {
            let segments = (frame.len() as u32).div_ceil(gso_size);
            context[GSO_SEGS..GSO_SEGS + 4].copy_from_slice(&segments.to_ne_bytes());
            context[GSO_SIZE..GSO_SIZE + 4].copy_from_slice(&gso_size.to_ne_bytes());
        }
        let mut out = vec![0; LONGEST];
        let mut options = TestRunOptions::new();
        options.data_in = Some(frame);
        options.data_out = Some(&mut out);
        options.ctx_in = Some(&context);
        let program = classifier(&mut self.steer.programs, name).expect("the program");
        let result =
            program.test_run(options).unwrap_or_else(|e| panic!("{} bytes: {}", frame.len(), chain(&e)));
        out.truncate(result.data_size_out as usize);
        let verdict = match result.return_value.cast_signed() {
            -1 => Verdict::Pass,
            2 => Verdict::Drop,
            7 => Verdict::Redirect,
            other => panic!("no verdict of ours: {other}"),
        };
        (verdict, out)
    }

    pub(super) fn paths(&self) -> Vec<(&'static str, u64)> {
        paths(&self.steer)
    }

    pub(super) fn held(&mut self) -> Vec<(HeldHeader, Vec<u8>)> {
        held(&mut self.steer)
    }
}

/// Counters that are not zero, by name.
pub(super) fn paths(steer: &Steer) -> Vec<(&'static str, u64)> {
    PATH_NAMES.into_iter().zip(steer.counters()).filter(|(_, n)| *n > 0).collect()
}

/// What the ring holds.
pub(super) fn held(steer: &mut Steer) -> Vec<(HeldHeader, Vec<u8>)> {
    let mut held = Vec::new();
    steer.drain_held(&mut |header, packet| held.push((*header, packet.to_vec())));
    held
}

/// A rewrite entry of hand-off `flow_id`, from its home.
pub(super) fn owner(flow_id: u64) -> RewriteOwner {
    RewriteOwner { flow_id, peer: 0, handler: 0, home_id: flow_id, home_peer: 0, hop: 1 }
}
