//! Small files that must survive a power cut: read with a bound, replaced as a whole.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::limits::STATE_FILE_BYTES_MAX;

pub type Fields = Map<String, Value>;

/// What a JSON file holds.
#[derive(Debug)]
pub enum Content {
    Missing,
    Fields(Fields),
    /// It is there but no JSON object; its bytes, and why.
    Damaged(Vec<u8>, String),
}

/// The whole file, `None` if there is none. Larger than [`STATE_FILE_BYTES_MAX`] is an error.
pub fn read(path: &Path) -> io::Result<Option<Vec<u8>>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut bytes = Vec::new();
    file.take(STATE_FILE_BYTES_MAX as u64 + 1)
        .read_to_end(&mut bytes)?;
    if bytes.len() > STATE_FILE_BYTES_MAX {
        return Err(io::Error::other(format!(
            "it is larger than {STATE_FILE_BYTES_MAX} bytes"
        )));
    }
    Ok(Some(bytes))
}

/// The fields of a JSON object.
pub fn read_fields(path: &Path) -> io::Result<Content> {
    let Some(bytes) = read(path)? else {
        return Ok(Content::Missing);
    };
    Ok(match serde_json::from_slice(&bytes) {
        Ok(fields) => Content::Fields(fields),
        Err(error) => Content::Damaged(bytes, error.to_string()),
    })
}

/// Replaces the file: after a power cut it holds either the old or the new content, whole. The
/// directory is created if it is missing. `mode` is that of the new file.
pub fn replace(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    std::fs::create_dir_all(directory)?;
    let temporary = beside(path, "new");
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(mode)
        .open(&temporary)?;
    // A leftover of a crash keeps its own mode when it is opened.
    file.set_permissions(std::fs::Permissions::from_mode(mode))?;
    file.write_all(content)?;
    file.sync_all()?;
    std::fs::rename(&temporary, path)?;
    File::open(directory)?.sync_all()
}

/// Moves a file that cannot be used out of the way and keeps it.
pub fn set_aside(path: &Path) -> io::Result<PathBuf> {
    let kept = beside(path, "damaged");
    std::fs::rename(path, &kept)?;
    Ok(kept)
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(suffix);
    PathBuf::from(name)
}
