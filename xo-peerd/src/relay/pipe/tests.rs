use std::net::TcpListener;
use std::thread;

use xo_proto::tls::{Content, Header, Opener, Sealer, TlsState, Version, alert};

use super::*;
use crate::ktls::tests::states;

const LIMIT: Duration = Duration::from_secs(20);

/// A pipe between a client and a handler.
struct Stage {
    pipe: Pipe,
    client: TcpStream,
    handler: Option<UnixStream>,
    sealer: Sealer,
    opener: Opener,
    buffer: Vec<u8>,
}

impl Stage {
    fn new(state: &TlsState) -> Stage {
        let mut state = state.clone();
        // Not so far that a new key is due.
        state.sent.seq = 5;
        let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
        let client = TcpStream::connect(listener.local_addr().expect("address")).expect("connect");
        let (socket, address) = listener.accept().expect("accept");
        let (ours, handler) = UnixStream::pair().expect("a pair");
        for end in [client.set_nonblocking(true), handler.set_nonblocking(true)] {
            end.expect("an option");
        }
        let session = Box::new(Session::new(&state).expect("a suite"));
        let pipe = Pipe::new(socket.into(), ours, session, address).expect("a pipe");
        pipe.begin();
        let suite = state.suite().expect("a suite");
        Stage {
            pipe,
            client,
            handler: Some(handler),
            sealer: Sealer::new(suite, state.received.clone()),
            opener: Opener::new(suite, state.sent.clone()),
            buffer: vec![0; 1 << 16],
        }
    }

    /// As the thread does when anything happens.
    fn turn(&mut self) -> Turn {
        self.pipe.may(Side::Client, true, true);
        self.pipe.may(Side::Handler, true, true);
        self.pipe.turn(&mut self.buffer)
    }

    fn until(&mut self, what: &str, mut there: impl FnMut(&mut Stage, Turn) -> bool) {
        let begun = Instant::now();
        loop {
            let turn = self.turn();
            if there(self, turn) {
                return;
            }
            assert!(begun.elapsed() < LIMIT, "{what}");
            thread::sleep(Duration::from_millis(1));
        }
    }

    fn says(&mut self, content: Content, data: &[u8]) {
        let mut wire = Vec::new();
        self.sealer.seal(content, data, &mut wire).expect("a record");
        self.client.write_all(&wire).expect("room");
    }

    /// What comes from the client to the handler, until this much, or the end.
    fn handler_reads(&mut self, most: usize) -> Vec<u8> {
        let mut got = Vec::new();
        self.until("the handler reads", |stage, _| {
            let mut part = [0; 4096];
            let handler = stage.handler.as_mut().expect("a handler");
            match handler.read(&mut part) {
                Ok(0) => true,
                Ok(n) => {
                    got.extend_from_slice(&part[..n]);
                    got.len() >= most
                }
                Err(e) => e.kind() != ErrorKind::WouldBlock,
            }
        });
        got
    }

    /// Records for the client, until the end of its socket.
    fn client_reads(&mut self) -> Vec<(Content, Vec<u8>)> {
        let mut wire = Vec::new();
        self.until("the client reads", |stage, _| {
            let mut part = [0; 1 << 16];
            match stage.client.read(&mut part) {
                Ok(0) => true,
                Ok(n) => {
                    wire.extend_from_slice(&part[..n]);
                    false
                }
                Err(e) => e.kind() != ErrorKind::WouldBlock,
            }
        });
        let (mut rest, mut records) = (&mut wire[..], Vec::new());
        while !rest.is_empty() {
            let (record, after) = rest.split_at_mut(Header::parse(rest).expect("a header").total());
            let opened = self.opener.open(record).expect("the next record");
            records.push((opened.content, opened.data.to_vec()));
            rest = after;
        }
        records
    }

    fn writes(&mut self, data: &[u8]) {
        self.handler.as_mut().expect("a handler").write_all(data).expect("room");
    }
}

fn goodbye() -> (Content, Vec<u8>) {
    (Content::Alert, vec![1, alert::CLOSE_NOTIFY])
}

#[test]
fn a_handler_that_has_done_says_goodbye_and_a_crashed_one_does_not() {
    for state in states() {
        for word in [Word::Done, Word::Cut] {
            let mut stage = Stage::new(&state);
            stage.says(Content::Data, b"request");
            assert_eq!(stage.handler_reads(7), b"request");
            stage.writes(b"response");
            stage.handler = None;
            stage.until("it asks", |stage, turn| turn == Turn::Wait && stage.pipe.asks());
            assert_eq!(stage.pipe.deadline, None, "the engine's word is waited for");
            stage.pipe.hear(word);
            assert!(!stage.pipe.asks());
            let mut expected = vec![(Content::Data, b"response".to_vec())];
            expected.extend((word == Word::Done).then(goodbye));
            assert_eq!(stage.client_reads(), expected);
            // It lasts until its client has closed, too, or the time is over.
            assert_eq!(stage.turn(), Turn::Wait);
            let deadline = stage.pipe.arm().expect("a deadline");
            assert_eq!(stage.pipe.arm(), None, "once");
            assert!(!stage.pipe.is_overdue(deadline - Duration::from_millis(1)));
            assert!(stage.pipe.is_overdue(deadline));
            stage.client.shutdown(Shutdown::Write).expect("shutdown");
            stage.until("the end", |_, turn| turn == Turn::Over);
        }
    }
}

