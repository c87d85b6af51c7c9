//! The fast path by XDP (`xo-bpf/src/xdp.rs`): attached at the driver where that can do it, else in the kernel's generic way,
//! before the ingress program in both cases.
//!
//! A driver must say that it sends what XDP programs send by it: a virtual interface whose peer does not poll loses such frames
//! without a word. Where one of the interfaces cannot do it, all use the generic way, which every device has. Interfaces that
//! are not of Ethernet, or that carry VLANs (a NIC takes the tag out of a frame, and the program could not know), are left to tc.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use aya::Ebpf;
use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::xdp::{XdpLink, XdpLinkId};
use aya::programs::{ProgramError, Xdp, XdpMode};
use xo_flower::{Channel, Link};
use xo_sys::netdev::XdpFeatures;
use xo_sys::route::Way;

use super::pin::Pins;
use super::{Steer, SteerError, chain, verified};
use xo_bpf_abi::{NextHop, XDP_PROGRAM};

/// Linux's list of VLANs and the interfaces that carry them; of the calling thread's network namespace.
const VLANS: &str = "/proc/thread-self/net/vlan/config";
/// Until the kernel has done what it does in the background.
const PATIENCE: Duration = Duration::from_secs(2);

/// Where a program runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Driver,
    Generic,
}

impl Place {
    /// As `status` has it, and the end of a pinned link's name.
    fn mode(self) -> &'static str {
        match self {
            Place::Driver => "xdp-native",
            Place::Generic => "xdp-generic",
        }
    }
}

/// What the XDP program is told of a way.
pub(super) struct Fast {
    channel: Channel,
    /// In the generic way every device sends.
    features: Option<XdpFeatures>,
}

impl Fast {
    /// Fills in what the fast path must know. It stays as it is where the kernel does not know the neighbour (yet), or the
    /// device is not one that XDP programs send by.
    pub(super) fn complete(&mut self, hop: &mut NextHop, way: Way) {
        match self.find(way) {
            Ok(Some((neighbour, link))) => {
                hop.xdp_longest = u16::try_from(link.mtu).unwrap_or(u16::MAX);
                // A veth does not wake its peer then, unless that has a program of its own (`veth_xdp_flush`).
                hop.xdp_back = u16::from(!link.is_veth);
                hop.ethernet = addresses(neighbour, link.ethernet);
            }
            Ok(None) => {}
            Err(e) => log::debug!("the way of XDP to {}: {e}", way.neighbour),
        }
    }

    fn find(&mut self, way: Way) -> Result<Option<([u8; 6], Link)>, xo_flower::Error> {
        if let Some(features) = &mut self.features
            && !features.can_send(way.interface)?
        {
            return Ok(None);
        }
        let Some(link) = self.channel.link(way.interface)? else { return Ok(None) };
        // What XDP sends the kernel does not see: without this it would never ask whether the neighbour is there still.
        let neighbour = self.channel.use_neighbour(way.interface, way.neighbour)?;
        Ok(neighbour.map(|neighbour| (neighbour, link)))
    }
}

fn addresses(neighbour: [u8; 6], own: [u8; 6]) -> [u16; 6] {
    let mut words = [0; 6];
    let bytes = neighbour.as_chunks::<2>().0.iter().chain(own.as_chunks::<2>().0);
    for (word, bytes) in words.iter_mut().zip(bytes) {
        *word = u16::from_ne_bytes(*bytes);
    }
    words
}

impl Steer {
    /// Loads the fast path and attaches it; says so once if that is not done as it could be. Where it cannot be at all, tc
    /// steers alone.
    pub(crate) fn attach_xdp(&mut self, interfaces: &[String]) {
        match self.try_xdp(interfaces) {
            Ok(Some(place)) => self.mode = place.mode(),
            Ok(None) => log::warn!("steering.mode = \"xdp\": no interface for it: tc steers alone"),
            Err(e) => {
                log::warn!("steering.mode = \"xdp\": {e}: tc steers alone");
                // It may be attached to some of the interfaces.
                if let Ok(program) = program(&mut self.programs) {
                    let _ = program.unload();
                }
                self.detach_xdp();
            }
        }
    }

