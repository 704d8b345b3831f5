#!/usr/bin/env bash
# Ends what start.sh has started below DIR: every job first, since jobs outlive the daemons, then the daemons.
#
#     tests/slurm/stop.sh DIR
set -uo pipefail
dir=$1
export SLURM_CONF=$dir/etc/slurm.conf

alive() {
    local state
    state=$(ps -o stat= -p "$1") && [[ $state != Z* ]]
}

child() { cat "$dir/run/$1.child" 2>/dev/null; }

if pid=$(child slurmctld) && alive "$pid"; then
    squeue -h -o %A | sort -u | xargs -r scancel
    end=$((SECONDS + 20)) # KillWait, and some seconds
    while [ -n "$(squeue -h)" ] && ((SECONDS < end)); do sleep 0.2; done
fi
for name in slurmd slurmctld munged; do
    pid=$(child "$name") || continue
    kill -TERM "$pid" 2>/dev/null
    end=$((SECONDS + 10))
    while alive "$pid" && ((SECONDS < end)); do sleep 0.05; done
    alive "$pid" && kill -KILL "$pid"
    rm -f "$dir/run/$name.child"
done
exit 0
