//! What the tasks of the benchmark run: this program, printing. It costs less than a shell would.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

const BLOCK_BYTES: usize = 64 * 1024;
const LINE: &[u8] = b"2026-01-31T12:00:00.000Z sensor/07 temperature=20.75 humidity=41 \"ok\"\n";

/// `bulk BYTES`, `both BYTES` or `lines COUNT INTERVAL_US BYTES`; the words of the command line.
pub fn run(words: &[String]) -> Result<(), String> {
    let number = |at: usize| -> Result<u64, String> {
        let word = words.get(at).ok_or("a number is missing")?;
        word.parse().map_err(|_| format!("{word} is no number"))
    };
    match words.first().map(String::as_str) {
        Some("bulk") => bulk(number(1)?),
        Some("both") => both(number(1)?),
        Some("lines") => lines(
            number(1)?,
            Duration::from_micros(number(2)?),
            number(3)? as usize,
        ),
        _ => return Err("print what?".to_owned()),
    }
    .map_err(|error| format!("cannot print: {error}"))
}

/// Text lines without end, cut anywhere.
fn block() -> Vec<u8> {
    LINE.iter().copied().cycle().take(BLOCK_BYTES).collect()
}

/// A block of the text that [`bulk`] prints.
pub fn sample(bytes: usize) -> Vec<u8> {
    LINE.iter().copied().cycle().take(bytes).collect()
}

fn bulk(bytes: u64) -> io::Result<()> {
    let block = block();
    let mut out = unbuffered(io::stdout())?;
    let mut left = bytes;
    while left > 0 {
        let count = left.min(block.len() as u64);
        out.write_all(&block[..count as usize])?;
        left -= count;
    }
    Ok(())
}

/// Half of the bytes to each stream, in turn.
fn both(bytes: u64) -> io::Result<()> {
    let block = &block()[..16 * 1024];
    let (mut out, mut err) = (unbuffered(io::stdout())?, unbuffered(io::stderr())?);
    for _ in 0..bytes / (2 * block.len() as u64) {
        out.write_all(block)?;
        err.write_all(block)?;
    }
    Ok(())
}

/// Lines of this length, one write each, that begin with the monotonic time.
fn lines(count: u64, interval: Duration, bytes: usize) -> io::Result<()> {
    let mut out = unbuffered(io::stdout())?;
    let begun = Instant::now();
    for number in 0..count {
        let at = interval.saturating_mul(number as u32);
        let left = at.saturating_sub(begun.elapsed());
        if !left.is_zero() {
            std::thread::sleep(left);
        }
        let stamp = monotonic_ns();
        let filling = bytes.saturating_sub(2 + stamp.to_string().len());
        out.write_all(format!("{stamp} {:.<1$}\n", "", filling).as_bytes())?;
    }
    Ok(())
}

/// One call is one write.
fn unbuffered(stream: impl AsFd) -> io::Result<File> {
    Ok(stream.as_fd().try_clone_to_owned()?.into())
}

/// The same clock in every process of a machine.
pub fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}
