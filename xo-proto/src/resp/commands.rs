//! Redis's commands: where their keys are (as `COMMAND` tells it), and what they do to a connection.
//!
//! Up to Redis 8. A command that is not here may do anything: the connection is left alone.

/// Where a command's keys are; numbers are positions of arguments, the command's name being 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Keys {
    /// None.
    None,
    /// From `first` to `last` (counted from the end if negative), every `step`th argument.
    Range { first: u32, last: i32, step: u32 },
    /// The number of keys stands at `at`, the keys after it; one more key at `also`, if that is not 0.
    Counted { at: u32, also: u32 },
    /// After `STREAMS`: keys, then as many ids.
    Streams,
    /// The first argument, and the one after `STORE` or `STOREDIST`.
    Store,
}

/// What a command does beside answering once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effect {
    /// Nothing.
    None,
    /// It may answer much later.
    Blocks,
    /// It runs a script, which the server knows by what was said on this server before.
    Script,
    /// MULTI.
    Multi,
    /// EXEC and DISCARD.
    EndMulti,
    /// WATCH.
    Watch,
    /// UNWATCH.
    Unwatch,
    /// SELECT: of another database than the first, unless its argument is `0`.
    Select,
    /// RESET.
    Reset,
    /// The server keeps something about the connection, or does not answer once for each request, from here on.
    State,
    /// CLIENT: by the subcommand, [`Effect::State`] or nothing.
    Client,
    /// HELLO: without arguments, or with `2` alone, nothing, else [`Effect::State`].
    Hello,
}

const ONE: Keys = Keys::Range { first: 1, last: 1, step: 1 };
const TWO: Keys = Keys::Range { first: 1, last: 2, step: 1 };
const ALL: Keys = Keys::Range { first: 1, last: -1, step: 1 };
const ALL_BUT_LAST: Keys = Keys::Range { first: 1, last: -2, step: 1 };
const PAIRS: Keys = Keys::Range { first: 1, last: -1, step: 2 };
const SECOND: Keys = Keys::Range { first: 2, last: 2, step: 1 };
const FROM_SECOND: Keys = Keys::Range { first: 2, last: -1, step: 1 };

/// Groups of commands that are alike; names apart by a space, or by the backslash at a line's end.
const GROUPS: &[(Keys, Effect, &str)] = &[
    (
        ONE,
        Effect::None,
        "GET SET SETNX SETEX PSETEX GETSET GETDEL GETEX APPEND STRLEN GETRANGE SUBSTR SETRANGE INCR DECR INCRBY DECRBY \
         INCRBYFLOAT GETBIT SETBIT BITCOUNT BITPOS BITFIELD BITFIELD_RO \
         HGET HSET HSETNX HMGET HMSET HDEL HEXISTS HGETALL HINCRBY HINCRBYFLOAT HKEYS HLEN HRANDFIELD HSCAN HSTRLEN HVALS \
         HEXPIRE HPEXPIRE HEXPIREAT HPEXPIREAT HTTL HPTTL HEXPIRETIME HPEXPIRETIME HPERSIST HGETDEL HGETEX HSETEX \
         LINDEX LINSERT LLEN LPOP LPOS LPUSH LPUSHX LRANGE LREM LSET LTRIM RPOP RPUSH RPUSHX \
         SADD SCARD SISMEMBER SMEMBERS SMISMEMBER SPOP SRANDMEMBER SREM SSCAN \
         ZADD ZCARD ZCOUNT ZINCRBY ZLEXCOUNT ZMSCORE ZPOPMAX ZPOPMIN ZRANDMEMBER ZRANGE ZRANGEBYLEX ZRANGEBYSCORE ZRANK \
         ZREM ZREMRANGEBYLEX ZREMRANGEBYRANK ZREMRANGEBYSCORE ZREVRANGE ZREVRANGEBYLEX ZREVRANGEBYSCORE ZREVRANK ZSCAN \
         ZSCORE \
         XACK XADD XAUTOCLAIM XCLAIM XDEL XLEN XPENDING XRANGE XREVRANGE XSETID XTRIM \
         GEOADD GEODIST GEOHASH GEOPOS GEOSEARCH GEORADIUS_RO GEORADIUSBYMEMBER_RO PFADD \
         DUMP RESTORE EXPIRE EXPIREAT EXPIRETIME PEXPIRE PEXPIREAT PEXPIRETIME PERSIST TTL PTTL TYPE MOVE SORT_RO SPUBLISH",
    ),
    (TWO, Effect::None, "RENAME RENAMENX RPOPLPUSH LMOVE SMOVE COPY LCS ZRANGESTORE GEOSEARCHSTORE"),
    (
        ALL,
        Effect::None,
        "DEL UNLINK EXISTS TOUCH MGET PFCOUNT PFMERGE SINTER SUNION SDIFF SINTERSTORE SUNIONSTORE SDIFFSTORE",
    ),
    (PAIRS, Effect::None, "MSET MSETNX"),
    (FROM_SECOND, Effect::None, "BITOP"),
    (SECOND, Effect::None, "OBJECT MEMORY XINFO XGROUP"),
    (Keys::Counted { at: 1, also: 0 }, Effect::None, "LMPOP ZMPOP SINTERCARD ZINTERCARD ZUNION ZINTER ZDIFF"),
    (Keys::Counted { at: 2, also: 1 }, Effect::None, "ZUNIONSTORE ZINTERSTORE ZDIFFSTORE"),
    (Keys::Store, Effect::None, "SORT GEORADIUS GEORADIUSBYMEMBER"),
    (ALL_BUT_LAST, Effect::Blocks, "BLPOP BRPOP BZPOPMIN BZPOPMAX"),
    (TWO, Effect::Blocks, "BLMOVE BRPOPLPUSH"),
    (Keys::Counted { at: 2, also: 0 }, Effect::Blocks, "BLMPOP BZMPOP"),
    (Keys::Streams, Effect::Blocks, "XREAD XREADGROUP"),
    (Keys::None, Effect::Blocks, "WAIT WAITAOF"),
    (Keys::Counted { at: 2, also: 0 }, Effect::Script, "EVAL EVALSHA EVAL_RO EVALSHA_RO FCALL FCALL_RO"),
    (
        Keys::None,
        Effect::None,
        "PING ECHO TIME QUIT INFO COMMAND CONFIG DBSIZE KEYS SCAN RANDOMKEY FLUSHALL FLUSHDB SWAPDB SAVE BGSAVE \
         BGREWRITEAOF LASTSAVE SHUTDOWN FAILOVER ROLE CLUSTER LATENCY SLOWLOG PUBLISH PUBSUB SCRIPT FUNCTION ACL MODULE \
         DEBUG LOLWUT MIGRATE",
    ),
    (Keys::None, Effect::Multi, "MULTI"),
    (Keys::None, Effect::EndMulti, "EXEC DISCARD"),
    (ALL, Effect::Watch, "WATCH"),
    (Keys::None, Effect::Unwatch, "UNWATCH"),
    (Keys::None, Effect::Select, "SELECT"),
    (Keys::None, Effect::Reset, "RESET"),
    (Keys::None, Effect::Client, "CLIENT"),
    (Keys::None, Effect::Hello, "HELLO"),
    (
        Keys::None,
        Effect::State,
        "AUTH MONITOR SUBSCRIBE PSUBSCRIBE SSUBSCRIBE UNSUBSCRIBE PUNSUBSCRIBE SUNSUBSCRIBE SYNC PSYNC REPLCONF REPLICAOF \
         SLAVEOF READONLY READWRITE ASKING",
    ),
];

