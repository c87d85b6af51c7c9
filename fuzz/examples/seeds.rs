//! Writes the seed corpora: one valid input of each kind for each target. Run in `fuzz/` when a format changes:
//! `rm -r seeds && cargo run --example seeds`; the result is committed.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;

use xo_proto::conn::{Buffers, ConnRecord, SockOptions, TcpState, Timestamps, Window};
use xo_proto::frame::{MAX_LOCAL_MESSAGE, encode_local, encode_peer};
use xo_proto::ipc::{self, Deliver, Destination, FromDaemon, Offload, ToDaemon};
use xo_proto::reason::Reason;
use xo_proto::tls::{Content, Direction, Sealer, Suite, TlsState, Version};
use xo_proto::wire::{
    BeginOffload, Handed, Hello, HostReady, MAGIC, PeerMessage, Ping, Query, Refuse, TargetReady, VERSION,
};
use xo_proto::worth::Worth;

const REQUESTS: [&str; 6] = [
    "GET /a?b HTTP/1.1\r\nHost: x\r\n\r\nHEAD http://y/ HTTP/1.1\r\nHost: x\r\n\r\n",
    "POST / HTTP/1.1\r\nContent-Length: 5\r\n\r\nhelloGET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
    "PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nWiki\r\nA ;x=y\r\n0123456789\r\n0\r\nT: v\r\n\r\n",
    "\r\n\r\nPOST / HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "GET / HTTP/1.1\r\nUpgrade: websocket\r\nConnection: upgrade, close\r\n\r\n",
    "GET / HTTP/1.1\nA: b\n\n",
];

const RESPONSES: [&str; 5] = [
    "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhelloHTTP/1.1 304 Not Modified\r\n\r\n",
    "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n",
    "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;a\r\nabc\r\n0\r\nT: v\r\n\r\n",
    "HTTP/1.0 200 OK\nServer: x\n\nuntil the end",
    "HTTP/1.1 101 Switching Protocols\r\n\r\n\x01",
];

const COMMANDS: [&str; 5] = [
    "*3\r\n$3\r\nSET\r\n$1\r\na\r\n$5\r\nhello\r\n*2\r\n$3\r\nGET\r\n$1\r\nb\r\nPING\r\n*0\r\n*-1\r\n\r\n",
    "*5\r\n$4\r\nMSET\r\n$4\r\n{a}b\r\n$1\r\n1\r\n$4\r\n{a}c\r\n$1\r\n2\r\n*3\r\n$3\r\nDEL\r\n$1\r\na\r\n$1\r\nb\r\n",
    "*1\r\n$5\r\nMULTI\r\n*2\r\n$4\r\nINCR\r\n$1\r\na\r\n*1\r\n$4\r\nEXEC\r\n*2\r\n$6\r\nSELECT\r\n$1\r\n1\r\n",
    "*3\r\n$5\r\nBLPOP\r\n$1\r\na\r\n$1\r\n0\r\n*4\r\n$4\r\nEVAL\r\n$1\r\nx\r\n$1\r\n1\r\n$1\r\na\r\n",
    "*4\r\n$5\r\nXREAD\r\n$7\r\nSTREAMS\r\n$1\r\na\r\n$1\r\n0\r\nget a\n*2\r\n$9\r\nSUBSCRIBE\r\n$1\r\na\r\n",
];

const REPLIES: [&str; 4] = [
    "+OK\r\n$5\r\nhello\r\n:1\r\n-ERR x\r\n",
    "*3\r\n$1\r\na\r\n$-1\r\n*2\r\n:1\r\n*-1\r\n>2\r\n+message\r\n$1\r\nx\r\n_\r\n",
    "|1\r\n+ttl\r\n:3\r\n%2\r\n+a\r\n,1.5\r\n+b\r\n#t\r\n~1\r\n(12345678901234567890\r\n",
    "=7\r\ntxt:abc\r\n!5\r\nERR x\r\n$0\r\n\r\n*0\r\n",
];

/// A push of null elements, and lengths that are none.
const PUSHES: &[u8] = b"\0\0\0\x02\n*-1\r\n>3\r\n+mess$-1\r\n$1\r\nx\r\n>2\r\n+messag*\r\n$2\r\n\n>2\xff\xff\xff\xff\xff\xff\r\n+mess$-1\r\n$1\r\nx\r\n\xbd\xcd\xf2\xf5\xd4\x92\x9a\x8csag*\r\n$1\r\nx\r\n";

