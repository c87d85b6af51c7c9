//! The policy file: read at start, watched, read again when it changes. A broken one leaves the old policy in force.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use serde_json::{Value, json};
use xo_proto::board::MAX_POLICY;
use xo_proto::policy::Policy;

use crate::config::ConfigError;
use crate::engine::Engine;

/// How often the file is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Tells a file's contents from what they were, without reading them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    inode: (u64, u64),
    modified: (i64, i64),
    length: u64,
}

impl Stamp {
    fn of(path: &Path) -> Option<Stamp> {
        let about = fs::metadata(path).ok()?;
        Some(Stamp {
            inode: (about.dev(), about.ino()),
            modified: (about.mtime(), about.mtime_nsec()),
            length: about.len(),
        })
    }
}

/// A policy file that has been read, and found right.
#[derive(Clone, Debug)]
pub(crate) struct Loaded {
    path: PathBuf,
    /// Of before it was read: what is written meanwhile is a change.
    stamp: Option<Stamp>,
    text: String,
    /// What it says.
    pub(crate) policy: Policy,
}

impl Loaded {
    /// Reads a policy file and checks it.
    ///
    /// # Errors
    /// With file, line and column.
    pub(crate) fn read(path: &Path) -> Result<Loaded, ConfigError> {
        let fail = |e: &dyn std::fmt::Display| ConfigError::new(format!("{}:{e}", path.display()));
        let stamp = Stamp::of(path);
        let text =
            fs::read_to_string(path).map_err(|e| ConfigError::new(format!("{}: {e}", path.display())))?;
        if text.len() > MAX_POLICY {
            return Err(fail(&format_args!("1:1: longer than {MAX_POLICY} bytes")));
        }
        let policy = Policy::parse(&text).map_err(|e| fail(&e))?;
        Ok(Loaded { path: path.to_owned(), stamp, text, policy })
    }
}

/// The policy file of a running daemon.
pub(crate) struct PolicyFile {
    loaded: Loaded,
    loaded_at: SystemTime,
    /// What has been judged, right or wrong.
    judged: Option<Stamp>,
    /// It has changed, and is left alone until it is the same twice: it may be half written.
    changing: Option<Option<Stamp>>,
    looked: Instant,
    errors: u64,
    /// What is wrong with the file as it is now.
    error: Option<String>,
}

impl PolicyFile {
    /// As it was read at start.
    pub(crate) fn new(loaded: Loaded) -> PolicyFile {
        PolicyFile {
            judged: loaded.stamp,
            loaded,
            loaded_at: SystemTime::now(),
            changing: None,
            looked: Instant::now(),
            errors: 0,
            error: None,
        }
    }

    /// Has the file changed, and come to rest?
    fn is_due(&mut self, now: Instant) -> bool {
        if self.changing.is_none() && now.duration_since(self.looked) < LOOK_EVERY {
            return false;
        }
        self.looked = now;
        let stamp = Stamp::of(&self.loaded.path);
        if stamp == self.judged {
            self.changing = None;
            return false;
        }
        self.changing.replace(stamp) == Some(stamp)
    }

    /// Reads it again. `true`: there is a new policy.
    fn read(&mut self) -> Result<bool, String> {
        self.changing = None;
        self.judged = Stamp::of(&self.loaded.path);
        match Loaded::read(&self.loaded.path) {
            Ok(loaded) => {
                self.judged = loaded.stamp;
                self.error = None;
                let is_new = loaded.text != self.loaded.text;
                if is_new {
                    self.loaded = loaded;
                    self.loaded_at = SystemTime::now();
                }
                Ok(is_new)
            }
            Err(e) => {
                self.errors += 1;
                let text = e.to_string();
                self.error = Some(text.clone());
                Err(text)
            }
        }
    }
}

/// The policy, for `status`.
#[derive(Clone, Debug, Default)]
pub(crate) struct PolicyView {
    /// How many this daemon has had; 0: it has none.
    pub(crate) epoch: u32,
    /// Since when the one in force is, seconds since 1970.
    pub(crate) loaded_at: u64,
    /// How often the file was found broken.
    pub(crate) errors: u64,
    /// What is wrong with it now.
    pub(crate) error: Option<String>,
}

