//! The journal of one attempt: everything that was accepted for it, in the order of acceptance.
//!
//! One append-only file an attempt holds the task itself, both output streams, its lifecycle and
//! its final as records. So a group of messages is durable after one write and one `fdatasync`;
//! what was accepted (highest sequences, byte counts, jumps) is derived from the file and cannot
//! disagree with it; and a position in the file is all that an operator stream needs to go on.
//! sled would write each output byte several times over, so it gets none of them.
//!
//! Record: 32 bytes of header, little-endian, then the payload.
//!
//! | offset | field |
//! | --- | --- |
//! | 0 | kind (u8), flags (u8), zero (u16) |
//! | 4 | payload length (u32) |
//! | 8 | sequence (u64), 0 where the kind has none |
//! | 16 | bytes that the payload stands for (u64) |
//! | 24 | CRC32C of the payload (u32) |
//! | 28 | CRC32C of the 28 bytes before (u32) |
//!
//! Invariant: records are only ever appended. After a crash the first record that does not check
//! is the end: all behind it was never acknowledged, and is cut off before anything is appended.

use std::io::{self, Read};

use crate::ids::Stream;
use crate::limits::GATEWAY_MESSAGE_BYTES_MAX;

pub const HEADER_BYTES: usize = 32;

/// The chunk came flagged `truncated_locally` and begins after a jump.
pub const FLAG_JUMP: u8 = 1;
/// The chunk came as text that may hold U+FFFD for bytes that were something else.
pub const FLAG_INEXACT: u8 = 2;

/// What a record says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// First record: the task, as JSON.
    Task,
    Received,
    Started,
    /// An operator asked for the end; the payload is the reason.
    Cancel,
    Output(Stream),
    /// The result, as JSON.
    Final,
}

impl Kind {
    fn code(self) -> u8 {
        match self {
            Kind::Task => 1,
            Kind::Received => 2,
            Kind::Started => 3,
            Kind::Cancel => 4,
            Kind::Output(Stream::Stdout) => 5,
            Kind::Output(Stream::Stderr) => 6,
            Kind::Final => 7,
        }
    }

    fn of(code: u8) -> Option<Kind> {
        Some(match code {
            1 => Kind::Task,
            2 => Kind::Received,
            3 => Kind::Started,
            4 => Kind::Cancel,
            5 => Kind::Output(Stream::Stdout),
            6 => Kind::Output(Stream::Stderr),
            7 => Kind::Final,
            _ => return None,
        })
    }
}

/// A record without its payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    pub kind: Kind,
    pub flags: u8,
    pub length: usize,
    pub sequence: u64,
    pub byte_count: u64,
    /// CRC32C of the payload.
    pub checksum: u32,
}

impl Header {
    /// Header of a record that is no output.
    pub fn plain(kind: Kind, payload: &[u8]) -> Header {
        Header {
            kind,
            flags: 0,
            length: payload.len(),
            sequence: 0,
            byte_count: payload.len() as u64,
            checksum: crc32c::crc32c(payload),
        }
    }

    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let length = u32::try_from(self.length).expect("a payload is bounded far below 4 GiB");
        let mut bytes = [0; HEADER_BYTES];
        bytes[0] = self.kind.code();
        bytes[1] = self.flags;
        bytes[4..8].copy_from_slice(&length.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.byte_count.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.checksum.to_le_bytes());
        let guard = crc32c::crc32c(&bytes[..28]);
        bytes[28..].copy_from_slice(&guard.to_le_bytes());
        bytes
    }

    /// `None` if this is no header, or one of a payload that is never written.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Option<Header> {
        let u32_at = |at: usize| {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        if crc32c::crc32c(&bytes[..28]) != u32_at(28) {
            return None;
        }
        let length = usize::try_from(u32_at(4)).ok()?;
        if length > GATEWAY_MESSAGE_BYTES_MAX {
            return None;
        }
        Some(Header {
            kind: Kind::of(bytes[0])?,
            flags: bytes[1],
            length,
            sequence: u64_at(8),
            byte_count: u64_at(16),
            checksum: u32_at(24),
        })
    }

    /// Bytes of the whole record.
    pub fn record_bytes(&self) -> u64 {
        (HEADER_BYTES + self.length) as u64
    }
}