const POLICIES: [&str; 8] = [
    "listen = [80, 443]\n[targets]\nt1 = \"10.3.0.2:7400\"\n[[rule]]\npath_prefix = \"/img/\"\nto = [\"t1\", \"local\"]\n\
     balance = \"round_robin\"\nhandler = \"web\"\n[[rule]]\nhost = \"*.example.org\"\nmethod = [\"PUT\"]\n\
     header = { name = \"x\", value = \"y\" }\nto = [\"t1\"]\n[[rule]]\npath_regex = \"^/v[0-9]+\"\npath_exact = \"/a\"\nto = [\"t1\"]\n",
    "\080, 8080\0t1=10.3.0.2:7400,t2=[fd00::2]:7400\0/img/ => t1,t2 @web; host=a.example method=GET|HEAD =/x => t2; ~^/v.* => local",
    "listen = [80]\0\0t1=10.3.0.2:7400\0/ => t3",
    "listen = [80, { port = 6379, protocol = \"redis\" }]\n[targets]\nt1 = \"10.3.0.2:7400\"\n[[rule]]\n\
     slots = [\"0-5460\", \"7000\"]\nto = [\"t1\"]\n\06379/redis\0t1=10.3.0.2:7400\0slots=0-5460|7000 => t1",
    "listen = [{ port = 6379, protocol = \"redis\" }]\n[targets]\nt1 = \"10.3.0.2:7400\"\nt2 = \"10.4.0.2:7400\"\n[[rule]]\n\
     slots = [\"0-16383\"]\nto = [\"local\", { name = \"t1\", weight = 3 }, \"t2\"]\nbalance = \"hash\"\nkey = \"slot\"\n\
     handler = \"redis\"\nsticky = false\n",
    "\080,6379/redis\0t1=10.3.0.2:7400,t2=10.4.0.2:7400\0slots=0-8191 => local,t1,t2*3 %hash(slot) @redis; slots=8192-16383 => t2; \
     /img/ => t1 %hash(path)",
    "listen = [80]\n[targets]\nt1 = \"10.3.0.2:7400\"\nt2 = \"10.4.0.2:7400\"\n[[rule]]\npath_prefix = \"/\"\n\
     to = [\"t1\", { name = \"t2\", weight = 3 }]\nbalance = \"least_loaded\"\nsticky = \"balanced\"\nimbalance = 50\n",
    "listen = [80]\n[targets]\nt1 = \"10.3.0.2:7400\"\n[[rule]]\npath_prefix = \"/a/\"\nto = [\"t1\"]\nflower_after = \"2MiB\"\n\
     [[rule]]\npath_prefix = \"/\"\nto = [\"t1\"]\nflower_after = \"500ms\"\n",
];

const POOLS: [&str; 3] = [
    "{\"type\":\"hello\",\"version\":1,\"capacity\":64}\n\0\0\0{\"type\":\"done\",\"connection\":2}\n\0{\"type\":\"done\",\"connection\":2}\n",
    "{\"type\":\"hello\",\"version\":1,\"capacity\":1}\0{\"type\":\"capacity\",\"capacity\":0}\0{\"type\":\"hello\",\"version\":1,\"capacity\":1}",
    "{\"type\":\"done\",\"connection\":1}\0{\"type\":\"hello\",\"version\":2,\"capacity\":1048577}",
];

/// Some state of TLS 1.3.
fn tls() -> TlsState {
    let suite = Suite::of(Version::Tls13, 0x1301).expect("a suite");
    let [received, sent] = [7, 8].map(|b| Direction::from_secret(suite, &[b; 32]).expect("keys"));
    let (server_name, alpn) = ("a.example".into(), b"http/1.1".to_vec());
    TlsState { version: Version::Tls13, cipher: 0x1301, received, sent, server_name, alpn }
}

