#!/usr/bin/env bash
# Simulates clusters in one process, and looks whether anything goes wrong that must not.
#
#   scripts/simulate.sh --seed S                one life, told line by line
#   scripts/simulate.sh --seeds N --minutes M   many, until N were run or M minutes are over
#   --faults kill,pause,partition,…             only these may happen; --help names them all
#   --work-ms N                                 clients work for so long before all is healed
#   --twice                                     each seed twice: the two runs must not differ
#   --mutants                                   lists faults that can be put into nodes
#   --mutant NAME --seeds N                     puts one in: ends with 1 once it is found
#
# Ends with 0 where nothing was wrong, 1 where something was, 2 where it could not run. The build is
# in a target directory of its own (target/simulate, or $QUORATE_SIM_TARGET), since it needs tokio's
# unstable features.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

target=${QUORATE_SIM_TARGET:-$PWD/target/simulate}
log=$(mktemp)
trap 'rm -f "$log"' EXIT

# What cargo says is not what a seed says: it is shown only where the build fails.
if ! RUSTFLAGS="--cfg tokio_unstable" CARGO_TARGET_DIR=$target CARGO_TERM_COLOR=never \
    cargo build --quiet --locked --package quorate-sim --features world --profile sim \
    >"$log" 2>&1; then
    cat "$log" >&2
    echo "simulate.sh: the simulator could not be built" >&2
    exit 2
fi

status=0
"$target/sim/quorate-sim" "$@" || status=$?
case $status in
    0 | 1 | 2) exit "$status" ;;
    *)
        echo "simulate.sh: the simulator ended with status $status" >&2
        exit 2
        ;;
esac
