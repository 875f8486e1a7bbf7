//! Groups in one process: nodes with a simulated disk and maps in memory, lanes in memory or over
//! loopback.

mod cluster;
mod failover;
mod full_disk;
mod groups;
mod lanes;
mod network;
mod opening;
mod rebuild;
mod slow_maps;
mod snapshots;
mod stalling_disk;
mod storage_suite;
mod witness;
