#!/usr/bin/env bash
# Starts a SLURM of one pretended node (munged, slurmctld, slurmd) with all its files below DIR, and waits until it takes jobs.
#
#     CTLD_PORT=17817 SLURMD_PORT=17818 tests/slurm/start.sh DIR    # at most 75 characters: sockets' paths end at 107
#     tests/slurm/start.sh DIR slurmd                              # the node alone, after it was killed
#
# Commands find it by SLURM_CONF=DIR/etc/slurm.conf. stop.sh ends it.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mkdir -p "$1"/{etc,munge,state,spool,log,run}
dir=$(cd "$1" && pwd)
export SLURM_CONF=$dir/etc/slurm.conf

spawn() { # spawn NAME COMMAND...: in a session of its own, without the caller's pipes, its process id kept
    local name=$1
    shift
    setsid "$@" </dev/null >"$dir/log/$name.out" 2>&1 &
    echo $! >"$dir/run/$name.child"
}

alive() { # a zombie that nobody has waited for answers kill -0, too
    local state
    state=$(ps -o stat= -p "$1") && [[ $state != Z* ]]
}

wait_for() { # wait_for NAME TEST...
    local name=$1 end=$((SECONDS + 30))
    shift
    until "$@"; do
        if ! alive "$(cat "$dir/run/$name.child")" || ((SECONDS > end)); then
            echo "$name did not come up:" >&2
            tail -n 20 "$dir/log/$name".* >&2
            exit 1
        fi
        sleep 0.05
    done
}

start_slurmd() {
    spawn slurmd slurmd -D -f "$SLURM_CONF" -N n1
    wait_for slurmd takes_jobs
}

takes_jobs() {
    case $(sinfo -h -o %t 2>/dev/null) in idle | mix | alloc) ;; *) return 1 ;; esac
}

if [ "${2:-}" = slurmd ]; then
    start_slurmd
    exit 0
fi

chmod 755 "$dir" "$dir/munge" "$dir/spool" # munged wants its socket's directory open
chmod 700 "$dir/state"
sed -e "s#@DIR@#$dir#g" -e "s#@USER@#$(id -un)#g" -e "s#@HOST@#$(hostname -s)#g" \
    -e "s#@CTLD_PORT@#${CTLD_PORT:-17817}#g" -e "s#@SLURMD_PORT@#${SLURMD_PORT:-17818}#g" \
    "$here/slurm.conf.in" >"$SLURM_CONF"
[ -s "$dir/munge/munge.key" ] || (umask 077 && head -c 128 /dev/urandom >"$dir/munge/munge.key")
rm -f "$dir/munge/munge.socket"

spawn munged munged --foreground --socket="$dir/munge/munge.socket" --key-file="$dir/munge/munge.key" \
    --seed-file="$dir/munge/munged.seed" --log-file="$dir/munge/munged.log" --pid-file="$dir/munge/munged.pid"
wait_for munged test -S "$dir/munge/munge.socket"
spawn slurmctld slurmctld -D -f "$SLURM_CONF"
start_slurmd
