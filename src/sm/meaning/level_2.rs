//! What came with level 2.

use super::{MapKind, Script};
use crate::sm::kv::{self, Action, Condition, Media, Operation, Write};
use crate::sm::slots::slot_of;

pub fn shard() -> Script {
    let mut script = Script::new(MapKind::Shard);
    let set = |reason: Option<&str>| {
        kv::KvCommand::SetReadOnly {
            reason: reason.map(str::to_owned),
        }
        .encode()
    };
    script.run(
        "r",
        &kv::KvCommand::Claim {
            slots: vec![slot_of(b"r")],
        }
        .encode(),
    );
    script.run("r", &set(Some("its replicas differ")));
    script.attempt("r", &set(Some("they still do")));
    // What a leader proposed before it is written all the same, on every replica.
    let action = Action::Put {
        media: Media::Text,
        value: "v".into(),
    };
    let put = Operation {
        key: "{r}k".into(),
        condition: Condition::None,
        action,
    };
    let writes = vec![Write {
        operations: vec![put],
        idempotency_key: None,
    }];
    script.run(
        "r",
        &kv::KvCommand::BoundedWrite { time_ms: 7, writes }.encode(),
    );
    script.run("r", &set(None));
    script.attempt("r", &set(None));
    script
}