    /// Takes an earlier daemon's fast path away.
    pub(crate) fn detach_xdp(&mut self) {
        if let Some(pins) = &self.pins
            && let Err(e) = pins.forget_xdp(None)
        {
            log::error!("removing the pinned XDP links: {e}");
        }
    }

    fn try_xdp(&mut self, interfaces: &[String]) -> Result<Option<Place>, SteerError> {
        let mut channel = Channel::open().map_err(|e| SteerError::Load(format!("netlink: {e}")))?;
        let interfaces = fit(interfaces, &mut channel);
        if interfaces.is_empty() {
            return Ok(None);
        }
        let program = program(&mut self.programs)?;
        let mut attachment = Attachment { program, pins: self.pins.as_ref(), interfaces };
        let (place, features) = match attachment.native() {
            Ok(features) => (Place::Driver, Some(features)),
            Err(e) => {
                log::warn!("{e}: XDP is used in the kernel's generic way");
                attachment.generic()?;
                (Place::Generic, None)
            }
        };
        self.ways.tell_xdp(Fast { channel, features });
        Ok(Some(place))
    }
}

fn program(programs: &mut Ebpf) -> Result<&mut Xdp, SteerError> {
    let program = programs.program_mut(XDP_PROGRAM);
    let program = program.ok_or_else(|| SteerError::Load(format!("no program {XDP_PROGRAM}")))?;
    program.try_into().map_err(|e| SteerError::Load(chain(&e)))
}

/// Those of the interfaces that are for XDP, with their numbers.
fn fit(interfaces: &[String], channel: &mut Channel) -> Vec<(u32, String)> {
    let vlans = fs::read_to_string(VLANS).unwrap_or_default();
    let mut fit = Vec::new();
    for name in interfaces {
        let Ok(number) = index(name) else { continue };
        let why = if carries_vlans(&vlans, name) {
            "it carries VLANs"
        } else if !matches!(channel.link(number), Ok(Some(_))) {
            "it is not of Ethernet"
        } else {
            fit.push((number, name.clone()));
            continue;
        };
        log::warn!("interface {name} is not for XDP: {why}");
    }
    fit
}

/// `eth0.5  | 5  | eth0`, a line for each VLAN.
fn carries_vlans(vlans: &str, interface: &str) -> bool {
    vlans.lines().any(|line| line.split('|').nth(2).is_some_and(|carrier| carrier.trim() == interface))
}

fn index(name: &str) -> io::Result<u32> {
    let name = std::ffi::CString::new(name)?;
    // SAFETY: a C string.
    match unsafe { libc::if_nametoindex(name.as_ptr()) } {
        0 => Err(io::Error::last_os_error()),
        number => Ok(number),
    }
}

/// The program on its way to the interfaces.
struct Attachment<'p> {
    program: &'p mut Xdp,
    pins: Option<&'p Pins>,
    interfaces: Vec<(u32, String)>,
}

