#!/usr/bin/env bash
# Builds the image without pulling any: docker/build-scratch.sh [TAG] (kvs:3.0). The program is
# linked without shared libraries (four minutes on two cores). QUORATE_BIN names a program that is
# there already; the shared libraries that it needs, if any, are put beside it.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
tag=${1:-kvs:3.0}
case $tag in -*) printf 'usage: %s [TAG]\n' "$0" >&2 && exit 2 ;; esac

binary=${QUORATE_BIN:-}
if [ -z "$binary" ]; then
    host=$(rustc -vV | sed -n 's/^host: //p')
    target=${CARGO_TARGET_DIR:-$root/target}
    # With a target named, the flag is not that of build scripts and procedural macros, which need
    # shared libraries.
    (cd "$root" && RUSTFLAGS="-C target-feature=+crt-static" CARGO_TARGET_DIR=$target \
        cargo build --release --locked --bin quorate --target "$host") >&2
    binary=$target/$host/release/quorate
fi

context=$(mktemp -d "${TMPDIR:-/tmp}/quorate-image.XXXXXX")
trap 'rm -rf "$context"' EXIT
mkdir -p "$context/image/data"
cp "$binary" "$context/image/quorate"
# Debug information is of no use in there.
strip "$context/image/quorate" 2>/dev/null || true
# ldd fails for a program that needs none.
for library in $(ldd "$binary" 2>/dev/null | grep -o '/[^ ]*' || true); do
    mkdir -p "$context/image$(dirname "$library")"
    cp -L "$library" "$context/image$library"
done
docker build --quiet --tag "$tag" --file "$root/docker/Dockerfile.scratch" "$context"