/// Appends one record to `out`.
pub fn append(out: &mut Vec<u8>, header: Header, payload: &[u8]) {
    debug_assert_eq!(header.length, payload.len());
    out.extend_from_slice(&header.encode());
    out.extend_from_slice(payload);
}

/// Reads records from the beginning of `file` and hands each to `record`. Returns the bytes up to
/// the end of the last good one.
pub fn scan(mut file: impl Read, mut record: impl FnMut(&Header, &[u8])) -> io::Result<u64> {
    let mut good = 0;
    let mut payload = Vec::new();
    loop {
        let mut bytes = [0; HEADER_BYTES];
        if !read_whole(&mut file, &mut bytes)? {
            return Ok(good);
        }
        let Some(header) = Header::decode(&bytes) else {
            return Ok(good);
        };
        payload.resize(header.length, 0);
        if !read_whole(&mut file, &mut payload)? || crc32c::crc32c(&payload) != header.checksum {
            return Ok(good);
        }
        record(&header, &payload);
        good += header.record_bytes();
    }
}

/// `false` if the file ended before `buffer` was full.
fn read_whole(file: &mut impl Read, buffer: &mut [u8]) -> io::Result<bool> {
    match file.read_exact(buffer) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

/// Takes the first whole record off `bytes`: its header, its payload and the rest. `Ok(None)` if
/// more bytes are needed; `Err` if this is no record.
#[allow(clippy::type_complexity)]
pub fn split_first(bytes: &[u8]) -> Result<Option<(Header, &[u8], &[u8])>, &'static str> {
    let Some((head, rest)) = bytes.split_first_chunk::<HEADER_BYTES>() else {
        return Ok(None);
    };
    let header = Header::decode(head).ok_or("no record begins here")?;
    if rest.len() < header.length {
        return Ok(None);
    }
    let (payload, rest) = rest.split_at(header.length);
    if crc32c::crc32c(payload) != header.checksum {
        return Err("the checksum of a record is wrong");
    }
    Ok(Some((header, payload, rest)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn journal() -> Vec<u8> {
        let mut bytes = Vec::new();
        append(&mut bytes, Header::plain(Kind::Task, b"{}"), b"{}");
        let payload = b"output";
        let header = Header {
            kind: Kind::Output(Stream::Stderr),
            flags: FLAG_JUMP,
            length: payload.len(),
            sequence: 7,
            byte_count: 9,
            checksum: crc32c::crc32c(payload),
        };
        append(&mut bytes, header, payload);
        bytes
    }

    fn kinds(bytes: &[u8]) -> (Vec<Kind>, u64) {
        let mut kinds = Vec::new();
        let good = scan(bytes, |header, _| kinds.push(header.kind)).expect("memory");
        (kinds, good)
    }

    #[test]
    fn records_are_read_back() {
        let bytes = journal();
        let both = vec![Kind::Task, Kind::Output(Stream::Stderr)];
        assert_eq!(kinds(&bytes), (both, bytes.len() as u64));
        let (header, payload, rest) = split_first(&bytes[34..]).expect("good").expect("whole");
        assert_eq!(
            (header.sequence, header.byte_count, header.flags),
            (7, 9, 1)
        );
        assert_eq!((payload, rest.len()), (&b"output"[..], 0));
    }

    #[test]
    fn a_torn_or_changed_tail_ends_the_journal_at_the_last_good_record() {
        let bytes = journal();
        for cut in 34..bytes.len() {
            assert_eq!(kinds(&bytes[..cut]), (vec![Kind::Task], 34), "{cut}");
        }
        for changed in 34..bytes.len() {
            let mut bytes = bytes.clone();
            bytes[changed] ^= 0x20;
            assert_eq!(kinds(&bytes), (vec![Kind::Task], 34), "{changed}");
        }
    }
}
