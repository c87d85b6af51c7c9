//! Declaring hooks. One line in `hooks.rs` exports the function, proves its signature against libc's and
//! registers the original to be looked up at load.

use std::ffi::CStr;
use std::sync::atomic::{AtomicPtr, Ordering};

/// Functions every supported libc has, declared through redhook. `NAME::real()` is the original.
///
/// redhook looks an original up at the first use; `resolve_all` uses each once, at load. Its catch_unwind
/// repeats the call after a panic: nothing here panics, and releases abort.
macro_rules! hooks {
    ($( fn $name:ident($($arg:ident: $type:ty),*) -> $ret:ty $body:block )*) => {
        $(
            pub(crate) mod $name {
                #[allow(unused_imports, reason = "not every body uses every name")]
                use super::*;

                const _: unsafe extern "C" fn($($type),*) -> $ret = libc::$name;

                redhook::hook! { unsafe fn $name($($arg: $type),*) -> $ret => hooked $body }

                /// The original.
                pub(crate) fn real() -> unsafe extern "C" fn($($type),*) -> $ret {
                    redhook::real!($name)
                }
            }
        )*

        /// Looks all originals up.
        pub(super) fn resolve_mandatory() {
            $( let _ = $name::real(); )*
        }
    };
}

/// Functions that a libc may lack, that libc does not declare, or that are variadic (called with a fixed
/// number of arguments, which the C calling conventions of our platforms allow). `NAME::real()` is the
/// original, if there is one.
macro_rules! optional_hooks {
    ($( fn $name:ident($($arg:ident: $type:ty),*) -> $ret:ty $body:block )*) => {
        $(
            pub(crate) mod $name {
                #[allow(unused_imports, reason = "not every body uses every name")]
                use super::*;

                static REAL: $crate::interpose::Original = $crate::interpose::Original::new();

                #[unsafe(no_mangle)]
                unsafe extern "C" fn $name($($arg: $type),*) -> $ret $body

                /// The original.
                #[allow(dead_code, reason = "some hooks have their own way to do the call")]
                pub(crate) fn real() -> Option<unsafe extern "C" fn($($type),*) -> $ret> {
                    let original = REAL.get();
                    // SAFETY: the address that dlsym gave for this name, and null is None.
                    unsafe { std::mem::transmute(original) }
                }

                pub(super) fn resolve() {
                    REAL.resolve(concat!(stringify!($name), "\0"));
                }
            }
        )*

        /// Looks all originals up.
        pub(super) fn resolve_optional() {
            $( $name::resolve(); )*
        }
    };
}

pub(crate) use {hooks, optional_hooks};

/// Address of an original.
pub(crate) struct Original(AtomicPtr<libc::c_void>);

impl Original {
    pub(crate) const fn new() -> Original {
        Original(AtomicPtr::new(std::ptr::null_mut()))
    }

    /// Null before `resolve`, and where the function does not exist.
    pub(crate) fn get(&self) -> *mut libc::c_void {
        self.0.load(Ordering::Relaxed)
    }

    /// Resolved elsewhere.
    pub(crate) fn set(&self, address: *mut libc::c_void) {
        self.0.store(address, Ordering::Relaxed);
    }

    pub(crate) fn resolve(&self, name: &str) {
        if let Ok(name) = CStr::from_bytes_with_nul(name.as_bytes()) {
            // SAFETY: a C string; dlsym has no other demands.
            let address = unsafe { libc::dlsym(libc::RTLD_NEXT, name.as_ptr()) };
            self.0.store(address, Ordering::Relaxed);
        }
    }
}
