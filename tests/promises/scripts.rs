//! The scripts for those who come from other stores do what they say, with the real binary.

use std::path::Path;
use std::process::{Command, Output};

use crate::common::cluster::{Cluster, Setup, binary};
use crate::common::say;

/// A place for a cluster of the scripts, and ports that are its own.
struct Place {
    cluster: Cluster,
    dir: tempfile::TempDir,
}

impl Place {
    async fn take() -> Self {
        let dir = tempfile::TempDir::with_prefix_in("scripts-", env!("CARGO_TARGET_TMPDIR"))
            .expect("a directory");
        Self {
            cluster: Cluster::prepare(Setup::nodes(0)).await,
            dir,
        }
    }

    fn port(&self, number: u16) -> String {
        (self.cluster.first_port() + number).to_string()
    }

    /// Runs a script of this repository to its end.
    fn run(&self, script: &str, arguments: &[&str]) -> Output {
        let mut command = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join(script));
        command.args(arguments).current_dir(self.dir.path());
        command
            .env("QUORATE_BIN", binary())
            .env("QUORATE_CLUSTER_DIR", self.dir.path().join("cluster"));
        command
            .output()
            .unwrap_or_else(|error| panic!("{command:?}: {error}"))
    }

    /// What it printed, of one that must succeed.
    fn must(&self, script: &str, arguments: &[&str]) -> String {
        let output = self.run(script, arguments);
        assert!(
            output.status.success(),
            "{script} {arguments:?} ended with {}: {}",
            output.status,
            text(&output)
        );
        text(&output)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        drop(self.run("scripts/stop_servers.sh", &["--clean"]));
    }
}

fn text(output: &Output) -> String {
    [&output.stdout[..], &output.stderr]
        .map(String::from_utf8_lossy)
        .concat()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_selftest_finds_every_value_though_a_node_is_killed() {
    let place = Place::take().await;
    for order in ["Random", "Serial"] {
        let (port, proxy) = (place.port(0), place.port(9));
        let arguments = [
            "--nodes",
            "3",
            "--port",
            &port,
            "--proxy-port",
            &proxy,
            "-r",
            "30",
            "-c",
            order,
        ];
        let told = place.must("scripts/selftest.sh", &arguments);
        let result = told
            .lines()
            .find(|line| line.starts_with("30 keys, 0 wrong answers"));
        say(&format!(
            "selftest: {}",
            result.unwrap_or_else(|| panic!("{told}"))
        ));
    }
    for wrong in [
        &["--nodes"][..],
        &["--nodes", "none"],
        &["-c", "Sorted"],
        &["--frobnicate"],
    ] {
        assert_eq!(
            place.run("scripts/selftest.sh", wrong).status.code(),
            Some(2),
            "{wrong:?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn servers_and_a_gateway_are_started_and_stopped() {
    let place = Place::take().await;
    let (first, proxy) = (place.port(0), place.port(9));
    place.must("scripts/start_n_servers.sh", &["2", &first]);
    place.must("cluster.sh", &["gateway", &proxy]);
    assert_eq!(place.must("cluster.sh", &["members"]).lines().count(), 2);
    let url = format!("http://127.0.0.1:{proxy}/v1/kv/kept");
    let curl = |arguments: &[&str]| {
        let output = Command::new("curl")
            .args(["-q", "-s", "--noproxy", "*"])
            .args(arguments)
            .arg(&url)
            .output();
        text(&output.expect("curl"))
    };
    curl(&["-X", "PUT", "-d", "value"]);
    let samples = place.must("scripts/client.sh", &[&format!("127.0.0.1:{proxy}")]);
    assert!(
        samples.contains(r#"[{"keys_added":3,"keys_failed":[]}]"#)
            && samples.contains("under a key of bits"),
        "{samples}"
    );
    // What runs already is left alone; what was stopped comes back with its data.
    place.must("scripts/start_n_servers.sh", &["2", &first]);
    place.must("cluster.sh", &["gateway", &proxy]);
    place.must("scripts/stop_servers.sh", &[]);
    assert_eq!(place.must("cluster.sh", &["members"]), "");
    assert_eq!(curl(&[]), "");
    place.must("scripts/start_n_servers.sh", &["2"]);
    place.must("cluster.sh", &["gateway", &proxy]);
    assert_eq!(curl(&[]), "value");
    assert!(
        !place
            .run("scripts/start_n_servers.sh", &["3"])
            .status
            .success(),
        "there is a cluster of another size"
    );
    assert_eq!(
        place
            .run("scripts/start_n_servers.sh", &["three"])
            .status
            .code(),
        Some(2)
    );
    place.must("scripts/stop_servers.sh", &["--clean"]);
    assert!(!place.dir.path().join("cluster").exists());
}
