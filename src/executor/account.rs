//! Whom tasks run as (`HOSTLINK_TASK_USER`): names and groups from `/etc/passwd` and `/etc/group`,
//! read by ourselves, since a static binary has no name service.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use crate::limits::{ACCOUNT_FILE_BYTES_MAX, GROUPS_MAX};

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Account {
    pub uid: u32,
    pub gid: u32,
    /// Supplementary groups, `gid` among them.
    pub groups: Vec<u32>,
    /// `None` for a number that stands in no file.
    pub entry: Option<Entry>,
}

/// What `/etc/passwd` says beside the numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub name: String,
    pub home: String,
    pub shell: String,
}

impl Account {
    /// Looks up `name`, `uid` or `uid:gid`. Errors say what to do.
    pub fn find(wanted: &str) -> Result<Account, String> {
        let passwd = read(Path::new("/etc/passwd"));
        let group = read(Path::new("/etc/group"));
        Account::parse(wanted, &passwd, &group)
    }

    fn parse(wanted: &str, passwd: &str, group: &str) -> Result<Account, String> {
        let (user, gid) = match wanted.split_once(':') {
            Some((user, gid)) => {
                let number = gid.parse().map_err(|_| {
                    format!("the group `{gid:.80}` of HOSTLINK_TASK_USER is no number")
                })?;
                (user, Some(number))
            }
            None => (wanted, None),
        };
        let number: Option<u32> = user.parse().ok();
        let found = passwd
            .lines()
            .filter_map(parse_user)
            .find(|user_entry| number.map_or(user_entry.2.name == user, |uid| uid == user_entry.0));
        let (uid, gid, entry) = match (found, number, gid) {
            (Some((uid, own_gid, entry)), _, gid) => (uid, gid.unwrap_or(own_gid), Some(entry)),
            (None, Some(uid), Some(gid)) => (uid, gid, None),
            (None, Some(uid), None) => {
                return Err(format!(
                    "/etc/passwd has no user {uid}, so the group is unknown: set \
                     HOSTLINK_TASK_USER={uid}:GID"
                ));
            }
            (None, None, _) => {
                return Err(format!(
                    "/etc/passwd has no user `{user:.80}`: correct HOSTLINK_TASK_USER, or give \
                     numbers (UID:GID)"
                ));
            }
        };
        if uid == u32::MAX || gid == u32::MAX {
            // The kernel reads it as "leave it as it is", and a task must not stay what we are.
            return Err(format!("{} is no user or group id", u32::MAX));
        }
        let mut groups = vec![gid];
        if let Some(entry) = &entry {
            let others = group
                .lines()
                .filter_map(|line| membership(line, &entry.name));
            for other in others {
                if !groups.contains(&other) && groups.len() < GROUPS_MAX {
                    groups.push(other);
                }
            }
        }
        Ok(Account {
            uid,
            gid,
            groups,
            entry,
        })
    }
}

/// Missing and unreadable files have no entries.
fn read(path: &Path) -> String {
    let mut bytes = Vec::new();
    let file = File::open(path);
    let _ = file.and_then(|file| file.take(ACCOUNT_FILE_BYTES_MAX).read_to_end(&mut bytes));
    String::from_utf8_lossy(&bytes).into_owned()
}

/// `name:password:uid:gid:comment:home:shell` (passwd(5)).
fn parse_user(line: &str) -> Option<(u32, u32, Entry)> {
    let fields: Vec<&str> = line.split(':').collect();
    let &[name, _, uid, gid, _, home, shell] = fields.as_slice() else {
        return None;
    };
    let or = |text: &str, default: &str| match text {
        "" => default.to_owned(),
        text => text.to_owned(),
    };
    let entry = Entry {
        name: name.to_owned(),
        home: or(home, "/"),
        shell: or(shell, "/bin/sh"),
    };
    Some((uid.parse().ok()?, gid.parse().ok()?, entry))
}

/// `name:password:gid:member,member` (group(5)): the group's id if the user is a member.
fn membership(line: &str, user: &str) -> Option<u32> {
    let mut fields = line.split(':').skip(2);
    let gid = fields.next()?.parse().ok()?;
    let is_member = fields.next()?.split(',').any(|member| member == user);
    is_member.then_some(gid)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/bash\nbroken:x:1\n\
                          meter:x:200:20:Meter,,,:/var/meter:\nhigh:x:4294967296:1::/:/bin/sh\n";
    const GROUP: &str = "root:x:0:\ndialout:x:18:other,meter\nmeter:x:20:meter\ngpio:x:30:meter\n\
                         near:x:31:meter2\n";

    #[test]
    fn names_and_numbers_are_found_with_their_groups() {
        let check = |wanted: &str, expected: (u32, u32, &[u32], Option<&str>)| {
            let account = Account::parse(wanted, PASSWD, GROUP).expect(wanted);
            let name = account.entry.as_ref().map(|entry| entry.name.as_str());
            let found = (account.uid, account.gid, account.groups.as_slice(), name);
            assert_eq!(found, expected, "{wanted}");
        };
        check("meter", (200, 20, &[20, 18, 30], Some("meter")));
        check("200", (200, 20, &[20, 18, 30], Some("meter")));
        check("200:7", (200, 7, &[7, 18, 20, 30], Some("meter")));
        check("1234:5", (1234, 5, &[5], None));
        check("root", (0, 0, &[0], Some("root")));
        let meter = Account::parse("meter", PASSWD, GROUP).expect("known");
        let entry = meter.entry.expect("known");
        assert_eq!(
            (entry.home.as_str(), entry.shell.as_str()),
            ("/var/meter", "/bin/sh")
        );
    }

    #[test]
    fn what_cannot_be_found_says_what_to_do() {
        let check = |wanted: &str, expected: &str| {
            let why = Account::parse(wanted, PASSWD, GROUP).expect_err(wanted);
            assert!(why.contains(expected), "{why}");
        };
        check("nobody-there", "no user `nobody-there`");
        check("broken", "no user");
        check("high", "no user");
        check("1234", "1234:GID");
        check("meter:staff", "is no number");
        check("", "no user");
        check("-1", "no user");
        check("4294967295:5", "no user or group id");
        check("5:4294967295", "no user or group id");
    }
}
