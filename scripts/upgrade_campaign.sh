#!/usr/bin/env bash
# Rehearses an upgrade with the real older program and its data directories, on this machine:
# a cluster of the old program is upgraded node by node while clients write, goes back where it
# still can, has its level raised, and takes the old program no more. Every write that was
# acknowledged must be there at the end.
#
#     scripts/upgrade_campaign.sh [--old PROGRAM] [--new PROGRAM] [--port PORT] [--keep]
#
# Without --old the program of commit 0bbd823, the last that knew no levels, is built.
set -euo pipefail

here=$(cd "$(dirname "$0")/.." && pwd)
old='' new='' port=21100 keep=false
while [ $# -gt 0 ]; do
    case $1 in
        --old) old=$2; shift 2 ;;
        --new) new=$2; shift 2 ;;
        --port) port=$2; shift 2 ;;
        --keep) keep=true; shift ;;
        *) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit 2 ;;
    esac
done

work=$(mktemp -d)
declare -A pids=()
writer='' bench=''
# Processes are ended by their ids, and only those that this script has started.
finish() {
    for pid in $writer $bench "${pids[@]}"; do kill -9 "$pid" 2>/dev/null || true; done
    wait 2>/dev/null || true
    git -C "$here" worktree remove --force "$work/old-tree" 2>/dev/null || true
    if $keep; then echo "kept: $work"; else rm -rf "$work"; fi
}
trap finish EXIT

say() { printf '%s  %s\n' "$(date +%T)" "$*"; }
fail() { say "FAILED: $*"; tail -n 5 "$work"/*.log >&2 || true; exit 1; }

if [ -z "$new" ]; then
    cargo build --locked --manifest-path "$here/Cargo.toml" --target-dir "$here/target"
    new=$here/target/debug/quorate
fi
if [ -z "$old" ]; then
    git -C "$here" worktree add --detach "$work/old-tree" 0bbd823 >/dev/null
    cargo build --locked --manifest-path "$work/old-tree/Cargo.toml" --target-dir "$work/old-target"
    old=$work/old-target/debug/quorate
fi

addresses=()
for n in 0 1 2; do addresses+=("127.0.0.1:$((port + n))"); done
view=$(IFS=,; echo "${addresses[*]}")
spare=127.0.0.1:$((port + 3))

# start NODE PROGRAM [FLAG...]
start() {
    local node=$1 program=$2; shift 2
    "$program" serve --address "${addresses[$node]}" --view "$view" \
        --data-dir "$work/node-$node" "$@" >>"$work/node-$node.log" 2>&1 &
    pids[$node]=$!
}

start_new() { start "$1" "$new" --raise-level-after 3; }

stop() {
    kill -TERM "${pids[$1]}"
    wait "${pids[$1]}" || true
    unset "pids[$1]"
}

# until_true SECONDS WHAT COMMAND...
until_true() {
    local deadline=$(($(date +%s) + $1)) what=$2; shift 2
    until "$@" >/dev/null 2>&1; do
        [ "$(date +%s)" -lt "$deadline" ] || fail "never: $what"
        sleep 0.2
    done
}

ready() { curl -sf -m 2 "http://${addresses[$1]}/readyz"; }
until_ready() { until_true 90 "${addresses[$1]} is ready" ready "$1"; }
level_is() { curl -sf -m 2 "http://${addresses[0]}/v1/cluster" | grep -q "\"level\":$1,"; }
cluster() { "$new" cluster --server "$view" "$@"; }

put() {
    curl -sf -L -m 5 -o /dev/null -X PUT --data-binary "value $1" \
        "http://${addresses[$(($1 % 3))]}/v1/kv/key-$1"
}

# Writes one key after the other, and notes each that was acknowledged.
write_on() {
    local n=$1
    while :; do
        n=$((n + 1))
        if put "$n"; then echo "$n" >>"$work/acknowledged"; fi
    done
}

check_all() {
    local n value count=0
    while read -r n; do
        value=$(curl -sf -L -m 10 "http://${addresses[$((n % 3))]}/v1/kv/key-$n") ||
            fail "key-$n is not there"
        [ "$value" = "value $n" ] || fail "key-$n is $value"
        count=$((count + 1))
    done <"$work/acknowledged"
    say "all $count acknowledged keys are there"
}

say "a cluster of the old program: $old"
for node in 0 1 2; do start "$node" "$old"; done
# The first programs are never ready where they are alone, but these are three.
for node in 0 1 2; do until_ready "$node"; done
for n in $(seq 1 100); do put "$n" && echo "$n" >>"$work/acknowledged"; done

write_on 1000 &
writer=$!
"$new" bench --server "$view" -w mixed -c 4 -r 200 --duration 600s >"$work/bench.out" 2>&1 &
bench=$!

say 'one node is upgraded, and holds the level'
stop 0; start_new 0; until_ready 0
until_true 20 'the level is held' cluster level --hold
for node in 1 2; do
    say "node $node is upgraded"
    stop "$node"; start_new "$node"; until_ready "$node"
done
say 'a node goes back to the old program, and comes again'
stop 1; start 1 "$old"; until_ready 1
stop 1; start_new 1; until_ready 1
level_is 0 || fail 'the level was raised though it is held'

say 'the hold is released'
cluster level --release
until_true 60 'the level is raised' level_is 1
cluster level

say 'the old program is refused'
until_true 20 'the stamp is of the level' grep -q '"level": 1' "$work/node-1/stamp"
stop 1
if timeout 30 "$old" serve --address "${addresses[1]}" --view "$view" \
    --data-dir "$work/node-1" >"$work/old.log" 2>&1; then
    fail 'the old program started in a directory of level 1'
fi
grep -q 'which this version does not know: it was written by a newer one' "$work/old.log" ||
    fail "it said: $(cat "$work/old.log")"
if timeout 30 "$new" serve --address "${addresses[1]}" --view "$view" \
    --data-dir "$work/node-1" --level-max 0 >"$work/level-0.log" 2>&1; then
    fail 'a program that knows level 0 started in a directory of level 1'
fi
grep -q 'this cluster uses level 1, this program knows 0' "$work/level-0.log" ||
    fail "it said: $(cat "$work/level-0.log")"
start_new 1; until_ready 1

"$old" serve --address "$spare" --view "$view" --data-dir "$work/spare" >"$work/spare.log" 2>&1 &
pids[3]=$!
is_refused() {
    { cluster add "$spare" --yes 2>&1 || true; } |
        grep -q "can't be added: this cluster uses level 1, this program knows 0"
}
until_true 30 'the old program is refused as a new node' is_refused
kill -9 "${pids[3]}"; wait "${pids[3]}" 2>/dev/null || true; unset 'pids[3]'

kill "$writer"; wait "$writer" 2>/dev/null || true; writer=''
kill "$bench"; wait "$bench" 2>/dev/null || true; bench=''
check_all

say 'all nodes are started again'
for node in 0 1 2; do stop "$node"; done
for node in 0 1 2; do start_new "$node"; done
for node in 0 1 2; do until_ready "$node"; done
level_is 1 || fail 'the level is not what it was'
check_all
say 'done'
