//! The disk as the log sees it: a folder of segment files. Small, so that tests can put a
//! simulated one in its place.
//!
//! What a caller may rely on: written bytes are durable after [`DiskFile::sync_data`], a file's
//! existence after [`Disk::sync_dir`], and neither before. After a failed sync nothing is known
//! about the file, and its sync is never tried again.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Instant;

use rustix::fs::{FallocateFlags, FlockOperation};
use rustix::io::Errno;

use crate::limits::{LOCK_PATIENCE, LOCK_RETRY_DELAY};

pub(super) trait Disk: Send {
    /// Names of all files in the folder, in any order.
    fn list(&mut self) -> io::Result<Vec<String>>;
    /// Makes a file that did not exist, of this length if the file system can preallocate.
    fn create(&mut self, name: &str, len: u64) -> io::Result<Box<dyn DiskFile>>;
    fn open(&mut self, name: &str) -> io::Result<Box<dyn DiskFile>>;
    /// Opens a file that will be written from the beginning.
    fn reuse(&mut self, name: &str) -> io::Result<Box<dyn DiskFile>> {
        self.open(name)
    }
    fn remove(&mut self, name: &str) -> io::Result<()>;
    fn sync_dir(&mut self) -> io::Result<()>;
    /// Whether a used file is worth keeping for its allocated blocks.
    fn recycles(&self) -> bool;
}

pub(super) trait DiskFile: Send {
    fn len(&self) -> io::Result<u64>;
    /// Reads what there is, up to the length of `buffer`; fewer bytes only at the end of the file.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;
    /// All or an error; after an error any part may have been written.
    fn write_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<()>;
    fn sync_data(&mut self) -> io::Result<()>;
}

/// Locks a folder, and waits a moment for one that is held: a process that was just killed may
/// have left a child that has not replaced its image yet and still shares the lock.
///
/// # Errors
/// `WOULDBLOCK` if it is held for longer than [`LOCK_PATIENCE`]. Blocks that long.
pub fn lock_folder(folder: &File) -> Result<(), Errno> {
    let patience = Instant::now() + LOCK_PATIENCE;
    loop {
        match rustix::fs::flock(folder, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) if Instant::now() < patience => {
                std::thread::sleep(LOCK_RETRY_DELAY);
            }
            outcome => return outcome,
        }
    }
}

/// A folder of the real file system.
pub(super) struct RealDisk {
    dir: PathBuf,
    preallocates: bool,
    /// Keeps other processes out for as long as it is open.
    _lock: Option<File>,
}

impl RealDisk {
    /// Makes the folder if it is missing, durably, and locks it.
    ///
    /// # Errors
    /// Also if another process has the folder locked.
    pub fn new(dir: &Path) -> io::Result<RealDisk> {
        if !dir.is_dir() {
            std::fs::create_dir_all(dir)?;
            if let Some(parent) = dir.parent() {
                sync_folder(parent)?;
            }
        }
        let lock = File::open(dir)?;
        match lock_folder(&lock) {
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NOLCK) => {}
            Err(Errno::WOULDBLOCK) => {
                return Err(io::Error::other("another process has it open"));
            }
            Err(why) => return Err(why.into()),
        }
        Ok(RealDisk {
            dir: dir.to_owned(),
            preallocates: true,
            _lock: Some(lock),
        })
    }

    /// For reading only: the folder must exist and is left as it is.
    pub fn existing(dir: &Path) -> RealDisk {
        RealDisk {
            dir: dir.to_owned(),
            preallocates: false,
            _lock: None,
        }
    }
}

impl Disk for RealDisk {
    fn list(&mut self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&self.dir)? {
            if let Ok(name) = entry?.file_name().into_string() {
                names.push(name);
            }
        }
        Ok(names)
    }

    fn create(&mut self, name: &str, len: u64) -> io::Result<Box<dyn DiskFile>> {
        let path = self.dir.join(name);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)?;
        if self.preallocates {
            match rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, len) {
                Ok(()) => {}
                Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => self.preallocates = false,
                Err(why) => {
                    // Best effort: an empty leftover is removed by the next recovery too.
                    let _ = std::fs::remove_file(&path);
                    return Err(why.into());
                }
            }
        }
        Ok(Box::new(RealFile(file)))
    }

    fn open(&mut self, name: &str) -> io::Result<Box<dyn DiskFile>> {
        let path = self.dir.join(name);
        let file = match OpenOptions::new().read(true).write(true).open(&path) {
            Ok(file) => file,
            // A read-only remount: what is there can still be read.
            Err(why) if why.kind() == io::ErrorKind::ReadOnlyFilesystem => File::open(&path)?,
            Err(why) if why.kind() == io::ErrorKind::PermissionDenied => File::open(&path)?,
            Err(why) => return Err(why),
        };
        Ok(Box::new(RealFile(file)))
    }

    fn reuse(&mut self, name: &str) -> io::Result<Box<dyn DiskFile>> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(self.dir.join(name))?;
        // Large pages of the last use would be written whole for each line. Only advice.
        let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed);
        Ok(Box::new(RealFile(file)))
    }

    fn remove(&mut self, name: &str) -> io::Result<()> {
        std::fs::remove_file(self.dir.join(name))
    }

    fn sync_dir(&mut self) -> io::Result<()> {
        sync_folder(&self.dir)
    }

    fn recycles(&self) -> bool {
        self.preallocates
    }
}

pub(super) fn sync_folder(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

struct RealFile(File);

impl DiskFile for RealFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut done = 0;
        while done < buffer.len() {
            match self.0.read_at(&mut buffer[done..], offset + done as u64) {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(why) if why.kind() == io::ErrorKind::Interrupted => {}
                Err(why) => return Err(why),
            }
        }
        Ok(done)
    }

    fn write_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_all_at(bytes, offset)
    }

    fn sync_data(&mut self) -> io::Result<()> {
        self.0.sync_data()
    }
}
