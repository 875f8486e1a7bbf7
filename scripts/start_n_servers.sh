#!/usr/bin/env bash
# Starts N servers on this machine: scripts/start_n_servers.sh N [FIRST_PORT]. They listen on
# 127.0.0.1, from FIRST_PORT (9000) on, and form one cluster. Where there is a cluster of N already,
# its stopped servers are started from their data. See cluster.sh for everything else.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
count=${1:-} first=${2:-9000}
case $count$first in
    *[!0-9]* | '') printf 'usage: %s N [FIRST_PORT]\n' "$0" >&2 && exit 2 ;;
esac

dir=${QUORATE_CLUSTER_DIR:-$root/.cluster}
there=$(find "$dir/nodes" -mindepth 2 -maxdepth 2 -name address 2>/dev/null |
    wc -l | tr -d ' ' || true)
if [ "$there" -gt 0 ]; then
    if [ "$there" -ne "$count" ]; then
        printf 'There is a cluster of %s servers in %s. Remove it first: %s --clean\n' \
            "$there" "$dir" "$root/scripts/stop_servers.sh" >&2
        exit 1
    fi
    "$root/cluster.sh" start
else
    "$root/cluster.sh" bootstrap "$count" --base-port "$first"
fi
cluster=$root/cluster.sh
cat <<TEXT

Start the proxy with     $cluster gateway           (on ports 8080 and 8081, in the background)
Try it with              $root/scripts/client.sh
Stop everything with     $root/scripts/stop_servers.sh      (--clean removes the data too)
TEXT
