#!/usr/bin/env bash
# Runs what is left of a sweep here, without SLURM, from the tree as it stands.
#
#     slurm/local.sh SWEEP [-j N]        # N runs at once [1]; Ctrl-C saves and stops them, the same line goes on
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

fail() {
    echo "local.sh: error: $*" >&2
    exit 2
}

[ $# -gt 0 ] || fail "which sweep? slurm/sweeps/*.txt"
[ -f "$1" ] || fail "there is no sweep $1"
sweep=$(realpath "$1") at_once=1
if [ $# -gt 1 ]; then
    at_once=${3:-}
    [[ $2 == -j && $at_once =~ ^[1-9][0-9]*$ ]] || fail "${*:2}: -j N is the only option, a number of runs from 1"
fi
cd "$root"
# shellcheck source=slurm/site.sh
source slurm/site.sh
setup
mkdir -p results/slurm/runs
plan=$("$PYTHON" slurm/sweep.py prepare "$sweep" --data-dir "$DATA_DIR")
{ read -r lines && read -r open && read -r _; } <<<"$plan"$'\n\n' # the last two may be empty
status=0
tr ',' '\n' <<<"$open" | xargs --no-run-if-empty -P "$at_once" -n 1 slurm/run_line.sh "$lines" || status=$?
"$PYTHON" slurm/sweep.py status "$sweep"
exit "$status"
