#!/usr/bin/env bash
# Shows that time changes nothing: a cluster on this machine under a mixed load (reads, writes,
# overwrites, deletes, idle spells, a node that comes and goes), measured at the end of each idle
# spell. Prints a line per cycle, and then whether memory, descriptors, threads, tasks and disk grew
# from the middle third of the run to its last. Exits with 1 if they did, 2 if it could not run.
#
#     scripts/soak.sh [--minutes M] [--nodes N] [--base-port P] [--rate R] [--keep]
#
# An hour by default. --rate is requests per second of the mixed load; choose one that the machine
# keeps up with. Needs bash, curl and a release build (QUORATE_BIN names another program); touches
# only what it started.
set -Eeuo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
minutes=60 nodes=3 port=21800 rate=300 keep=false
usage() { sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 2; }
while [ $# -gt 0 ]; do
    case $1 in
        --minutes) minutes=${2:?}; shift 2 ;;
        --nodes) nodes=${2:?}; shift 2 ;;
        --base-port) port=${2:?}; shift 2 ;;
        --rate) rate=${2:?}; shift 2 ;;
        --keep) keep=true; shift ;;
        *) usage ;;
    esac
done

export QUORATE_BIN=${QUORATE_BIN:-${CARGO_TARGET_DIR:-$here/target}/release/quorate}
if [ ! -x "$QUORATE_BIN" ]; then
    echo "no program at $QUORATE_BIN: cargo build --release --locked" >&2
    exit 2
fi
dir=$(mktemp -d)
cluster() { "$here/cluster.sh" "$@" --dir "$dir"; }
finish() {
    cluster stop >/dev/null 2>&1 || true
    if $keep; then echo "kept: $dir"; else rm -rf "$dir"; fi
}
trap finish EXIT
trap 'exit 2' ERR INT TERM

cluster bootstrap "$nodes" --base-port "$port" >"$dir/bootstrap.log" 2>&1 ||
    { cat "$dir/bootstrap.log" >&2; exit 2; }
servers() { cluster members | awk '{print $1}' | paste -sd,; }

# load NAME ARGUMENTS...: one spell of load; prints the 99th percentile in microseconds, and the
# number of requests that failed.
load() {
    local name=$1; shift
    "$QUORATE_BIN" bench --json -s "$(servers)" "$@" >"$dir/$name.json" 2>"$dir/$name.err" ||
        { cat "$dir/$name.err" >&2; return 1; }
    local text failed=0 count
    text=$(<"$dir/$name.json")
    [[ $text =~ \"p99\":([0-9]+) ]] || return 1
    local p99=${BASH_REMATCH[1]}
    [[ $text =~ \"errors\":\{([^}]*)\} ]] || return 1
    for count in $(grep -o '[0-9]*$\|[0-9]*,' <<<"${BASH_REMATCH[1]}" | tr -d ,); do
        failed=$((failed + count))
    done
    echo "$p99 $failed"
}

# change add|remove: has the spare join the view, or leave it.
change() {
    "$QUORATE_BIN" cluster -s "$(servers)" "$1" "$spare" --yes >"$dir/change.log" 2>&1 ||
        { cat "$dir/change.log" >&2; return 1; }
}

metric() {
    curl -sf -m 5 "http://$1/metrics" | awk -v name="$2" '$1 == name {print int($2)}' || true
}

# The largest of all nodes, but for the disk, which is the sum.
sample() {
    local address pid value memory=0 files=0 threads=0 tasks=0
    while read -r address pid; do
        value=$(awk '/^VmRSS/ {print int($2 / 1024)}' "/proc/$pid/status")
        memory=$((value > memory ? value : memory))
        value=$(find "/proc/$pid/fd" -mindepth 1 2>/dev/null | wc -l)
        files=$((value > files ? value : files))
        value=$(find "/proc/$pid/task" -mindepth 1 -maxdepth 1 2>/dev/null | wc -l)
        threads=$((value > threads ? value : threads))
        value=$(metric "$address" quorate_runtime_tasks)
        tasks=$((${value:-0} > tasks ? ${value:-0} : tasks))
    done < <(cluster members)
    echo "$memory $files $threads $tasks $(du -sm "$dir/nodes" | awk '{print $1}')"
}

printf '%6s %10s %6s %8s %6s %9s %12s %7s\n' \
    minute memory_MiB files threads tasks disk_MiB p99_us failed
end=$((SECONDS + $(awk -v m="$minutes" 'BEGIN {print int(m * 60)}')))
cycle=0 spare='' rows=()
while [ "$SECONDS" -lt "$end" ]; do
    cycle=$((cycle + 1))
    measured=$(load mixed -w mixed=70 -k 20000 --value-size 256 -c 16 -r "$rate" -d 12)
    read -r p99 failed <<<"$measured"
    load hot -w put -k 20 --value-size 20000 -c 8 -r 100 -d 4 --key-prefix hot- >/dev/null
    load delete --url-template 'http://{server}/v1/kv/{key}?proxy=true' --method DELETE \
        -k 20000 -c 8 -r "$rate" -d 4 --seed "$cycle" >/dev/null
    if [ $((cycle % 3)) = 0 ] && [ -z "$spare" ]; then
        spare=$(cluster add 2>/dev/null | tail -n 1)
        change add
    elif [ $((cycle % 3)) = 0 ]; then
        change remove
        cluster kill "$spare" >/dev/null
        rm -rf "$dir/nodes/${spare##*:}"
        spare=''
    fi
    # Longer than the time after which a quiet replica gives its log and memory back.
    sleep 15
    measured=$(sample)
    read -r memory files threads tasks disk <<<"$measured"
    rows+=("$memory $files $threads $tasks $disk $p99 $failed")
    printf '%6s %10s %6s %8s %6s %9s %12s %7s\n' \
        "$(awk -v s="$SECONDS" 'BEGIN {printf "%.1f", s / 60}')" \
        "$memory" "$files" "$threads" "$tasks" "$disk" "$p99" "$failed"
done

[ "${#rows[@]}" -ge 6 ] || { echo "too short to tell: give it at least 6 minutes" >&2; exit 2; }
# The 99th percentile and the requests that failed are shown, not judged: they measure the machine
# as much.
printf '%s\n' "${rows[@]}" | awk '
    { for (i = 1; i <= NF; i++) value[NR, i] = $i }
    # The mean of a third.
    function mean(column, from, to,   sum, row) {
        for (row = from; row <= to; row++) sum += value[row, column]
        return sum / (to - from + 1)
    }
    END {
        split("memory files threads tasks disk p99 failed", name, " ")
        split("1.15 1.1 1.1 1.1 1.25", factor, " ")
        split("16 8 4 20 64", slack, " ")
        third = int(NR / 3)
        for (i = 1; i <= 7; i++) {
            before = mean(i, NR - 2 * third + 1, NR - third)
            after = mean(i, NR - third + 1, NR)
            grew = i <= 5 && after > before * factor[i] + slack[i]
            verdict = i > 5 ? "not judged" : grew ? "GREW" : "flat"
            printf "%-8s %10.0f -> %10.0f  %s\n", name[i], before, after, verdict
            if (grew) bad = 1
        }
        exit bad
    }' || exit 1
