//! OpenSSL's public functions, of the copy that the server uses. Nothing of its private layout is known here.
//!
//! libssl may come late and out of the global scope's sight (Python loads it with its `_ssl` module), so it is looked for when one of
//! its functions is first called: what comes after us in the global scope, else the loaded object of that name.

use std::ffi::{CStr, c_char, c_int, c_long, c_uchar, c_uint, c_ulong, c_void};

use once_cell::race::OnceBox;

/// The first version with the callbacks and the behaviour that is relied upon.
const LEAST_VERSION: c_ulong = 0x3000_0000;
/// Versions from here on are not known.
const TOO_NEW: c_ulong = 0x4000_0000;

/// `SSL`, `SSL_CTX`, `SSL_CIPHER`, `BIO`.
pub(super) type Object = *mut c_void;
pub(super) type Keylog = Option<unsafe extern "C" fn(ssl: Object, line: *const c_char)>;

/// Declares [`Functions`] and how they are looked up: all, or it is not an OpenSSL that we know.
macro_rules! functions {
    ($( fn $name:ident($($type:ty),*) $(-> $ret:ty)?; )*) => {
        /// Functions of libssl and libcrypto.
        #[allow(non_snake_case, reason = "as in OpenSSL")]
        pub(super) struct Functions {
            $( pub(super) $name: unsafe extern "C" fn($($type),*) $(-> $ret)?, )*
        }

        impl Functions {
            fn of(handle: Handle) -> Option<Functions> {
                Some(Functions {
                    // SAFETY: the function of that name in OpenSSL's public headers.
                    $( $name: unsafe {
                        std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($type),*) $(-> $ret)?>(
                            handle.symbol(concat!(stringify!($name), "\0"))?
                        )
                    }, )*
                })
            }
        }
    };
}

functions! {
    fn OpenSSL_version_num() -> c_ulong;
    fn CRYPTO_get_ex_new_index(c_int, c_long, *mut c_void, *mut c_void, *mut c_void, *mut c_void) -> c_int;
    fn BIO_ctrl(Object, c_int, c_long, *mut c_void) -> c_long;
    fn BIO_read(Object, *mut c_void, c_int) -> c_int;
    fn BIO_test_flags(Object, c_int) -> c_int;
    fn BIO_write(Object, *const c_void, c_int) -> c_int;
    fn ERR_pop_to_mark() -> c_int;
    fn ERR_set_mark() -> c_int;
    fn SSL_CIPHER_find(Object, *const c_uchar) -> Object;
    fn SSL_CIPHER_get_protocol_id(Object) -> u16;
    fn SSL_CTX_get_ex_data(Object, c_int) -> *mut c_void;
    fn SSL_CTX_get_keylog_callback(Object) -> Keylog;
    fn SSL_CTX_set_ex_data(Object, c_int, *mut c_void) -> c_int;
    fn SSL_CTX_set_keylog_callback(Object, Keylog);
    fn SSL_SESSION_get_max_fragment_length(Object) -> u8;
    fn SSL_get0_alpn_selected(Object, *mut *const c_uchar, *mut c_uint);
    fn SSL_get_SSL_CTX(Object) -> Object;
    fn SSL_get_client_random(Object, *mut c_uchar, usize) -> usize;
    fn SSL_get_current_cipher(Object) -> Object;
    fn SSL_get_early_data_status(Object) -> c_int;
    fn SSL_get_ex_data(Object, c_int) -> *mut c_void;
    fn SSL_get_rbio(Object) -> Object;
    fn SSL_get_rfd(Object) -> c_int;
    fn SSL_get_server_random(Object, *mut c_uchar, usize) -> usize;
    fn SSL_get_session(Object) -> Object;
    fn SSL_get_servername(Object, c_int) -> *const c_char;
    fn SSL_get_verify_mode(Object) -> c_int;
    fn SSL_get_wbio(Object) -> Object;
    fn SSL_is_init_finished(Object) -> c_int;
    fn SSL_set_ex_data(Object, c_int, *mut c_void) -> c_int;
    fn SSL_version(Object) -> c_int;
}

