# shellcheck shell=bash disable=SC2034
# What differs from cluster to cluster, and nothing else: edit it, no need to commit. Read by all scripts here; jobs run with
# the settings they were submitted with.

# Options of every sbatch. Those on the command line of submit.sh come after these, and win. `sinfo` lists partitions, `sacctmgr
# show assoc user=$USER` accounts; clusters differ in how GPUs are asked for (--gres=gpu:1, --gpus=1, --gres=gpu:a100:1).
SBATCH_OPTIONS=(
    # --partition=gpu     # the queue; without it the cluster's default
    # --account=project   # who pays; without it your default
    --gres=gpu:1          # GPUs of a run: one (several: multi_gpu.slurm)
    --cpus-per-task=4     # also the threads of PyTorch
    --mem=16G             # main memory, not the GPU's
    --time=24:00:00       # of one job: a longer run is stopped, saved, requeued and resumed, so shorter is started sooner
)

# How many runs of a sweep at once, at most. submit.sh --at-once N overrides it.
MAX_AT_ONCE=20

# How often a run may be requeued before it is left as it stands (submit again to go on): ends what never makes progress.
MAX_REQUEUES=100

# The Python that has PyTorch; a relative path starts from the project's root.
PYTHON=.venv/bin/python

# Where image sets lie; a relative path starts from the project's root. Nodes without internet read it, and download nothing,
# if it was filled before: `make data` on a login node fills `data`.
DATA_DIR=data

# Called before Python, on login and compute nodes: modules to load, environments to activate, variables to set.
setup() {
    : # module load python/3.11
}
