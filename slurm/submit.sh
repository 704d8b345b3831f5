#!/usr/bin/env bash
# Submits what is left of a sweep as one job array.
#
#     slurm/submit.sh [--dry-run] [--uncommitted] [--multi-gpu] [--at-once N] SWEEP [OPTIONS OF SBATCH]
#
#     slurm/submit.sh slurm/sweeps/zoo.txt
#     slurm/submit.sh --at-once 4 slurm/sweeps/zoo.txt --partition=gpu --time=4:00:00
#
# Lines that have finished, or are running or waiting already, are left out: submit again whenever something is left. Jobs run a
# copy of the last commit, whatever the tree holds by then; uncommitted changes are refused unless --uncommitted takes them along
# (site.sh and sweeps may be changed freely). --dry-run says what would be submitted, and makes nothing.
# --multi-gpu gives each run all GPUs of its job, which the options of sbatch ask for: see multi_gpu.slurm.
# Prints the ids of the jobs that the sweep's open lines are in, joined with ':', as --dependency=afterok: takes them.
set -euo pipefail
shopt -s inherit_errexit
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

fail() {
    echo "submit.sh: error: $*" >&2
    exit 2
}

dry_run='' uncommitted='' at_once='' batch=array
while [[ ${1:-} == --* ]]; do
    case $1 in
        --dry-run) dry_run=1 ;;
        --uncommitted) uncommitted=1 ;;
        --multi-gpu) batch=multi_gpu ;;
        --at-once)
            at_once=${2:-}
            [[ $at_once =~ ^[1-9][0-9]*$ ]] || fail "--at-once $at_once: a number of runs, from 1"
            shift
            ;;
        --help) sed -n '2,/^set/{/^set/d;s/^# \?//p}' "${BASH_SOURCE[0]}" && exit 0 ;;
        *) fail "unknown option $1: options of sbatch come after the sweep" ;;
    esac
    shift
done
[ $# -gt 0 ] || fail "which sweep? slurm/sweeps/*.txt"
[ -f "$1" ] || fail "there is no sweep $1"
sweep=$(realpath "$1")
shift
single=$(grep -oE '^[[:space:]]*(routing_networks|deepsets_exercise)\.py' "$sweep" | head -n 1) || true
if [ "$batch" = multi_gpu ] && [ -n "$single" ]; then
    fail "--multi-gpu: a run of ${single##*[[:space:]]} takes one GPU, others would idle: leave it out, an array uses many"
fi
cd "$root"
# shellcheck source=slurm/site.sh
source slurm/site.sh
setup

snapshot() { # makes, if it is not there, the copy of the code that jobs run, and prints where it is
    local revision tree index place
    revision=$(git rev-parse HEAD) || fail "$root is no git checkout: nobody could tell later what was run"
    tree=$revision
    if ! git diff --quiet HEAD -- . ':!slurm/site.sh' ':!slurm/sweeps' ||
        [ -n "$(git ls-files --others --exclude-standard '*.py')" ]; then
        if [ -z "$uncommitted" ]; then
            git status --short -- . ':!slurm/site.sh' ':!slurm/sweeps' >&2
            fail "uncommitted changes: commit them, or --uncommitted runs them"
        fi
        index=$(mktemp)
        cp "$(git rev-parse --git-path index)" "$index"
        tree=$(export GIT_INDEX_FILE=$index && git add --all && git write-tree)
        rm "$index"
        revision=$revision-dirty-${tree:0:12}
    fi
    # the settings belong to it, too
    place=results/slurm/snapshots/$revision-$(sha256sum slurm/site.sh | cut -c 1-8)
    if [ -z "$dry_run" ] && [ ! -d "$place" ]; then
        rm -rf "$place.new" && mkdir -p "$place.new"
        git archive "$tree" -- . ':!tests' ':!results' ':!benchmarks' | tar -x -C "$place.new"
        cp slurm/site.sh "$place.new/slurm/site.sh"
        echo "$revision" >"$place.new/REVISION" # for the runs' args.json
        mv "$place.new" "$place"
    fi
    echo "$place"
}

if [ -z "$dry_run" ]; then
    mkdir -p results/slurm/jobs results/slurm/runs results/slurm/snapshots
    exec 8>results/slurm/submit.lock # of two submits at once, the second sees what the first has submitted
    flock 8
fi
code=$(snapshot)
if [ -n "$dry_run" ]; then
    plan=$("$PYTHON" slurm/sweep.py prepare "$sweep" --data-dir "$DATA_DIR" --show)
else
    plan=$("$PYTHON" "$code/slurm/sweep.py" prepare "$sweep" --data-dir "$DATA_DIR")
fi
{ read -r lines && read -r open && read -r jobs; } <<<"$plan"$'\n\n' # the last two may be empty
if [ -z "$open" ]; then
    echo "nothing is left to submit${jobs:+: the rest is in job ${jobs//:/, }}" >&2
    echo "$jobs"
    exit 0
fi
name=$(basename "$lines" .lines) # status.sh finds the lines by it
command=(sbatch --parsable --chdir="$root" --job-name="$name" --array="$open%${at_once:-$MAX_AT_ONCE}"
    "${SBATCH_OPTIONS[@]}" "$@" "$code/slurm/$batch.slurm" "$root/$code" "$lines")
if [ -n "$dry_run" ]; then
    echo "would run:${command[*]/#/ }" >&2
    echo "JOB"
    exit 0
fi
job=$("${command[@]}" 8>&-)
job=${job%%;*} # a federation adds its cluster's name
echo "submitted as job $job; slurm/status.sh says how it stands" >&2
echo "${jobs:+$jobs:}$job"