/// OpenSSL as it is used here, in a version that is known.
pub(super) struct OpenSsl {
    pub(super) call: Functions,
    /// Index of our word in an SSL object: its connection.
    pub(super) ssl_index: c_int,
    /// Index of our word in a context: the server's own keylog callback.
    pub(super) context_index: c_int,
}

static OPENSSL: OnceBox<Option<OpenSsl>> = OnceBox::new();

/// The server's OpenSSL; `None` when it is none that is known. Asked when one of its functions is called: so it is loaded.
#[inline]
pub(super) fn get() -> Option<&'static OpenSsl> {
    OPENSSL.get_or_init(|| Box::new(look())).as_ref()
}

#[cold]
fn look() -> Option<OpenSsl> {
    /// `CRYPTO_EX_INDEX_SSL` and `CRYPTO_EX_INDEX_SSL_CTX` (crypto.h).
    const SSL: c_int = 0;
    const CONTEXT: c_int = 1;
    let call = Functions::of(Handle(libc::RTLD_NEXT)).or_else(|| Functions::of(loaded()?))?;
    // SAFETY: no arguments, cannot fail.
    let version = unsafe { (call.OpenSSL_version_num)() };
    if !(LEAST_VERSION..TOO_NEW).contains(&version) {
        log::warn!("OpenSSL {version:#x} is not known: connections with TLS stay here");
        return None;
    }
    let null = std::ptr::null_mut();
    // SAFETY: no callbacks; the answer is a number.
    let index = |class| unsafe { (call.CRYPTO_get_ex_new_index)(class, 0, null, null, null, null) };
    let (ssl_index, context_index) = (index(SSL), index(CONTEXT));
    (ssl_index >= 0 && context_index >= 0).then_some(OpenSsl { call, ssl_index, context_index })
}

/// Address of a function that the server has called, in its own libssl. Null: there is none.
#[cold]
pub(super) fn original(name: &str) -> *mut c_void {
    let next = Handle(libc::RTLD_NEXT).symbol(name);
    next.or_else(|| loaded()?.symbol(name)).unwrap_or(std::ptr::null_mut())
}

/// Of dlopen.
#[derive(Clone, Copy)]
struct Handle(*mut c_void);

impl Handle {
    fn symbol(self, name: &str) -> Option<*mut c_void> {
        let name = CStr::from_bytes_with_nul(name.as_bytes()).ok()?;
        // SAFETY: a handle that stays open, a C string.
        let address = unsafe { libc::dlsym(self.0, name.as_ptr()) };
        (!address.is_null()).then_some(address)
    }
}

/// The loaded libssl, wherever it comes from; its file's name may have been decorated.
fn loaded() -> Option<Handle> {
    unsafe extern "C" fn each(info: *mut libc::dl_phdr_info, _: usize, found: *mut c_void) -> c_int {
        // SAFETY: the loader's own structure, and the pointer that is given below.
        let (info, found) = unsafe { (&*info, &mut *found.cast::<Option<Handle>>()) };
        if info.dlpi_name.is_null() {
            return 0;
        }
        // SAFETY: the loader's C string.
        let name = unsafe { CStr::from_ptr(info.dlpi_name) };
        let file = name.to_bytes().rsplit(|b| *b == b'/').next().unwrap_or_default();
        if file.starts_with(b"libssl") && file.windows(3).any(|w| w == b".so") {
            // SAFETY: a C string; the object is there, nothing is loaded.
            let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_LAZY | libc::RTLD_NOLOAD) };
            if !handle.is_null() {
                *found = Some(Handle(handle));
                return 1;
            }
        }
        0
    }
    let mut found: Option<Handle> = None;
    // SAFETY: the function above, and a place for its result that lives through the call.
    unsafe { libc::dl_iterate_phdr(Some(each), (&raw mut found).cast()) };
    found
}
