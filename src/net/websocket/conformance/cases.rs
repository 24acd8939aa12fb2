//! What the server sends in each case, and what must come of it. After a case's bytes the server
//! always sends a close with status 1000.

const TEXT: u8 = 1;
const BINARY: u8 = 2;
const CLOSE: u8 = 8;
const PING: u8 = 9;
const PONG: u8 = 10;
const FIN: u8 = 0x80;

const PROTOCOL: Ending = Ending::Violation(1002);
const NO_UTF8: Ending = Ending::Violation(1007);
const TOO_LARGE: Ending = Ending::Violation(1009);
const GOODBYE: Ending = Ending::Clean(Some(1000));

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// The server's close is answered with its status.
    Clean(Option<u16>),
    /// The client closes with this status.
    Violation(u16),
}

#[derive(Debug)]
pub struct Case {
    pub id: String,
    pub group: &'static str,
    pub what: String,
    /// Written one after another.
    pub pieces: Vec<Vec<u8>>,
    pub texts: Vec<String>,
    pub pongs: Vec<Vec<u8>>,
    pub only_last_pong: bool,
    pub ending: Ending,
}

struct Cases {
    list: Vec<Case>,
    group: &'static str,
}

impl Cases {
    fn add(&mut self, id: &str, what: &str, frames: Vec<Vec<u8>>, ending: Ending) -> &mut Case {
        self.list.push(Case {
            id: id.to_owned(),
            group: self.group,
            what: what.to_owned(),
            pieces: vec![frames.concat()],
            texts: Vec::new(),
            pongs: Vec::new(),
            only_last_pong: false,
            ending,
        });
        self.list.last_mut().expect("just added")
    }
}

impl Case {
    fn reads(&mut self, texts: &[&str]) -> &mut Case {
        self.texts = texts.iter().map(|&text| text.to_owned()).collect();
        self
    }

    fn pongs(&mut self, pongs: &[&[u8]]) -> &mut Case {
        self.pongs = pongs.iter().map(|pong| pong.to_vec()).collect();
        self
    }

    /// In pieces of so many bytes.
    fn chopped(&mut self, bytes: usize) -> &mut Case {
        let whole = self.pieces.concat();
        self.pieces = whole.chunks(bytes).map(<[u8]>::to_vec).collect();
        self
    }
}

/// A frame as a server sends it; `first` is its first byte.
fn raw(first: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![first];
    match payload.len() {
        len @ ..126 => bytes.push(len as u8),
        len @ ..0x1_0000 => {
            bytes.push(126);
            bytes.extend((len as u16).to_be_bytes());
        }
        len => {
            bytes.push(127);
            bytes.extend((len as u64).to_be_bytes());
        }
    }
    bytes.extend(payload);
    bytes
}

fn whole(opcode: u8, payload: &[u8]) -> Vec<u8> {
    raw(FIN | opcode, payload)
}

/// A message in fragments of these payloads.
fn fragments(opcode: u8, payloads: &[&[u8]]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (at, payload) in payloads.iter().enumerate() {
        let fin = if at + 1 == payloads.len() { FIN } else { 0 };
        bytes.extend(raw(fin | if at == 0 { opcode } else { 0 }, payload));
    }
    bytes
}

fn close(status: u16, reason: &[u8]) -> Vec<u8> {
    whole(CLOSE, &[&status.to_be_bytes(), reason].concat())
}

pub fn all() -> Vec<Case> {
    let mut cases = Cases {
        list: Vec::new(),
        group: "",
    };
    framing(&mut cases);
    pings(&mut cases);
    reserved_bits(&mut cases);
    opcodes(&mut cases);
    fragmentation(&mut cases);
    utf8(&mut cases);
    closing(&mut cases);
    limits(&mut cases);
    cases.list
}

fn framing(cases: &mut Cases) {
    cases.group = "framing";
    for (at, bytes) in [0, 125, 126, 127, 128, 65_535, 65_536].iter().enumerate() {
        let text = "*".repeat(*bytes);
        let frames = || vec![whole(TEXT, text.as_bytes())];
        let (id, what) = (at + 1, format!("a text of {bytes} bytes"));
        cases
            .add(&format!("1.1.{id}"), &what, frames(), GOODBYE)
            .reads(&[&text]);
        let what = format!("a binary message of {bytes} bytes");
        let frames = vec![whole(BINARY, text.as_bytes())];
        cases.add(&format!("1.2.{id}"), &what, frames, Ending::Violation(1003));
    }
    let text = "*".repeat(65_536);
    let frames = vec![whole(TEXT, text.as_bytes())];
    let case = cases.add("1.1.8", "a text in pieces of 997 bytes", frames, GOODBYE);
    case.reads(&[&text]).chopped(997);
}