impl Engine {
    /// At start: libraries and dials get the policy.
    pub(crate) fn publish_policy(&mut self) {
        if let Some(file) = &self.policy {
            self.targets.set_policy(&file.loaded.text, &file.loaded.policy);
        }
    }

    /// Every tick.
    pub(crate) fn look_at_policy(&mut self, now: Instant) {
        if self.policy.as_mut().is_some_and(|file| file.is_due(now)) {
            let _ = self.reload_policy();
        }
    }

    /// SIGHUP.
    pub(crate) fn reload_now(&mut self) {
        if self.policy.is_none() {
            log::warn!("SIGHUP: there is no `policy` in the configuration to read again");
        }
        let _ = self.reload_policy();
    }

    /// Reads the file again; a new policy is in force when this returns.
    fn reload_policy(&mut self) -> Result<bool, String> {
        let Some(file) = &mut self.policy else { return Err("no `policy` in the configuration".into()) };
        let path = file.loaded.path.display().to_string();
        match file.read() {
            Ok(true) => {
                self.publish_policy();
                self.dial_targets();
                log::info!("{path}: policy {} is in force", self.targets.policy_epoch());
                Ok(true)
            }
            Ok(false) => Ok(false),
            Err(e) => {
                log::error!("{e}; the policy before stays in force");
                Err(e)
            }
        }
    }

    /// `xo-peerd reload`.
    pub(crate) fn reload_answer(&mut self) -> Value {
        match self.reload_policy() {
            Ok(changed) => json!({"policy_epoch": self.targets.policy_epoch(), "changed": changed}),
            Err(error) => json!({"error": error}),
        }
    }

    /// For `status`.
    pub(crate) fn policy_view(&self) -> PolicyView {
        let Some(file) = &self.policy else { return PolicyView::default() };
        let since = file.loaded_at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        PolicyView {
            epoch: self.targets.policy_epoch(),
            loaded_at: since.as_secs(),
            errors: file.errors,
            error: file.error.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_is_read_once_it_has_come_to_rest() {
        let path = std::env::temp_dir().join(format!("xo-policy-{}", std::process::id()));
        fs::write(&path, "listen = [80]\n").expect("written");
        let mut file = PolicyFile::new(Loaded::read(&path).expect("a policy"));
        let mut now = Instant::now();
        let mut later = |by: u64| {
            now += Duration::from_millis(by);
            now
        };
        assert!(!file.is_due(later(1100)), "nothing has changed");
        fs::write(&path, "listen = [80, 81]\n").expect("written");
        assert!(!file.is_due(later(50)), "not looked at yet");
        assert!(!file.is_due(later(1000)), "changed just now");
        fs::write(&path, "listen = [80, 81, 82]\n").expect("written");
        assert!(!file.is_due(later(50)), "and again");
        assert!(file.is_due(later(50)));
        assert_eq!((file.read(), file.loaded.policy.listen.len()), (Ok(true), 3));
        assert!(!file.is_due(later(1100)));
        assert_eq!(file.read(), Ok(false), "the same");
        fs::write(&path, "listen = [80]\nx = 1\n").expect("written");
        assert!(!file.is_due(later(1100)) && file.is_due(later(50)));
        let error = file.read().expect_err("broken");
        assert!(error.starts_with(&format!("{}:2:1: unknown field", path.display())), "{error}");
        assert!(!file.is_due(later(1100)), "said once");
        assert_eq!((file.errors, file.loaded.policy.listen.len()), (1, 3), "the old one stays");
        fs::remove_file(&path).expect("removed");
        assert!(!file.is_due(later(1100)) && file.is_due(later(50)));
        assert!(file.read().is_err() && file.errors == 2 && !file.is_due(later(1100)));
        fs::write(&path, "x".repeat(MAX_POLICY + 1)).expect("written");
        let error = Loaded::read(&path).expect_err("too long").to_string();
        assert!(error.ends_with(":1:1: longer than 262144 bytes"), "{error}");
        fs::remove_file(&path).expect("removed");
    }
}
