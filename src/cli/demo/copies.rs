//! What was printed and what arrived, kept beside each other to be compared byte for byte.

use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::path::Path;
use std::pin::Pin;
use std::task::{Context, Poll};

use futures_lite::AsyncWrite;

/// Prints, and keeps a copy of what was printed.
pub struct Copying<W> {
    inner: W,
    copy: File,
}

impl<W> Copying<W> {
    pub fn new(inner: W, dir: &Path, name: &str) -> Result<Copying<W>, String> {
        let copy = File::create(dir.join(name)).map_err(|error| error.to_string())?;
        Ok(Copying { inner, copy })
    }
}

impl<W: AsyncWrite + Unpin> AsyncWrite for Copying<W> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.inner).poll_write(context, bytes);
        if let Poll::Ready(Ok(count)) = written {
            self.copy.write_all(&bytes[..count])?;
        }
        written
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(context)
    }

    fn poll_close(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_close(context)
    }
}

/// Length of the first file, and how many bytes are missing, surplus or different in the second.
pub fn compare(printed: &Path, arrived: &Path) -> io::Result<(u64, u64)> {
    let mut printed = BufReader::new(File::open(printed)?).bytes();
    let mut arrived = BufReader::new(File::open(arrived)?).bytes();
    let (mut length, mut differing) = (0, 0);
    loop {
        match (printed.next().transpose()?, arrived.next().transpose()?) {
            (None, None) => return Ok((length, differing)),
            (left, right) => {
                length += u64::from(left.is_some());
                differing += u64::from(left != right);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_comparison_counts_missing_surplus_and_changed_bytes() {
        let dir = std::env::temp_dir().join(format!("hostlink-compare-{}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("directory");
        let check = |printed: &[u8], arrived: &[u8], expected: (u64, u64)| {
            std::fs::write(dir.join("printed"), printed).expect("file");
            std::fs::write(dir.join("arrived"), arrived).expect("file");
            let found = compare(&dir.join("printed"), &dir.join("arrived"));
            assert_eq!(found.expect("both are there"), expected);
        };
        check(b"", b"", (0, 0));
        check(b"abc", b"abc", (3, 0));
        check(b"abc", b"ab", (3, 1));
        check(b"abc", b"abcd", (3, 1));
        check(b"a\xffc", b"a\xfec", (3, 1));
        assert!(compare(&dir.join("printed"), &dir.join("missing")).is_err());
        std::fs::remove_dir_all(&dir).expect("clean up");
    }
}
