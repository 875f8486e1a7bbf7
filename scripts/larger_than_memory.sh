#!/usr/bin/env bash
# Reads from a cluster whose data are larger than its memory, on this machine: three nodes are read
# from at random, and each of them lives, from the moment that it is ready, in a control group that
# leaves it but little memory more for what it reads. No leader may change.
#
#     sudo scripts/larger_than_memory.sh [--program PROGRAM] [--port PORT] [--keys N]
#         [--value-size BYTES] [--memory-mib MIB] [--cache-mib MIB] [--reads-per-second N]
#         [--connections N] [--seconds N] [--data DIR]
#
# --data has the data in a directory that stays: the next run with it need not write them again.
# --reads-per-second is what the disk does for each node, where the kernel can hold it to that: the
# disks of development machines are mostly too fast to be in anybody's way.
# Needs root and control groups of the first or second version.
set -euo pipefail

here=$(cd "$(dirname "$0")/.." && pwd)
program='' port=21300 data=''
keys=180000 value=2000 memory=64 cache=8 reads=400 connections=64 seconds=120
while [ $# -gt 0 ]; do
    case $1 in
        --program) program=$2; shift 2 ;;
        --port) port=$2; shift 2 ;;
        --keys) keys=$2; shift 2 ;;
        --value-size) value=$2; shift 2 ;;
        --memory-mib) memory=$2; shift 2 ;;
        --cache-mib) cache=$2; shift 2 ;;
        --reads-per-second) reads=$2; shift 2 ;;
        --connections) connections=$2; shift 2 ;;
        --seconds) seconds=$2; shift 2 ;;
        --data) data=$2; shift 2 ;;
        *) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit 2 ;;
    esac
done

work=$(mktemp -d)
[ -n "$data" ] || data=$work
mkdir -p "$data"
declare -A pids=()
groups=()
# Processes are ended by their ids, and only those that this script has started.
finish() {
    for pid in "${pids[@]}"; do kill -9 "$pid" 2>/dev/null || true; done
    wait 2>/dev/null || true
    for group in "${groups[@]}"; do rmdir "$group" 2>/dev/null || true; done
    rm -rf "$work"
}
trap finish EXIT

