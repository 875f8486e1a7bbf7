#!/usr/bin/env bash
# Plays a scenario of the kvs dialect with containers on a network of their own, at fixed addresses:
# two nodes, keys, a third node added by a view change, a node cut off from the network and
# connected again. Prints one line a step; exits with 0 if all of it held, and with 77 if there is
# no Docker engine to play it on. Removes what it made.
#
#   IMAGE=kvs:3.0 scripts/docker-test.sh    takes that image, instead of building one
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
name=quorate-test-$$
subnet=${SUBNET:-10.10}
keys=40

say() { printf '%s\n' "$*"; }
die() { say "docker-test.sh: $*" >&2; exit 1; }

if ! command -v docker >/dev/null || ! docker info >/dev/null 2>&1; then
    say "docker-test.sh: skipped: no Docker engine runs here"
    exit 77
fi

cleanup() {
    local status=$? node
    trap - EXIT
    for node in 4 5 6; do
        if [ "$status" -ne 0 ]; then
            say "--- node $node" >&2
            docker logs --tail 15 "$name-$node" >&2 2>&1 || true
        fi
        docker rm --force --volumes "$name-$node" >/dev/null 2>&1 || true
    done
    docker network rm "$name" >/dev/null 2>&1 || true
    [ -n "${IMAGE:-}" ] || docker rmi "$image" >/dev/null 2>&1 || true
    exit "$status"
}

image=${IMAGE:-$name:latest}
trap cleanup EXIT
trap 'exit 130' INT TERM
[ -n "${IMAGE:-}" ] || "$root/docker/build-scratch.sh" "$image" >/dev/null
docker network create --subnet "$subnet.0.0/16" "$name" >/dev/null ||
    die "cannot make a network of $subnet.0.0/16: SUBNET=10.99 takes another"

address() { printf '%s.0.%s:13800' "$subnet" "$1"; }

# Starts node $1, with VIEW $2. Its port is published on a free one of the host, which is how it is
# asked.
start() {
    docker run --detach --name "$name-$1" --network "$name" --ip "$subnet.0.$1" \
        --publish 127.0.0.1::13800 --env ADDRESS="$(address "$1")" --env VIEW="$2" \
        "$image" >/dev/null
}

published() { docker port "$name-$1" 13800/tcp | head -n 1; }

# curl at node $1, path $2; sets CODE and BODY.
ask() {
    local node=$1 path=$2 answer
    shift 2
    answer=$(curl -q -s --noproxy '*' --max-time 10 -w '\n%{http_code}' "$@" \
        "http://$(published "$node")$path") || true
    CODE=${answer##*$'\n'} BODY=${answer%$'\n'*}
}

# Waits at most $1 seconds until the rest succeeds.
within() {
    local deadline=$((SECONDS + $1))
    shift
    until "$@"; do
        [ "$SECONDS" -lt "$deadline" ] || die "not in time: $*; the last answer was $CODE $BODY"
        sleep 0.3
    done
}

answers() { ask "$1" "$2" && [ "$CODE" = "$3" ]; }
is_ready() { answers "$1" /readyz 200; }
is_spare() { answers "$1" /readyz 503 && case $BODY in *spare*) ;; *) return 1 ;; esac; }
is_healthy() { [ "$(docker inspect --format '{{.State.Health.Status}}' "$name-$1")" = healthy ]; }
stores() {
    ask "$1" "/kvs/keys/$2" -X PUT -H 'Content-Type: application/json' -d "{\"value\":\"$3\"}" &&
        case $CODE in 200 | 201) ;; *) return 1 ;; esac
}
reads() {
    answers "$1" "/kvs/keys/$2" 200 &&
        case $BODY in *"\"value\":\"$3\""*) ;; *) return 1 ;; esac
}

# Every key has the value it should have, whichever of these nodes is asked.
all_there() {
    local node n
    for node in "$@"; do
        for ((n = 1; n <= keys; n++)); do within 20 reads "$node" "key$n" "value $n"; done
    done
}

# The keys that the nodes have among them.
counted() {
    local node sum=0 count
    for node in "$@"; do
        ask "$node" /kvs/key-count
        [ "$CODE" = 200 ] || return 1
        count=$(printf '%s' "$BODY" | sed -nE 's/.*"key-count": ?([0-9]+).*/\1/p')
        sum=$((sum + count))
    done
    [ "$sum" -eq "$keys" ]
}

two=$(address 4),$(address 5) three=$two,$(address 6)
CODE='' BODY=''

start 4 "$two"
start 5 "$two"
within 60 is_ready 4
within 60 is_ready 5
say "two nodes form a cluster"
within 30 is_healthy 4
say "the health check says so too"
for ((n = 1; n <= keys; n++)); do within 20 stores "$((4 + n % 2))" "key$n" "value $n"; done
all_there 4 5
within 20 counted 4 5
say "$keys keys are stored and read through either; each is counted once"

start 6 "$three"
within 60 is_spare 6
ask 4 /kvs/view-change -X PUT -H 'Content-Type: application/json' -d "{\"view\":\"$three\"}"
[ "$CODE" = 200 ] || die "the view change was answered $CODE $BODY"
within 60 is_ready 6
all_there 6
within 30 counted 4 5 6
say "a third node joined by a view change; no key is lost"

docker network disconnect "$name" "$name-6"
for ((n = 1; n <= keys; n++)); do within 20 stores 4 "key$n" "value $n"; done
all_there 4 5
say "with one node cut off, the others go on with every key"
docker network connect --ip "$subnet.0.6" "$name" "$name-6"
within 60 is_ready 6
all_there 6
within 30 counted 4 5 6
say "connected again, it has every key"
