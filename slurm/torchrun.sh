#!/usr/bin/env bash
# What srun starts in each task of multi_gpu.slurm: torchrun with a process for each GPU of the task (one where there is none).
#
#     srun slurm/torchrun.sh SCRIPT OPTIONS
#
# Processes meet at the job's first node, at a port that its id gives.
set -euo pipefail
code=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=slurm/site.sh
source "$code/slurm/site.sh"

IFS=, read -ra gpus <<<"${CUDA_VISIBLE_DEVICES:-0}"
export OMP_NUM_THREADS=$(((${SLURM_CPUS_PER_TASK:-1} + ${#gpus[@]} - 1) / ${#gpus[@]}))
first=127.0.0.1
if [ "$SLURM_NNODES" -gt 1 ]; then
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
fi
# SIGUSR1 (time limit ahead) is passed on like SIGTERM, else torchrun would die of it
exec "$PYTHON" -m torch.distributed.run --nnodes="$SLURM_NTASKS" --node-rank="$SLURM_PROCID" \
    --nproc-per-node="${#gpus[@]}" --master-addr="$first" --master-port=$((20000 + SLURM_JOB_ID % 10000)) \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 "$@"
