//! What was acknowledged is on the disk: a node that starts from what a power cut leaves has all of
//! it.
//!
//! The disk is an image file behind a loop device. The node is stopped for a moment, and the image
//! copied while nothing is written to it: the copy holds what was synced, and not what the kernel
//! still held in memory. The node that starts from it believes in another boot of the machine, as
//! it would after a power cut.

use std::fs;
use std::path::Path;
use std::time::Duration;

use crate::common::cluster::{Cluster, Setup};
use crate::common::load::Load;
use crate::common::mounts::{Mount, format_image, run};
use crate::common::{eventually, say};

const IMAGE_BYTES: u64 = 2 << 30;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_acknowledged_survives_a_power_cut() {
    let place = tempfile::TempDir::with_prefix_in("power-", env!("CARGO_TARGET_TMPDIR"))
        .expect("a directory");
    let (image, copy, mounted) = (
        place.path().join("image"),
        place.path().join("copy"),
        place.path().join("mounted"),
    );
    let disk = match format_image(&image, IMAGE_BYTES).and_then(|()| Mount::image(&mounted, &image))
    {
        Ok(disk) => disk,
        Err(reason) => {
            return say(&format!(
                "power_cut: left out, can't mount an image: {reason}"
            ));
        }
    };
    let setup = Setup {
        data: vec![(0, mounted.join("data"))],
        no_view: true,
        ..Setup::nodes(1)
    };
    let mut cluster = Cluster::start(setup).await;
    let load = Load::new("power").start(&cluster);
    load.writes(1000).await;

    cluster.nodes[0].pause();
    let acknowledged = load.acknowledged_ledger();
    copy_when_quiet(&disk, &image, &copy).await;
    cluster.nodes[0].resume();
    load.writes(10).await;
    drop(load.stop().await);
    cluster.nodes[0].kill();
    drop(disk);

    let _disk = Mount::image(&mounted, &copy).expect("a copy that can be mounted like the image");
    cluster.nodes[0].wrapper = other_boot(place.path());
    cluster.nodes[0].start();
    cluster.wait_ready().await;
    let lost = acknowledged.lost(&cluster, 0).await;
    say(&format!(
        "power_cut: {} keys acknowledged before the cut",
        acknowledged.len()
    ));
    assert!(acknowledged.len() > 50, "too few keys to prove anything");
    assert!(
        lost.is_empty(),
        "acknowledged before the cut, and lost: {lost:?}"
    );
    cluster.nodes[0].kill();
}

/// Copies the image at one point in time: again, until nothing was written to it meanwhile.
async fn copy_when_quiet(disk: &Mount, image: &Path, copy: &Path) {
    let device = disk.device();
    let statistics = format!("/sys/block/{}/stat", device.trim_start_matches("/dev/"));
    let counters = || fs::read_to_string(&statistics).expect("the counters of a loop device");
    let copied = eventually(Duration::from_secs(60), async || {
        let before = counters();
        run(
            "cp",
            &[
                "--sparse=always",
                &image.display().to_string(),
                &copy.display().to_string(),
            ],
        )
        .expect("a copy");
        (counters() == before).then_some(())
    });
    copied
        .await
        .expect("a moment in which nothing is written to the image");
}

/// Runs the node with another boot id of the machine.
fn other_boot(place: &Path) -> Vec<String> {
    let boot = place.join("boot_id");
    fs::write(&boot, "00000000-1111-2222-3333-444444444444\n").expect("a boot id");
    let script = format!(
        "mount --bind '{}' /proc/sys/kernel/random/boot_id && exec \"$@\"",
        boot.display()
    );
    ["unshare", "--mount", "sh", "-c", &script, "sh"]
        .map(str::to_owned)
        .to_vec()
}
