//! The small servers in `programs/`.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Bed;

/// Compiles them into the bed's directory: the servers, and a library with a constructor.
///
/// # Panics
/// When the compiler does not like them.
#[must_use]
pub fn compile(bed: &Bed) -> (PathBuf, PathBuf) {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("programs");
    let (program, early) = (bed.directory().join("hazards"), bed.directory().join("libearly.so"));
    let gcc = |arguments: &[&str], files: &[&str], to: &Path| {
        let mut command = Command::new("gcc");
        command.args(["-Wall", "-Wextra", "-Werror", "-O1", "-pthread"]).args(arguments).arg("-o").arg(to);
        let output = command.args(files.iter().map(|f| sources.join(f))).output().expect("gcc");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    gcc(&[], &["common.c", "process.c", "reading.c", "pending.c"], &program);
    gcc(&["-shared", "-fPIC"], &["early.c"], &early);
    (program, early)
}