fn pings(cases: &mut Cases) {
    cases.group = "pings and pongs";
    let long = [0xfe; 125];
    let payloads: [&[u8]; 4] = [
        b"",
        b"Hello, world!",
        b"\x00\xff\xfe\xfd\xfc\xfb\x00\xff",
        &long,
    ];
    for (at, payload) in payloads.iter().enumerate() {
        let frames = vec![whole(PING, payload)];
        let id = format!("2.{}", at + 1);
        cases.add(&id, "a ping", frames, GOODBYE).pongs(&[payload]);
    }
    let frames = vec![whole(PING, &[0xfe; 126])];
    cases.add("2.5", "a ping of 126 bytes", frames, PROTOCOL);
    let case = cases.add(
        "2.6",
        "a ping, byte by byte",
        vec![whole(PING, &long)],
        GOODBYE,
    );
    case.pongs(&[&long]).chopped(1);
    cases.add(
        "2.7",
        "a pong that nobody asked for",
        vec![whole(PONG, b"")],
        GOODBYE,
    );
    cases.add(
        "2.8",
        "one with a payload",
        vec![whole(PONG, b"unsolicited")],
        GOODBYE,
    );
    let frames = vec![whole(PONG, b"unsolicited"), whole(PING, b"ping")];
    cases
        .add("2.9", "one before a ping", frames, GOODBYE)
        .pongs(&[b"ping"]);
    for (id, piece) in [("2.10", usize::MAX), ("2.11", 1)] {
        let frames = (0..10)
            .map(|number: u8| whole(PING, &[b'0' + number]))
            .collect();
        let case = cases.add(id, "ten pings", frames, GOODBYE).pongs(&[b"9"]);
        case.chopped(piece).only_last_pong = true;
    }
}

fn reserved_bits(cases: &mut Cases) {
    cases.group = "reserved bits";
    let set = |opcode: u8, bits: u8, payload: &[u8]| raw(FIN | bits << 4 | opcode, payload);
    let hello = || whole(TEXT, b"hello");
    let mut add = |id, before: bool, bad: Vec<u8>, piece: usize| {
        let frames = if before {
            vec![hello(), bad]
        } else {
            vec![bad]
        };
        let case = cases.add(id, "reserved bits are set", frames, PROTOCOL);
        case.chopped(piece);
        if before {
            case.reads(&["hello"]);
        }
    };
    add("3.1", false, set(TEXT, 1, b"hello"), usize::MAX);
    add("3.2", true, set(TEXT, 2, b"hello"), usize::MAX);
    add("3.3", true, set(TEXT, 3, b"hello"), 6);
    add("3.4", true, set(TEXT, 4, b"hello"), 1);
    add("3.5", false, set(BINARY, 5, b"\x00\xff"), usize::MAX);
    add("3.6", false, set(PING, 6, b"hello"), usize::MAX);
    add("3.7", false, set(CLOSE, 7, b""), usize::MAX);
}

fn opcodes(cases: &mut Cases) {
    cases.group = "opcodes";
    for (part, first) in [(1, 3), (2, 11)] {
        for number in 0..5 {
            let id = format!("4.{part}.{}", number + 1);
            let what = format!("opcode {}", first + number);
            let payload: &[u8] = if number % 2 == 0 { b"" } else { b"payload" };
            let bad = whole(first + number, payload);
            if number < 2 {
                cases.add(&id, &what, vec![bad, whole(PING, b"")], PROTOCOL);
            } else {
                let frames = vec![whole(TEXT, b"hello"), bad, whole(PING, b"")];
                let case = cases.add(&id, &what, frames, PROTOCOL).reads(&["hello"]);
                if number == 4 {
                    case.chopped(1);
                }
            }
        }
    }
}

