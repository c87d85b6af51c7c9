//! The programs on one packet at a time (BPF_PROG_TEST_RUN), from tables of fixtures; the maps; and what
//! only a real interface shows.

mod bench;
mod cost;
mod fixture;
mod frame;
mod live;
mod maps;
mod sweep;
mod tap;
mod veth;
mod xdp;

use bench::Hook;

#[test]
fn ingress_passes_and_redirects() {
    fixture::run(Hook::Ingress, include_str!("tests/ingress.toml"));
}

#[test]
fn errors_go_where_the_connection_is() {
    fixture::run(Hook::Ingress, include_str!("tests/quote.toml"));
}

#[test]
fn ingress_holds() {
    fixture::run(Hook::Ingress, include_str!("tests/hold.toml"));
}

#[test]
fn ingress_leaves_to_rules_what_they_take() {
    fixture::run(Hook::Ingress, include_str!("tests/rules.toml"));
}

#[test]
fn egress_rewrites() {
    fixture::run(Hook::Egress, include_str!("tests/egress.toml"));
}

#[test]
fn plain_segments_take_the_fast_path() {
    fixture::run(Hook::Xdp, include_str!("tests/xdp.toml"));
}
