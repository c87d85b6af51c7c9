//! Objects: what a path holds follows from its name, so a client knows every byte.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// Sizes of the objects, by name, bytes.
pub const SIZES: [(&str, usize); 6] =
    [("0", 0), ("1", 1), ("1k", 1 << 10), ("64k", 64 << 10), ("1m", 1 << 20), ("20m", 20 << 20)];

/// Directories of the objects: rules send the first elsewhere, the second stays.
pub const DIRECTORIES: [&str; 2] = ["img", "loc"];

/// The bytes of the object or upload with this name.
#[must_use]
pub fn of(name: &str, size: usize) -> Vec<u8> {
    // splitmix64: different for each name, and no period that could hide a shift.
    let mut state = name
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325, |h: u64, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
    let mut bytes = Vec::with_capacity(size + 8);
    while bytes.len() < size {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bytes.extend_from_slice(&(z ^ (z >> 31)).to_le_bytes());
    }
    bytes.truncate(size);
    bytes
}

/// Size of the object at a path like `/img/64k`.
#[must_use]
pub fn size_of(path: &str) -> Option<usize> {
    let name = path.rsplit('/').next()?;
    SIZES.iter().find(|(n, _)| *n == name).map(|(_, size)| *size)
}

/// Writes all objects below `root`, and empty directories `up` and `put` that anyone may write to.
///
/// # Panics
/// When a file cannot be written.
pub fn write_all(root: &Path) {
    for directory in DIRECTORIES {
        fs::create_dir_all(root.join(directory)).expect("a directory");
        for (name, size) in SIZES {
            let path = format!("/{directory}/{name}");
            fs::write(root.join(&path[1..]), of(&path, size)).expect("an object");
        }
    }
    for directory in ["up", "put"] {
        let directory = root.join(directory);
        fs::create_dir_all(&directory).expect("a directory");
        fs::set_permissions(directory, fs::Permissions::from_mode(0o777)).expect("its mode");
    }
}