/// Its process has ended, another has its end of the pair still: what it has written is all there will be.
#[test]
fn an_end_that_others_have_is_not_waited_for() {
    let mut stage = Stage::new(&states()[0]);
    stage.writes(b"all");
    stage.pipe.hear(Word::Done);
    assert_eq!(stage.client_reads(), [(Content::Data, b"all".to_vec()), goodbye()]);
    // Nor does anybody read what the client sends.
    stage.says(Content::Data, &[7; 10_000]);
    stage.client.shutdown(Shutdown::Write).expect("shutdown");
    stage.until("the end", |_, turn| turn == Turn::Over);
}

#[test]
fn each_side_may_go_on_when_the_other_has_closed() {
    for state in states() {
        let mut stage = Stage::new(&state);
        stage.says(Content::Data, b"request");
        stage.says(Content::Alert, &[1, alert::CLOSE_NOTIFY]);
        assert_eq!(stage.handler_reads(usize::MAX), b"request", "then the end");
        stage.writes(b"response");
        stage.handler.as_ref().expect("a handler").shutdown(Shutdown::Write).expect("shutdown");
        // Closed both ways, it might as well have crashed.
        stage.until("it asks", |stage, _| stage.pipe.asks());
        stage.pipe.hear(Word::Done);
        // The client has wanted it so, and may close first; in the end its socket ends all the same.
        stage.until("an answer", |stage, _| stage.pipe.writing == Writing::Answered);
        let deadline = stage.pipe.deadline.expect("a deadline");
        assert!(!stage.pipe.is_overdue(deadline));
        assert_eq!(stage.client_reads(), [(Content::Data, b"response".to_vec()), goodbye()]);
        assert!(stage.pipe.deadline.is_some_and(|d| d > deadline));

        let mut stage = Stage::new(&state);
        stage.writes(b"greeting");
        stage.handler.as_ref().expect("a handler").shutdown(Shutdown::Write).expect("shutdown");
        assert_eq!(stage.client_reads(), [(Content::Data, b"greeting".to_vec()), goodbye()]);
        assert!(!stage.pipe.asks(), "it has said so itself");
        stage.says(Content::Data, b"an upload");
        assert_eq!(stage.handler_reads(9), b"an upload");
        assert_eq!(stage.pipe.deadline, None);
        stage.client.shutdown(Shutdown::Write).expect("shutdown");
        stage.until("the end", |_, turn| turn == Turn::Over);
    }
}

/// The handler sees the end, and cannot write any more: not the same as a good-bye.
#[test]
fn what_cannot_be_read_ends_it_with_an_alert() {
    for state in states() {
        let mut stage = Stage::new(&state);
        stage.says(Content::Data, b"good");
        stage.client.write_all(b"GET / HTTP/1.1\r\n\r\n").expect("room");
        assert_eq!(stage.handler_reads(usize::MAX), b"good");
        let error = stage.handler.as_mut().expect("a handler").write(b"x").expect_err("closed");
        assert_eq!(error.kind(), ErrorKind::BrokenPipe);
        assert_eq!(stage.client_reads(), [(Content::Alert, vec![2, alert::DECODE_ERROR])]);
    }
}

#[test]
fn alerts_and_cut_records_end_it() {
    for state in states() {
        for cut in [false, true] {
            let mut stage = Stage::new(&state);
            if cut {
                stage.client.write_all(&[23, 3, 3, 1]).expect("room");
                stage.client.shutdown(Shutdown::Write).expect("shutdown");
            } else {
                stage.says(Content::Alert, &[2, 80]);
            }
            assert_eq!(stage.handler_reads(usize::MAX), b"");
            stage.handler.as_mut().expect("a handler").write(b"x").expect_err("closed");
            assert_eq!(stage.client_reads(), []);
        }
    }
}

/// While the handler does not read, the client's reset is noticed all the same.
#[test]
fn a_reset_ends_it_at_once() {
    let mut stage = Stage::new(&states()[0]);
    stage.pipe.failed = true;
    assert_eq!(stage.turn(), Turn::Over);
}

