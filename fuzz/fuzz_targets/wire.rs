//! Messages of the peer channel and of the library's socket: whatever the bytes claim, decoding allocates no more than
//! its limit; what can be decoded is encoded and decoded to the same again.
//!
//! Input: a byte that says which message, then its bytes (without length prefix for the peer channel's).
#![no_main]

use std::alloc::{GlobalAlloc, Layout, System};
use std::fmt::Debug;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use bincode::{Decode, Encode};
use libfuzzer_sys::{Corpus, fuzz_target};
use xo_proto::frame::{
    FrameError, MAX_LOCAL_MESSAGE, MAX_PEER_MESSAGE, decode_local, decode_peer, encode_local, encode_peer,
};
use xo_proto::ipc::{FromDaemon, ToDaemon};
use xo_proto::wire::PeerMessage;

/// For an error's text.
const ROOM: usize = 4096;

/// Allocated now, and the most since it was set to that.
static NOW: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

struct Counting;

// SAFETY: everything is System's; the counters are beside it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        MOST.fetch_max(NOW.fetch_add(layout.size(), Relaxed) + layout.size(), Relaxed);
        // SAFETY: the caller's promises are System's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        MOST.fetch_max(NOW.fetch_add(layout.size(), Relaxed) + layout.size(), Relaxed);
        // SAFETY: as above. Without it System's way to get zeroed pages for nothing would be lost.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Relaxed);
        // SAFETY: as above.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Runs `decode`; fails when it allocates more than `limit`.
fn within<T>(limit: usize, decode: impl FnOnce() -> T) -> T {
    let before = NOW.load(Relaxed);
    MOST.store(before, Relaxed);
    let result = decode();
    let most = MOST.load(Relaxed) - before;
    assert!(most <= limit + ROOM, "{most} bytes allocated, the limit is {limit}");
    result
}

fn peer(body: &[u8]) {
    let framed = [&(body.len() as u32).to_le_bytes(), body].concat();
    for n in [0, 3, framed.len() - 1] {
        let part = decode_peer::<PeerMessage>(&framed[..n.min(framed.len() - 1)]);
        assert!(matches!(part, Ok(None)), "a part of a message is {part:?}");
    }
    let decoded = within(MAX_PEER_MESSAGE, || decode_peer::<PeerMessage>(&framed));
    match decoded {
        Ok(Some((message, used))) => {
            assert_eq!(used, framed.len());
            let mut again = Vec::new();
            encode_peer(&message, &mut again).expect("as long as it was");
            assert_eq!(again, framed, "{message:?}");
            assert_eq!(decode_peer(&again), Ok(Some((message, used))));
        }
        Ok(None) => panic!("a whole message is taken for a part"),
        Err(e) => assert!(matches!(e, FrameError::Malformed(_)), "{e}"),
    }
    // As a stream with a claimed length of its own.
    let claimed = within(MAX_PEER_MESSAGE, || decode_peer::<PeerMessage>(body));
    if let Some((length, rest)) = body.split_first_chunk::<4>() {
        let length = u32::from_le_bytes(*length) as usize;
        match claimed {
            Ok(Some((_, used))) => assert_eq!(used, length + 4),
            Ok(None) => assert!(length > rest.len() && length <= MAX_PEER_MESSAGE),
            Err(FrameError::TooLong(n, limit)) => assert!(n == length && n > limit),
            Err(FrameError::Malformed(_)) => assert!(length <= rest.len()),
        }
    }
}

fn local<M: Decode<()> + Encode + Debug + PartialEq>(bytes: &[u8]) {
    if let Ok(message) = within(MAX_LOCAL_MESSAGE, || decode_local::<M>(bytes)) {
        let mut buffer = [0; MAX_LOCAL_MESSAGE];
        let n = encode_local(&message, &mut buffer).expect("as long as it was");
        assert_eq!(&buffer[..n], bytes, "{message:?}");
        assert_eq!(decode_local(&buffer[..n]), Ok(message));
    }
}

fuzz_target!(|data: &[u8]| -> Corpus {
    let Some((kind, bytes)) = data.split_first() else { return Corpus::Reject };
    match kind % 3 {
        0 => peer(bytes),
        1 => local::<ToDaemon>(bytes),
        _ => local::<FromDaemon>(bytes),
    }
    Corpus::Keep
});
