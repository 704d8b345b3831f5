#!/usr/bin/env bash
# Submits every sweep of the papers, in order. Submitting again goes on with what is left.
#
#     slurm/reproduce.sh [OPTIONS OF submit.sh]       # --dry-run: says what it would submit
#
# WARNING: this takes many GPU days. slurm/status.sh slurm/sweeps/*.txt says how it stands.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
options=("$@")

submit() { # submit SWEEP [OPTIONS OF SBATCH]; prints ids of jobs
    slurm/submit.sh "${options[@]}" "slurm/sweeps/$1.txt" "${@:2}"
}

submit amortised_clustering
submit swarm_images
submit amortised_mog
submit duet_cifar10
submit duet_cifar100

# networks are joined when they are there: if one of the zoo's jobs fails, what waits for it is cancelled
zoo=$(submit zoo)
echo "$zoo"
after_zoo=()
[ -z "$zoo" ] || after_zoo=("--dependency=afterok:$zoo" --kill-on-invalid-dep=yes)
submit stitching "${after_zoo[@]}"
submit stitching_crossval "${after_zoo[@]}"
submit alignment "${after_zoo[@]}"
submit projections
submit routing