/// As the early order takes a connection back: its host has it, so the client must not see a thing of this end.
#[test]
fn a_connection_that_is_taken_away_ends_without_a_packet() {
    for state in states() {
        let mut stage = Stage::new(&state);
        stage.says(Content::Data, b"request");
        assert_eq!(stage.handler_reads(7), b"request");
        xo_sys::tcp_repair::withdraw(stage.pipe.descriptors().0).expect("an empty socket");
        stage.writes(b"response");
        stage.until("the end", |_, turn| turn == Turn::Over);
        let Stage { pipe, mut client, handler, mut buffer, .. } = stage;
        drop(pipe);
        let ended = handler.expect("a handler").read(&mut buffer);
        assert!(matches!(ended, Ok(0)) || ended.is_err_and(|e| e.kind() == ErrorKind::ConnectionReset));
        let nothing = client.read(&mut buffer).expect_err("not even an end");
        assert_eq!(nothing.kind(), ErrorKind::WouldBlock);
    }
}

/// What a handler has left behind is kept for its client, as long as that takes something of it.
#[test]
fn who_takes_nothing_is_not_waited_for_for_ever() {
    let mut stage = Stage::new(&states()[0]);
    let mut still = 0;
    while still < 50 {
        while stage.turn() == Turn::Again {}
        match stage.handler.as_mut().expect("a handler").write(&[1; 1 << 14]) {
            Ok(_) => still = 0,
            Err(_) => still += 1,
        }
        thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(stage.pipe.deadline, None, "its handler may wait as long as it likes");
    stage.handler = None;
    stage.pipe.hear(Word::Done);
    assert_eq!((stage.turn(), stage.pipe.writing), (Turn::Wait, Writing::Open));
    let deadline = stage.pipe.arm().expect("a deadline");
    let mut part = [0; 1 << 14];
    stage.until("the client takes something", |stage, _| {
        let _ = stage.client.read(&mut part);
        stage.pipe.deadline.is_some_and(|d| d != deadline)
    });
    let another = stage.pipe.deadline.expect("a deadline");
    assert!(!stage.pipe.is_overdue(another - Duration::from_millis(1)));

    stage.pipe.writing = Writing::Open;
    assert!(stage.pipe.is_overdue(another), "it has taken nothing since");
}

/// However much either side sends, a portion is all that is kept here.
#[test]
fn who_does_not_read_slows_down_who_writes() {
    for state in states() {
        let mut stage = Stage::new(&state);
        let mut record = Vec::new();
        let (mut to_handler, mut to_client) = (0, 0);
        let mut still = 0;
        while still < 50 {
            let mut moved = false;
            if record.is_empty() {
                stage.sealer.seal(Content::Data, &[1; 16_000], &mut record).expect("a record");
            }
            if let Ok(n) = stage.client.write(&record) {
                record.drain(..n);
                (moved, to_handler) = (true, to_handler + n);
            }
            if let Ok(n) = stage.handler.as_mut().expect("a handler").write(&[2; 16_000]) {
                (moved, to_client) = (true, to_client + n);
            }
            while stage.turn() == Turn::Again {}
            if !moved {
                still += 1;
                thread::sleep(Duration::from_millis(1));
            }
        }
        let session = &stage.pipe.session;
        assert!(session.data().len() <= 2 << 16 && session.pending().len() <= 2 << 16);
        assert!(to_handler > 1 << 16 && to_client > 1 << 16, "{to_handler} {to_client}");
        // All of it arrives.
        let data = stage.handler_reads(to_handler / 17_000 * 16_000);
        assert!(data.iter().all(|b| *b == 1));
        stage.handler.as_ref().expect("a handler").shutdown(Shutdown::Write).expect("shutdown");
        let records = stage.client_reads();
        let length: usize = records.iter().filter(|r| r.0 == Content::Data).map(|r| r.1.len()).sum();
        assert_eq!((length, records.last()), (to_client, Some(&goodbye())));
    }
}

#[test]
fn new_keys_are_answered_while_nothing_else_is_said() {
    let mut stage = Stage::new(&states()[0]);
    assert_eq!(states()[0].version, Version::Tls13);
    let mut wire = Vec::new();
    stage.sealer.update(true, &mut wire).expect("a new key");
    stage.client.write_all(&wire).expect("room");
    stage.says(Content::Data, b"under the new key");
    assert_eq!(stage.handler_reads(17), b"under the new key");
    let mut answer = [0; 100];
    let mut length = 0;
    stage.until("an answer", |stage, _| {
        length = stage.client.read(&mut answer).unwrap_or_default();
        length > 0
    });
    let opened = stage.opener.open(&mut answer[..length]).expect("a record");
    assert_eq!((opened.content, &*opened.data), (Content::Handshake, &[24, 0, 0, 1, 0][..]));
    stage.opener.update().expect("TLS 1.3");
    stage.writes(b"hello");
    stage.handler = None;
    stage.pipe.hear(Word::Done);
    assert_eq!(stage.client_reads(), [(Content::Data, b"hello".to_vec()), goodbye()]);
}