fn fragmentation(cases: &mut Cases) {
    cases.group = "fragmentation";
    let parts: &[&[u8]] = &[b"fragment1", b"fragment2"];
    let joined = "fragment1fragment2";
    cases.add(
        "5.1",
        "a ping in fragments",
        vec![fragments(PING, parts)],
        PROTOCOL,
    );
    cases.add(
        "5.2",
        "a pong in fragments",
        vec![fragments(PONG, parts)],
        PROTOCOL,
    );
    for (id, piece) in [("5.3", usize::MAX), ("5.4", 10), ("5.5", 1)] {
        let case = cases.add(
            id,
            "a text in fragments",
            vec![fragments(TEXT, parts)],
            GOODBYE,
        );
        case.reads(&[joined]).chopped(piece);
    }
    for (id, piece) in [("5.6", usize::MAX), ("5.7", 10), ("5.8", 1)] {
        let frames = vec![
            raw(TEXT, parts[0]),
            whole(PING, b"ping"),
            whole(0, parts[1]),
        ];
        let case = cases.add(id, "a ping between fragments", frames, GOODBYE);
        case.reads(&[joined]).pongs(&[b"ping"]).chopped(piece);
    }
    for (at, piece) in [usize::MAX, 10, 1].into_iter().enumerate() {
        for (first, fin) in [(9, FIN), (12, 0)] {
            let id = format!("5.{}", first + at);
            let frames = vec![raw(fin, b"nothing to continue"), whole(TEXT, b"hello")];
            let case = cases.add(&id, "a continuation of nothing", frames, PROTOCOL);
            case.chopped(piece);
        }
    }
    let frames = vec![
        fragments(TEXT, parts),
        raw(0, b"more"),
        whole(TEXT, b"hello"),
    ];
    let case = cases.add("5.15", "a continuation behind the end", frames, PROTOCOL);
    case.reads(&[joined]);
    for (id, fin) in [("5.16", 0), ("5.17", FIN)] {
        let frames = [raw(fin, b"one"), raw(TEXT, b"two"), whole(0, b"three")];
        cases.add(
            id,
            "a continuation before the begin",
            vec![frames.concat().repeat(2)],
            PROTOCOL,
        );
    }
    let frames = vec![raw(TEXT, b"one"), whole(TEXT, b"two")];
    cases.add("5.18", "a text within a text", frames, PROTOCOL);
    for (id, piece) in [("5.19", usize::MAX), ("5.20", 1)] {
        let frames = vec![
            raw(TEXT, b"1"),
            raw(0, b"2"),
            whole(PING, b"first"),
            raw(0, b"3"),
            raw(0, b"4"),
            whole(PING, b"second"),
            whole(0, b"5"),
        ];
        let case = cases.add(id, "five fragments with pings", frames, GOODBYE);
        case.reads(&["12345"]).pongs(&[b"second"]).chopped(piece);
        case.only_last_pong = true;
    }
}

const VALID: &[&[u8]] = &[
    // All lengths of one word, up to each character's end (6.5, 6.6).
    b"\xce\xba",
    b"\xce\xba\xe1\xbd\xb9",
    b"\xce\xba\xe1\xbd\xb9\xcf\x83",
    b"\xce\xba\xe1\xbd\xb9\xcf\x83\xce\xbc\xce\xb5",
    // First and last of each length, and the edges of the surrogates (6.7, 6.9, 6.11).
    b"\x00",
    b"\xc2\x80",
    b"\xe0\xa0\x80",
    b"\xf0\x90\x80\x80",
    b"\x7f",
    b"\xdf\xbf",
    b"\xef\xbf\xbf",
    b"\xf4\x8f\xbf\xbf",
    b"\xed\x9f\xbf",
    b"\xee\x80\x80",
    b"\xef\xbf\xbd",
    // No characters, but no errors either (6.22, 6.23).
    b"\xef\xbf\xbe",
    b"\xf0\x9f\xbf\xbe",
    b"\xf0\x9f\xbf\xbf",
    b"\xf4\x8f\xbf\xbe",
    b"\xef\xbf\xb9",
];

