//! [`FailureReporter`]: tells every node that votes in the meta group that replicas have failed
//! here, again and again, so that whoever leads it asks this node.

use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use tokio_util::sync::CancellationToken;

use crate::api::peer::FailureReport;
use crate::node::context::NodeContext;
use crate::node::failure_reports::meta_voters;
use crate::node::pause;
use crate::types::DirectoryId;

/// Between two reports.
const REPORT_EVERY: Duration = Duration::from_secs(2);
const REPORT_TIMEOUT: Duration = Duration::from_secs(1);

/// Tells the voters of the meta group that replicas have failed here.
pub struct FailureReporter {
    context: Arc<NodeContext>,
    directory: DirectoryId,
}

impl FailureReporter {
    pub fn new(context: Arc<NodeContext>, directory: DirectoryId) -> Self {
        Self { context, directory }
    }

    pub async fn run(self, shutdown: &CancellationToken) {
        while pause::waited(shutdown, REPORT_EVERY).await {
            if !self.context.failures.now().is_empty() {
                self.report().await;
            }
        }
    }

    async fn report(&self) {
        let view = self.context.view();

        // This node may lead the meta group itself: nobody else tells it then.
        self.context.reports.take(&view, self.directory);
        let report = FailureReport {
            cluster: self.context.cluster,
            directory: self.directory,
        };
        let voters = meta_voters(&view, self.context.node);
        let told = voters.iter().map(|address| async {
            let told = self
                .context
                .peers
                .report_failures(address, &report, REPORT_TIMEOUT)
                .await;
            if let Err(error) = told {
                tracing::debug!("the failures of this node were not reported: {error}");
            }
        });
        join_all(told).await;
    }
}