/// Subcommands of CLIENT that leave nothing behind. SETINFO leaves the name of the client's library, which
/// nothing but a list of clients shows.
pub(super) const HARMLESS_CLIENT: [&str; 12] = [
    "SETINFO",
    "ID",
    "INFO",
    "LIST",
    "GETNAME",
    "GETREDIR",
    "TRACKINGINFO",
    "KILL",
    "UNBLOCK",
    "PAUSE",
    "UNPAUSE",
    "HELP",
];

/// Longest name of a command.
const LONGEST: usize = 24;
/// More than twice the number of commands, so that a search is short.
const PLACES: usize = 1024;

/// A name: its group, and where it stands in the group's text.
#[derive(Clone, Copy)]
struct Place {
    group: u8,
    at: u16,
    len: u8,
}

static INDEX: [Place; PLACES] = index();

const fn hash(name: &[u8], at: usize, len: usize) -> usize {
    let mut h: u32 = 0x811c_9dc5;
    let mut i = at;
    while i < at + len {
        // Upper case, for letters.
        h = (h ^ (name[i] & 0xdf) as u32).wrapping_mul(0x0100_0193);
        i += 1;
    }
    (h ^ h >> 15) as usize % PLACES
}

const fn index() -> [Place; PLACES] {
    let mut places = [Place { group: 0, at: 0, len: 0 }; PLACES];
    let mut group = 0;
    while group < GROUPS.len() {
        let text = GROUPS[group].2.as_bytes();
        let (mut at, mut end) = (0, 0);
        while end <= text.len() {
            if end == text.len() || text[end] == b' ' {
                assert!(end > at && end - at <= LONGEST, "a command's name");
                let mut place = hash(text, at, end - at);
                while places[place].len != 0 {
                    place = (place + 1) % PLACES;
                }
                places[place] = Place { group: group as u8, at: at as u16, len: (end - at) as u8 };
                at = end + 1;
            }
            end += 1;
        }
        group += 1;
    }
    places
}

/// Looks a command up, in any case.
pub(super) fn find(name: &[u8]) -> Option<(Keys, Effect)> {
    if name.len() > LONGEST {
        return None;
    }
    let mut place = hash(name, 0, name.len());
    loop {
        let Place { group, at, len } = INDEX[place];
        if len == 0 {
            return None;
        }
        let (keys, effect, text) = GROUPS[usize::from(group)];
        let known = text.as_bytes().get(usize::from(at)..usize::from(at) + usize::from(len));
        if known.is_some_and(|known| known.eq_ignore_ascii_case(name)) {
            return Some((keys, effect));
        }
        place = (place + 1) % PLACES;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_found_once() {
        let mut seen = std::collections::HashSet::new();
        for (keys, effect, text) in GROUPS {
            for name in text.split(' ') {
                assert!(seen.insert(name), "{name} stands twice");
                assert_eq!(find(name.to_lowercase().as_bytes()), Some((*keys, *effect)), "{name}");
            }
        }
        assert!(seen.len() > 200 && seen.len() * 2 < PLACES, "{}", seen.len());
        for unknown in ["", "GETT", "GE", "NO.SUCH", "A-NAME-LONGER-THAN-ANY-COMMAND'S", "\x07\x05\x14"] {
            assert_eq!(find(unknown.as_bytes()), None, "{unknown}");
        }
    }
}
