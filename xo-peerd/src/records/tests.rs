use xo_proto::tls::Content;
use xo_sys::ktls;

use super::*;
use crate::ktls::tests::{queue, states};

fn layers(wanted: Records) -> RecordLayers {
    RecordLayers { wanted, kernel: KernelTls::probe(wanted), relay: None }
}

#[test]
fn the_kernel_has_what_it_can_follow() {
    let [auto, kernel, library] = [Records::Auto, Records::Kernel, Records::Library].map(layers);
    let has = ktls::probe().is_ok();
    assert_eq!(auto.name(), if has { "kernel_tls12" } else { "library" });
    assert_eq!((kernel.name(), library.name()), ("kernel", "library"));
    for state in states() {
        let is_kernel = |layers: &RecordLayers| match layers.choose(&state, &[]) {
            Ok(Choice::Kernel(0)) => Some(true),
            Ok(Choice::Relay(_, 0)) => Some(false),
            Ok(_) => panic!("nothing waits"),
            Err(_) => None,
        };
        assert_eq!(is_kernel(&library), Some(false));
        assert_eq!(is_kernel(&kernel), has.then_some(true));
        assert_eq!(is_kernel(&auto), Some(has && state.version == Version::Tls12), "{state:?}");
    }
}

#[test]
fn what_waits_is_counted_over_new_keys() {
    let library = layers(Records::Library);
    for state in states() {
        let mut records = vec![(Content::Data, &b"GET"[..]), (Content::Data, &[]), (Content::Data, b" /")];
        let mut bytes = queue(&state, &records);
        let waiting = |bytes: &[u8]| match library.choose(&state, bytes) {
            Ok(Choice::Relay(_, waiting)) => waiting,
            _ => panic!("not the relay"),
        };
        assert_eq!(waiting(&bytes), 5);
        bytes.pop();
        assert_eq!(waiting(&bytes), 3);
        // The kernel would refuse what waits: a new key, or a second handshake.
        let update: &[u8] = if state.version == Version::Tls13 { &[24, 0, 0, 1, 0] } else { &[1, 0, 0, 0] };
        records.push((Content::Handshake, update));
        assert_eq!(waiting(&queue(&state, &records)), 5);
    }
}
