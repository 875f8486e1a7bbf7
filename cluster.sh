#!/usr/bin/env bash
# A Quorate cluster on this machine, in the background. Needs bash and curl only; touches only processes that it started.
set -u

usage() {
    cat <<'TEXT'
usage: cluster.sh VERB [ARGUMENTS] [--dir DIR]

  bootstrap [N] [--repl-factor R] [--shards S] [--base-port P]
                   build if needed, start N (3) nodes on 127.0.0.1:P.. (13801) and wait until every shard has a leader
  start            bring a stopped cluster back from its data
  stop             stop every node, cleanly
  restart ADDR     stop the node if it runs, and start it from its data; does not wait for a quorum
  add              start one spare node; the last line is its address
  members          ADDR PID of each live process
  leader [KEY]     the address of the node that leads KEY's shard; without KEY, the meta group
  kill ADDR        kill -9 a node
  pause ADDR       stop a node's process (SIGSTOP); resume ADDR lets it go on
  status           a table of nodes and shards
  logs ADDR [-f]   the end of a node's log; -f follows it
  clean            stop, and remove what this script created

  --dir DIR        where nodes keep their data and logs (default: $QUORATE_CLUSTER_DIR, else .cluster beside this script)
  $QUORATE_BIN     the program to run, instead of building it;  $CARGO_TARGET_DIR  where cargo builds
TEXT
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
dir=${QUORATE_CLUSTER_DIR:-$here/.cluster}
base_port=13801
repl_factor=
shards=
follow=
words=()

die() { echo "cluster.sh: $*" >&2; exit 1; }
misuse() { echo "cluster.sh: $*" >&2; echo "try: cluster.sh help" >&2; exit 2; }
is_number() { case "$1" in '' | *[!0-9]*) return 1 ;; esac; }

while [ $# -gt 0 ]; do
    case "$1" in
        --dir | --base-port | --repl-factor | --shards)
            [ $# -ge 2 ] || misuse "$1 wants a value"
            case "$1" in
                --dir) dir=$2 ;;
                --base-port) base_port=$2 ;;
                --repl-factor) repl_factor=$2 ;;
                --shards) shards=$2 ;;
            esac
            shift ;;
        --dir=*) dir=${1#*=} ;;
        --base-port=*) base_port=${1#*=} ;;
        --repl-factor=*) repl_factor=${1#*=} ;;
        --shards=*) shards=${1#*=} ;;
        -f) follow=1 ;;
        -h | --help) words=(help) ; break ;;
        --) shift; words+=("$@"); break ;;
        -*) misuse "unknown option $1" ;;
        *) words+=("$1") ;;
    esac
    shift
done
for number in "$base_port" "${repl_factor:-0}" "${shards:-0}"; do
    is_number "$number" || misuse "'$number' is not a number"
done
case "$dir" in /*) ;; *) dir=$PWD/$dir ;; esac
nodes=$dir/nodes

# --- the program

program() {
    if [ -n "${QUORATE_BIN:-}" ]; then
        [ -x "$QUORATE_BIN" ] || die "\$QUORATE_BIN is $QUORATE_BIN, which is no program"
        case "$QUORATE_BIN" in /*) echo "$QUORATE_BIN" ;; *) echo "$PWD/$QUORATE_BIN" ;; esac
    else
        echo "${CARGO_TARGET_DIR:-$here/target}/release/quorate"
    fi
}

ensure_program() {
    [ -n "${QUORATE_BIN:-}" ] && { program > /dev/null || exit 1; return; }
    command -v cargo > /dev/null || die "cargo is not installed: see https://rustup.rs, or set \$QUORATE_BIN"
    (cd "$here" && cargo build --release --locked --bin quorate) >&2 || die "the build failed"
}

# --- processes: known by pid and by when they started, so that a pid that was given to another process is never touched

started_at() { LC_ALL=C ps -o lstart= -p "$1" 2> /dev/null; }

# Prints the pid of the node in $1 if its process lives.
live_pid() {
    local pid started
    [ -f "$1/pid" ] || return 1
    { read -r pid; read -r started; } < "$1/pid"
    is_number "$pid" && [ -n "$started" ] || return 1
    kill -0 "$pid" 2> /dev/null || return 1
    # Without the blanks that ps pads with. A zombie is gone for us.
    [ "$(started_at "$pid" | tr -s ' ')" = "$started" ] || return 1
    case "$(ps -o stat= -p "$pid" 2> /dev/null)" in Z*) return 1 ;; esac
    echo "$pid"
}

all_nodes() {
    local node
    for node in "$nodes"/*/; do
        [ -f "${node}address" ] && echo "${node%/}"
    done
}

