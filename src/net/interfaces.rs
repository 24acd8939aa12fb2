//! The return of the network, as the kernel tells it (rtnetlink(7)): an interface has its carrier
//! back, or an address is there. A device that waits a minute for its next dial need not wait then.
//!
//! One socket, no thread, nothing asked at any interval. Where the kernel or a sandbox has no such
//! sockets, the backoff alone decides.

use std::cell::Cell;
use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use futures_lite::future;
use log::info;
use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, bind, recv, socket_with};
use smol::{Async, Timer};

use crate::limits::{NETWORK_MESSAGE_BYTES, NETWORK_RETURN_INTERVAL, NETWORK_RETURNS_IN_A_ROW};

// `linux/rtnetlink.h`, `linux/if.h`, `linux/if_addr.h`.
const GROUPS: u32 = GROUP_LINK | GROUP_IPV4_ADDRESS | GROUP_IPV6_ADDRESS;
const GROUP_LINK: u32 = 0x1;
const GROUP_IPV4_ADDRESS: u32 = 0x10;
const GROUP_IPV6_ADDRESS: u32 = 0x100;
const NEW_LINK: u16 = 16;
const DELETE_LINK: u16 = 17;
const NEW_ADDRESS: u16 = 20;
const DELETE_ADDRESS: u16 = 21;
const INTERFACE_LOOPBACK: u32 = 0x8;
const INTERFACE_RUNNING: u32 = 0x40;
const ADDRESS_TENTATIVE: u8 = 0x40;
/// Addresses of this and a larger scope lead nowhere beyond the next switch.
const SCOPE_LINK: u8 = 253;

/// Bytes before the header of the message's own kind.
const HEADER_BYTES: usize = 16;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Change {
    /// Something that could carry a connection has gone.
    Gone,
    /// Something that can carry one is there.
    There,
}

/// Tells returns of the network. One task at a time asks it.
#[derive(Debug)]
pub struct Interfaces {
    socket: Option<Async<OwnedFd>>,
    /// Something has gone since the last return.
    gone: Cell<bool>,
    pace: Cell<Pace>,
}

impl Interfaces {
    /// Changes are noted from now on.
    pub fn watch() -> Interfaces {
        let socket = open().inspect_err(|why| {
            info!(
                "the kernel does not tell when the network returns ({why}): the next try to \
                 connect comes when its delay is over"
            );
        });
        Interfaces {
            socket: socket.ok(),
            gone: Cell::default(),
            pace: Cell::default(),
        }
    }

    /// Waits for the next return. True: something was gone before, so that connections may be dead.
    /// Changes that come while nobody waits are told by the next call, as one.
    pub async fn returned(&self) -> bool {
        loop {
            match self.change().await {
                Some(Change::Gone) => self.gone.set(true),
                Some(Change::There) => break,
                None => {}
            }
        }
        let mut pace = self.pace.get();
        let wait = pace.spend(Instant::now());
        self.pace.set(pace);
        if !wait.is_zero() {
            Timer::after(wait).await;
        }
        // What has come meanwhile is part of it, but for what is gone at its end.
        let mut gone_again = false;
        while let Some(change) = future::poll_once(self.change()).await {
            match change {
                Some(Change::Gone) => {
                    self.gone.set(true);
                    gone_again = true;
                }
                Some(Change::There) => gone_again = false,
                None => {}
            }
        }
        self.gone.replace(gone_again)
    }

    /// What the next message tells; `None` if it says nothing of this. Without a socket none comes.
    async fn change(&self) -> Option<Change> {
        let Some(socket) = &self.socket else {
            return future::pending().await;
        };
        let mut message = [0; NETWORK_MESSAGE_BYTES];
        let read = socket
            .read_with(|socket| {
                let (length, _) = recv(socket, &mut message[..], RecvFlags::empty())?;
                Ok(length)
            })
            .await;
        match read {
            Ok(length) => read_change(&message[..length]),
            // Some did not fit into the socket's buffer: they may have told of anything.
            Err(why) if why.raw_os_error() == Some(Errno::NOBUFS.raw_os_error()) => {
                self.gone.set(true);
                Some(Change::There)
            }
            Err(why) => {
                info!("the kernel does not tell any more when the network returns: {why}");
                future::pending().await
            }
        }
    }
}

fn open() -> io::Result<Async<OwnedFd>> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    // Without a protocol it is NETLINK_ROUTE.
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
    bind(&socket, &SocketAddrNetlink::new(0, GROUPS))?;
    Async::new_nonblocking(socket)
}