const INVALID: &[&[u8]] = &[
    // The word, cut within a character (6.6).
    b"\xce",
    b"\xce\xba\xe1",
    b"\xce\xba\xe1\xbd",
    b"\xce\xba\xe1\xbd\xb9\xcf",
    // Five and six bytes, and too far (6.8, 6.10, 6.11).
    b"\xf8\x88\x80\x80\x80",
    b"\xfc\x84\x80\x80\x80\x80",
    b"\xf7\xbf\xbf\xbf",
    b"\xfb\xbf\xbf\xbf\xbf",
    b"\xfd\xbf\xbf\xbf\xbf\xbf",
    b"\xf4\x90\x80\x80",
    // Continuations alone, and starts alone (6.12 to 6.15).
    b"\x80",
    b"\xbf",
    b"\x80\xbf",
    b"\x80\xbf\x80\xbf\x80\xbf",
    b"\xc0 \xc1 \xc2 \xdf ",
    b"\xe0 \xe8 \xef ",
    b"\xf0 \xf4 \xf7 ",
    b"\xf8 \xfb ",
    b"\xfc \xfd ",
    b"\xe0\x80",
    b"\xf0\x80\x80",
    b"\xdf",
    b"\xef\xbf",
    b"\xf7\xbf\xbf",
    b"\xc0\xe0\x80\xf0\x80\x80",
    // Bytes that never occur (6.16).
    b"\xfe",
    b"\xff",
    b"\xfe\xfe\xff\xff",
    // Longer than need be (6.17 to 6.19).
    b"\xc0\xaf",
    b"\xe0\x80\xaf",
    b"\xf0\x80\x80\xaf",
    b"\xc1\xbf",
    b"\xe0\x9f\xbf",
    b"\xf0\x8f\xbf\xbf",
    b"\xc0\x80",
    b"\xe0\x80\x80",
    b"\xf0\x80\x80\x80",
    // Surrogates (6.20, 6.21).
    b"\xed\xa0\x80",
    b"\xed\xad\xbf",
    b"\xed\xbf\xbf",
    b"\xed\xa0\x80\xed\xb0\x80",
    b"\xed\xaf\xbf\xed\xbf\xbf",
];

fn utf8(cases: &mut Cases) {
    cases.group = "UTF-8";
    cases
        .add("6.1.1", "an empty text", vec![whole(TEXT, b"")], GOODBYE)
        .reads(&[""]);
    let frames = vec![fragments(TEXT, &[b"", b"", b""])];
    cases
        .add("6.1.2", "three empty fragments", frames, GOODBYE)
        .reads(&[""]);
    let frames = vec![fragments(TEXT, &[b"", b"middle", b""])];
    cases
        .add("6.1.3", "two empty fragments", frames, GOODBYE)
        .reads(&["middle"]);
    let text = "Hello-\u{b5}@\u{df}\u{f6}\u{e4}\u{fc}\u{e0}\u{e1}-UTF-8!!";
    let bytes = text.as_bytes();
    let frames = vec![whole(TEXT, bytes)];
    cases
        .add("6.2.1", "characters of two bytes", frames, GOODBYE)
        .reads(&[text]);
    for (id, at) in [("6.2.2", 6), ("6.2.3", 7)] {
        let (head, tail) = bytes.split_at(at);
        let frames = vec![fragments(TEXT, &[head, tail])];
        let case = cases.add(id, "a character in two fragments", frames, GOODBYE);
        case.reads(&[text]);
    }
    let single: Vec<&[u8]> = bytes.chunks(1).collect();
    let case = cases.add(
        "6.2.4",
        "fragments of one byte",
        vec![fragments(TEXT, &single)],
        GOODBYE,
    );
    case.reads(&[text]);
    let bad = b"\xce\xba\xe1\xbd\xb9\xcf\x83\xce\xbc\xce\xb5\xed\xa0\x80edited";
    cases.add("6.3.1", "a surrogate", vec![whole(TEXT, bad)], NO_UTF8);
    let single: Vec<&[u8]> = bad.chunks(1).collect();
    let frames = vec![fragments(TEXT, &single)];
    cases.add("6.3.2", "a surrogate in fragments", frames, NO_UTF8);
    for (id, at) in [("6.4.1", 11), ("6.4.2", 12), ("6.4.3", 13), ("6.4.4", 14)] {
        let (head, tail) = bad.split_at(at);
        let frames = vec![fragments(TEXT, &[head, tail])];
        cases.add(id, "a surrogate cut by a fragment", frames, NO_UTF8);
    }
    for (number, bytes) in (1..).zip(VALID) {
        let text = str::from_utf8(bytes).expect("valid");
        let frames = vec![whole(TEXT, bytes)];
        let what = format!("{bytes:02x?}");
        cases
            .add(&format!("6.5.{number}"), &what, frames, GOODBYE)
            .reads(&[text]);
    }
    for (number, bytes) in (1..).zip(INVALID) {
        let frames = vec![whole(TEXT, bytes)];
        cases.add(
            &format!("6.6.{number}"),
            &format!("{bytes:02x?}"),
            frames,
            NO_UTF8,
        );
    }
}

