#!/usr/bin/env bash
# Runs what is left of a sweep here, without SLURM, from the tree as it stands.
#
#     slurm/local.sh SWEEP [-j N]        # N runs at once [1]; Ctrl-C saves and stops them, the same command goes on
#
# Several runs at once share the cores, unless OMP_NUM_THREADS says how many threads a run has. Each has one of the GPUs, the one
# with the fewest runs.
#
# SIGTERM and SIGUSR1 stop it in the same way. Exit status: 0 if all lines have finished, else that of the first that has not
# (75: stopped and resumable).
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
IFS=, read -ra numbers <<<"$open"
runs=() status=0 stopped=''
gpus=() && declare -A gpu_of # runs by process
if [ "$at_once" -gt 1 ]; then
    threads=$(($(nproc) / at_once))
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        IFS=, read -ra gpus <<<"$CUDA_VISIBLE_DEVICES"
    elif command -v nvidia-smi >/dev/null; then
        mapfile -t gpus < <(nvidia-smi --query-gpu=index --format=csv,noheader)
    fi
fi

freest_gpu() { # sets `gpu`, to nothing where there is none or all runs may have all
    local candidate pid n least=
    gpu=''
    for candidate in "${gpus[@]}"; do
        n=0
        for pid in $(jobs -pr); do
            [ "${gpu_of[$pid]}" != "$candidate" ] || n=$((n + 1))
        done
        if [ -z "$least" ] || [ "$n" -lt "$least" ]; then
            gpu=$candidate least=$n
        fi
    done
}

# shellcheck disable=SC2317 # called by signals
stop() {
    local running
    stopped=1
    mapfile -t running < <(jobs -pr)
    [ ${#running[@]} = 0 ] || kill -TERM "${running[@]}" 2>/dev/null || true # they may have ended just now
}
trap stop TERM INT USR1

for number in "${numbers[@]}"; do
    while [ "$(jobs -pr | wc -l)" -ge "$at_once" ]; do
        wait -n || true # ends also when a signal comes
    done
    [ -z "$stopped" ] || break
    freest_gpu
    ${gpu:+env "CUDA_VISIBLE_DEVICES=$gpu"} slurm/run_line.sh "$lines" "$number" &
    runs+=($!) gpu_of[$!]=$gpu
done
while [ -n "$(jobs -pr)" ]; do
    wait -n || true
done
for run in "${runs[@]}"; do
    wait "$run" && ended=0 || ended=$?
    [ "$status" != 0 ] || status=$ended
done
# lines that were not started are left to do, and so is one that was stopped before it could note the signal
[ ${#runs[@]} = ${#numbers[@]} ] && [ "$status" != 143 ] || status=75
"$PYTHON" slurm/sweep.py status "$sweep"
exit "$status"
