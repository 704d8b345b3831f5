#!/usr/bin/env bash
# Runs one line of a prepared sweep, and notes how it ended. Called by array.slurm, multi_gpu.slurm and local.sh:
#
#     slurm/run_line.sh LINES NUMBER          # from the project's root; LINES is what sweep.py prepare has written
#
# One process at a time is at a line: it holds a lock that ends with it. SIGUSR1 (time limit ahead) and SIGTERM (preemption,
# scancel) go on to the run, which saves and leaves. Exit status: that of the run (0 finished, or was before; 75 stopped and
# resumable, or another process is at it). In a job, a run that SIGUSR1 has stopped goes back into the queue.
set -euo pipefail
code=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
lines=$1 number=$2
run='' stopped_by=''

say() { echo "$(date '+%F %T') line $number: $*"; }

# shellcheck disable=SC2317 # called by signals
pass_on() { # pass_on SIGNAL
    stopped_by=$1
    [ -z "$run" ] || kill -"$1" "$run" 2>/dev/null || true # it may have ended just now
}
trap 'pass_on USR1' USR1
trap 'pass_on TERM' TERM INT # a shell's children in the background do not get Ctrl-C

# shellcheck source=slurm/site.sh
source "$code/slurm/site.sh"
setup
IFS=$'\t' read -r key command < <(sed -n "${number}p" "$lines")
read -ra words <<<"$command"
record=results/slurm/runs/$key
mkdir -p results/slurm/runs

exec 9>>"$record.lock" # inherited by the run: while any of both lives, the line is taken
flock --wait 2 --conflict-exit-code 75 9 || {
    status=$?
    [ "$status" != 75 ] || say "another process is at it, and it is left to it: $record.out"
    exit "$status"
}
rm -f "$record.exit"

if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
    export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
fi
launch=("$PYTHON" -u) torchrun='' status=75
if [ -n "${MULTI_GPU:-}" ]; then
    case ${words[0]} in
        train_zoo.py | cifar10_*.py) # many jobs: a process for each GPU, or, where there is none, for each task; or as typed
            IFS=, read -ra gpus <<<"${CUDA_VISIBLE_DEVICES:-}"
            n=${#gpus[@]}
            [ "$n" -gt 0 ] || n=${SLURM_NTASKS:-1}
            words=("${words[0]}" --jobs "$n" "${words[@]:1}")
            ;;
        *) launch=(srun --kill-on-bad-exit=1 "$code/slurm/torchrun.sh") torchrun=1 ;;
    esac
fi
if [ -z "$torchrun" ] && [ "${SLURM_NNODES:-1}" -gt 1 ]; then
    say "${words[0]} works on one node, and has $SLURM_NNODES: submit it without --nodes"
    status=2
elif [ -z "$stopped_by" ]; then
    say "on $(hostname): $command"
    "${launch[@]}" "$code/${words[0]}" "${words[@]:1}" </dev/null >>"$record.out" 2>&1 &
    run=$!
    # a signal ends `wait`, not the run: wait until the run has gone
    while :; do
        wait "$run" && status=0 || status=$?
        kill -0 "$run" 2>/dev/null || break
    done
fi
# a signal that comes while Python is still starting kills it, and torchrun has no exit status of its own: nothing is lost
case $stopped_by:$status in
    *:0 | :*) ;;
    *:138 | *:143) status=75 ;;
    *) [ -z "$torchrun" ] || status=75 ;;
esac
echo "$status" >"$record.exit.new"
mv "$record.exit.new" "$record.exit"

case $status in
    0) say "finished" ;;
    75) say "stopped by ${stopped_by:-itself}, and resumable" ;;
    *)
        say "FAILED with exit status $status; the end of $record.out:"
        tail -n 20 "$record.out"
        ;;
esac

# After SIGTERM SLURM itself does what is to be done: it requeues the job if it was preempted, and not if it was cancelled.
if [ "$status:$stopped_by" = 75:USR1 ] && [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
    if [ "${SLURM_RESTART_COUNT:-0}" -ge "$MAX_REQUEUES" ]; then
        say "was requeued $MAX_REQUEUES times: MAX_REQUEUES in site.sh. Submitting the sweep again goes on with it"
    else
        say "back into the queue"
        # never by SLURM_JOB_ID: one task of an array has the array's own, and all of its tasks would start again
        if scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"; then
            sleep 60 # SLURM ends this script here
        fi
    fi
fi
exit "$status"
