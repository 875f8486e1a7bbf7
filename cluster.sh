#!/usr/bin/env bash
# Runs a Quorate cluster on this machine: see `./cluster.sh help`.
#
# Everything it keeps is in DIR/nodes/<port>/: address, flags (of `quorate serve`, one a line), pid
# (with the start time of the process), log, data. DIR/nodes/.founding is there until the cluster
# was up once: without it, there was a cluster, and whatever became of its data, none is founded in
# its place. A gateway keeps its address, pid and log in DIR/gateway.
#
# It signals a process only while its pid, its start time and its command line are all those of the
# node: a reused pid is never touched.
#
# Written for bash 3.2 and BSD tools as well; needs curl, and cargo where there is no binary yet.
set -u
umask 022
LC_ALL=C # Bytes are characters, and ps prints dates in one way.
export LC_ALL
export CDPATH=

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P) || exit 1
ME=$0
HOST=127.0.0.1
COUNT_DEFAULT=3
PORT_DEFAULT=13801
GATEWAY_PORTS_DEFAULT=(8080 8081)
# How long a node may take to stop before it is killed, and a cluster to become ready before the
# wait is given up.
STOP_SECONDS=20
READY_SECONDS=300

usage() {
    cat <<USAGE
usage: cluster.sh [--dir DIR] COMMAND [ARGUMENTS]

  bootstrap [N] [--repl-factor R] [--shards S] [--base-port P] [--timing-factor F]
                 build, start N (3) nodes on $HOST:P... ($PORT_DEFAULT), wait until every shard
                 has a leader; with F, heartbeats and elections take F times as long: for many nodes
                 on few cores
  members        ADDR and PID of each live process
  leader [KEY]   ADDR of the leader of KEY's shard; without KEY, of the group that holds the view
  kill ADDR      kill -9: returns when the process is gone
  pause ADDR     stop the process in its tracks (SIGSTOP); resume ADDR lets it go on
  restart ADDR   start it again from its data, stopping it first where it runs; does not wait for a
                 quorum
  add            start one more node, as a spare; the last line is its ADDR
  gateway [PORT...]
                 start a gateway on these ports of $HOST (${GATEWAY_PORTS_DEFAULT[*]}): it serves
                 the whole cluster from there
  status         the view, the shards, their leaders and replicas
  logs ADDR [-f] the end of a node's log; with -f, go on
  stop           stop every node and the gateway, keeping the data; start brings the nodes back, and
                 founds no new cluster where all of the data is gone
  clean          stop them and remove what this script has made
  help           this text

  --dir DIR      where the cluster lives (else QUORATE_CLUSTER_DIR, else .cluster beside this
                 script); DIR may hold other files
  QUORATE_BIN    the binary to run, instead of building one; CARGO_TARGET_DIR is honoured too

ADDR is host:port, or the port alone. Options may follow arguments; after -- nothing is an option.
USAGE
}

say() { printf '%s\n' "$*" >&2; }
die() { say "cluster.sh: $*"; exit 1; }
misuse() { say "cluster.sh: $*"; say "Try: $ME help"; exit 2; }

# --- Processes ------------------------------------------------------------------------------------