fn closing(cases: &mut Cases) {
    cases.group = "closing";
    let bye = || close(1000, b"");
    let hello = || whole(TEXT, b"hello");
    cases
        .add("7.1.1", "a text before it", vec![hello(), bye()], GOODBYE)
        .reads(&["hello"]);
    cases.add("7.1.2", "two closes", vec![bye(), bye()], GOODBYE);
    cases.add(
        "7.1.3",
        "a ping behind it",
        vec![bye(), whole(PING, b"")],
        GOODBYE,
    );
    cases.add("7.1.4", "a text behind it", vec![bye(), hello()], GOODBYE);
    let frames = vec![raw(TEXT, b"one"), bye(), whole(0, b"two")];
    cases.add("7.1.5", "a fragment before it", frames, GOODBYE);
    let large = "x".repeat(256 * 1024);
    let frames = vec![whole(TEXT, large.as_bytes()), bye(), whole(PING, b"")];
    cases
        .add("7.1.6", "a large text before it", frames, GOODBYE)
        .reads(&[&large]);
    let frames = vec![whole(CLOSE, b"")];
    cases.add("7.3.1", "no status", frames, Ending::Clean(None));
    cases.add(
        "7.3.2",
        "half a status",
        vec![whole(CLOSE, b"\x03")],
        PROTOCOL,
    );
    cases.add("7.3.3", "a status", vec![bye()], GOODBYE);
    cases.add(
        "7.3.4",
        "a reason",
        vec![close(1000, b"Hello World!")],
        GOODBYE,
    );
    cases.add(
        "7.3.5",
        "a reason of 123 bytes",
        vec![close(1000, &[b'*'; 123])],
        GOODBYE,
    );
    cases.add(
        "7.3.6",
        "a reason of 124 bytes",
        vec![close(1000, &[b'*'; 124])],
        PROTOCOL,
    );
    let frames = vec![close(1000, b"\xce\xba\xed\xa0\x80")];
    cases.add("7.5.1", "a reason that is no UTF-8", frames, NO_UTF8);
    let valid = [
        1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 3000, 3999, 4000, 4999,
    ];
    for (number, status) in (1..).zip(valid) {
        let ending = Ending::Clean(Some(status));
        let what = format!("status {status}");
        cases.add(
            &format!("7.7.{number}"),
            &what,
            vec![close(status, b"")],
            ending,
        );
    }
    let invalid = [
        0, 999, 1004, 1005, 1006, 1016, 1100, 2000, 2999, 5000, 65_535,
    ];
    for (number, status) in (1..).zip(invalid) {
        let what = format!("status {status}");
        cases.add(
            &format!("7.9.{number}"),
            &what,
            vec![close(status, b"")],
            PROTOCOL,
        );
    }
}

fn limits(cases: &mut Cases) {
    cases.group = "limits";
    const MIB: usize = 1 << 20;
    for (number, bytes) in (1..).zip([64 << 10, 256 << 10, MIB]) {
        let text = "*".repeat(bytes);
        let frames = vec![whole(TEXT, text.as_bytes())];
        let what = format!("a text of {bytes} bytes");
        cases
            .add(&format!("9.1.{number}"), &what, frames, GOODBYE)
            .reads(&[&text]);
    }
    for (number, bytes) in (4..).zip([MIB + 1, 4 * MIB, 16 * MIB]) {
        // The frame's head is enough.
        let mut frame = whole(TEXT, &vec![b'*'; bytes]);
        frame.truncate(2000);
        let what = format!("a text of {bytes} bytes");
        cases.add(&format!("9.1.{number}"), &what, vec![frame], TOO_LARGE);
    }
    let text = "*".repeat(MIB);
    for (number, bytes) in (1..).zip([256, 1 << 10, 16 << 10, 256 << 10]) {
        let parts: Vec<&[u8]> = text.as_bytes().chunks(bytes).collect();
        let frames = vec![fragments(TEXT, &parts)];
        let what = format!("a megabyte in fragments of {bytes} bytes");
        cases
            .add(&format!("9.3.{number}"), &what, frames, GOODBYE)
            .reads(&[&text]);
    }
    let longer = "*".repeat(MIB + 1);
    let parts: Vec<&[u8]> = longer.as_bytes().chunks(4096).collect();
    let frames = vec![fragments(TEXT, &parts)];
    cases.add(
        "9.3.5",
        "a megabyte and a byte in fragments",
        frames,
        TOO_LARGE,
    );
    cases.group = "automatic fragmentation";
    let text = "*".repeat(65_536);
    let parts: Vec<&[u8]> = text.as_bytes().chunks(1300).collect();
    let frames = vec![fragments(TEXT, &parts)];
    cases
        .add(
            "10.1.1",
            "64 KiB in fragments of 1,300 bytes",
            frames,
            GOODBYE,
        )
        .reads(&[&text]);
}
