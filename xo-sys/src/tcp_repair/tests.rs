use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::*;

/// Client and accepted connection on loopback.
fn pair(address: &str) -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind(address).expect("listen");
    let mut to = listener.local_addr().expect("address");
    if to.ip().is_unspecified() {
        to.set_ip("127.0.0.1".parse().expect("an address"));
    }
    let client = TcpStream::connect(to).expect("connect");
    let (server, _) = listener.accept().expect("accept");
    for s in [&client, &server] {
        s.set_read_timeout(Some(Duration::from_secs(10))).expect("time-out");
    }
    (client, server)
}

fn mss(fd: RawFd) -> u32 {
    let mut info = TcpInfo::default();
    raw::getsockopt(fd, libc::IPPROTO_TCP, libc::TCP_INFO, &mut info).expect("TCP_INFO");
    info.snd_mss
}

fn wait_queued(socket: &TcpStream, bytes: usize) {
    let deadline = Instant::now() + Duration::from_secs(10);
    let mut buffer = vec![0; bytes];
    while socket.peek(&mut buffer).expect("peek") < bytes {
        assert!(Instant::now() < deadline, "{bytes} bytes do not arrive");
    }
}

fn spare() -> SpareSockets {
    let mut spare = SpareSockets::default();
    spare.refill(1);
    spare
}

fn dumped(server: &TcpStream, limit: usize) -> Result<ConnRecord, RepairError> {
    dump(server.as_raw_fd(), &ends(server.as_raw_fd())?, limit)
}

/// Moves a server's socket to a new one in this process; the peer must not notice.
fn moved(server: TcpStream) -> TcpStream {
    let record = dumped(&server, 1 << 24).expect("dump");
    let options = options(server.as_raw_fd(), &ends(server.as_raw_fd()).expect("ends")).expect("options");
    assert_eq!(arrived_since(server.as_raw_fd(), &record).expect("rcv_nxt"), None);
    vacate(server.as_raw_fd()).expect("vacate");
    let restored = restore(&record, record.local, false, Duration::ZERO, &mut spare()).expect("restore");
    assert_eq!(restored.local(), record.local);
    apply_options(restored.as_raw_fd(), &options);
    let live = restored.start(false, Duration::ZERO).expect("start");
    reuse_address(live.as_raw_fd()).expect("SO_REUSEADDR");
    TcpStream::from(OwnedFd::from(live))
}

fn pattern(n: usize) -> Vec<u8> {
    (0..n).map(|i| (i * 7 + i / 251) as u8).collect()
}

#[test]
fn a_connection_moves_with_its_queues() {
    for address in ["127.0.0.1:0", "[::1]:0", "0.0.0.0:0"] {
        let (mut client, mut server) = pair(address);
        server.set_nodelay(true).expect("nodelay");
        client.write_all(b"one").expect("write");
        server.read_exact(&mut [0; 3]).expect("read");
        client.write_all(b"GET / HTTP/1.1\r\n\r\n").expect("write");
        wait_queued(&server, 18);
        let before = mss(server.as_raw_fd());
        let old = server.try_clone().expect("dup");
        let mut server = moved(server);
        // TCP_MAXSEG ends at 32767; loopback has more, less 12 bytes of timestamps.
        assert_eq!(mss(server.as_raw_fd()), before.min(32_755), "segment size, {address}");
        assert!(server.nodelay().expect("option"));
        let mut request = [0; 18];
        server.read_exact(&mut request).expect("the request, from the receive queue");
        assert_eq!(&request, b"GET / HTTP/1.1\r\n\r\n");
        server.write_all(b"answer").expect("write");
        client.read_exact(&mut [0; 6]).expect("read");
        client.write_all(b"next").expect("write");
        server.read_exact(&mut [0; 4]).expect("read");
        let e = (&old).write(b"x").expect_err("the emptied socket");
        assert_eq!(e.kind(), io::ErrorKind::BrokenPipe);
        drop(server);
        assert_eq!(client.read(&mut [0; 1]).expect("a clean end"), 0);
    }
}

