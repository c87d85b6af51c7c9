//! Attaches the program that gives restored sockets the congestion window of their connection (`xo-bpf/src/carry.rs`). It
//! is called for the sockets of a control group: that of the daemon, which makes them.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use aya::Ebpf;
use aya::programs::{CgroupAttachMode, SockOps};

use super::{SteerError, chain, verified};
use xo_bpf_abi::{CARRY_MASK, CARRY_PRIORITY, CARRY_PROGRAM};
use xo_sys::tcp_repair::WINDOW_PRIORITY;

// What the one writes is what the other looks for.
const _: () = assert!(WINDOW_PRIORITY == CARRY_PRIORITY && CARRY_MASK == !(u16::MAX as u32));

/// Loads and attaches it, for as long as the programs live.
pub(super) fn attach(programs: &mut Ebpf) -> Result<(), SteerError> {
    let failed = |e: &dyn std::error::Error| SteerError::Load(chain(e));
    let missing = || SteerError::Load(format!("no program {CARRY_PROGRAM}"));
    let program = programs.program_mut(CARRY_PROGRAM).ok_or_else(missing)?;
    let program: &mut SockOps = program.try_into().map_err(|e| failed(&e))?;
    let group = own_group().and_then(|path| {
        File::open(&path).map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", path.display())))
    });
    let group = group.map_err(|e| SteerError::Load(format!("own control group: {e}")))?;
    verified(|| program.load())?;
    // By a link (5.7), beside which others' programs stay, as those of other daemons do; it takes no flags.
    program.attach(group, CgroupAttachMode::Single).map_err(|e| failed(&e))?;
    Ok(())
}

/// The directory of this process's group in the second version's hierarchy (cgroups(7)).
fn own_group() -> io::Result<PathBuf> {
    let groups = fs::read_to_string("/proc/self/cgroup")?;
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    find(&groups, &mounts).ok_or_else(|| io::Error::other("no hierarchy of version 2 is mounted"))
}

fn find(groups: &str, mounts: &str) -> Option<PathBuf> {
    let path = groups.lines().find_map(|line| line.strip_prefix("0::/"))?;
    mounts.lines().find_map(|line| {
        let (place, kind) = line.split_once(" - ")?;
        let mut fields = place.split(' ').skip(3);
        let (root, point) = (fields.next()?, fields.next()?);
        // What is mounted may be a part of the hierarchy.
        let below = Path::new("/").join(path).strip_prefix(root).ok()?.to_owned();
        (kind.split(' ').next() == Some("cgroup2")).then(|| Path::new(point).join(below))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_own_group_is_found() {
        let mount = |root: &str, point: &str, kind: &str| {
            format!("36 25 0:31 {root} {point} rw,relatime shared:9 - {kind} none rw\n")
        };
        let other = mount("/", "/proc", "proc") + &mount("/", "/sys/fs/cgroup/cpu", "cgroup");
        let unified = mount("/", "/sys/fs/cgroup/unified", "cgroup2");
        for (groups, mounts, expected) in [
            ("0::/\n", other.clone() + &unified, Some("/sys/fs/cgroup/unified")),
            (
                "5:cpu:/a\n0::/system.slice/xo.service\n",
                unified.clone(),
                Some("/sys/fs/cgroup/unified/system.slice/xo.service"),
            ),
            ("0::/a/b\n", mount("/a", "/sys/fs/cgroup", "cgroup2"), Some("/sys/fs/cgroup/b")),
            ("0::/a/b\n", mount("/c", "/sys/fs/cgroup", "cgroup2"), None),
            ("0::/\n", other, None),
            ("5:cpu:/a\n", unified, None),
        ] {
            assert_eq!(find(groups, &mounts), expected.map(PathBuf::from), "{groups}{mounts}");
        }
    }
}
