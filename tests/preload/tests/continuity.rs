//! What a client's TCP sees of a server that moves with every request: one peer, whose timestamps, acknowledgements, window and
//! sequence numbers go on where they were.

use xo_tests::counters::Counters;
use xo_tests::program::stay_on_one_processor;
use xo_tests::servers::{address, address6};
use xo_tests::wire::{ACK, RST, SYN, Segment, Wire};
use xo_tests::{Bed, Connection, content};

const REQUESTS: usize = 60;

/// `a` is not before `b` (RFC 7323, 2.2 and 5.3: numbers wrap).
fn not_before(a: u32, b: u32) -> bool {
    a.wrapping_sub(b).cast_signed() >= 0
}

/// Every third request is an upload; all orders of two places occur.
fn travel(host: &str) -> u16 {
    let mut c = Connection::to(host, 80).expect("connect");
    let places = ["host", "t1", "t2"];
    for i in 0..REQUESTS {
        let place = places[(i * (1 + i / 3)) % 3];
        let response = match i % 3 {
            0 => {
                let path = format!("/up/{place}/{i}");
                c.put(&path, &content::of(&path, 30_000)).unwrap_or_else(|e| panic!("{i}: {e}"))
            }
            _ => {
                let path = format!("/img/{place}/{}", ["1k", "64k", "1m"][i / 3 % 3]);
                c.get(&path).unwrap_or_else(|e| panic!("{i}: {e}"))
            }
        };
        assert_eq!(response.node(), place, "{i}");
    }
    c.stream().local_addr().expect("an address").port()
}

/// What the server's side has promised and said so far.
struct Server {
    scale: u8,
    timestamp: u32,
    echo: u32,
    ack: u32,
    /// First sequence number beyond the window.
    edge: u32,
    next: u32,
    /// Segments without an echo.
    mute: usize,
    /// Times that the echo went away.
    mute_times: usize,
    /// The last one had none.
    is_mute: bool,
}

impl Server {
    fn of(answer: &Segment) -> Server {
        let (timestamp, echo) = answer.timestamps.expect("timestamps");
        Server {
            scale: answer.scale.expect("a scale"),
            timestamp,
            echo,
            ack: answer.ack,
            edge: answer.ack.wrapping_add(u32::from(answer.window)),
            next: answer.seq.wrapping_add(1),
            mute: 0,
            mute_times: 0,
            is_mute: false,
        }
    }

    /// `sent`: the newest timestamp of the client's.
    fn says(&mut self, s: &Segment, sent: u32) {
        let (timestamp, echo) = s.timestamps.unwrap_or_else(|| panic!("no timestamps: {s:?}"));
        assert!(not_before(timestamp, self.timestamp), "the clock goes back from {}: {s:?}", self.timestamp);
        if echo == 0 {
            // A restored socket knows no timestamp of its client's before it has heard it (PROTOCOL, "Known gaps").
            self.mute += 1;
            self.mute_times += usize::from(!self.is_mute);
        } else {
            assert!(not_before(echo, self.echo), "the echo goes back from {}: {s:?}", self.echo);
            assert!(not_before(sent, echo), "an echo of what was never sent, {sent} at most: {s:?}");
            self.echo = echo;
        }
        self.is_mute = echo == 0;
        assert!(not_before(s.ack, self.ack), "the acknowledgement goes back from {}: {s:?}", self.ack);
        let window = u32::from(s.window) << self.scale;
        let edge = s.ack.wrapping_add(window);
        // RFC 7323, 2.3: by what does not fit into the scaled field a window may seem to shrink.
        let unit = 1 << self.scale;
        assert!(
            not_before(edge.wrapping_add(unit), self.edge),
            "the window shrinks, {} was promised: {s:?}",
            self.edge
        );
        assert!(not_before(self.next, s.seq), "bytes are left out, {} was next: {s:?}", self.next);
        let next = s.seq.wrapping_add(u32::try_from(s.len).expect("a packet"));
        (self.timestamp, self.ack) = (timestamp, s.ack);
        if not_before(edge, self.edge) {
            self.edge = edge;
        }
        if not_before(next, self.next) {
            self.next = next;
        }
    }
}

fn check(all: &[Segment], port: u16) {
    let (mut server, mut sent, mut count) = (None::<Server>, 0, 0);
    for s in all.iter().filter(|s| s.from == port || s.to == port) {
        assert_eq!(s.flags & RST, 0, "{s:?}");
        match &mut server {
            _ if s.from == port => sent = s.timestamps.expect("the client's").0,
            None => {
                assert_eq!(s.flags & (SYN | ACK), SYN | ACK, "{s:?}");
                server = Some(Server::of(s));
            }
            Some(server) => {
                server.says(s, sent);
                count += 1;
            }
        }
    }
    let server = server.expect("an answer to the SYN");
    println!("{count} segments of the server, {} without an echo, {} times", server.mute, server.mute_times);
    assert!(server.mute_times <= REQUESTS, "the echo goes away where nothing moves");
    assert!(count > 3 * REQUESTS, "{count} segments: not all were seen");
}

#[test]
fn the_client_sees_one_peer() {
    // On several processors packets of two machines overtake each other.
    stay_on_one_processor();
    let bed = Bed::up(2, 1);
    let programs = bed.sharded();
    for host in [address("host"), address6("host")] {
        let before = Counters::of(&bed);
        let wire = Wire::listen(&bed, "client");
        let port = bed.on("client", move || travel(&host));
        let all = wire.stop();
        check(&all, port);
        let counted = Counters::of(&bed).since(&before);
        println!("{}", counted.troubles());
        assert_eq!(counted.get("TCPTimeouts"), 0, "{}", counted.troubles());
    }
    bed.wait_idle(&["host", "t1", "t2"]);
    drop(programs);
}