address_of() { cat "$1/address"; }

node_of() {
    [ -n "${1:-}" ] || misuse "which node? give its address"
    local node
    while read -r node; do
        [ "$(address_of "$node")" = "$1" ] && { echo "$node"; return; }
    done < <(all_nodes)
    die "$1 is no node of the cluster in $dir"
}

# An array element a line: flags hold no blanks or newlines but for the data directory, which is last.
launch() {
    local node=$1 flags=() line pid
    while IFS= read -r line; do flags+=("$line"); done < "$node/flags"
    if command -v setsid > /dev/null; then
        setsid nohup "$(program)" serve "${flags[@]}" >> "$node/log" 2>&1 < /dev/null &
    else
        nohup "$(program)" serve "${flags[@]}" >> "$node/log" 2>&1 < /dev/null &
    fi
    pid=$!
    disown "$pid" 2> /dev/null
    { echo "$pid"; started_at "$pid" | tr -s ' '; } > "$node/pid"
}

prepare() { # ADDRESS VIEW
    local node=$nodes/${1##*:}
    mkdir -p "$node" || die "cannot create $node"
    echo "$1" > "$node/address"
    {
        printf '%s\n' --address "$1" --view "$2"
        [ -n "$repl_factor" ] && printf '%s\n' --repl-factor "$repl_factor"
        [ -n "$shards" ] && printf '%s\n' --shards "$shards"
        printf '%s\n' --data-dir "$node/data"
    } > "$node/flags"
    : >> "$node/log"
}

# A port that something listens on refuses no connection.
is_port_taken() { (exec 3<> "/dev/tcp/127.0.0.1/$1") 2> /dev/null; }

holder_of() {
    command -v lsof > /dev/null && lsof -nP -iTCP:"$1" -sTCP:LISTEN 2> /dev/null | awk 'NR == 2 { print " by " $1 " (pid " $2 ")" }'
}

get() { curl -sS -m "${2:-3}" "http://$1" 2> /dev/null; }
status_code() { curl -s -o /dev/null -m 3 -w '%{http_code}' "http://$1" 2> /dev/null; }

show_end() { echo "--- the end of $1/log:" >&2; tail -n 15 "$1/log" >&2; }

# Waits until every node is ready; says for whom, and why, when that changes.
wait_ready() {
    local node address told='' waits reason
    while :; do
        waits=
        while read -r node; do
            address=$(address_of "$node")
            if ! live_pid "$node" > /dev/null; then
                show_end "$node"
                die "$address has stopped"
            fi
            [ "$(status_code "$address/readyz")" = 200 ] && continue
            reason=$(get "$address/readyz")
            # A spare is not ready until a view change names it.
            case "$reason" in *'"code":"spare"'*) continue ;; esac
            reason=$(printf '%s' "$reason" | sed -n 's/.*"detail":"\([^"]*\)".*/\1/p')
            waits="$waits$address: ${reason:-no answer yet}"$'\n'
        done < <(all_nodes)
        [ -z "$waits" ] && return
        if [ "$waits" != "$told" ]; then
            printf '%s' "$waits" | sed 's/^/waiting for /' >&2
            told=$waits
        fi
        sleep 0.2
    done
}