# Sets STATE, STARTED and COMMAND of process $1, or returns 1. A zombie counts as gone, once the
# last of its threads is.
inspect() {
    local line threads
    if [ -d /proc/self ]; then
        { IFS= read -r line <"/proc/$1/stat"; } 2>/dev/null || return 1
        # After the name in brackets: the state is field 3 of proc(5), the start time field 22.
        # shellcheck disable=SC2086
        set -- "$1" ${line##*) }
        STATE=${2:-} STARTED=${21:-}
        if [ "$STATE" = Z ]; then
            threads=("/proc/$1/task"/*)
            [ "${#threads[@]}" -gt 1 ] && return 0
        fi
        COMMAND=$({ tr '\0' ' ' <"/proc/$1/cmdline"; } 2>/dev/null)
    else
        line=$(ps -o stat= -p "$1" 2>/dev/null) || return 1
        STATE=${line%"${line#?}"}
        STARTED=$(TZ=UTC ps -o lstart= -p "$1" 2>/dev/null) || return 1
        COMMAND=$(ps -ww -o command= -p "$1" 2>/dev/null) || return 1
    fi
    case $STATE in Z | X | '') return 1 ;; esac
}

# Whether the node in directory $1 runs; sets PID.
live() {
    local started
    PID=
    { IFS= read -r PID && IFS= read -r started; } 2>/dev/null <"$1/pid" || return 1
    case $PID in '' | *[!0-9]*) return 1 ;; esac
    inspect "$PID" && [ "$STARTED" = "$started" ] || return 1
    # On its way out it has no command line any more.
    [ "$STATE" != Z ] || return 0
    local address
    address=$(address_of "$1")
    case "$COMMAND " in
        *" serve --address $address "* | *" gateway --listen $address "*) return 0 ;;
    esac
    return 1
}

# Waits until the node in $1 is gone, for at most $2 seconds.
wait_gone() {
    local tenths=$(($2 * 10))
    while live "$1"; do
        [ "$tenths" -gt 0 ] || return 1
        tenths=$((tenths - 1))
        sleep 0.1
    done
}

# Stops the nodes in the directories given, all at once.
stop_nodes() {
    local node stopping=()
    for node in "$@"; do
        live "$node" || continue
        stopping+=("$node")
        # A paused process takes its SIGTERM when it goes on.
        kill -TERM "$PID" 2>/dev/null
        kill -CONT "$PID" 2>/dev/null
    done
    local deadline=$((SECONDS + STOP_SECONDS)) left
    for node in ${stopping[@]+"${stopping[@]}"}; do
        left=$((deadline - SECONDS))
        [ "$left" -gt 0 ] || left=0
        if ! wait_gone "$node" "$left"; then
            say "$(address_of "$node") has not stopped within $STOP_SECONDS s: killing it"
            kill_node "$node"
        fi
        say "stopped $(address_of "$node")"
    done
}

kill_node() {
    live "$1" || return 0
    kill -KILL "$PID" 2>/dev/null
    wait_gone "$1" 60 || die "process $PID does not go away, even after kill -9"
}

# Of the process that listens on port $1, as far as it can be known: the end of a sentence.
holder_of() {
    local holder=''
    if command -v lsof >/dev/null; then
        holder=$(lsof -nP -iTCP:"$1" -sTCP:LISTEN 2>/dev/null |
            awk 'NR == 2 { print $1 " (pid " $2 ")" }')
    fi
    printf '%s' "${holder:-another process}"
}

port_taken() { (exec 3<>"/dev/tcp/$HOST/$1") 2>/dev/null; }

# Waits until port $1 is free. A process that has just ended may hold it for a moment.
wait_free() {
    local looks
    for ((looks = 100; looks > 0; looks--)); do
        port_taken "$1" || return 0
        sleep 0.02
    done
    say "cluster.sh: port $1 is in use by $(holder_of "$1")"
    return 1
}

# Starts the node in directory $1. Returns when it runs as `quorate serve`.
start_node() {
    local address flags=() flag
    address=$(address_of "$1")
    wait_free "${address##*:}" || { say "$address was not started"; return 1; }
    while IFS= read -r flag; do flags+=("$flag"); done <"$1/flags"
    spawn "$1" serve --address "$address" ${flags[@]+"${flags[@]}"} --data-dir "$1/data"
}

# Runs the binary in directory $1 with the arguments that follow, in a process group of its own,
# deaf to the terminal's hang-up. Returns when it has become the binary.
spawn() {
    local dir=$1 pid looks=500
    shift
    set -m
    (
        trap '' HUP
        unset ADDRESS VIEW REPL_FACTOR PUBLIC_ADDRESS JOIN_ONLY LOST_DISK_AFTER
        # As a variable and not as a flag: a program of an earlier release passes over it, and
        # starts.
        [ -f "$DIR/nodes/.founding" ] || export JOIN_ONLY=true
        cd "$dir" || exit 1
        exec "$BINARY" "$@" 3>&- 4>&- 5>&- 6>&- 7>&- 8>&- 9>&-
    ) </dev/null >>"$dir/log" 2>&1 &
    pid=$!
    set +m
    if inspect "$pid"; then
        printf '%s\n%s\n' "$pid" "$STARTED" >"$dir/pid.new" &&
            mv "$dir/pid.new" "$dir/pid" || return 1
    fi
    # Until it has become the binary, its command line is that of this script.
    while ! live "$dir"; do
        if ! inspect "$pid" || [ "$looks" -eq 0 ]; then
            say "cluster.sh: $(address_of "$dir") ended at once; the end of its log:"
            log_tail "$dir"
            return 1
        fi
        looks=$((looks - 1))
        sleep 0.02
    done
}

log_tail() {
    if [ -s "$1/log" ]; then
        tail -n 20 "$1/log" | sed 's/^/    /' >&2
    else
        say "    (it has written nothing)"
    fi
}

# --- Nodes ----------------------------------------------------------------------------------------

address_of() {
    local address
    IFS= read -r address <"$1/address" && printf '%s' "$address"
}

# The directories of all nodes, by port, one a line.
node_dirs() {
    local entry
    for entry in "$DIR"/nodes/*/address; do
        entry=${entry%/address}
        case ${entry##*/} in *[!0-9]*) continue ;; esac
        [ -f "$entry/address" ] && printf '%s\n' "${entry##*/}"
    done | sort -n | while IFS= read -r entry; do printf '%s\n' "$DIR/nodes/$entry"; done
}

load_nodes() {
    local node
    NODES=()
    while IFS= read -r node; do [ -n "$node" ] && NODES+=("$node"); done <<<"$(node_dirs)"
}

need_cluster() {
    load_nodes
    [ "${#NODES[@]}" -gt 0 ] || die "there is no cluster in $DIR: make one with $ME bootstrap"
}

# The directory of the node that is called $1.
node_at() {
    need_cluster
    for NODE in "${NODES[@]}"; do
        [ "$(address_of "$NODE")" = "$1" ] && return
        [ "${NODE##*/}" = "$1" ] && return
        [ "localhost:${NODE##*/}" = "$1" ] && return
    done
    die "there is no node $1 in $DIR; there are:$(
        for NODE in "${NODES[@]}"; do printf ' %s' "$(address_of "$NODE")"; done
    )"
}

need_live() { live "$1" || die "$(address_of "$1") is not running"; }

# Writes what a node at address $2 with directory $1 is started with.
make_node() {
    local node=$1 address=$2
    shift 2
    {
        printf '%s\n' "$address" >"$node/address" &&
            printf '%s\n' "$@" >"$node/flags" &&
            : >>"$node/log"
    } || die "cannot write to $node"
}

# Sets BINARY. With `build`, cargo looks whether it is up to date; else it is asked only where there
# is none.
find_binary() {
    if [ -n "${QUORATE_BIN:-}" ]; then
        BINARY=$(absolute "$QUORATE_BIN")
        if [ ! -x "$BINARY" ] || [ -d "$BINARY" ]; then
            die "QUORATE_BIN=$QUORATE_BIN is no program"
        fi
        return
    fi
    local target
    target=$(absolute "${CARGO_TARGET_DIR:-$HERE/target}")
    BINARY=$target/release/quorate
    [ "${1:-}" = build ] || [ ! -x "$BINARY" ] || return 0
    if ! command -v cargo >/dev/null; then
        [ -x "$BINARY" ] && return
        die "cargo is not installed and there is no $BINARY:" \
            "install Rust (https://rustup.rs), or set QUORATE_BIN"
    fi
    (cd "$HERE" && CARGO_TARGET_DIR=$target cargo build --release --locked --bin quorate) >&2 ||
        die "the build failed"
}

absolute() {
    case $1 in /*) printf '%s' "$1" ;; *) printf '%s/%s' "$PWD" "$1" ;; esac
}

# --- HTTP -----------------------------------------------------------------------------------------

# No ~/.curlrc and no proxy come between this script and its nodes.
ask() {
    local seconds=$1
    shift
    curl -q -s --noproxy '*' --path-as-is --connect-timeout 2 --max-time "$seconds" "$@" 2>/dev/null
}

# The text of member $1 in the JSON object on the standard input, unescaped as far as it matters to
# people.
json_text() {
    sed -nE 's/.*"'"$1"'":"(([^"\\]|\\.)*)".*/\1/p' | sed -e 's/\\n/ /g' -e 's/\\\(.\)/\1/g'
}

# Sets WHY to what /readyz of address $1 says, and CODE to its code; returns 0 if it is ready, or a
# spare and $2 is `spare`.
ready() {
    local answer code
    CODE=
    answer=$(ask 5 -w '\n%{http_code}' "http://$1/readyz")
    code=${answer##*$'\n'}
    answer=${answer%$'\n'*}
    case $code in
        200) return 0 ;;
        000 | '') WHY="no answer yet" ;;
        *)
            WHY=$(printf '%s' "$answer" | json_text detail)
            WHY=${WHY:-"/readyz answers $code"}
            CODE=$(printf '%s' "$answer" | json_text code)
            [ "${2:-}" = spare ] && [ "$CODE" = spare ] && return 0
            ;;
    esac
    return 1
}

