//! A network of its own for each node of a cluster, so that links can be cut, reset and slowed one
//! by one: network namespaces on a bridge, with a packet filter in each.
//!
//! Needs root, `ip`, `iptables` and `tc`; where they can't be had, the caller says so and leaves
//! its test out.

use std::fmt;

use super::mounts::run;

/// What is done to packets on the way from one node to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// They vanish.
    Drop,
    /// They vanish, and whoever sent them has its connection reset.
    Reset,
}

/// The namespaces of some nodes, numbered from 0; removed when dropped.
pub struct Network {
    /// Part of every name, and of every address: below 512.
    id: u16,
    nodes: usize,
}

impl fmt::Debug for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "network {:04x}", self.id)
    }
}

impl Network {
    /// Makes a bridge, and a namespace for each node. Returns why that can't be had here.
    pub fn new(nodes: usize) -> Result<Self, String> {
        // Dropped, and so cleared away, when a step fails.
        let network = Self {
            id: rand::random_range(0..512),
            nodes,
        };
        // The bridge is in a namespace too: the packet filter of the machine may have rules for
        // bridges.
        let (hub, root, inside) = (network.hub(), network.outside(nodes), network.inside(nodes));
        run("ip", &["netns", "add", &hub])?;
        run(
            "ip",
            &["-n", &hub, "link", "add", "bridge", "type", "bridge"],
        )?;
        run("ip", &["-n", &hub, "link", "set", "bridge", "up"])?;
        run(
            "ip",
            &[
                "link", "add", &root, "type", "veth", "peer", "name", &inside, "netns", &hub,
            ],
        )?;
        run(
            "ip",
            &["-n", &hub, "link", "set", &inside, "master", "bridge", "up"],
        )?;
        run(
            "ip",
            &[
                "address",
                "add",
                &format!("{}/24", network.ip(253)),
                "dev",
                &root,
            ],
        )?;
        run("ip", &["link", "set", &root, "up"])?;
        for node in 0..nodes {
            network.connect(node)?;
        }
        // Refuses before a test has begun.
        network.filter(0, &["-L", "INPUT"])?;
        Ok(network)
    }

    fn connect(&self, node: usize) -> Result<(), String> {
        let (space, hub, inside) = (self.space(node), self.hub(), self.inside(node));
        run("ip", &["netns", "add", &space])?;
        let pair = [
            "-n", &space, "link", "add", "uplink", "type", "veth", "peer", "name", &inside,
        ];
        run("ip", &[&pair[..], &["netns", &hub]].concat())?;
        run(
            "ip",
            &["-n", &hub, "link", "set", &inside, "master", "bridge", "up"],
        )?;
        let address = format!("{}/24", self.ip(node));
        self.within(node, "ip", &["address", "add", &address, "dev", "uplink"])?;
        self.within(node, "ip", &["link", "set", "uplink", "up"])?;
        self.within(node, "ip", &["link", "set", "lo", "up"])?;
        Ok(())
    }

    /// Where a node listens.
    pub fn address(&self, node: usize) -> String {
        format!("{}:13800", self.ip(node))
    }

    /// What is put before the program of a node.
    pub fn wrapper(&self, node: usize) -> Vec<String> {
        ["ip", "netns", "exec", &self.space(node)]
            .map(str::to_owned)
            .to_vec()
    }

    /// Cuts one way between two nodes.
    pub fn cut(&self, from: usize, to: usize, how: Cut) {
        let source = self.ip(from);
        let target: &[&str] = match how {
            Cut::Drop => &["-j", "DROP"],
            Cut::Reset => &["-p", "tcp", "-j", "REJECT", "--reject-with", "tcp-reset"],
        };
        let rule = [&["-A", "INPUT", "-s", &source], target].concat();
        self.filter(to, &rule).expect("a rule of the packet filter");
    }

    /// Cuts both ways between two nodes.
    pub fn part(&self, one: usize, other: usize, how: Cut) {
        self.cut(one, other, how);
        self.cut(other, one, how);
    }

    /// Lets a node send so much and no more; what waits longer than a second is dropped.
    pub fn slow_down(&self, node: usize, kilobits_per_second: u32) {
        let rate = format!("{kilobits_per_second}kbit");
        let limit = ["rate", &rate, "burst", "16kb", "latency", "1s"];
        let words = [
            &["qdisc", "replace", "dev", "uplink", "root", "tbf"],
            &limit[..],
        ]
        .concat();
        self.within(node, "tc", &words)
            .expect("a limit of the rate");
    }

    /// Takes every cut and limit away.
    pub fn heal(&self) {
        for node in 0..self.nodes {
            self.filter(node, &["-F", "INPUT"])
                .expect("an empty packet filter");
            // Fails where there is no limit.
            let _ = self.within(node, "tc", &["qdisc", "del", "dev", "uplink", "root"]);
        }
    }

    fn filter(&self, node: usize, words: &[&str]) -> Result<String, String> {
        self.within(node, "iptables", &[&["-w", "10"], words].concat())
    }

    fn within(&self, node: usize, program: &str, words: &[&str]) -> Result<String, String> {
        let space = self.space(node);
        run("ip", &[&["netns", "exec", &space, program], words].concat())
    }

    fn hub(&self) -> String {
        format!("quorate-{:04x}-hub", self.id)
    }

    fn space(&self, node: usize) -> String {
        format!("quorate-{:04x}-{node}", self.id)
    }

    /// The end of a link that is outside of the hub: of that to the machine's own network.
    fn outside(&self, node: usize) -> String {
        format!("qo{:04x}-{node}", self.id)
    }

    /// The end of a link that is at the bridge.
    fn inside(&self, node: usize) -> String {
        format!("qi{:04x}-{node}", self.id)
    }

    /// From the range that is set apart for tests of networks.
    fn ip(&self, node: usize) -> String {
        let [high, low] = self.id.to_be_bytes();
        format!("198.{}.{low}.{}", 18 + high, node + 1)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        // Each may never have come to be.
        for node in 0..self.nodes {
            let _ = run("ip", &["netns", "del", &self.space(node)]);
        }
        let _ = run("ip", &["link", "del", &self.outside(self.nodes)]);
        let _ = run("ip", &["netns", "del", &self.hub()]);
    }
}