live_addresses() {
    local node
    while read -r node; do
        live_pid "$node" > /dev/null && address_of "$node"
    done < <(all_nodes)
}

any_live() { live_addresses | head -n 1; }

joined() { paste -sd, -; }

need_cluster() { [ -n "$(all_nodes)" ] || die "there is no cluster in $dir: cluster.sh bootstrap makes one"; }

# --- verbs

how_to_use() {
    local first
    first=$(any_live)
    cat <<TEXT
The cluster is up: $(live_addresses | paste -sd' ' -)

  curl -L -X PUT -d 'hello world' http://$first/v1/kv/greeting
  curl -L http://$first/v1/kv/greeting
  $0 status

Any member answers: for a key that another node leads it redirects (curl -L follows) or, with ?proxy=true, asks for you.
TEXT
}

bootstrap() {
    local n=${1:-3} i port view='' addresses=()
    case "$n" in "" | 0* | *[!0-9]*) misuse "'$n' is no number of nodes" ;; esac
    if [ -n "$(all_nodes)" ]; then
        echo "There is a cluster in $dir already: nothing was changed." >&2
        if [ -n "$(any_live)" ]; then how_to_use; else echo "It is stopped: cluster.sh start brings it back." >&2; fi
        return 0
    fi
    if [ -n "$repl_factor" ] && [ "$repl_factor" -gt "$n" ]; then
        die "--repl-factor $repl_factor needs at least as many nodes, and these are $n"
    fi
    for ((i = 0; i < n; i++)); do
        port=$((base_port + i))
        is_port_taken "$port" && die "port $port is taken$(holder_of "$port"): choose others by --base-port"
        addresses+=("127.0.0.1:$port")
        view=$view${view:+,}127.0.0.1:$port
    done
    ensure_program
    for i in "${addresses[@]}"; do prepare "$i" "$view"; done
    for i in "${addresses[@]}"; do launch "$nodes/${i##*:}"; done
    wait_ready
    how_to_use
}

start_all() {
    local node
    need_cluster
    ensure_program
    while read -r node; do
        live_pid "$node" > /dev/null || launch "$node"
    done < <(all_nodes)
    wait_ready
    how_to_use
}

wait_gone() { # NODE SECONDS
    local tries=$(($2 * 20))
    while live_pid "$1" > /dev/null; do
        [ "$tries" -le 0 ] && return 1
        tries=$((tries - 1))
        sleep 0.05
    done
}

terminate() { # a stopped process can't take a SIGTERM: it is woken
    local pid
    pid=$(live_pid "$1") || return 0
    kill -TERM "$pid" 2> /dev/null
    kill -CONT "$pid" 2> /dev/null
}

finish() {
    local pid
    wait_gone "$1" 20 && return
    pid=$(live_pid "$1") || return
    echo "$(address_of "$1") did not stop within 20 s: it is killed" >&2
    kill -9 "$pid" 2> /dev/null
    wait_gone "$1" 10 || die "$(address_of "$1") (pid $pid) cannot be killed"
}

stop_all() {
    local node
    while read -r node; do terminate "$node"; done < <(all_nodes)
    while read -r node; do finish "$node"; done < <(all_nodes)
}

kill_one() {
    local node pid
    node=$(node_of "${1:-}") || exit
    pid=$(live_pid "$node") || die "$1 does not run"
    kill -9 "$pid"
    wait_gone "$node" 10 || die "$1 (pid $pid) cannot be killed"
}

signal_one() { # SIGNAL ADDRESS
    local node pid
    node=$(node_of "${2:-}") || exit
    pid=$(live_pid "$node") || die "$2 does not run"
    kill "-$1" "$pid"
}

restart_one() {
    local node
    node=$(node_of "${1:-}") || exit
    ensure_program
    terminate "$node"
    finish "$node"
    launch "$node"
    sleep 0.2
    live_pid "$node" > /dev/null || { show_end "$node"; die "$1 did not start"; }
}

