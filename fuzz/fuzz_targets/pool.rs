//! What a pool's worker says, packet by packet, and what the daemon makes of it.
//!
//! Input: packets between NUL bytes; an empty one: the worker is given a connection.
#![no_main]

use libfuzzer_sys::fuzz_target;
use xo_proto::pool::{Book, FromWorker, MAX_CAPACITY, Said, decode, encode};

fuzz_target!(|data: &[u8]| {
    let mut book = Book::default();
    let (mut given, mut done) = (0, 0);
    for packet in data.split(|b| *b == 0) {
        if packet.is_empty() {
            given += 1;
            book.give(given, given);
            continue;
        }
        let Ok(message) = decode::<FromWorker>(packet) else { continue };
        assert_eq!(decode(&encode(&message)), Ok(message.clone()));
        let greeted = book.is_greeted();
        match book.on(&message) {
            Ok(Said::Hello) => assert!(!greeted),
            Ok(Said::Capacity) => assert!(greeted),
            Ok(Said::Done(number)) => {
                assert_eq!(message, FromWorker::Done { connection: number });
                done += 1;
            }
            Err(e) => assert!(!e.to_string().is_empty()),
        }
        assert!(book.capacity() <= MAX_CAPACITY && (greeted <= book.is_greeted()));
        assert_eq!(u64::from(book.connections()), given - done);
    }
    assert_eq!(book.into_given().len() as u64, given - done);
});
