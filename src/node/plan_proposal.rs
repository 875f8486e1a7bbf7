//! Proposes a plan to the meta group: of the operator, or of a controller that repairs.

use tokio::time::Instant;

use crate::raft::{ProposeError, Replica};
use crate::sm::cluster::meta::{MetaCommand, MetaOutcome, MetaRejection};
use crate::sm::cluster::view::View;

/// The reason why a plan is not installed.
#[derive(Debug)]
pub enum PlanRefusal {
    /// The meta group looked at it and said no.
    Rejected(MetaRejection),
    /// It was not applied, or that is not known.
    Failed(ProposeError),
}

/// Has the meta group accept `next` as the plan that follows `view`.
pub async fn install_plan(
    meta: &Replica,
    view: &View,
    next: View,
    deadline: Instant,
) -> Result<(), PlanRefusal> {
    let command = MetaCommand::InstallPlan {
        base: view.version,
        next: Box::new(next),
    };
    match meta.propose_meta(command, deadline).await {
        Ok(MetaOutcome::Done | MetaOutcome::MoveOpened { .. }) => Ok(()),
        Ok(MetaOutcome::Rejected(rejection)) => Err(PlanRefusal::Rejected(rejection)),
        Err(error) => Err(PlanRefusal::Failed(error)),
    }
}