fn peer_messages() -> Vec<PeerMessage> {
    let address: SocketAddr = "[fd00:1::2]:40000".parse().expect("an address");
    let local: SocketAddr = "10.2.0.2:80".parse().expect("an address");
    let tcp = TcpState {
        snd_seq: 1,
        rcv_seq: 2,
        sent: b"sent".to_vec(),
        unsent: b"unsent".to_vec(),
        received: b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        mss_clamp: 1460,
        snd_mss: 1448,
        wscale: Some((7, 9)),
        sack: true,
        timestamps: Some(Timestamps { value: 3, usec: true }),
        snd_cwnd: 11,
        window: Window { snd_wl1: 4, snd_wnd: 5, max_window: 6, rcv_wnd: 7, rcv_wup: 8 },
    };
    let options = SockOptions { congestion: "cubic".into(), nodelay: true, ..SockOptions::default() };
    let record = ConnRecord {
        client: address,
        local,
        tcp,
        buffers: Buffers { rcvbuf: 9, sndbuf: 10, lock: 1 },
        tls: Some(tls()),
    };
    let hello = Hello {
        magic: MAGIC,
        version: VERSION,
        node: "host".into(),
        boot_id: [9; 16],
        usec_timestamps: true,
    };
    vec![
        PeerMessage::Hello(hello),
        PeerMessage::BeginOffload(Box::new(BeginOffload {
            id: 1,
            handler: "web".into(),
            record,
            elapsed_ns: 2,
            start: true,
            sent_ns: 3,
            home: None,
            moves: 1,
        })),
        PeerMessage::TargetReady(TargetReady {
            id: 1,
            local,
            restore_ns: 2,
            rewrite_ns: 3,
            total_ns: 4,
            started_ns: Some(5),
        }),
        PeerMessage::Refuse(Refuse { id: 1, reason: Reason::NoHandler, detail: "none".into() }),
        PeerMessage::HostReady(HostReady { id: 1, options: Some(options), hop: 1, elapsed_ns: 2 }),
        PeerMessage::Handed(Handed { id: 1, hand_ns: 2, at_ns: 3 }),
        PeerMessage::Closed(1),
        PeerMessage::Ping(Ping { number: 2, sent_ns: 3 }),
        PeerMessage::Query(Query { id: 1, sent_ns: 2 }),
        PeerMessage::Abort(1),
    ]
}

fn local_messages() -> Vec<Vec<u8>> {
    let client: SocketAddr = "10.1.0.2:40000".parse().expect("an address");
    let offload = Offload {
        slot: 1,
        generation: 2,
        to: Destination::Target { node: "t1".into(), address: client },
        handler: "web".into(),
        moves: 1,
        tls: Some(tls()),
        used: 4,
        decided_ns: 3,
        flower_after: Some(Worth::Age(10_000)),
    };
    let to_daemon = [
        ToDaemon::Hello { version: 1, ticket: Some([7; 16]) },
        ToDaemon::Offload(offload),
        ToDaemon::Register { epoll: true, tls: true },
        ToDaemon::Take { wake_port: 5 },
        ToDaemon::Query(ipc::Query::Flows),
        ToDaemon::Recover { slot: 1, generation: 2 },
    ];
    let from_daemon = [
        FromDaemon::Welcome { version: 1, node: "host".into(), ticket: [7; 16] },
        FromDaemon::Denied { detail: "no".into() },
        FromDaemon::Deliver(Deliver {
            delivery: 1,
            client,
            guest: true,
            home: 3,
            moves: 2,
            tls: Some(tls()),
            handshake: true,
        }),
        FromDaemon::Nothing,
    ];
    let mut buffer = [0; MAX_LOCAL_MESSAGE];
    let mut all = Vec::new();
    for m in &to_daemon {
        let n = encode_local(m, &mut buffer).expect("short");
        all.push([&[1], &buffer[..n]].concat());
    }
    for m in &from_daemon {
        let n = encode_local(m, &mut buffer).expect("short");
        all.push([&[2], &buffer[..n]].concat());
    }
    all
}

fn wire() -> Vec<Vec<u8>> {
    let peer = peer_messages().into_iter().map(|m| {
        let mut framed = Vec::new();
        encode_peer(&m, &mut framed).expect("short");
        // The target makes the length prefix itself.
        [&[0], &framed[4..]].concat()
    });
    peer.chain(local_messages()).collect()
}

/// GSO size 4, MTU 100, then a packet of ten bytes of data.
fn packets() -> Vec<Vec<u8>> {
    let tcp = [0x9c, 0x40, 0, 80, 0, 0, 0, 100, 0, 0, 0, 1, 0x50, 0x19, 1, 0, 0, 0, 0, 0];
    let mut four = vec![0x45, 0, 0, 50, 0x12, 0x34, 0x40, 0, 64, 6, 0, 0, 10, 1, 0, 2, 10, 2, 0, 2];
    let mut six = vec![0x60, 0, 0, 0, 0, 30, 6, 64];
    six.extend([[0xfd; 16], [0xfe; 16]].concat());
    for packet in [&mut four, &mut six] {
        packet.extend(tcp);
        packet.extend(b"0123456789");
    }
    vec![
        [&[0, 4, 0, 100, 1], &four[..]].concat(),
        [&[0, 4, 0, 100, 202], b"\x01late".as_slice()].concat(),
        [&[0, 0, 0, 64, 2], &six[..]].concat(),
    ]
}

