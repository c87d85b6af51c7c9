//! The programs of the committed object, loaded as the daemon loads them, run on one frame at a time by
//! BPF_PROG_TEST_RUN.

use aya::programs::{TestRun, TestRunOptions, Xdp};
use xo_bpf_abi::{NextHop, PATH_NAMES, XDP_PROGRAM};

use super::super::*;
use super::frame::{NEIGHBOUR, OWN};

/// Where `struct __sk_buff` has its fields (linux/bpf.h).
const SK_BUFF: usize = 192;
const GSO_SEGS: usize = 164;
const GSO_SIZE: usize = 176;

/// Room for what comes out; the kernel takes no frame longer than a page.
const LONGEST: usize = 4096;

/// By which a test run's frame comes in: the loopback.
pub(super) const INGRESS: u32 = 1;

/// A program.
#[derive(Clone, Copy, Debug)]
pub(super) enum Hook {
    /// `xo_ingress`
    Ingress,
    /// `xo_egress`
    Egress,
    /// `xo_xdp`
    Xdp,
}

/// What a program says about a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Verdict {
    /// `TC_ACT_UNSPEC`: to the next program, and on; `XDP_PASS`: up.
    Pass,
    /// `TC_ACT_SHOT`
    Drop,
    /// `TC_ACT_REDIRECT`, `XDP_REDIRECT`
    Redirect,
    /// `XDP_TX`: out by the interface that it came in by.
    Back,
}

/// Loaded programs that are attached to nothing.
pub(super) struct Bench {
    pub(super) steer: Steer,
    has_xdp: bool,
}

impl Bench {
    pub(super) fn new() -> Bench {
        Bench::with(64, 1 << 20)
    }

    pub(super) fn with(max_flows: u32, ring_bytes: u32) -> Bench {
        Bench {
            steer: Steer::load(&[], Sizes { flows: max_flows, ring: ring_bytes }, None)
                .expect("the programs; tests run as root"),
            has_xdp: false,
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
            Hook::Xdp => return self.run_xdp(frame),
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

    /// A frame has come in by [`INGRESS`].
    fn run_xdp(&mut self, frame: &[u8]) -> (Verdict, Vec<u8>) {
        let mut out = vec![0; LONGEST];
        let mut options = TestRunOptions::new();
        options.data_in = Some(frame);
        options.data_out = Some(&mut out);
        let result = self.xdp().test_run(options);
        let result = result.unwrap_or_else(|e| panic!("{} bytes: {}", frame.len(), chain(&e)));
        out.truncate(result.data_size_out as usize);
        let verdict = match result.return_value {
            2 => Verdict::Pass,
            3 => Verdict::Back,
            4 => Verdict::Redirect,
            other => panic!("no verdict of ours: {other}"),
        };
        (verdict, out)
    }

    /// The program for XDP, loaded when it is first wanted.
    pub(super) fn xdp(&mut self) -> &mut Xdp {
        let program = self.steer.programs.program_mut(XDP_PROGRAM).expect("the program");
        let program: &mut Xdp = program.try_into().expect("a program for XDP");
        if !self.has_xdp {
            verified(|| program.load()).expect("the program");
            self.has_xdp = true;
        }
        program
    }

    /// Has the program for XDP know a way to an address.
    pub(super) fn way(&mut self, to: IpAddr, interface: u32, longest: u16, until_ns: u64) {
        self.hop(to, interface, (longest, 1), until_ns);
    }

    /// The same; `back`: is what has come in by it sent back at once?
    pub(super) fn hop(
        &mut self,
        to: IpAddr,
        interface: u32,
        (xdp_longest, xdp_back): (u16, u16),
        until_ns: u64,
    ) {
        let ethernet = [NEIGHBOUR, OWN].concat();
        let ethernet = std::array::from_fn(|i| u16::from_ne_bytes([ethernet[2 * i], ethernet[2 * i + 1]]));
        let (family, address) = (0, [0; 4]);
        let hop = NextHop { until_ns, interface, family, address, xdp_longest, xdp_back, ethernet };
        self.steer.ways.pretend(to, hop);
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

/// A flow redirected as it is when nothing of it is held any more: the mark of a first redirect is gone with a second one.
pub(super) fn redirect_unordered(steer: &mut Steer, key: &FlowKey, flow_id: u64, to: SocketAddr) {
    steer.hold(key, flow_id, 0).expect("an entry");
    for _ in 0..2 {
        steer.redirect(key, flow_id, (0, 1), to).expect("the flip");
    }
}

/// A rewrite entry of hand-off `flow_id`, from its home.
pub(super) fn owner(flow_id: u64) -> RewriteOwner {
    RewriteOwner { flow_id, peer: 0, handler: 0, home_id: flow_id, home_peer: 0, hop: 1 }
}