#[test]
fn long_queues_move_in_both_directions() {
    let (mut client, mut server) = pair("127.0.0.1:0");
    let up = pattern(3 << 20);
    let sender = client.try_clone().expect("dup");
    let wrote = std::thread::scope(|s| {
        // Fill the receive queue as far as the window allows, and the send queue until it would block.
        let body = &up;
        let writer = s.spawn(move || (&sender).write_all(body));
        wait_queued(&server, 100 << 10);
        server.set_nonblocking(true).expect("non-blocking");
        let down = pattern(8 << 20);
        let mut wrote = 0;
        while let Ok(n) = server.write(&down[wrote..]) {
            wrote += n;
        }
        server.set_nonblocking(false).expect("blocking");
        // The client does not read yet: part of this is unsent. Let what is on its way arrive.
        let mut last = u64::MAX;
        loop {
            let mut n = 0_i32;
            // SAFETY: a number to write to.
            sys!(libc::SYS_ioctl, server.as_raw_fd(), libc::FIONREAD, &raw mut n).expect("SIOCINQ");
            if n as u64 == last {
                break;
            }
            last = n as u64;
            std::thread::yield_now();
            let t = Instant::now();
            while t.elapsed() < Duration::from_millis(50) {
                std::thread::yield_now();
            }
        }
        server = moved(server.try_clone().expect("dup"));
        let mut reader = client.try_clone().expect("dup");
        let read = s.spawn(move || {
            let mut all = vec![0; wrote];
            reader.read_exact(&mut all).map(|()| all)
        });
        let mut got = vec![0; body.len()];
        server.read_exact(&mut got).expect("upload");
        assert!(got == *body, "upload differs");
        writer.join().expect("no panic").expect("upload written");
        let all = read.join().expect("no panic").expect("download");
        assert!(all == down[..wrote], "download differs");
        wrote
    });
    assert!(wrote > 100_000, "only {wrote} bytes were queued");
    drop(server);
    assert_eq!(client.read(&mut [0; 1]).expect("end"), 0);
}

/// A socket that is restored with what two segments carried has it in one, of which the client may have acknowledged the first part.
#[test]
fn a_segment_that_is_acknowledged_in_part_moves_with_the_rest() {
    let (mut client, mut server) = pair("127.0.0.1:0");
    server.write_all(b"0123456789").expect("write");
    client.read_exact(&mut [0; 10]).expect("read");
    let record_of = |socket: &TcpStream| {
        let record = dumped(socket, 1 << 20).expect("dump");
        vacate(socket.as_raw_fd()).expect("vacate");
        record
    };
    // As if the client had not had the last four bytes, and its acknowledgement of the first six were still to come.
    let mut ours = record_of(&server);
    ours.tcp.sent = b"0123456789".to_vec();
    let mut theirs = record_of(&client);
    theirs.tcp.rcv_seq = theirs.tcp.rcv_seq.wrapping_sub(4);
    theirs.tcp.window.rcv_wup = theirs.tcp.rcv_seq;
    let [mut client, server] = [theirs, ours].map(|record| {
        let restored = restore(&record, record.local, false, Duration::ZERO, &mut spare()).expect("restore");
        let live = restored.start(false, Duration::ZERO).expect("start");
        TcpStream::from(OwnedFd::from(live))
    });
    client.write_all(b"x").expect("write");
    wait_queued(&server, 1);
    let record = dumped(&server, 1 << 20).unwrap_or_else(|e| panic!("{}: {e}", e.reason().name()));
    assert_eq!((&record.tcp.sent[..], &record.tcp.received[..]), (&b"6789"[..], &b"x"[..]));
    resume(server.as_raw_fd()).expect("resume");
    let mut rest = [0; 4];
    client.read_exact(&mut rest).expect("what is sent again");
    assert_eq!(&rest, b"6789");
}