# Waits until the nodes in the directories given are ready, and says for whom, and why, whenever
# that changes.
wait_ready() {
    local node address said='' told strangers=0 deadline=$((SECONDS + READY_SECONDS))
    for node in "$@"; do
        address=$(address_of "$node")
        until ready "$address" spare; do
            if ! live "$node"; then
                say "cluster.sh: $address has ended; the end of its log ($node/log):"
                log_tail "$node"
                return 1
            fi
            told="waiting for $address: $WHY"
            [ "$told" = "$said" ] || say "$told"
            said=$told
            # Nodes that find each other know of a cluster within a moment, if any has its data.
            if [ "$CODE" = no-cluster ]; then strangers=$((strangers + 1)); else strangers=0; fi
            if [ "$strangers" -ge 50 ]; then
                say "cluster.sh: there was a cluster in $DIR, and no node has its data any more:" \
                    "nothing was founded."
                say "Put the data back, or begin anew with: $ME clean"
                return 1
            fi
            if [ "$SECONDS" -ge "$deadline" ]; then
                say "cluster.sh: not ready after $READY_SECONDS s; the nodes go on running"
                return 1
            fi
            sleep 0.2
        done
    done
}

# $1 with every byte escaped that might mean something in a URL.
percent_encode() {
    local text=$1 i byte out=''
    for ((i = 0; i < ${#text}; i++)); do
        byte=${text:i:1}
        case $byte in
            [a-zA-Z0-9_~-]) out=$out$byte ;;
            *) out=$out$(printf '%%%02X' "$(($(printf '%d' "'$byte") & 255))") ;;
        esac
    done
    printf '%s' "$out"
}

# --- Commands -------------------------------------------------------------------------------------

# What there is, for someone who asked for a new cluster: 0 if it is what was asked for, and all of
# it runs.
existing() {
    local node running=0 differs=''
    for node in "${NODES[@]}"; do live "$node" && running=$((running + 1)); done
    say "There is a cluster in $DIR already (${#NODES[@]} nodes, $running running):" \
        "nothing was changed."
    [ -z "$COUNT" ] || [ "$COUNT" -eq "${#NODES[@]}" ] || differs=yes
    [ -z "$BASE_PORT" ] || [ -d "$DIR/nodes/$BASE_PORT" ] || differs=yes
    [ -z "$REPL_FACTOR_ASKED" ] ||
        [ "$(flag_of "${NODES[0]}" --repl-factor)" = "$REPL_FACTOR_ASKED" ] || differs=yes
    [ -z "$SHARDS" ] || [ "$(flag_of "${NODES[0]}" --shards)" = "$SHARDS" ] || differs=yes
    [ -z "$TIMING_FACTOR" ] ||
        [ "$(flag_of "${NODES[0]}" --timing-factor)" = "$TIMING_FACTOR" ] || differs=yes
    if [ -n "$differs" ]; then
        say "It is not the one asked for: $ME clean removes it," \
            "--dir DIR makes another (with --base-port)."
        return 1
    elif [ "$running" -lt "${#NODES[@]}" ]; then
        say "Start what is stopped with: $ME start"
        return 1
    fi
}

# The value of flag $2 of node $1, if it was started with it.
flag_of() {
    local flag last=''
    while IFS= read -r flag; do
        [ "$last" != "$2" ] || printf '%s' "$flag"
        last=$flag
    done <"$1/flags"
}

bootstrap() {
    load_nodes
    if [ "${#NODES[@]}" -gt 0 ]; then
        existing
        return
    fi
    local count=${COUNT:-$COUNT_DEFAULT} base=${BASE_PORT:-$PORT_DEFAULT} port view='' flags node
    [ "$count" -ge 1 ] || misuse "a cluster has at least one node"
    if [ "$base" -lt 1 ] || [ $((base + count - 1)) -gt 65535 ]; then
        misuse "ports $base to $((base + count - 1)) are not all between 1 and 65535"
    fi
    if [ -n "$REPL_FACTOR_ASKED" ] &&
        { [ "$REPL_FACTOR_ASKED" -lt 1 ] || [ "$REPL_FACTOR_ASKED" -gt "$count" ]; }; then
        misuse "a replication factor of $REPL_FACTOR_ASKED does not go with $count nodes"
    fi
    [ -z "$SHARDS" ] || [ "$SHARDS" -ge 1 ] || misuse "a cluster has at least one shard"
    [ -z "$TIMING_FACTOR" ] || [ "$TIMING_FACTOR" -ge 1 ] ||
        misuse "--timing-factor takes a number above 0"
    for ((port = base; port < base + count; port++)); do
        port_taken "$port" &&
            die "port $port is in use by $(holder_of "$port"): choose others with --base-port"
        view=$view${view:+,}$HOST:$port
    done
    find_binary build
    make_root
    flags=(--view "$view")
    [ -z "$REPL_FACTOR_ASKED" ] || flags+=(--repl-factor "$REPL_FACTOR_ASKED")
    [ -z "$SHARDS" ] || flags+=(--shards "$SHARDS")
    [ -z "$TIMING_FACTOR" ] || flags+=(--timing-factor "$TIMING_FACTOR")
    for ((port = base; port < base + count; port++)); do
        mkdir "$DIR/nodes/$port" || die "cannot create $DIR/nodes/$port"
        make_node "$DIR/nodes/$port" "$HOST:$port" "${flags[@]}"
    done
    load_nodes
    for node in "${NODES[@]}"; do
        start_node "$node" || give_up
        say "started $(address_of "$node")"
    done
    wait_ready "${NODES[@]}" || give_up
    rm -f "$DIR/nodes/.founding"
    explain
    if [ "$count" -eq 2 ] && [ "$REPL_FACTOR_ASKED" != 1 ]; then
        say "two nodes hold two copies and have no node for a witness: while either is away," \
            "writes wait for it, and default reads; reads with"
        say "?consistency=stale go on. With a third node either may be lost: $ME bootstrap 3"
    fi
}

# DIR/nodes, which only one bootstrap can make. A file in it remembers whether DIR is ours as well.
make_root() {
    local ours=''
    [ -d "$DIR" ] || { mkdir -p "$DIR" && ours=yes; } || die "cannot create $DIR"
    rmdir "$DIR/nodes" 2>/dev/null
    mkdir "$DIR/nodes" 2>/dev/null ||
        die "$DIR/nodes exists, or cannot be created:" \
            "choose another directory with --dir, or try $ME clean"
    [ -z "$ours" ] || : >"$DIR/nodes/.dir-is-ours"
    : >"$DIR/nodes/.founding" || die "cannot write to $DIR/nodes"
}

give_up() {
    say "The cluster is not up. Its files, with the logs, are in $DIR;" \
        "$ME clean stops what runs and removes them."
    exit 1
}

explain() {
    local first nodes="${#NODES[@]} nodes"
    first=$(address_of "${NODES[0]}")
    [ "${#NODES[@]}" -gt 1 ] || nodes="one node"
    cat <<TEXT
The cluster is up: $nodes, and every shard has a leader.

  curl -L -X PUT -d 'hello' http://$first/v1/kv/greeting
  curl -L http://$first/v1/kv/greeting
  curl http://$first/v1/kv

$ME status shows the shards and where they are, http://$first/ the routes.
$ME help tells the rest: kill a leader and go on, stop, start, clean.
TEXT
}

start() {
    need_cluster
    find_binary
    local node started=()
    for node in "${NODES[@]}"; do
        live "$node" && continue
        start_node "$node" || exit 1
        say "started $(address_of "$node")"
        started+=("$node")
    done
    [ "${#started[@]}" -gt 0 ] || say "every node runs already"
    wait_ready "${NODES[@]}" || exit 1
    rm -f "$DIR/nodes/.founding"
    say "The cluster is up."
}

members() {
    need_cluster
    for NODE in "${NODES[@]}"; do
        live "$NODE" && printf '%s %s\n' "$(address_of "$NODE")" "$PID"
    done
    return 0
}

# Whether address $1 is that of a node of ours that does not run.
known_dead() {
    for NODE in "${NODES[@]}"; do
        if [ "$(address_of "$NODE")" = "$1" ]; then
            live "$NODE" && return 1
            return 0
        fi
    done
    return 1
}

# The leader of the meta group, as most of those say who answer: one that was cut off for a while
# may still name the last one.
meta_leader() {
    need_cluster
    local node body id named='' winner
    for node in "${NODES[@]}"; do
        if ! live "$node" || [ "$STATE" = T ]; then continue; fi
        body=$(ask 3 "http://$(address_of "$node")/v1/cluster") || continue
        id=$(printf '%s' "$body" | sed -nE 's/.*"meta_leader":([0-9]+).*/\1/p')
        [ -n "$id" ] || continue
        named=$named$(printf '%s' "$body" |
            sed -nE 's/.*\{"id":'"$id"',"address":"([^"]*)".*/\1/p')$'\n'
    done
    while IFS= read -r winner; do
        [ -n "$winner" ] || continue
        known_dead "$winner" && continue
        printf '%s\n' "$winner"
        return
    done <<<"$(printf '%s' "$named" | sort | uniq -c | sort -rn | sed -E 's/^ *[0-9]+ //')"
    die "no leader is known to any node that answers"
}

# The leader of the shard of key $1: the node that answers for it. One that only redirects names the
# next to ask.
key_leader() {
    [ -n "$1" ] || misuse "a key is not empty"
    need_cluster
    local path node address hops answer
    path=/v1/kv/$(percent_encode "$1")
    for node in "${NODES[@]}"; do
        if ! live "$node" || [ "$STATE" = T ]; then continue; fi
        address=$(address_of "$node")
        for ((hops = 0; hops < 4; hops++)); do
            answer=$(ask 4 -I -o /dev/null -w '%{http_code} %{redirect_url}' \
                "http://$address$path?timeout=3s")
            case $answer in
                200\ * | 404\ *)
                    printf '%s\n' "$address"
                    return
                    ;;
                307\ *)
                    address=${answer#*://}
                    address=${address%%/*}
                    known_dead "$address" && break
                    ;;
                *) break ;;
            esac
        done
    done
    die "no node that answers knows a leader for this key"
}

# Sends signal $1 to the node at address $2, which must run, and says $3.
signal_node() {
    node_at "$2"
    need_live "$NODE"
    kill "-$1" "$PID" 2>/dev/null || die "cannot signal $2"
    local tenths=50
    # The kernel stops a process in its own time.
    while [ "$1" = STOP ] && live "$NODE" && [ "$STATE" != T ] && [ "$tenths" -gt 0 ]; do
        tenths=$((tenths - 1))
        sleep 0.1
    done
    say "$3 $(address_of "$NODE")"
}

kill_address() {
    node_at "$1"
    need_live "$NODE"
    kill_node "$NODE"
    say "killed $(address_of "$NODE")"
}

restart() {
    node_at "$1"
    find_binary
    stop_nodes "$NODE"
    start_node "$NODE" || exit 1
    say "started $(address_of "$NODE")"
}

add() {
    need_cluster
    find_binary
    local port=${NODES[${#NODES[@]} - 1]##*/} view='' node address timing
    for node in "${NODES[@]}"; do view=$view${view:+,}$(address_of "$node"); done
    port=$((port + 1))
    while port_taken "$port" || ! mkdir "$DIR/nodes/$port" 2>/dev/null; do
        port=$((port + 1))
        [ "$port" -le 65535 ] || die "there is no free port left"
    done
    node=$DIR/nodes/$port address=$HOST:$port
    timing=$(flag_of "${NODES[0]}" --timing-factor)
    make_node "$node" "$address" --view "$view" ${timing:+--timing-factor "$timing"}
    start_node "$node" || exit 1
    until [ "$(ask 5 -o /dev/null -w '%{http_code}' "http://$address/healthz")" = 200 ]; do
        if ! live "$node"; then
            say "cluster.sh: $address has ended; the end of its log ($node/log):"
            log_tail "$node"
            exit 1
        fi
        sleep 0.1
    done
    say "started $address as a spare: it holds nothing until a view change names it"
    printf '%s\n' "$address"
}

gateway() {
    need_cluster
    find_binary
    local ports=("$@") port listen=() node members=() running='' dir=$DIR/gateway
    [ "${#ports[@]}" -gt 0 ] || ports=("${GATEWAY_PORTS_DEFAULT[@]}")
    if live "$dir"; then
        [ "$(address_of "$dir")" = "$HOST:${ports[0]}" ] ||
            die "a gateway runs already, at $(address_of "$dir")"
        say "The gateway runs already."
        return
    fi
    for port in "${ports[@]}"; do
        port=$(number gateway "$port") || exit 2
        wait_free "$port" || exit 1
        listen+=(--listen "$HOST:$port")
    done
    for node in "${NODES[@]}"; do
        members+=("$(address_of "$node")")
        ! live "$node" || running=yes
    done
    [ -n "$running" ] || die "no node of the cluster in $DIR runs: $ME start"
    { mkdir -p "$dir" && printf '%s\n' "${listen[1]}" >"$dir/address"; } ||
        die "cannot write to $dir"
    spawn "$dir" gateway "${listen[@]}" "${members[@]}" || exit 1
    wait_ready "$dir" || exit 1
    say "The gateway is up at port ${ports[*]} of $HOST."
}

status() {
    need_cluster
    find_binary
    local servers=''
    for NODE in "${NODES[@]}"; do
        live "$NODE" && servers=$servers${servers:+,}$(address_of "$NODE")
    done
    [ -n "$servers" ] || die "no node of the cluster in $DIR runs: $ME start"
    exec "$BINARY" cluster status --server "$servers"
}

logs() {
    node_at "$1"
    if [ -n "$FOLLOW" ]; then exec tail -n 50 -f "$NODE/log"; else exec tail -n 50 "$NODE/log"; fi
}

stop() {
    need_cluster
    stop_nodes "$DIR/gateway" "${NODES[@]}"
    say "No node of the cluster runs; its data is in $DIR."
}

clean() {
    load_nodes
    if [ -f "$DIR/gateway/address" ]; then
        stop_nodes "$DIR/gateway"
        rm -f "$DIR/gateway/address" "$DIR/gateway/log" "$DIR/gateway/pid" "$DIR/gateway/pid.new"
        rmdir "$DIR/gateway" 2>/dev/null ||
            say "$DIR/gateway holds files that are not mine: they stay"
    fi
    if [ "${#NODES[@]}" -gt 0 ]; then
        stop_nodes "${NODES[@]}"
        for NODE in "${NODES[@]}"; do
            rm -rf "$NODE/data" "$NODE/log" "$NODE/flags" "$NODE/pid" "$NODE/pid.new" ||
                die "cannot remove all of $NODE"
            rm -f "$NODE/address"
            rmdir "$NODE" 2>/dev/null || say "$NODE holds files that are not mine: they stay"
        done
    fi
    # What an interrupted bootstrap has left.
    rmdir "$DIR"/nodes/[0-9]* 2>/dev/null
    [ -d "$DIR/nodes" ] || { say "there is nothing to remove in $DIR"; return; }
    local ours=''
    [ -f "$DIR/nodes/.dir-is-ours" ] && ours=yes
    rm -f "$DIR/nodes/.dir-is-ours" "$DIR/nodes/.founding"
    rmdir "$DIR/nodes" 2>/dev/null && [ -n "$ours" ] && rmdir "$DIR" 2>/dev/null
    say "removed the cluster in $DIR"
}

# --- The command line -----------------------------------------------------------------------------

number() {
    case $2 in '' | *[!0-9]* | ??????*) misuse "$1 takes a number, not '$2'" ;; esac
    printf '%s' "$((10#$2))"
}

DIR=${QUORATE_CLUSTER_DIR:-$HERE/.cluster}
COUNT='' BASE_PORT='' REPL_FACTOR_ASKED='' SHARDS='' TIMING_FACTOR=''
FOLLOW='' VERB='' NODES=() ARGUMENTS=() USED=()
# Takes one word that is no option.
word() {
    if [ -n "$VERB" ]; then ARGUMENTS+=("$1"); else VERB=$1; fi
}
while [ $# -gt 0 ]; do
    case $1 in
        --*=*)
            option=${1%%=*} value=${1#*=}
            shift
            set -- "$option" "$value" ${1+"$@"}
            ;;
    esac
    case $1 in
        --dir | --base-port | --repl-factor | --shards | --timing-factor)
            [ $# -ge 2 ] || misuse "$1 takes a value"
            case $1 in
                --dir) DIR=$2 ;;
                --base-port) BASE_PORT=$(number "$1" "$2") || exit 2 ;;
                --repl-factor) REPL_FACTOR_ASKED=$(number "$1" "$2") || exit 2 ;;
                --shards) SHARDS=$(number "$1" "$2") || exit 2 ;;
                --timing-factor) TIMING_FACTOR=$(number "$1" "$2") || exit 2 ;;
            esac
            [ "$1" = --dir ] || USED+=("$1")
            shift 2
            ;;
        -f | --follow) FOLLOW=yes USED+=(-f) && shift ;;
        -h | --help) VERB=help && break ;;
        --)
            shift
            for value in ${1+"$@"}; do word "$value"; done
            break
            ;;
        -?*) misuse "unknown option $1" ;;
        *) word "$1" && shift ;;
    esac
