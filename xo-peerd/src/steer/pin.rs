//! Maps and links pinned in the BPF file system: packets of moved connections go their way while no daemon runs, and a
//! restarted one finds its flows again.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::tc::TcAttachOptions;
use aya::programs::{LinkOrder, SchedClassifier, TcAttachType};

/// Version of the maps' layout; another one's flows cannot be taken over.
const LAYOUT: u32 = 6;
/// `statfs` type of the BPF file system (linux/magic.h).
const BPF_FS_MAGIC: i64 = 0xcafe_4a11;
const BPF_FS: &str = "/sys/fs/bpf";

/// Sizes of the maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sizes {
    /// Entries of the flow table, and of the rewrite table.
    pub(crate) flows: u32,
    /// Bytes of the ring of held packets.
    pub(crate) ring: u32,
}

/// The directory of one daemon.
#[derive(Debug)]
pub(crate) struct Pins {
    base: PathBuf,
    directory: PathBuf,
    sizes: Sizes,
}

impl Pins {
    /// Opens the directory, or makes it. An earlier daemon's maps keep their sizes.
    pub(crate) fn open(base: &Path, wanted: Sizes) -> io::Result<Pins> {
        mount_bpf_fs()?;
        fs::create_dir_all(base)?;
        let mut sizes = wanted;
        for entry in fs::read_dir(base)? {
            let entry = entry?;
            match parse(&entry.file_name().to_string_lossy()) {
                Some(found) => sizes = found,
                // Another version's: its entries would be misread.
                None => remove(&entry.path())?,
            }
        }
        if sizes != wanted {
            log::warn!("tables keep their sizes while connections are redirected by them: {sizes:?}");
        }
        let directory = base.join(format!("v{LAYOUT}-{}-{}", sizes.flows, sizes.ring));
        fs::create_dir_all(&directory)?;
        Ok(Pins { base: base.to_owned(), directory, sizes })
    }

    /// Sizes of the maps that are there, or are to be made.
    pub(crate) fn sizes(&self) -> Sizes {
        self.sizes
    }

    /// Where a map is pinned.
    pub(crate) fn map(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Attaches a program to an interface by TCX, in the place of an earlier daemon's if there is one, and pins the link.
    pub(crate) fn attach(
        &self,
        program: &mut SchedClassifier,
        interface: &str,
        hook: TcAttachType,
    ) -> Result<(), Box<dyn std::error::Error>> {
        let way = if hook == TcAttachType::Ingress { "ingress" } else { "egress" };
        let path = self.directory.join(format!("link-{interface}-{way}"));
        if let Ok(old) = PinnedLink::from_pin(&path) {
            // One step: there is no moment without a program.
            match program.attach_to_link(FdLink::from(old).try_into()?) {
                Ok(_) => return Ok(()),
                // The interface that it was attached to is gone.
                Err(e) => log::debug!("{}: {e}", path.display()),
            }
            fs::remove_file(&path)?;
        }
        let first = TcAttachOptions::TcxOrder(LinkOrder::first());
        let id = program.attach_with_options(interface, hook, first)?;
        FdLink::try_from(program.take_link(id)?)?.pin(&path)?;
        Ok(())
    }

    /// Removes the pins of XDP programs, but for those that are attached in the mode `but`; were there any?
    pub(super) fn forget_xdp(&self, but: Option<&str>) -> io::Result<bool> {
        let mut any = false;
        for entry in fs::read_dir(&self.directory)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let is_xdp = name.starts_with("link-") && name.contains("-xdp-");
            if is_xdp && but.is_none_or(|mode| !name.ends_with(mode)) {
                fs::remove_file(entry.path())?;
                any = true;
            }
        }
        Ok(any)
    }

    /// Removes everything: the programs are detached, the maps forgotten when this process closes them.
    pub(crate) fn clear(&self) -> io::Result<()> {
        remove(&self.base)
    }
}

fn parse(name: &str) -> Option<Sizes> {
    let mut parts = name.strip_prefix(&format!("v{LAYOUT}-"))?.split('-').map(|n| n.parse().ok());
    let sizes = Sizes { flows: parts.next()??, ring: parts.next()?? };
    parts.next().is_none().then_some(sizes)
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// systemd mounts it; a container may not have it.
fn mount_bpf_fs() -> io::Result<()> {
    let path = CString::new(Path::new(BPF_FS).as_os_str().as_bytes())?;
    // SAFETY: an all-zero statfs is valid, and the kernel writes it.
    let mut about: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: a C string, and a structure that may be written.
    if unsafe { libc::statfs(path.as_ptr(), &raw mut about) } == 0 && about.f_type == BPF_FS_MAGIC {
        return Ok(());
    }
    let kind = c"bpf".as_ptr();
    // SAFETY: C strings; no data.
    let result = unsafe { libc::mount(kind, path.as_ptr(), kind, 0, std::ptr::null()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_layout_is_taken_over() {
        let ours = |rest: &str| parse(&format!("v{LAYOUT}-{rest}"));
        assert_eq!(ours("100-131072"), Some(Sizes { flows: 100, ring: 131_072 }));
        assert_eq!(parse(&format!("v{}-100-131072", LAYOUT - 1)), None);
        for rest in ["100", "a-b", "1-2-3"] {
            assert_eq!(ours(rest), None, "{rest}");
        }
        assert_eq!(parse("other"), None);
    }
}
