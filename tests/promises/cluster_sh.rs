//! `cluster.sh` does what its help says, with the real binary.
