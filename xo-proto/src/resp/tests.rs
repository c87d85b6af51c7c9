mod oracle;
mod properties;
mod reader;

use super::*;
use crate::reason::Reason;

/// A command as clients send it, its arguments apart by spaces.
fn array(text: &str) -> Vec<u8> {
    let words: Vec<_> = text.split(' ').collect();
    let bulk = words.iter().map(|w| format!("${}\r\n{w}\r\n", w.len()));
    format!("*{}\r\n{}", words.len(), bulk.collect::<String>()).into_bytes()
}

/// What is seen of one command, on a connection of which `before` has been served.
fn look(before: &[&str], text: &str) -> Look {
    let mut requests = Requests::default();
    for text in before {
        let bytes = array(text);
        let Look::Here(run) = requests.look(&bytes, true, |_| false, |_| ()) else { panic!("{text}") };
        requests = run.next;
        requests.consumed_unseen(bytes.len() as u64);
        assert!(requests.at_boundary());
    }
    requests.look(&array(text), false, |_| true, |_| ())
}

fn slot_and_reason(text: &str) -> (Option<u16>, Option<Reason>) {
    let mut seen = None;
    let mut kept = None;
    let see = |c: &Command| {
        seen = c.slot;
        false
    };
    let looked = Requests::default().look(&array(text), false, see, |reason| kept = Some(reason));
    assert!(matches!(looked, Look::Here(_)), "{text}: {looked:?}");
    (seen, kept)
}

#[test]
fn keys_are_found() {
    let (a, b) = ("{a}", "{b}");
    for text in [
        "GET A",
        "set A B",
        "MSET A B A B",
        "DEL A A A",
        "BITOP AND A A",
        "OBJECT ENCODING A",
        "XINFO STREAM A B",
        "SINTERCARD 2 A A LIMIT B",
        "ZUNIONSTORE A 2 A A WEIGHTS B",
        "BLPOP A A B",
        "BLMPOP B 2 A A LEFT",
        "XREAD COUNT B STREAMS A A B B",
        "XREADGROUP GROUP B B streams A B",
        "SORT A BY B STORE A",
        "SORT A STORE A",
        "GEORADIUS A B B B B STOREDIST A",
        "COPY A A DB B",
        "PFCOUNT A",
        "WATCH A A",
    ] {
        let text = text.split(' ').map(|w| match w {
            "A" => a,
            "B" => b,
            w => w,
        });
        let text = text.collect::<Vec<_>>().join(" ");
        assert_eq!(slot_and_reason(&text), (Some(key_slot(b"a")), None), "{text}");
    }
    for text in
        ["PING", "INFO", "SCAN 0", "OBJECT HELP", "ZUNION x a", "SINTERCARD 0", "CLIENT SETINFO LIB-NAME x"]
    {
        assert_eq!(slot_and_reason(text), (None, None), "{text}");
    }
    for text in ["MGET a b", "MSET a 1 b 2", "ZUNIONSTORE a 1 b", "SORT a STORE b", "XREAD STREAMS a b 0 0"] {
        assert_eq!(slot_and_reason(text).1, Some(Reason::CrossSlot), "{text}");
    }
    for text in ["EVAL x 0", "FCALL f 1 a", "EVALSHA x 2 a b"] {
        assert_eq!(slot_and_reason(text).1, Some(Reason::Script), "{text}");
    }
}

