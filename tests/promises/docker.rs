//! Containers on a network of their own join, leave and come back, with nothing lost:
//! `scripts/docker-test.sh`, with the real binary.

use std::fs;
use std::path::Path;

use crate::common::cluster::{binary, take_turn};
use crate::common::say;

/// How `scripts/docker-test.sh` ends where there is no Docker engine.
const SKIPPED: i32 = 77;

/// A file of this repository, with each run of white space as one space.
fn words(path: &str) -> String {
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path));
    let text = text
        .unwrap_or_else(|error| panic!("{path}: {error}"))
        .replace("\\\n", " ");
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Builds by hand are too slow for a test: that both ways to an image say the same is not.
#[test]
fn both_images_are_built_and_run_alike() {
    let (image, scratch, script) = (
        words("Dockerfile"),
        words("docker/Dockerfile.scratch"),
        words("docker/build-scratch.sh"),
    );
    let host = "rustc -vV | sed -n 's/^host: //p'";
    for text in [&image, &script] {
        assert!(
            text.contains(host) && text.contains(r#"RUSTFLAGS="-C target-feature=+crt-static""#),
            "{text}"
        );
        assert!(
            text.contains("cargo build --release --locked --bin quorate --target \"$host\""),
            "{text}"
        );
    }
    for line in [
        "USER 65532:65532",
        "EXPOSE 13800",
        "VOLUME /data",
        "WORKDIR /data",
        r#"CMD ["/quorate", "health"]"#,
        "STOPSIGNAL SIGTERM",
        r#"ENTRYPOINT ["/quorate"]"#,
        r#"CMD ["serve", "--ip", "0.0.0.0", "--data-dir", "/data"]"#,
    ] {
        assert!(image.contains(line) && scratch.contains(line), "{line}");
    }
    let sent = words(".dockerignore");
    for source in ["Cargo.toml", "Cargo.lock", "src", "benches"] {
        let copied =
            image.contains(&format!("COPY {source} ")) || image.contains(&format!(" {source} ./"));
        assert!(
            copied && sent.contains(&format!("!{source}")),
            "{source} is not sent to the build"
        );
    }
    let readme = words("README.md");
    for command in [
        "docker build -t kvs:3.0 .",
        "docker/build-scratch.sh",
        "scripts/docker-test.sh",
        "compose.yaml",
    ] {
        assert!(
            readme.contains(command),
            "README.md does not name {command}"
        );
    }
    for file in [
        "compose.yaml",
        "scripts/docker-test.sh",
        "docker/build-scratch.sh",
    ] {
        assert!(
            Path::new(env!("CARGO_MANIFEST_DIR")).join(file).is_file(),
            "there is no {file}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn containers_join_leave_and_come_back() {
    let _turn = take_turn().await;
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/docker-test.sh");
    let mut command = tokio::process::Command::new(&script);
    let output = command
        .env("QUORATE_BIN", binary())
        .env_remove("IMAGE")
        .kill_on_drop(true)
        .output()
        .await;
    let output = output.unwrap_or_else(|error| panic!("{}: {error}", script.display()));
    let (told, complaints) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    match output.status.code() {
        Some(0) => say(&format!(
            "docker: {}",
            told.trim_end().replace('\n', "\n    docker: ")
        )),
        Some(SKIPPED) => say(told.trim_end()),
        _ => panic!(
            "{} ended with {}:\n{told}{complaints}",
            script.display(),
            output.status
        ),
    }
}
