//! `cluster.sh` does what its help says, with the real binary.
//!
//! What each verb prints is played by the tour and by the scripts; here is what only a program of
//! an earlier release shows.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::common::cluster::{Cluster, Setup, binary};

/// Writes a program that refuses the flags which the first release did not know, as that does, and
/// else is the one under test.
fn earlier_program(dir: &Path) -> PathBuf {
    let path = dir.join("quorate");
    let script = format!(
        "#!/bin/sh\nfor argument; do case $argument in --join-only*|--lost-disk-after*) exit 2 ;; \
         esac; done\nexec '{}' \"$@\"\n",
        binary()
    );
    std::fs::write(&path, script).expect("written");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))
        .expect("made executable");
    path
}

fn run(program: &Path, dir: &Path, arguments: &[&str]) -> Output {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("cluster.sh");
    let mut command = Command::new(script);
    command
        .args(arguments)
        .arg("--dir")
        .arg(dir)
        .env("QUORATE_BIN", program);
    command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_program_of_an_earlier_release_is_started_again() {
    let ports = Cluster::prepare(Setup::nodes(0)).await;
    let place = tempfile::TempDir::with_prefix_in("earlier-", env!("CARGO_TARGET_TMPDIR"))
        .expect("a directory");
    let (program, dir) = (earlier_program(place.path()), place.path().join("cluster"));
    let port = ports.first_port().to_string();

    let verbs: [&[&str]; 4] = [
        &["bootstrap", "1", "--base-port", &port],
        &["stop"],
        &["start"],
        &["clean"],
    ];
    for verb in verbs {
        let output = run(&program, &dir, verb);
        let told = [&output.stdout[..], &output.stderr]
            .map(String::from_utf8_lossy)
            .concat();
        assert!(
            output.status.success(),
            "{verb:?} ended with {}: {told}",
            output.status
        );
    }
}