say() { printf '%s  %s\n' "$(date +%T)" "$*"; }
fail() { say "FAILED: $*"; tail -n 5 "$work"/*.log >&2 || true; exit 1; }

if [ -z "$program" ]; then
    cargo build --release --locked --manifest-path "$here/Cargo.toml"
    program=$here/target/release/quorate
fi

addresses=()
for n in 0 1 2; do addresses+=("127.0.0.1:$((port + n))"); done
view=$(IFS=,; echo "${addresses[*]}")

# join NODE: has a node that runs live with so much more memory than it has now, and so many reads.
join() {
    local name=quorate-$$-$1 pid=${pids[$1]} disk of_memory of_disk
    disk=$(stat -c '%Hd:%Ld' "$data")
    # A partition has no limit of its own: its disk has.
    [ -e "/sys/dev/block/$disk/partition" ] && disk=$(cat "/sys/dev/block/$disk/../dev")
    if [ -d /sys/fs/cgroup/memory ]; then
        of_memory=/sys/fs/cgroup/memory/$name of_disk=/sys/fs/cgroup/blkio/$name
        mkdir "$of_memory" "$of_disk"
        groups+=("$of_memory" "$of_disk")
        echo $((memory << 20)) >"$of_memory/memory.limit_in_bytes"
        echo "$disk $reads" >"$of_disk/blkio.throttle.read_iops_device" ||
            say "reads are not held back here"
        echo "$pid" >"$of_disk/cgroup.procs"
    else
        of_memory=/sys/fs/cgroup/$name
        mkdir "$of_memory"
        groups+=("$of_memory")
        echo $((memory << 20)) >"$of_memory/memory.max"
        echo "$disk riops=$reads" >"$of_memory/io.max" || say "reads are not held back here"
    fi
    echo "$pid" >"$of_memory/cgroup.procs"
}

# start NODE
start() {
    "$program" serve --address "${addresses[$1]}" --view "$view" --data-dir "$data/node-$1" \
        --cache-mib "$cache" >>"$work/node-$1.log" 2>&1 &
    pids[$1]=$!
}

# until_true SECONDS WHAT COMMAND...
until_true() {
    local deadline=$(($(date +%s) + $1)) what=$2; shift 2
    until "$@" >/dev/null 2>&1; do
        [ "$(date +%s)" -lt "$deadline" ] || fail "never: $what"
        sleep 0.3
    done
}

ready() { curl -sf -m 5 "http://${addresses[$1]}/readyz"; }
all_ready() { for n in 0 1 2; do until_true 300 "${addresses[$n]} is ready" ready "$n"; done; }
metric() {
    curl -sf -m 30 "http://${addresses[$1]}/metrics" |
        awk -v name="$2" '$1 ~ "^"name"({|$)" { sum += $2 } END { print sum + 0 }'
}
terms() { for n in 0 1 2; do metric "$n" quorate_group_term; done | paste -sd' '; }
bench() {
    "$program" bench --server "$view" --value-size "$value" -k "$keys" "$@"
}

# Writes the keys of `quorate bench` from $1 on, up to $2 of them.
write_from() {
    awk -v first="$1" -v count="$2" -v keys="$keys" -v bytes="$value" 'BEGIN {
        text = "\"encoding\":\"string\",\"data\":"
        while (length(filler) < bytes) filler = filler "v"
        for (n = first; n < first + count && n < keys; n++)
            printf "%s{\"key\":{%s\"bench-%09d\"},\"value\":{%s\"%s\"}}", \
                (n == first ? "[" : ","), text, n, text, filler
        print "]"
    }' | curl -sf -m 120 -o /dev/null -X PUT --data-binary @- "http://${addresses[0]}/set"
}
for n in 0 1 2; do start "$n"; done
all_ready
if [ ! -e "$data/written" ]; then
    say "$keys keys of $value bytes are written"
    batch=$((16 * 1024 * 1024 / (value + 100)))
    for ((n = 0; n < keys; n += batch)); do
        until_true 300 "keys from $n on are written" write_from "$n" "$batch"
    done
    touch "$data/written"
fi
say "until all of it is in the trees"
in_tables() {
    local bytes
    bytes=$(for n in 0 1 2; do
        metric "$n" quorate_map_active_bytes
        metric "$n" quorate_map_frozen_bytes
    done | awk '{ sum += $1 } END { print sum }')
    [ "$bytes" -lt 1000000 ]
}
until_true 120 "tables are written down" in_tables
maps=$(metric 0 quorate_map_bytes)
for n in 0 1 2; do kill -TERM "${pids[$n]}"; wait "${pids[$n]}" || true; done

for n in 0 1 2; do start "$n"; done
all_ready
sync
# What was read until now is charged to nobody, and gone.
for n in 0 1 2; do join "$n"; done
echo 3 >/proc/sys/vm/drop_caches
for n in 0 1 2; do
    own=$(awk '/VmRSS/ { print int($2 / 1024) }' "/proc/${pids[$n]}/status" || true)
    say "node $n: $((maps >> 20)) MiB of maps, $own MiB of its own, $memory MiB more"
done
sleep 5
before=$(terms)
bench -w get -c "$connections" --duration "${seconds}s" --warm-up 2s | tee "$work/bench.log"
after=$(terms)
for n in 0 1 2; do
    kill -0 "${pids[$n]}" 2>/dev/null || fail "node $n has ended"
    elsewhere=$(metric "$n" quorate_map_reads_elsewhere_total || true)
    say "node $n: $elsewhere reads waited off the threads that serve"
done
say "terms before: $before, after: $after"
[ "$before" = "$after" ] || fail "leaders have changed"
say "no leader has changed"
