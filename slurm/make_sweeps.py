"""Writes slurm/sweeps/*.txt: the sweeps that the papers need, one command line a run.

    python slurm/make_sweeps.py

The files are committed as made; a test compares. Edit a file for a sweep of your own, or better a copy under another name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

SWEEPS = Path(__file__).resolve().parent / "sweeps"
SEEDS = range(5)
SSL_SEEDS = range(3)

# DUET learns the structure of all of these, ESSL predicts some of them
TRANSFORMATIONS = ("sca", "rot", "ron", "fli", "flv", "blu", "gra", "bri", "con", "sat", "hue")
PREDICTED = ("rot", "ron", "fli", "flv", "gra", "bri", "con", "sat", "hue")
ON_A_CIRCLE = ("rot", "ron")  # where von Mises is the target, and not Gaussian

STITCHED = ("mCNN", "resnet20", "resnet18")
ZOO = (*STITCHED, "cwCNN")
ZOO_CHUNKS, CROSSVAL_CHUNKS = 4, 8
RANKS = (1, 2, 4)
MULTIPLIERS = (0.0001, 0.001, 0.01, 0.1)

DECISIONS = (
    "WPL", "REINFORCE", "REINFORCEBl1", "REINFORCEBl2", "EGreedyREINFORCE", "ActorCritic", "AAC", "BootstrapAAC", "EGreedyAAC",
    "QLearning", "SARSA", "AdvantageLearning", "BootstrapAdvantageLearning", "GumbelSoftmax", "RELAX",
)  # fmt: skip
OTHER_MODELS = ("dispatched", "single-agent", "soft-mixture", "per-task-all-fc", "per-task-1-fc")


def amortised_clustering() -> Iterator[str]:
    """The published line of the SWARM model, and the models it is compared with, of the same width and budget."""
    models = ("Swarm -n_hidden 128 -n_iter 10 -n_layers 1 -dropout 0.0", "SetLinear", "SetTransformer", "LSTM", "LSTMS")
    for model in models:
        for seed in SEEDS:
            yield f"amortised_clustering.py -type {model} -bs 50 -wc 60 -seed {seed}"


def swarm_images() -> Iterator[str]:
    """The three published lines; then each with its class, which is what the original trained whatever it was told."""
    for condition in ("", " -cond"):
        yield f"swarm_transformer.py -data CIFAR10 -n_layers 1 -n_hidden 512 -n_iter 20 -wc 7200 -lr 0.002 -bs 20{condition}"
        for data in ("FashionMNIST", "MNIST"):
            yield f"swarm_transformer.py -data {data} -n_layers 1 -n_hidden 256 -n_iter 10 -wc 480 -lr 0.001 -bs 50{condition}"


def amortised_mog() -> Iterator[str]:
    """Either pooling, three seeds, twenty minutes each, in which the learning rate falls to a hundredth."""
    for pooling in ("MEAN", "POMA"):
        for seed in SSL_SEEDS:
            yield f"amortised_mog.py -p {pooling} -gamma 0.8 -wc 20 -seed {seed}"


def duet(dataset: str) -> Iterator[str]:
    """Each transformation, beside a crop: structured (DUET), forgotten (SimCLR), predicted (ESSL). Options as in the published
    line, whose lambda of 1000 is the only one that is known."""
    for code in TRANSFORMATIONS:
        views = "sca" if code == "sca" else f"sca {code}"
        target = "vm" if code in ON_A_CIRCLE else "ga"
        methods = [f"duet --tx {views} --equi-tx {code} --duet-target {target} --duet-lambda 1000", f"simclr --tx {views}"]
        if code in PREDICTED:
            methods.append(f"essl --tx sca --equi-tx {code}")
        for method in methods:
            for seed in SSL_SEEDS:
                yield (
                    f"train_ssl.py --dataset {dataset} --encoder cifar10_resnet32 --batch-size 1024 --test-every 10 "
                    f"--warmup-epochs 10 --epochs 800 --center-crop --model {method} --seed {seed}"
                )


def zoo() -> Iterator[str]:
    """100 networks of each architecture, a quarter a job."""
    for arch in ZOO:
        for chunk in range(ZOO_CHUNKS):
            yield f"train_zoo.py --num_models=100 --arch={arch} --num_chunks={ZOO_CHUNKS} --chunk={chunk}"


def stitching() -> Iterator[str]:
    """Each architecture by each joint: permutation, any matrix, by rank, by penalty. Needs the zoo."""
    joints = ["Grelu", "standard"]
    joints += [f"lowrank --rank {rank}" for rank in RANKS]
    joints += [f"lasso --multiplier {multiplier}" for multiplier in MULTIPLIERS]
    for arch in STITCHED:
        for joint in joints:
            yield f"cifar10_stitching.py --arch {arch} --recipe {joint}"


def stitching_crossval() -> Iterator[str]:
    """Permutations whose penalty is chosen by validation, an eighth of the pairs a job. Needs the zoo."""
    for arch in STITCHED:
        for chunk in range(CROSSVAL_CHUNKS):
            yield f"cifar10_stitching.py --arch {arch} --recipe crossval --num_chunks {CROSSVAL_CHUNKS} --chunk {chunk}"


def alignment() -> Iterator[str]:
    """Each architecture by each published measure: 32 pairs by Procrustes, 16 by CKA. Needs the zoo."""
    for arch in ZOO:
        for measure, pairs in (("procrustes", 32), ("ortho_procrustes", 32), ("cka", 16), ("ortho_cka", 16)):
            yield f"cifar10_alignment.py --arch={arch} --similarity={measure} --repeats={pairs}"


def projections() -> Iterator[str]:
    """The rotation test: ten elements of either group at three layers."""
    yield "cifar10_projections.py --repeats=10"


def routing() -> Iterator[str]:
    """CIFAR-100 in 20 tasks: every way to learn decisions, and the models that decide nothing, or otherwise."""
    kinds = [f"--decision {decision}" for decision in DECISIONS] + [f"--model {model}" for model in OTHER_MODELS]
    for kind in kinds:
        for seed in SEEDS:
            yield f"routing_networks.py --data CIFAR100-MTL {kind} --seed {seed}"


def sweep(comment: str, lines: Iterable[str]) -> str:
    return "".join(f"# {text}\n" for text in comment.split("\n")) + "\n" + "".join(f"{line}\n" for line in lines)


def sweeps() -> dict[str, str]:
    """The content of every file, by its name. A new sweep is a function above and an entry here (and in reproduce.sh)."""
    of_ssl = "Each transformation by DUET, SimCLR and ESSL"
    return {
        "amortised_clustering.txt": sweep(
            "Amortised clustering: five models, five seeds, an hour each", amortised_clustering()
        ),
        "swarm_images.txt": sweep("SWARM image transformer: 5 days for CIFAR-10, 8 hours for the others", swarm_images()),
        "amortised_mog.txt": sweep(
            "Amortised mixtures of Gaussians: two poolings, three seeds, 20 minutes each", amortised_mog()
        ),
        "duet_cifar10.txt": sweep(f"{of_ssl}: CIFAR-10, three seeds", duet("cifar10")),
        "duet_cifar100.txt": sweep(f"{of_ssl}: CIFAR-100, three seeds", duet("cifar100")),
        "zoo.txt": sweep("Zoos of 100 networks of an architecture, in four chunks each", zoo()),
        "stitching.txt": sweep("Stitching by architecture and joint, as published. Needs the networks of zoo.txt", stitching()),
        "stitching_crossval.txt": sweep(
            "Stitching by permutations, cross-validated, in eight chunks each. Needs the networks of zoo.txt",
            stitching_crossval(),
        ),
        "alignment.txt": sweep("Alignment by architecture and measure. Needs the networks of zoo.txt", alignment()),
        "projections.txt": sweep("The rotation test", projections()),
        "routing.txt": sweep("Routing by decision, and its baselines, five seeds each", routing()),
    }


def main() -> None:
    SWEEPS.mkdir(exist_ok=True)
    for name, content in sweeps().items():
        (SWEEPS / name).write_text(content)


if __name__ == "__main__":
    main()
