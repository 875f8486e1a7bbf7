#!/usr/bin/env bash
# Tries a cluster of its own for real: starts nodes and a proxy, stores keys and reads them back
# through the proxy by the load balancer's dialect, kills a node half-way, and compares every value.
# Exits with 0 if every value was right; removes what it started.
set -euo pipefail

usage() {
    cat <<USAGE
usage: scripts/selftest.sh [--nodes N] [--port P] [--proxy-port P] [-r KEYS] [-c Random|Serial]

  --nodes N       how many nodes (4); with three or more, one is killed half-way
  --port P        the port of the first node (3000)
  --proxy-port P  the port of the proxy (8081)
  -r KEYS         how many keys (100)
  -c ORDER        Random: keys of random names, in random order; Serial: key1, key2, ... (Random)
USAGE
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
nodes=4 port=3000 proxy_port=8081 keys=100 order=Random

misuse() { printf 'selftest.sh: %s\n' "$*" >&2; usage >&2; exit 2; }
number() {
    case $2 in '' | *[!0-9]* | ???????*) misuse "$1 takes a number, not '$2'" ;; esac
    [ "$2" -ge 1 ] || misuse "$1 is at least 1"
}

while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage && exit ;;
        --nodes | --port | --proxy-port | -r | -c) [ $# -ge 2 ] || misuse "$1 takes a value" ;;
        *) misuse "unknown option $1" ;;
    esac
    case $1 in -c) ;; *) number "$1" "$2" ;; esac
    case $1 in
        --nodes) nodes=$2 ;;
        --port) port=$2 ;;
        --proxy-port) proxy_port=$2 ;;
        -r) keys=$2 ;;
        -c) order=$2 ;;
    esac
    shift 2
done
case $order in
    [Rr]andom) order=Random ;;
    [Ss]erial) order=Serial ;;
    *) misuse "-c is Random or Serial, not '$order'" ;;
esac

dir=$(mktemp -d "${TMPDIR:-/tmp}/quorate-selftest.XXXXXX")
cluster() { "$root/cluster.sh" --dir "$dir" "$@"; }
finish() {
    local status=$?
    trap - EXIT
    if [ "$status" -ne 0 ]; then printf 'selftest.sh: FAILED\n' >&2; fi
    cluster clean >/dev/null 2>&1 || printf 'selftest.sh: cannot remove all of %s\n' "$dir" >&2
    rmdir "$dir" 2>/dev/null || true
    exit "$status"
}
trap finish EXIT
trap 'exit 130' INT TERM

ask() { curl -q -s --noproxy '*' --max-time 10 "$@"; }

# Stores value $2 under key $1, once more while nobody can tell: the same value twice is the same
# value.
put() {
    local answer tries
    for ((tries = 0; tries < 40; tries++)); do
        answer=$(ask -d "$2" "http://127.0.0.1:$proxy_port/set/$1") || true
        [ "$answer" != "response from server:\"stored key:value is $2\"" ] || return 0
        sleep 0.25
    done
    printf 'selftest.sh: %s=%s was not stored: %s\n' "$1" "$2" "$answer" >&2
    return 1
}

# Whether key $1 has value $2.
has() {
    local answer tries
    for ((tries = 0; tries < 40; tries++)); do
        answer=$(ask "http://127.0.0.1:$proxy_port/get/$1") || true
        case $answer in
            "response from server:\"retrived key value is $2\"") return 0 ;;
            'response from server:'*) break ;; # A wrong answer, and a final one.
        esac
        sleep 0.25
    done
    printf 'selftest.sh: %s should be %s, and the answer is: %s\n' "$1" "$2" "$answer" >&2
    return 1
}

cluster bootstrap "$nodes" --base-port "$port"
cluster gateway "$proxy_port"

names=() values=()
for ((n = 1; n <= keys; n++)); do
    if [ "$order" = Serial ]; then
        names+=("key$n")
    else
        names+=("key$n$(printf 'x%04x' "$RANDOM")")
    fi
    values+=("$((RANDOM * 32768 + RANDOM + 1))")
done
# The order in which keys are read.
sequence=()
for ((n = 0; n < keys; n++)); do sequence+=("$n"); done
if [ "$order" = Random ]; then
    for ((n = keys - 1; n > 0; n--)); do
        other=$(((RANDOM * 32768 + RANDOM) % (n + 1)))
        kept=${sequence[n]} sequence[n]=${sequence[other]} sequence[other]=$kept
    done
fi

killed=''
wrong=0
started=$SECONDS
for ((n = 0; n < keys; n++)); do
    if [ "$n" -eq $((keys / 2)) ] && [ "$nodes" -ge 3 ]; then
        killed=127.0.0.1:$((port + RANDOM % nodes))
        cluster kill "$killed"
    fi
    put "${names[n]}" "${values[n]}" || wrong=$((wrong + 1))
    # What was just stored is there at once.
    has "${names[n]}" "${values[n]}" || wrong=$((wrong + 1))
done
for n in "${sequence[@]}"; do has "${names[n]}" "${values[n]}" || wrong=$((wrong + 1)); done
if [ -n "$killed" ]; then
    cluster restart "$killed"
    for n in "${sequence[@]}"; do has "${names[n]}" "${values[n]}" || wrong=$((wrong + 1)); done
fi
printf '%s keys, %s wrong answers, %s s%s\n' "$keys" "$wrong" "$((SECONDS - started))" \
    "${killed:+; $killed was killed half-way}"
[ "$wrong" -eq 0 ]
