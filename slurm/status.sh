#!/usr/bin/env bash
# How the lines of a sweep stand: finished, running, waiting, failed (with the end of what it printed), resumable, new; what is
# left of the time limit, and the figures so far. Asks squeue alone, and the files of the runs.
#
#     slurm/status.sh SWEEP...
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ $# = 0 ]; then
    echo "status.sh: error: which sweep? slurm/sweeps/*.txt" >&2
    exit 2
fi
mapfile -d '' -t sweeps < <(realpath -z -- "$@")
cd "$root"
# shellcheck source=slurm/site.sh
source slurm/site.sh
setup
for sweep in "${sweeps[@]}"; do
    "$PYTHON" slurm/sweep.py status "$sweep"
done
