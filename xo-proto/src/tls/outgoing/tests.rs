use super::*;
use crate::tls::Opener;
use crate::tls::tests::all;

/// All that the records in `wire` hold, which must be those of `state` from the first on.
fn opened(suite: Suite, state: &Direction, wire: &[u8]) -> (Vec<u8>, u64) {
    let mut opener = Opener::new(suite, state.clone());
    let (mut data, mut rest) = (Vec::new(), wire.to_vec());
    while let Some(header) = crate::tls::Header::parse(&rest) {
        let mut record: Vec<u8> = rest.drain(..header.total()).collect();
        let record = opener.open(&mut record).expect("the next record");
        match record.content {
            Content::Data => data.extend_from_slice(record.data),
            Content::Handshake => opener.update().expect("TLS 1.3"),
            _ => {}
        }
    }
    assert_eq!(rest.len(), 0);
    (data, opener.state().seq)
}

/// A kernel that takes what it likes, and a server that writes as servers do: what has not been taken, it writes again.
#[test]
fn a_writer_that_tries_again_sends_every_byte_once() {
    for state in all() {
        let suite = state.suite().expect("a suite");
        let data: Vec<u8> = (0..50_000_u32).map(|i| (i * 7 / 3) as u8).collect();
        for (most, takes) in [(50_000, 1_000), (20_000, 16_500), (700, 333), (3, 1), (40_000, 100_000)] {
            let data = if most == 3 { &data[..300] } else { &data[..] };
            let mut outgoing = state.outgoing().expect("a suite");
            let (mut wire, mut written) = (Vec::new(), 0);
            while written < data.len() {
                let wanted = &data[written..data.len().min(written + most)];
                let mut told = outgoing.told(wanted.len());
                if told == 0 {
                    if outgoing.pending().is_empty() {
                        outgoing.data(wanted).expect("sealed");
                    }
                    let n = takes.min(outgoing.pending().len());
                    wire.extend_from_slice(&outgoing.pending()[..n]);
                    outgoing.taken(n);
                    told = outgoing.told(wanted.len());
                }
                written += told;
                // What it has been told is on the wire.
                if outgoing.state().is_some() {
                    assert_eq!(opened(suite, &state.sent, &wire).0, data[..written]);
                }
            }
            let end = outgoing.state().expect("nothing is owed");
            assert_eq!(opened(suite, &state.sent, &wire), (data.to_vec(), end.seq), "{most} {takes}");
        }
    }
}

#[test]
fn nothing_moves_before_all_is_said() {
    for state in all() {
        let mut outgoing = state.outgoing().expect("a suite");
        assert_eq!(outgoing.state().as_ref(), Some(&state.sent));
        outgoing.data(b"answer").expect("sealed");
        assert_eq!(outgoing.state(), None);
        let n = outgoing.pending().len();
        outgoing.taken(n - 1);
        assert_eq!((outgoing.state(), outgoing.told(10)), (None, 0));
        outgoing.taken(1);
        assert_eq!(outgoing.state(), None, "its writer would write it again");
        assert_eq!((outgoing.told(4), outgoing.state().is_none()), (4, true));
        assert_eq!(outgoing.told(4), 2);
        assert_eq!(outgoing.state().expect("all is said").seq, state.sent.seq + 1);
    }
}

#[test]
fn a_worn_key_is_changed() {
    let state = all().next().expect("a state");
    let suite = state.suite().expect("a suite");
    let worn = Direction { seq: 1 << 23, ..state.sent.clone() };
    let mut outgoing = Outgoing::new(suite, worn.clone());
    outgoing.data(b"after it").expect("sealed");
    assert_eq!(opened(suite, &worn, outgoing.pending()).0, b"after it");
    let n = outgoing.pending().len();
    outgoing.taken(n);
    outgoing.told(8);
    let next = outgoing.state().expect("nothing is owed");
    assert_eq!((next.seq, next.secret == worn.secret), (1, false));
}
