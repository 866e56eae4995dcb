#!/bin/sh
# Lints the units beside this file with systemd's own tool, with a command that exists in place of the installed one.
# Any word of `verify` is a failure: it ends with 0 for a misspelt key. `security` fails above an exposure of 2.0.
set -eu
command -v systemd-analyze >/dev/null || { echo "systemd-analyze is not here: the units are not linted"; exit 0; }
cd "$(dirname "$0")"
copies="$(mktemp -d)"
trap 'rm -rf "$copies"' EXIT
for unit in *.service; do
    sed 's#/opt/magnetar/bin/magnetar#/bin/true#' "$unit" >"$copies/$unit"
    found="$(systemd-analyze verify --man=no --recursive-errors=no "$copies/$unit" 2>&1)" || true
    [ -z "$found" ] || { echo "$found"; exit 1; }
    verdict="$(systemd-analyze security --offline=true --no-pager --threshold=20 "$copies/$unit" 2>&1)" \
        || { echo "$verdict" | tail -1; exit 1; }
    echo "$unit: ok,$(echo "$verdict" | tail -1 | cut -d: -f2)"
done