impl Attachment<'_> {
    /// At all drivers, which all must be able to send.
    fn native(&mut self) -> Result<XdpFeatures, SteerError> {
        let mut features = XdpFeatures::open().map_err(|e| {
            SteerError::Load(format!("what drivers do with XDP, the kernel does not tell: {e}"))
        })?;
        let fresh = self.attach(Place::Driver)?;
        // Asked now: some drivers can only with a program attached.
        for (number, name) in &self.interfaces {
            if !features.can_send(*number).map_err(|e| refused(name, &e))? {
                let why = "its driver does not send what XDP programs want sent".into();
                return Err(SteerError::Attach(name.clone(), why));
            }
        }
        self.pin(fresh)?;
        Ok(features)
    }

    fn generic(&mut self) -> Result<(), SteerError> {
        // Its links go with it; it may not have been loaded.
        let _ = self.program.unload();
        let fresh = self.attach(Place::Generic)?;
        self.pin(fresh)
    }

    /// Attaches the program to all interfaces, in the place of an earlier daemon's where there is one; the links that are to be
    /// pinned yet. Links of the other kind go first: a device has one kind at a time.
    fn attach(&mut self, place: Place) -> Result<Vec<(XdpLinkId, PathBuf)>, SteerError> {
        verified(|| self.program.load())?;
        let forgotten = self.pins.map_or(Ok(false), |pins| pins.forget_xdp(Some(place.mode())));
        let forgotten = forgotten.map_err(|e| SteerError::Load(format!("earlier links of XDP: {e}")))?;
        let mut fresh = Vec::new();
        for (number, name) in &self.interfaces {
            let path = self.pins.map(|pins| pins.map(&format!("link-{name}-{}", place.mode())));
            if let Some(path) = &path
                && take_over(self.program, path).map_err(|e| refused(name, &e))?
            {
                continue;
            }
            let id = attach(self.program, *number, place, forgotten).map_err(|e| refused(name, &e))?;
            fresh.extend(path.map(|path| (id, path)));
        }
        Ok(fresh)
    }

    fn pin(&mut self, links: Vec<(XdpLinkId, PathBuf)>) -> Result<(), SteerError> {
        for (id, path) in links {
            let link = self.program.take_link(id).map_err(|e| SteerError::Load(chain(&e)))?;
            FdLink::try_from(link)
                .map(|link| link.pin(&path))
                .map_err(|e| SteerError::Load(chain(&e)))?
                .map_err(|e| SteerError::Load(format!("{}: {}", path.display(), chain(&e))))?;
        }
        Ok(())
    }
}

fn refused(interface: &str, e: &dyn std::error::Error) -> SteerError {
    SteerError::Attach(interface.to_owned(), chain(e))
}

/// Puts the program in the place of an earlier daemon's, in one step; `false`: there is none, or its interface is gone.
fn take_over(program: &mut Xdp, path: &Path) -> io::Result<bool> {
    let Ok(old) = PinnedLink::from_pin(path) else { return Ok(false) };
    match XdpLink::try_from(FdLink::from(old)).map(|old| program.attach_to_link(old)) {
        Ok(Ok(_)) => return Ok(true),
        Ok(Err(e)) => log::debug!("{}: {}", path.display(), chain(&e)),
        Err(e) => log::debug!("{}: {}", path.display(), chain(&e)),
    }
    fs::remove_file(path)?;
    Ok(false)
}

/// The kernel detaches a forgotten link some time after its file has gone.
fn attach(program: &mut Xdp, number: u32, place: Place, patient: bool) -> Result<XdpLinkId, ProgramError> {
    let mode = if place == Place::Driver { XdpMode::Driver } else { XdpMode::Skb };
    let end = Instant::now() + PATIENCE;
    loop {
        let result = program.attach_to_if_index(number, mode);
        if result.is_ok() || !patient || Instant::now() > end {
            return result;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_that_carries_vlans_is_known() {
        let vlans = "VLAN Dev name    | VLAN ID\nName-Type: VLAN_NAME_TYPE_RAW_PLUS_VID_NO_PAD\n\
                     eth0.5         | 5  | eth0\nlong.17        | 17  | enp3s0f0np0\n";
        for (interface, expected) in
            [("eth0", true), ("enp3s0f0np0", true), ("eth0.5", false), ("eth", false), ("eth1", false)]
        {
            assert_eq!(carries_vlans(vlans, interface), expected, "{interface}");
        }
        assert!(!carries_vlans("", "eth0"));
    }

    #[test]
    fn addresses_are_in_the_order_of_a_frame() {
        let words = addresses([1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]);
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
        assert_eq!(bytes, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]);
    }
}
