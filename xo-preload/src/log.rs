//! Log lines: off by default, one `write` to descriptor 2 each, from a buffer on the stack.

use std::fmt::Write;

use log::{LevelFilter, Log, Metadata, Record};
use xo_sys::raw;

struct Stderr;

static LOGGER: Stderr = Stderr;

/// Sets the level named by `XO_LOG`; anything else means off.
pub(crate) fn start(level: &str) {
    let level = level.parse().unwrap_or(LevelFilter::Off);
    if log::set_logger(&LOGGER).is_ok() {
        log::set_max_level(level);
    }
}

/// Says something at load whatever `XO_LOG` says: a broken policy must not go unnoticed.
pub(crate) fn complain(text: std::fmt::Arguments<'_>) {
    let mut line = Line::default();
    let _ = writeln!(line, "xo: {text}");
    line.emit();
}

impl Log for Stderr {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let mut line = Line::default();
        let _ = writeln!(line, "xo: {}: {}", record.level().as_str().to_ascii_lowercase(), record.args());
        line.emit();
    }

    fn flush(&self) {}
}

/// A line that is cut where the buffer ends.
struct Line {
    bytes: [u8; 512],
    len: usize,
}

impl Default for Line {
    fn default() -> Self {
        Line { bytes: [0; 512], len: 0 }
    }
}

impl Line {
    fn emit(&self) {
        raw::write(2, self.bytes.get(..self.len).unwrap_or_default());
    }
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        for (to, from) in self.bytes.iter_mut().skip(self.len).zip(text.bytes()) {
            *to = from;
            self.len += 1;
        }
        Ok(())
    }
}