/// For each suite: its number among those of the target, a byte of secret, then what is to be opened.
fn tls_records() -> Vec<Vec<u8>> {
    (0..6)
        .map(|number| {
            let (version, cipher) = TLS_SUITES[usize::from(number)];
            let suite = Suite::of(version, cipher).expect("a suite");
            let direction = match version {
                Version::Tls13 => Direction::from_secret(suite, &vec![7; suite.hash_len()]).expect("keys"),
                Version::Tls12 => {
                    let [client, _] =
                        Direction::from_master(suite, &[7; 48], &[7; 32], &[7; 32]).expect("keys");
                    client
                }
            };
            let mut sealer = Sealer::new(suite, direction);
            let mut bytes = vec![number, 7];
            for (content, data) in
                [(Content::Data, b"GET / HTTP/1.1\r\n\r\n".as_slice()), (Content::Alert, &[1, 0])]
            {
                sealer.seal(content, data, &mut bytes).expect("sealed");
            }
            bytes
        })
        .collect()
}

/// As in `fuzz_targets/tls_record.rs`.
const TLS_SUITES: [(Version, u16); 6] = [
    (Version::Tls13, 0x1301),
    (Version::Tls13, 0x1302),
    (Version::Tls13, 0x1303),
    (Version::Tls12, 0xc02f),
    (Version::Tls12, 0xc030),
    (Version::Tls12, 0xcca8),
];

/// For each version: requests in one record and in many, new keys, warnings, an end; then what is no record.
const TLS_INCOMING: [&[u8]; 4] = [
    &[0, 7, 255, 3, 40, 9, 10, 20, 200, 30, 210, 5, 211, 1, 1, 1, 230, 199, 220],
    &[2, 9, 1, 2, 4, 7, 199, 199, 211, 199, 200, 3, 250, 22, 3, 3, 0, 1, 0],
    &[3, 1, 60, 60, 5, 0, 10, 20, 230, 40, 240, 50, 60, 220],
    &[5, 2, 255, 255, 255, 255, 199, 3, 2, 1, 200, 240, 250, 23, 3, 3, 0, 20, 1, 2],
];

/// Lines of a keylog.
const KEYLOG: [&str; 2] = [
    "CLIENT_TRAFFIC_SECRET_0 a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0 \
     0102030405060708090a0b0c0d0e0f10",
    "CLIENT_RANDOM a0 00",
];

fn keylog() -> impl Iterator<Item = Vec<u8>> {
    KEYLOG.iter().map(|line| [&[6, 0], line.as_bytes()].concat())
}

/// The world, then what happens: always the first thing that can, but for one mishap.
fn handoffs() -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    for shape in [0b000_0000, 0b000_0001, 0b000_0010, 0b100_0001, 0b111_1101] {
        for (at, mishap) in [(0, 0), (1, 0), (2, 2), (3, 5), (4, 8), (5, 3), (6, 1)] {
            let mut choices = vec![[0x10, 0]; 32];
            choices[at] = [0, mishap];
            all.push([&[shape, 1], choices.as_flattened()].concat());
        }
    }
    all
}

fn main() {
    let with = |begin: &'static [u8], texts: &[&str]| -> Vec<Vec<u8>> {
        texts.iter().map(|t| [begin, t.as_bytes()].concat()).collect()
    };
    let all = [
        ("http_request", with(&[4, 30, 255, 0, 2, 255, 9, 60, 0b1101_1000], &REQUESTS)),
        ("http_response", with(&[1, 0, 4, 30, 255, 2, 0], &RESPONSES)),
        ("resp_request", with(&[4, 30, 255, 0, 2, 255, 9, 60], &COMMANDS)),
        ("resp_reply", with(&[3, 4, 30, 255, 2], &REPLIES).into_iter().chain([PUSHES.to_vec()]).collect()),
        ("wire", wire()),
        ("policy", with(&[], &POLICIES)),
        ("pool", with(&[], &POOLS)),
        ("packet", packets()),
        ("handoff", handoffs()),
        ("tls_incoming", TLS_INCOMING.map(<[u8]>::to_vec).to_vec()),
        ("tls_record", tls_records().into_iter().chain(keylog()).collect()),
    ];
    for (target, seeds) in all {
        let directory = Path::new("seeds").join(target);
        fs::create_dir_all(&directory).expect("a directory");
        for (i, seed) in seeds.iter().enumerate() {
            fs::write(directory.join(format!("{i:02}")), seed).expect("a seed");
        }
    }
}
