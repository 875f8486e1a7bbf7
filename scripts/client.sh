#!/usr/bin/env bash
# Shows the requests of the encoded batch dialect with curl, and what the proxy (or any server)
# answers: scripts/client.sh [HOST:PORT].
set -euo pipefail

server=${1:-127.0.0.1:8080}
failed=0

# Prints a request as it could be typed, then its status and answer.
show() {
    local method=$1 path=$2 answer
    local words=(curl -q -s --noproxy '*' --max-time 10 -X "$method" "http://$server$path")
    printf "\n$ curl -X %s http://%s%s" "$method" "$server" "$path"
    if [ $# -gt 2 ]; then
        printf " -d '%s'" "$3"
        words+=(-d "$3")
    fi
    if ! answer=$("${words[@]}" -w '\n%{http_code}'); then
        printf '\nnobody answers at %s: %s\n' "$server" \
            'start a cluster with scripts/start_n_servers.sh 3, and cluster.sh gateway' >&2
        exit 1
    fi
    printf '\n%s %s\n' "${answer##*$'\n'}" "${answer%$'\n'*}"
    case ${answer##*$'\n'} in 2*) ;; *) failed=1 ;; esac
}

echo "Pairs are stored; a key and a value are text, or a string of bits."
show PUT /set '[
  {"key":{"encoding":"string","data":"fruit"},"value":{"encoding":"string","data":"apple"}},
  {"key":{"encoding":"string","data":"mask"},"value":{"encoding":"binary","data":"10110001"}},
  {"key":{"encoding":"binary","data":"0101"},
   "value":{"encoding":"string","data":"under a key of bits"}}]'
printf '\nA pair that cannot be stored is named, and the others are stored: 206.\n'
show PUT /set '[
  {"key":{"encoding":"string","data":"colour"},"value":{"encoding":"string","data":"green"}},
  {"key":{"encoding":"binary","data":"0102"},"value":{"encoding":"string","data":"no bits"}}]'
printf '\nWhat is asked for is answered, with an empty value where there is no such key.\n'
show POST /fetch '[{"encoding":"string","data":"fruit"},{"encoding":"binary","data":"0101"},
  {"encoding":"string","data":"nothing"}]'
printf '\nWhether keys exist.\n'
show POST /query '[{"encoding":"string","data":"fruit"},{"encoding":"string","data":"nothing"}]'
printf '\nEverything in the store.\n'
show GET /fetch
exit "$failed"
