//! Stores that an older agent could not read. It sets them aside, whole, and begins a new one; when
//! the newer agent comes back it takes them into the store in use: A/B images, a rollback and its
//! end. What was recorded there does not run again, and what waited there is delivered under its
//! old ids.

use std::io;
use std::path::{Path, PathBuf};

use super::disk::sync_folder;
use super::engine::Engine;
use super::moving::Source;
use super::opening::open_disk_once;
use super::recovery::OpenError;
use super::segment::FORMAT_VERSION;
use super::types::*;

/// Attempts to find a free name for a store that is set aside.
const NAMES_MAX: u32 = 100;

/// Puts a newer store beside, whole.
pub(super) fn set_aside(dir: &Path, version: u32) -> io::Result<()> {
    for number in 1..=NAMES_MAX {
        let aside = beside(dir, &format!("format-{version}-{number}"));
        if !aside.exists() {
            std::fs::rename(dir, &aside)?;
            aside.parent().map_or(Ok(()), sync_folder)?;
            log::error!(
                "the outbox in {} was written by a newer agent, in format {version}: it is kept \
                 as {} and a new one is begun; the newer agent takes it back and delivers what it \
                 holds",
                dir.display(),
                aside.display(),
            );
            return Ok(());
        }
    }
    Err(io::Error::other("too many stores have been set aside"))
}

/// Takes the stores that this agent can read into the one in use. One that cannot be taken stays
/// for the next start.
pub(super) fn take_back(settings: &Settings, engine: &mut Engine, recovered: &mut Recovered) {
    // Left by a power cut: all of it is in the store in use.
    let emptied = beside(&settings.dir, "emptied");
    let _ = std::fs::remove_dir_all(&emptied);
    for aside in readable(&settings.dir) {
        match take_one(settings, &aside, engine, recovered) {
            Ok(()) => {
                log::info!(
                    "the outbox that was set aside as {} is taken back into {}",
                    aside.display(),
                    settings.dir.display(),
                );
                let parent = aside.parent();
                let removed = std::fs::rename(&aside, &emptied)
                    .and_then(|()| parent.map_or(Ok(()), sync_folder))
                    .and_then(|()| std::fs::remove_dir_all(&emptied));
                if let Err(why) = removed {
                    log::warn!("cannot remove {}: {why}", aside.display());
                }
            }
            Err(OpenError::Newer(_)) => log::warn!(
                "the outbox that was set aside as {} holds what this agent cannot read: it stays",
                aside.display(),
            ),
            Err(OpenError::Io(why)) => log::error!(
                "the outbox that was set aside as {} cannot be taken back: {why}; the next start \
                 tries again, and until then what it recorded is not known",
                aside.display(),
            ),
        }
    }
}

fn take_one(
    settings: &Settings,
    aside: &Path,
    engine: &mut Engine,
    recovered: &mut Recovered,
) -> Result<(), OpenError> {
    let settings = Settings {
        dir: aside.to_owned(),
        ..settings.clone()
    };
    let (mut other, found) = open_disk_once(&settings)?;
    engine
        .absorb(&mut other, Source::Older)
        .map_err(|why| OpenError::Io(io::Error::other(why.to_string())))?;
    recovered.queued.extend(found.queued);
    recovered.interrupted.extend(found.interrupted);
    let mut seen = std::collections::HashSet::new();
    recovered.queued.retain(|task| {
        let key = task.ids.key();
        let waits = engine
            .attempts
            .get(&key)
            .is_some_and(|attempt| attempt.phase() == Phase::Received);
        waits && seen.insert(key)
    });
    Ok(())
}

/// The stores that were set aside in a format that this agent knows, in the order in which it
/// happened.
fn readable(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for version in 1..=FORMAT_VERSION {
        for number in 1..=NAMES_MAX {
            let aside = beside(dir, &format!("format-{version}-{number}"));
            if aside.is_dir() {
                found.push(aside);
            }
        }
    }
    found
}

fn beside(dir: &Path, suffix: &str) -> PathBuf {
    let mut name = dir.as_os_str().to_owned();
    name.push(".");
    name.push(suffix);
    PathBuf::from(name)
}
