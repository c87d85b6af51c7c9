//! Who serves a moved connection: a server with epoll, one without, or a process for each connection.

use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use xo_tests::counters::Counters;
use xo_tests::servers::{PeerdOptions, WEB, address, address6};
use xo_tests::{Bed, Connection};

#[test]
fn a_process_for_each_connection() {
    let bed = Bed::up(1, 1);
    // The request is on descriptor 0, the answer goes to descriptor 1, the addresses are in the environment.
    let script = "#!/bin/sh\nread -r request\nwhile read -r line && [ \"$line\" != \"$(printf '\\r')\" ]; do :; done\n\
                  body=\"$request from $XO_CLIENT_ADDR port $XO_CLIENT_PORT\"\n\
                  printf 'HTTP/1.1 200 OK\\r\\nX-Node: exec\\r\\nConnection: close\\r\\n\\r\\n%s' \"$body\"\n";
    let path = bed.file("hello-handler", script);
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("mode");
    let handler = format!("[[handler]]\nname = \"web\"\nmode = \"exec\"\ncommand = [{path:?}, \"unused\"]\n");
    let _daemons = [
        bed.peerd("host", &PeerdOptions::default()),
        bed.peerd("t1", &PeerdOptions { sections: handler, ..PeerdOptions::default() }),
    ];
    let _nginx = bed.nginx("host");
    let before = Counters::of(&bed);
    for (host, client) in [(address("host"), address("client")), (address6("host"), address6("client"))] {
        let (port, response, rest) = bed.on("client", move || {
            let mut c = Connection::to(&host, 80).expect("connect");
            c.get("/loc/1k").expect("local");
            c.send(b"GET /img/hello HTTP/1.1\r\nHost: x\r\n\r\n").expect("send");
            let port = c.stream().local_addr().expect("address").port();
            (port, c.response(false).expect("moved"), c.rest().expect("a clean end"))
        });
        let text = String::from_utf8(response.body).expect("text");
        assert_eq!(text.replace('\r', ""), format!("GET /img/hello HTTP/1.1 from {client} port {port}"));
        assert_eq!(rest, b"");
    }
    let counted = Counters::of(&bed).since(&before);
    counted.no_reset(&bed);
    assert_eq!(counted.losses(), 0, "{}", counted.troubles());
    assert_eq!(bed.status("t1", "/accepted_total"), 2);
}

#[test]
fn a_server_without_epoll() {
    let bed = Bed::up(1, 1);
    let handler = WEB.replace("port = 80", "port = 8080");
    let _daemons = [
        bed.peerd("host", &PeerdOptions::default()),
        bed.peerd("t1", &PeerdOptions { sections: handler, ..PeerdOptions::default() }),
    ];
    let _nginx = bed.nginx("host");
    // Python's threading server waits with poll() and blocks in reads: it is woken by a loopback connection.
    let program = "import http.server, sys\n\
        class Handler(http.server.BaseHTTPRequestHandler):\n\
        \x20   protocol_version = 'HTTP/1.1'\n\
        \x20   def do_GET(self):\n\
        \x20       body = (self.path + ' for ' + self.client_address[0]).encode()\n\
        \x20       self.send_response(200)\n\
        \x20       self.send_header('X-Node', 'python')\n\
        \x20       self.send_header('Content-Length', str(len(body)))\n\
        \x20       self.end_headers()\n\
        \x20       self.wfile.write(body)\n\
        class Server(http.server.ThreadingHTTPServer):\n\
        \x20   request_queue_size = 128\n\
        Server(('', 8080), Handler).serve_forever()\n";
    let path = bed.file("server.py", program);
    let policy = "listen = [8080]\n";
    let mut command: Command = bed.preloaded("t1", "python3");
    command.arg(path).env("XO_POLICY", bed.file("target-policy.toml", policy));
    let mut python = bed.start("t1", "t1-python", &mut command);
    bed.wait_listening("t1", 8080, &mut python);
    bed.wait_acceptors("t1", "web", 1);
    let threads: Vec<_> = (0..20)
        .map(|i| {
            bed.spawn("client", move || {
                let mut c = Connection::to(&address("host"), 80).expect("connect");
                for j in 0..5 {
                    let path = format!("/img/{i}-{j}");
                    c.send(format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes()).expect("send");
                    let response = c.response(false).unwrap_or_else(|e| panic!("{path}: {e}"));
                    assert_eq!(response.node(), "python");
                    assert_eq!(String::from_utf8_lossy(&response.body), format!("{path} for 10.1.0.2"));
                }
            })
        })
        .collect();
    let failed = threads.into_iter().filter_map(|t| t.join().err()).count();
    assert_eq!(failed, 0, "connections that failed");
    assert_eq!(bed.status("t1", "/accepted_total"), 20);
    bed.wait_idle(&["host", "t1"]);
}