#[test]
fn what_holds_a_connection() {
    let away = |l: Look| matches!(l, Look::Away(_));
    for before in [
        &["MULTI", "GET a", "EXEC"][..],
        &["MULTI", "DISCARD"],
        &["WATCH a", "UNWATCH"],
        &["WATCH a", "MULTI", "EXEC"],
        &["SELECT 1", "SELECT 0"],
        &["SELECT 1", "MULTI", "RESET"],
        &["HELLO 2", "CLIENT ID", "PING"],
    ] {
        assert!(away(look(before, "GET b")), "{before:?}");
    }
    for before in [
        &["MULTI"][..],
        &["MULTI", "EXEC x"],
        &["WATCH a", "MULTI", "UNWATCH"],
        &["SELECT 1"],
        &["SELECT 1", "MULTI", "SELECT 0"],
        &["SELECT 1", "MULTI", "EXEC"],
        &["MULTI", "SELECT 1", "EXEC"],
        &["SELECT 00"],
    ] {
        assert!(!away(look(before, "GET b")), "{before:?}");
    }
    for text in [
        "AUTH x",
        "HELLO 3",
        "HELLO 2 SETNAME x",
        "CLIENT SETNAME x",
        "CLIENT",
        "SUBSCRIBE a",
        "MONITOR",
        "PSYNC ? -1",
    ] {
        assert_eq!(look(&[], text), Look::Leave(Reason::SessionState), "{text}");
    }
    assert_eq!(look(&[], "NO.SUCH a"), Look::Leave(Reason::UnknownCommand));
}

#[test]
fn a_run_ends_before_what_belongs_elsewhere() {
    let elsewhere = key_slot(b"b");
    let run = |bytes: &[u8]| {
        let away = |c: &Command| c.slot == Some(elsewhere);
        match Requests::default().look(bytes, false, away, |_| ()) {
            Look::Here(run) => (run.replies, run.len as usize),
            other => panic!("{other:?}"),
        }
    };
    let (a, b, ping) = (array("GET a"), array("GET b"), array("PING"));
    assert_eq!(run(&[&a[..], &ping, &a, &b, &a].concat()), (3, 2 * a.len() + ping.len()));
    assert_eq!(run(&[&a[..], &a, &b[..b.len() - 1]].concat()), (2, 2 * a.len()));
    assert_eq!(run(&[&a[..], b"\r\nping\r\n*0\r\n*-1\r\n", &b].concat()), (2, a.len() + 17));
    assert_eq!(run(&[&a[..], &array("AUTH x")].concat()), (1, a.len()));
    // Of a long value nothing has to be there.
    let long = b"*3\r\n$3\r\nSET\r\n$1\r\na\r\n$1000000\r\nxx";
    assert_eq!(run(&[&a[..], long].concat()), (2, a.len() + long.len() - 2 + 1_000_002));
    assert_eq!(run(b"*3\r\n$3\r\nSET\r\n$1\r\na\r\n"), (1, 20));
}

#[test]
fn what_is_not_followed() {
    for (bytes, reason) in [
        (&b"*1\r\n+PING\r\n"[..], Reason::NotRedis),
        (b"*01\r\n", Reason::NotRedis),
        (b"*-2\r\n", Reason::NotRedis),
        (b"*1\n", Reason::NotRedis),
        (b"*1\r\n$-1\r\n", Reason::NotRedis),
        (b"\x16\x03\x01\x02", Reason::NotRedis),
        (b"get a\0b\r\n", Reason::NotRedis),
        (b"\"get\" a\r\n", Reason::UnknownCommand),
        (b"Host: x\r\n", Reason::UnknownCommand),
    ] {
        let looked = Requests::default().look(bytes, false, |_| false, |_| ());
        assert_eq!(looked, Look::Leave(reason), "{}", String::from_utf8_lossy(bytes));
    }
    let long = [b"get ".as_slice(), &[b'x'; MAX_HEAD]].concat();
    let looked = Requests::default().look(&long, false, |_| false, |_| ());
    assert_eq!(looked, Look::Leave(Reason::HeadTooLong));
    // A key that cannot be seen: the command stays, the connection is followed.
    let mut kept = Vec::new();
    let long = b"*2\r\n$3\r\nGET\r\n$20000\r\nabc";
    let looked = Requests::default().look(long, false, |_| true, |reason| kept.push(reason));
    assert!(matches!(looked, Look::Here(_)));
    assert_eq!(kept, [Reason::HeadTooLong]);
}