/// No urgent data is there: what comes meanwhile moves the counts.
#[test]
fn bytes_that_arrive_during_a_dump_are_in_it_or_come_after_it() {
    let (client, server) = pair("127.0.0.1:0");
    let stop = AtomicBool::new(false);
    std::thread::scope(|s| {
        s.spawn(|| {
            for byte in (0..=u8::MAX).cycle().take(200_000) {
                (&client).write_all(&[byte]).expect("write");
                let t = Instant::now();
                while t.elapsed() < Duration::from_micros(50) {
                    std::hint::spin_loop();
                }
                if stop.load(Ordering::Relaxed) {
                    break;
                }
            }
        });
        let deadline = Instant::now() + Duration::from_secs(20);
        let mut there = 0;
        while there < 1000 && Instant::now() < deadline {
            let record = dumped(&server, 1 << 20);
            let record = record.unwrap_or_else(|e| {
                stop.store(true, Ordering::Relaxed);
                panic!("{}: {e}", e.reason().name())
            });
            resume(server.as_raw_fd()).expect("resume");
            let received = record.tcp.received;
            assert!(
                received.iter().enumerate().all(|(i, byte)| *byte == i as u8),
                "in order, from the first"
            );
            there = received.len();
        }
        stop.store(true, Ordering::Relaxed);
        assert!(there >= 1000, "{there} bytes");
    });
}

#[test]
fn what_cannot_move_is_refused_and_stays_usable() {
    let (client, mut server) = pair("127.0.0.1:0");
    // SAFETY: one byte is read from a valid address.
    sys!(libc::SYS_sendto, client.as_raw_fd(), b"!".as_ptr(), 1, libc::MSG_OOB, 0, 0).expect("urgent byte");
    (&client).write_all(b"12345").expect("write");
    wait_queued(&server, 5);
    assert_eq!(dumped(&server, 1 << 20).expect_err("urgent").reason(), Reason::UrgentData);
    let mut five = [0; 5];
    server.read_exact(&mut five).expect("still readable");
    assert_eq!(&five, b"12345");

    let (client, server) = pair("127.0.0.1:0");
    (&client).write_all(&[7; 5000]).expect("write");
    wait_queued(&server, 5000);
    assert_eq!(dumped(&server, 4999).expect_err("limit").reason(), Reason::QueuesTooLong);
    client.shutdown(std::net::Shutdown::Write).expect("half-close");
    let mut all = Vec::new();
    (&server).read_to_end(&mut all).expect("read");
    assert_eq!(all.len(), 5000);
    assert_eq!(dumped(&server, 1 << 20).expect_err("half-closed").reason(), Reason::NotEstablished);
    let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
    assert_eq!(ends(listener.as_raw_fd()).expect_err("listener").reason(), Reason::NotEstablished);
}

#[test]
fn a_dumped_socket_can_be_taken_back() {
    let (mut client, mut server) = pair("127.0.0.1:0");
    client.write_all(b"hello").expect("write");
    wait_queued(&server, 5);
    dumped(&server, 1 << 20).expect("dump");
    resume(server.as_raw_fd()).expect("resume");
    server.read_exact(&mut [0; 5]).expect("read");
    server.write_all(b"there").expect("write");
    client.read_exact(&mut [0; 5]).expect("read");
}

#[test]
fn a_taken_4_tuple_gets_another_port_and_a_mapped_socket_serves_ipv4() {
    let (client, server) = pair("127.0.0.1:0");
    let record = dumped(&server, 1 << 20).expect("dump");
    // The original is still there: the same 4-tuple cannot be had.
    let restored = restore(&record, record.local, false, Duration::ZERO, &mut spare()).expect("restore");
    assert_ne!(restored.local().port(), record.local.port());
    drop(restored);
    vacate(server.as_raw_fd()).expect("vacate");
    let restored =
        restore(&record, record.local, true, Duration::ZERO, &mut spare()).expect("restore as AF_INET6");
    let fd = restored.start(false, Duration::ZERO).expect("start");
    assert_eq!(address_of(fd.as_raw_fd(), libc::SYS_getpeername).expect("peer"), (record.client, true));
    let mut server = TcpStream::from(OwnedFd::from(fd));
    server.write_all(b"v4 over v6").expect("write");
    (&client).read_exact(&mut [0; 10]).expect("read");
}

