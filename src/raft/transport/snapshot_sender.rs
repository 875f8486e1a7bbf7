//! [`send`]: sends a snapshot to another replica, and waits until it is installed.
//!
//! The file travels in chunks, each answered with the number of bytes that have arrived, so a
//! broken transfer goes on where it broke, even under a new leader that has the same file.
//! Installing may take any time; the sender asks again until it is done. A witness asks for the
//! watermark instead, and nothing of the map travels to it.

use std::time::Duration;

use tokio::time::Instant;

use super::LaneError;
use super::peer_client::PeerClient;
use super::wire::{PeerRefusal, PeerReply, PeerRequest, SnapshotName, WireError};
use crate::blocking;
use crate::rare::{self, RareBranch};
use crate::sm::ports::StoreError;
use crate::storage::log::Vote;
use crate::storage::snapshot::Snapshot;

/// Bytes of the snapshot file in one frame.
const CHUNK_BYTES: usize = 512 << 10;

/// Sends a snapshot, and waits until it is installed. Returns the receiver's vote. Each step must
/// succeed within `step_timeout`.
pub async fn send(
    client: &PeerClient,
    vote: Vote,
    snapshot: &Snapshot,
    step_timeout: Duration,
) -> Result<Vote, LaneError> {
    let name = name_of(snapshot);

    let opened = client
        .ask(
            &PeerRequest::SnapshotOpen {
                vote,
                snapshot: name,
            },
            &[],
            deadline(step_timeout),
        )
        .await?;

    if let PeerReply::WatermarkWanted = opened {
        let watermark = PeerRequest::Watermark {
            vote,
            applied: snapshot.applied().clone(),
        };
        return match client.ask(&watermark, &[], deadline(step_timeout)).await? {
            PeerReply::SnapshotInstalled { vote } => Ok(vote),
            other => Err(unexpected(&other)),
        };
    }

    // Goes on where an earlier transfer of the same file ended.
    let mut bytes_sent = read_bytes_sent(opened)?;
    while bytes_sent < name.bytes_len {
        let turn = client
            .budgets()
            .snapshot_pieces
            .acquire()
            .await
            .map_err(|_| LaneError::Closed)?;

        // The permit bounds the pieces that are in memory on this node, over all transfers.
        let chunk = read_chunk(snapshot, bytes_sent).await?;
        let request = PeerRequest::SnapshotChunk {
            snapshot: name,
            offset: bytes_sent,
        };

        let bytes_now =
            read_bytes_sent(client.ask(&request, &chunk, deadline(step_timeout)).await?)?;
        drop((turn, chunk));

        // A receiver that makes no progress would keep this loop going forever.
        if bytes_now <= bytes_sent {
            return Err(LaneError::Refused(PeerRefusal::Failed(format!(
                "the snapshot does not grow past {bytes_sent} bytes there"
            ))));
        }

        bytes_sent = bytes_now;
    }

    // An installation may take any time. The receiver answers each request in time, and is asked
    // again.
    loop {
        match client
            .ask(
                &PeerRequest::SnapshotInstall {
                    vote,
                    snapshot: name,
                },
                &[],
                deadline(step_timeout),
            )
            .await?
        {
            PeerReply::SnapshotInstalled { vote } => return Ok(vote),
            PeerReply::SnapshotHas { .. } => {}
            other => return Err(unexpected(&other)),
        }
    }
}

fn deadline(timeout: Duration) -> Instant {
    Instant::now() + timeout
}

fn name_of(snapshot: &Snapshot) -> SnapshotName {
    let applied = snapshot.applied().log_id;
    SnapshotName {
        written_by: snapshot.written_by().replica,
        applied,
        bytes_len: snapshot.bytes_len(),
    }
}

async fn read_chunk(snapshot: &Snapshot, offset: u64) -> Result<Vec<u8>, LaneError> {
    let snapshot = snapshot.clone();

    // The file may not be in memory, and threads that serve must not wait for the disk.
    let read = blocking::start(move || {
        let chunk_bytes = rare::or(RareBranch::SmallBlocks, 100, CHUNK_BYTES);
        let mut chunk = vec![0; chunk_bytes];
        let read = snapshot.read_at(offset, &mut chunk)?;
        chunk.truncate(read);
        Ok::<_, StoreError>(chunk)
    });
    let failed =
        |reason: String| LaneError::Down(format!("the snapshot can't be read here: {reason}"));
    read.await
        .map_err(|error| failed(error.to_string()))?
        .map_err(|error| failed(error.to_string()))
}

fn read_bytes_sent(reply: PeerReply) -> Result<u64, LaneError> {
    match reply {
        PeerReply::SnapshotHas { bytes_len } => Ok(bytes_len),
        other => Err(unexpected(&other)),
    }
}

fn unexpected(reply: &PeerReply) -> LaneError {
    LaneError::Unreadable(WireError::Malformed(format!(
        "a reply of another kind: {reply:?}"
    )))
}