done
[ -n "$VERB" ] || { usage >&2; exit 2; }

[ -n "$DIR" ] || misuse "--dir takes a directory"
DIR=$(absolute "$DIR")
[ ! -d "$DIR" ] || DIR=$(cd "$DIR" && pwd -P) || exit 1

# At least $1 and at most $2 arguments, called $3, and no options but those that follow.
takes() {
    local least=$1 most=$2 what=$3 used
    shift 3
    [ "${#ARGUMENTS[@]}" -ge "$least" ] || misuse "$VERB needs $what"
    [ "${#ARGUMENTS[@]}" -le "$most" ] ||
        misuse "$VERB takes ${what:-no argument}, and got ${ARGUMENTS[*]}"
    for used in ${USED[@]+"${USED[@]}"}; do
        case " $* " in *" $used "*) ;; *) misuse "$VERB does not take $used" ;; esac
    done
    command -v curl >/dev/null || die "curl is not installed"
}

case $VERB in
    bootstrap)
        takes 0 1 "a number of nodes" --base-port --repl-factor --shards --timing-factor
        [ "${#ARGUMENTS[@]}" -eq 0 ] || COUNT=$(number bootstrap "${ARGUMENTS[0]}") || exit 2
        bootstrap
        ;;
    leader)
        takes 0 1 "a key"
        if [ "${#ARGUMENTS[@]}" -eq 0 ]; then meta_leader; else key_leader "${ARGUMENTS[0]}"; fi
        ;;
    kill) takes 1 1 "an address" && kill_address "${ARGUMENTS[0]}" ;;
    pause) takes 1 1 "an address" && signal_node STOP "${ARGUMENTS[0]}" paused ;;
    resume) takes 1 1 "an address" && signal_node CONT "${ARGUMENTS[0]}" resumed ;;
    restart) takes 1 1 "an address" && restart "${ARGUMENTS[0]}" ;;
    logs) takes 1 1 "an address" -f && logs "${ARGUMENTS[0]}" ;;
    gateway) takes 0 8 "ports" && gateway ${ARGUMENTS[@]+"${ARGUMENTS[@]}"} ;;
    start | members | add | status | stop | clean) takes 0 0 '' && "$VERB" ;;
    help) usage ;;
    *) misuse "unknown command $VERB" ;;
esac
