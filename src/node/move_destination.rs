//! The destination's side of a slot move: what its leader does with a step that the driver sends.
//!
//! The driver is the leader of the source (`controllers::slot_moves`).

use std::collections::BTreeSet;
use std::time::Duration;

use crate::raft::Replica;
use crate::sm::kv::KvCommand;
use crate::sm::moves::{self, DestinationState, MoveCommand};
use crate::sm::ports::StoreError;
use crate::storage::map::{MapRead, ReadKind};
use crate::types::{MoveId, Slot};

/// Time for which a chunk waits for the disk to have caught up with those before it.
const AMPLE_ROOM_TIMEOUT: Duration = Duration::from_millis(500);
/// Returns true if a command is a step of a move, which a shard takes from the driver of the move.
pub fn is_step(command: &KvCommand) -> bool {
    match command {
        KvCommand::Move { .. } | KvCommand::Install { .. } => true,
        KvCommand::Write { .. }
        | KvCommand::BoundedWrite { .. }
        | KvCommand::Claim { .. }
        | KvCommand::Compare
        | KvCommand::SetReadOnly { .. } => false,
    }
}

/// Waits until the disk has caught up, before a command that changes many keys at once and that no
/// client waits for.
pub async fn wait_ample_room(group: &Replica, command: &KvCommand) {
    let can_wait = match command {
        KvCommand::Install { install, .. } => install.is_one_of_many(),
        KvCommand::Move { step, .. } => matches!(step, MoveCommand::Clear { .. }),
        KvCommand::Write { .. }
        | KvCommand::BoundedWrite { .. }
        | KvCommand::Claim { .. }
        | KvCommand::Compare
        | KvCommand::SetReadOnly { .. } => false,
    };
    if can_wait {
        // Not for ever: whoever sent it looks again what there is to do.
        let _ = tokio::time::timeout(AMPLE_ROOM_TIMEOUT, group.state().wait_ample_room()).await;
    }
}

/// Returns the command as the leader of a destination proposes it: a chunk carries its group time.
pub fn timed(command: KvCommand, group: &Replica) -> KvCommand {
    match command {
        KvCommand::Install { install, .. } => KvCommand::Install {
            time_ms: group.time_ms(),
            install,
        },
        other => other,
    }
}

/// Returns what the map of a destination says of a move.
pub async fn destination_state(
    group: &Replica,
    id: MoveId,
    slots: BTreeSet<Slot>,
) -> Result<DestinationState, StoreError> {
    let look = move |read: &MapRead<'_>| moves::destination_state(read, id, &slots);
    group.state().read_in(ReadKind::Page, look).await
}
