#!/usr/bin/env bash
# Stops the servers and the proxy that scripts/start_n_servers.sh and `cluster.sh gateway` have
# started. Their data stays, unless --clean is given.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
case ${1:-} in
    '') exec "$root/cluster.sh" stop ;;
    --clean) exec "$root/cluster.sh" clean ;;
    *) printf 'usage: %s [--clean]\n' "$0" >&2 && exit 2 ;;
esac