add() {
    local view port=$base_port node address
    need_cluster
    ensure_program
    view=$(while read -r node; do address_of "$node"; done < <(all_nodes) | joined)
    while [ -e "$nodes/$port" ] || is_port_taken "$port"; do port=$((port + 1)); done
    address=127.0.0.1:$port
    repl_factor='' shards=''
    prepare "$address" "$view"
    node=$nodes/$port
    launch "$node"
    echo "starting a spare, which waits until a view change names it" >&2
    until [ "$(status_code "$address/healthz")" = 200 ]; do
        live_pid "$node" > /dev/null || { show_end "$node"; die "$address has stopped"; }
        sleep 0.1
    done
    echo "$address"
}

members() {
    local node pid
    while read -r node; do
        pid=$(live_pid "$node") && echo "$(address_of "$node") $pid"
    done < <(all_nodes)
    return 0
}

encoded() { # percent-encodes any bytes
    local LC_ALL=C text=$1 i byte
    for ((i = 0; i < ${#text}; i++)); do
        byte=${text:i:1}
        case "$byte" in
            [a-zA-Z0-9._~-]) printf '%s' "$byte" ;;
            *) printf '%%%02X' "$(($(printf '%d' "'$byte") & 255))" ;;
        esac
    done
}

leader() {
    local address answer id code
    need_cluster
    while read -r address; do
        if [ $# -ge 1 ]; then
            answer=$(curl -sI -m 3 -w '\ncode %{http_code} %{redirect_url}\n' "http://$address/v1/kv/$(encoded "$1")" | sed -n 's/^code //p')
            code=${answer%% *}
            case "$code" in
                200 | 404) answer=$address ;;
                307) answer=${answer#* http://}; answer=${answer%%/*} ;;
                *) continue ;;
            esac
            # A leader that died may still be named: only one that answers counts.
            [ "$(status_code "$answer/healthz")" = 200 ] && { echo "$answer"; return 0; }
        else
            answer=$(get "$address/v1/cluster") || continue
            id=$(printf '%s' "$answer" | sed -n 's/.*"meta_leader":\([0-9][0-9]*\).*/\1/p')
            [ -n "$id" ] || continue
            answer=$(printf '%s' "$answer" | sed -n "s/.*{\"id\":$id,\"address\":\"\([^\"]*\)\".*/\1/p")
            [ -n "$answer" ] && [ "$(status_code "$answer/healthz")" = 200 ] && { echo "$answer"; return 0; }
        fi
    done < <(live_addresses)
    return 1
}

status() {
    need_cluster
    [ -n "$(any_live)" ] || die "no node of the cluster in $dir runs"
    "$(program)" cluster status --server "$(live_addresses | joined)"
}

logs() {
    local node
    node=$(node_of "${1:-}") || exit
    if [ -n "$follow" ]; then tail -n 50 -f "$node/log"; else tail -n 50 "$node/log"; fi
}

clean() {
    local node
    stop_all
    while read -r node; do
        rm -rf "$node/data"
        rm -f "$node/address" "$node/pid" "$node/flags" "$node/log"
        rmdir "$node" 2> /dev/null
    done < <(all_nodes)
    rmdir "$nodes" 2> /dev/null
    rmdir "$dir" 2> /dev/null
    return 0
}

set -- ${words[@]+"${words[@]}"}
verb=${1:-help}
[ $# -gt 0 ] && shift
case "$verb" in
    bootstrap) bootstrap "$@" ;;
    start) start_all ;;
    stop) stop_all ;;
    restart) restart_one "$@" ;;
    add) add ;;
    members) members ;;
    leader) leader "$@" ;;
    kill) kill_one "$@" ;;
    pause) signal_one STOP "$@" ;;
    resume) signal_one CONT "$@" ;;
    status) status ;;
    logs) logs "$@" ;;
    clean) clean ;;
    help) usage ;;
    *) misuse "unknown verb $verb" ;;
esac
