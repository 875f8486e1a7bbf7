//! Cuts ways between processes of this machine with iptables: connections of the processes of a
//! group to a port. Needs root; the rules go when it is dropped.

use super::mounts::run;

/// Rules that are in force for as long as this lives.
#[derive(Debug, Default)]
pub struct Firewall(Vec<Vec<String>>);

impl Firewall {
    /// Returns one without a rule, or why there can be none here.
    pub fn new() -> Result<Self, String> {
        // As much as a rule takes, and what gives a process its group.
        let mut firewall = Self::default();
        firewall.refuse(u32::MAX - 1, "127.0.0.1:9")?;
        firewall.heal();
        run("setpriv", &["--version"])?;
        Ok(firewall)
    }

    /// Puts a process, once it is started by this, into a group.
    pub fn wrapper(group: u32) -> Vec<String> {
        ["setpriv", "--regid", &group.to_string(), "--clear-groups"]
            .map(str::to_owned)
            .into()
    }

    /// Resets what the processes of a group send to an address.
    pub fn refuse(&mut self, group: u32, address: &str) -> Result<(), String> {
        self.add(group, address, &["REJECT", "--reject-with", "tcp-reset"])
    }

    /// Loses what the processes of a group send to an address.
    pub fn lose(&mut self, group: u32, address: &str) -> Result<(), String> {
        self.add(group, address, &["DROP"])
    }

    fn add(&mut self, group: u32, address: &str, verdict: &[&str]) -> Result<(), String> {
        let (host, port) = address.rsplit_once(':').ok_or("no port")?;
        let group = group.to_string();
        let of = [
            "OUTPUT",
            "-p",
            "tcp",
            "-d",
            host,
            "--dport",
            port,
            "-m",
            "owner",
            "--gid-owner",
            &group,
            "-j",
        ];
        let rule: Vec<&str> = of.iter().chain(verdict).copied().collect();
        run("iptables", &[&["-w", "-I"], &rule[..]].concat())?;
        self.0.push(rule.into_iter().map(str::to_owned).collect());
        Ok(())
    }

    /// Takes all rules away.
    pub fn heal(&mut self) {
        for rule in self.0.drain(..) {
            let rule: Vec<&str> = rule.iter().map(String::as_str).collect();
            run("iptables", &[&["-w", "-D"], &rule[..]].concat())
                .expect("a rule that was made is taken away");
        }
    }
}

impl Drop for Firewall {
    fn drop(&mut self) {
        self.heal();
    }
}
