//! Finds the process that holds a port, for the message of a failed bind. Best effort: Linux's
//! `/proc` or nothing.

use std::fmt;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;

/// A process that listens on an address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortOwner {
    pub pid: u32,
    pub command: String,
}

impl fmt::Display for PortOwner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {} ({})", self.pid, self.command)
    }
}

/// Returns the process that listens on `address`, or on a wildcard that covers it. None if there is
/// none, or it is another user's.
pub fn find(address: SocketAddr) -> Option<PortOwner> {
    let sockets: Vec<String> = ["/proc/net/tcp", "/proc/net/tcp6"]
        .into_iter()
        .filter_map(|path| fs::read_to_string(path).ok())
        .flat_map(|table| listening(&table, address))
        .map(|inode| format!("socket:[{inode}]"))
        .collect();
    if sockets.is_empty() {
        return None;
    }
    fs::read_dir("/proc").ok()?.flatten().find_map(|process| {
        let pid = process.file_name().to_str()?.parse().ok()?;
        holds(&process.path(), &sockets).then(|| PortOwner {
            pid,
            command: command(&process.path()),
        })
    })
}

/// Returns the inodes of the listening sockets of a table of `/proc/net` that conflict with
/// `address`.
fn listening(table: &str, address: SocketAddr) -> Vec<u64> {
    let inode = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        // sl local_address rem_address st tx_queue:rx_queue tr:tm->when retrnsmt uid timeout inode;
        // 0A is LISTEN.
        let (local, state, inode) = (fields.get(1)?, fields.get(3)?, fields.get(9)?);
        let (ip, port) = local.split_once(':')?;
        let (ip, port) = (parse_ip(ip)?, u16::from_str_radix(port, 16).ok()?);

        // A wildcard takes the port on every address.
        let overlaps = ip == address.ip() || ip.is_unspecified() || address.ip().is_unspecified();
        if *state == "0A" && port == address.port() && overlaps {
            inode.parse().ok()
        } else {
            None
        }
    };
    table.lines().skip(1).filter_map(inode).collect()
}

/// Addresses stand there as 32-bit words in the machine's byte order.
fn parse_ip(hex: &str) -> Option<IpAddr> {
    let word = |at: usize| {
        u32::from_str_radix(hex.get(at..at + 8)?, 16)
            .ok()
            .map(u32::to_ne_bytes)
    };
    match hex.len() {
        8 => Some(IpAddr::V4(Ipv4Addr::from(word(0)?))),
        32 => {
            let bytes = [word(0)?, word(8)?, word(16)?, word(24)?].concat();
            let bytes: [u8; 16] = bytes.try_into().ok()?;
            Some(Ipv6Addr::from(bytes).to_canonical())
        }
        _ => None,
    }
}

fn holds(process: &Path, sockets: &[String]) -> bool {
    let Ok(files) = fs::read_dir(process.join("fd")) else {
        return false;
    };
    files
        .flatten()
        .filter_map(|file| fs::read_link(file.path()).ok())
        .any(|target| {
            target
                .to_str()
                .is_some_and(|target| sockets.iter().any(|socket| socket == target))
        })
}

/// Returns the command line, shortened.
fn command(process: &Path) -> String {
    let line = fs::read(process.join("cmdline")).unwrap_or_default();
    let line = String::from_utf8_lossy(&line).replace('\0', " ");
    match line.trim() {
        "" => "unknown command".to_owned(),
        line => line.chars().take(120).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_searched_for_listeners_in_the_way() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   \
            uid  timeout inode\n0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 \
            00000000     0        0 111 1 0 100 0 0 10 0\n1: 00000000:1F91 00000000:0000 0A \
            00000000:00000000 00:00000000 00000000     0        0 222 1 0 100 0 0 10 0\n2: \
            0100007F:1F90 0100007F:9999 01 00000000:00000000 00:00000000 00000000     0        0 \
            333 1 0 100 0 0 10 0\ncut short\n";
        let found = |address: &str| listening(table, address.parse().expect("an address"));
        if cfg!(target_endian = "little") {
            assert_eq!(found("127.0.0.1:8080"), [111]);
            assert_eq!(found("127.0.0.2:8080"), [0u64; 0]);
            assert_eq!(found("0.0.0.0:8080"), [111]);
            assert_eq!(found("127.0.0.2:8081"), [222]);
        }
    }
}
