//! Containers on a network of their own join, leave and come back, with nothing lost: `scripts/docker-test.sh`, with the real binary.

use std::path::Path;

use crate::common::cluster::{binary, take_turn};
use crate::common::say;

/// How `scripts/docker-test.sh` ends where there is no Docker engine.
const SKIPPED: i32 = 77;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn containers_join_leave_and_come_back() {
    let _turn = take_turn().await;
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/docker-test.sh");
    let mut command = tokio::process::Command::new(&script);
    let output = command.env("QUORATE_BIN", binary()).env_remove("IMAGE").kill_on_drop(true).output().await;
    let output = output.unwrap_or_else(|error| panic!("{}: {error}", script.display()));
    let (told, complaints) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    match output.status.code() {
        Some(0) => say(&format!("docker: {}", told.trim_end().replace('\n', "\n    docker: "))),
        Some(SKIPPED) => say(told.trim_end()),
        _ => panic!("{} ended with {}:\n{told}{complaints}", script.display(), output.status),
    }
}