/// What one message tells: `nlmsghdr`, then `ifinfomsg` or `ifaddrmsg`. The kernel sends each of
/// these in a datagram of its own.
fn read_change(message: &[u8]) -> Option<Change> {
    let kind = u16::from_ne_bytes([*message.get(4)?, *message.get(5)?]);
    let body = message.get(HEADER_BYTES..)?;
    match kind {
        NEW_LINK | DELETE_LINK => {
            let flags = u32::from_ne_bytes(body.get(8..12)?.try_into().ok()?);
            if flags & INTERFACE_LOOPBACK != 0 {
                return None;
            }
            let is_there = kind == NEW_LINK && flags & INTERFACE_RUNNING != 0;
            Some(if is_there {
                Change::There
            } else {
                Change::Gone
            })
        }
        NEW_ADDRESS | DELETE_ADDRESS => {
            let &[_, _, flags, scope, ..] = body else {
                return None;
            };
            // An address that is still being checked for another owner cannot be used yet.
            if scope >= SCOPE_LINK || flags & ADDRESS_TENTATIVE != 0 {
                return None;
            }
            Some(match kind {
                NEW_ADDRESS => Change::There,
                _ => Change::Gone,
            })
        }
        _ => None,
    }
}

/// Some at once, and one each interval after that.
#[derive(Debug, Clone, Copy, Default)]
struct Pace {
    /// When all would be paid for.
    paid_at: Option<Instant>,
}

impl Pace {
    /// How long to wait for the next one.
    fn spend(&mut self, now: Instant) -> Duration {
        let paid_at = self.paid_at.unwrap_or(now).max(now) + NETWORK_RETURN_INTERVAL;
        self.paid_at = Some(paid_at);
        paid_at.saturating_duration_since(now + NETWORK_RETURN_INTERVAL * NETWORK_RETURNS_IN_A_ROW)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u16, body: &[u8]) -> Vec<u8> {
        let length = (HEADER_BYTES + body.len()) as u32;
        let mut bytes = length.to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.resize(HEADER_BYTES, 0);
        bytes.extend(body);
        bytes
    }

    fn link(kind: u16, flags: u32) -> Option<Change> {
        let mut body = vec![0; 16];
        body[8..12].copy_from_slice(&flags.to_ne_bytes());
        read_change(&message(kind, &body))
    }

    #[test]
    fn carriers_and_addresses_that_lead_somewhere_count() {
        let (up, running, loopback) = (0x1, INTERFACE_RUNNING, INTERFACE_LOOPBACK);
        assert_eq!(link(NEW_LINK, up), Some(Change::Gone));
        assert_eq!(link(NEW_LINK, up | running), Some(Change::There));
        assert_eq!(link(NEW_LINK, up | running | loopback), None);
        assert_eq!(link(DELETE_LINK, up | running), Some(Change::Gone));
        let address = |kind, flags, scope| {
            let body = [2, 24, flags, scope, 1, 0, 0, 0];
            read_change(&message(kind, &body))
        };
        assert_eq!(address(NEW_ADDRESS, 0x80, 0), Some(Change::There));
        assert_eq!(address(NEW_ADDRESS, ADDRESS_TENTATIVE, 0), None);
        assert_eq!(address(NEW_ADDRESS, 0x80, SCOPE_LINK), None);
        assert_eq!(address(NEW_ADDRESS, 0x80, 254), None);
        assert_eq!(address(DELETE_ADDRESS, 0, 0), Some(Change::Gone));
        assert_eq!(link(24, up | running), None, "a route");
    }

    #[test]
    fn a_short_message_tells_nothing() {
        let whole = message(NEW_LINK, &[0xff; 16]);
        for length in 0..HEADER_BYTES + 12 {
            assert_eq!(read_change(&whole[..length]), None, "{length}");
        }
        let whole = message(NEW_ADDRESS, &[0; 8]);
        for length in 0..HEADER_BYTES + 4 {
            assert_eq!(read_change(&whole[..length]), None, "{length}");
        }
    }

    #[test]
    fn a_link_that_flaps_is_followed_at_a_slower_pace() {
        let begun = Instant::now();
        let mut pace = Pace::default();
        for _ in 0..NETWORK_RETURNS_IN_A_ROW {
            assert_eq!(pace.spend(begun), Duration::ZERO);
        }
        assert_eq!(pace.spend(begun), NETWORK_RETURN_INTERVAL);
        // A long quiet time saves up no more than that.
        let later = begun + NETWORK_RETURN_INTERVAL * 100;
        for _ in 0..NETWORK_RETURNS_IN_A_ROW {
            assert_eq!(pace.spend(later), Duration::ZERO);
        }
        assert_eq!(pace.spend(later), NETWORK_RETURN_INTERVAL);
    }
}