#[test]
fn a_lost_connection_is_reset() {
    let (mut client, server) = pair("127.0.0.1:0");
    let record = dumped(&server, 1 << 20).expect("dump");
    vacate(server.as_raw_fd()).expect("vacate");
    restore(&record, record.local, false, Duration::ZERO, &mut spare())
        .expect("restore")
        .reset()
        .expect("reset");
    let e = client.read(&mut [0; 1]).expect_err("a reset");
    assert_eq!(e.kind(), io::ErrorKind::ConnectionReset);
}

#[test]
fn options_travel() {
    let (_client, server) = pair("127.0.0.1:0");
    let fd = server.as_raw_fd();
    let tcp = [
        (libc::TCP_NODELAY, 1),
        (libc::TCP_KEEPIDLE, 77),
        (libc::TCP_KEEPINTVL, 13),
        (libc::TCP_KEEPCNT, 4),
        (libc::TCP_USER_TIMEOUT, 4321),
    ];
    for (name, value) in tcp {
        set(fd, name, value).expect("option");
    }
    raw::setsockopt(fd, libc::SOL_SOCKET, libc::SO_KEEPALIVE, &1_i32).expect("keepalive");
    raw::setsockopt(fd, libc::IPPROTO_IP, libc::IP_TOS, &0x10_i32).expect("tos");
    raw::setsockopt(fd, libc::SOL_SOCKET, libc::SO_SNDBUF, &50_000_i32).expect("send buffer");
    let server = moved(server);
    let fd = server.as_raw_fd();
    for (name, value) in tcp {
        assert_eq!(get_u32(fd, name).expect("option"), value as u32, "TCP option {name}");
    }
    let int = |level, name| {
        let mut value = 0_i32;
        raw::getsockopt(fd, level, name, &mut value).expect("option");
        value
    };
    assert_eq!(int(libc::SOL_SOCKET, libc::SO_KEEPALIVE), 1);
    assert_eq!(int(libc::SOL_SOCKET, libc::SO_REUSEADDR), 1);
    assert_eq!(int(libc::IPPROTO_IP, libc::IP_TOS), 0x10);
    assert_eq!(int(libc::SOL_SOCKET, libc::SO_SNDBUF), 100_000);
    assert_eq!(
        int(libc::SOL_SOCKET, SO_BUF_LOCK),
        1,
        "the receive buffer grows by itself, the send buffer does not"
    );
}

#[test]
fn what_comes_after_the_dump_is_seen() {
    let (mut client, server) = pair("127.0.0.1:0");
    client.write_all(b"before").expect("write");
    wait_queued(&server, 6);
    let record = dumped(&server, 1 << 20).expect("dump");
    client.write_all(b"after").expect("write");
    client.shutdown(std::net::Shutdown::Write).expect("shutdown");
    let end = Instant::now() + Duration::from_secs(10);
    let late = loop {
        let late = arrived_since(server.as_raw_fd(), &record).expect("a look");
        match late {
            Some(late) if late.fin => break late,
            _ => assert!(Instant::now() < end, "{late:?}"),
        }
    };
    assert_eq!(late, Late { data: b"after".to_vec(), fin: true });
}

#[test]
fn a_live_socket_is_withdrawn_without_a_packet() {
    let (mut client, server) = pair("127.0.0.1:0");
    let mut moved = moved(server);
    moved.write_all(b"hello").expect("write");
    client.read_exact(&mut [0; 5]).expect("read");
    assert!(acknowledged(moved.as_raw_fd()).expect("TCP_INFO") <= 5);
    withdraw(moved.as_raw_fd()).expect("withdraw");
    assert_eq!(moved.write(b"x").expect_err("empty").kind(), io::ErrorKind::BrokenPipe);
    client.set_read_timeout(Some(Duration::from_millis(50))).expect("time-out");
    assert_eq!(client.read(&mut [0; 1]).expect_err("silence").kind(), io::ErrorKind::WouldBlock);
}
