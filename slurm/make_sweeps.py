"""Writes slurm/sweeps/*.txt: the sweeps that the papers need, and those of the tables in results/, one command line a run.

    python slurm/make_sweeps.py

A table of results/ is repeated on one machine by slurm/local.sh slurm/sweeps/NAME.txt -j RUNS_AT_ONCE.

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
    """The published command of the SWARM model, and the models it is compared with, of the same width and budget."""
    models = ("Swarm -n_hidden 128 -n_iter 10 -n_layers 1 -dropout 0.0", "SetLinear", "SetTransformer", "LSTM", "LSTMS")
    for model in models:
        for seed in SEEDS:
            yield f"amortised_clustering.py -type {model} -bs 50 -wc 60 -seed {seed}"


def swarm_images() -> Iterator[str]:
    """The three published commands; then each with its class, which is what the original trained whatever it was told."""
    for condition in ("", " -cond"):
        yield f"swarm_transformer.py -data CIFAR10 -n_layers 1 -n_hidden 512 -n_iter 20 -wc 7200 -lr 0.002 -bs 20{condition}"
        for data in ("FashionMNIST", "MNIST"):
            yield f"swarm_transformer.py -data {data} -n_layers 1 -n_hidden 256 -n_iter 10 -wc 480 -lr 0.001 -bs 50{condition}"


def amortised_mog() -> Iterator[str]:
    """Either pooling, three seeds, for the published 100 epochs."""
    for pooling in ("MEAN", "POMA"):
        for seed in SSL_SEEDS:
            yield f"amortised_mog.py -p {pooling} -seed {seed}"


def duet(dataset: str) -> Iterator[str]:
    """Each transformation, after a crop: structured (DUET), forgotten (SimCLR), predicted (ESSL). Options as in the published
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
    """Each architecture by each stitching layer: permutation, any matrix, by rank, by penalty. Needs the zoo."""
    layers = ["Grelu", "standard"]
    layers += [f"lowrank --rank {rank}" for rank in RANKS]
    layers += [f"lasso --multiplier {multiplier}" for multiplier in MULTIPLIERS]
    for arch in STITCHED:
        for layer in layers:
            yield f"cifar10_stitching.py --arch {arch} --recipe {layer}"


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


# ---- what one machine can do: the tables of results/ -----------------------------------------------------------------------


def clustering_hour() -> Iterator[str]:
    """The published command as printed, and other models with about as many parameters (135,178): 139,758, 135,020, 137,738."""
    models = (
        "Swarm -n_hidden 128 -n_iter 10 -n_layers 1 -dropout 0.0", "SetTransformer -n_hidden 92 -lr 0.003",
        "SetLinear -n_hidden 180 -n_layers 4 -lr 0.003", "LSTM -n_hidden 128",
    )  # fmt: skip
    for model in models:
        yield f"amortised_clustering.py -type {model} -bs 50 -wc 60"


def swarm_gpu() -> Iterator[str]:
    """Eight minutes of a GPU that they share: the published clustering model, and mixtures with a learning rate that falls."""
    clustering = "amortised_clustering.py -type Swarm -n_hidden 128 -n_iter 10 -n_layers 1 -dropout 0.0 -bs 50"
    mixtures = [f"amortised_mog.py -p {pooling} -gamma 0.9 -max_epochs 40" for pooling in ("MEAN", "POMA")]
    for line in (clustering, *mixtures):
        for seed in range(3):
            yield f"{line} -wc 8.2 -seed {seed}"


def clustering_small() -> Iterator[str]:
    """A small SWARM layer, which one thread can train. docs/clustering.md has the runs at lower learning rates that follow."""
    model = "-type Swarm -n_hidden 64 -n_iter 10 -bs 20"
    for seed in range(3):
        yield f"amortised_clustering.py {model} -tasks 20000 -lr 0.01 -max_epochs 12 -wc 120 -seed {seed}"


def images_small() -> Iterator[str]:
    """A fifth of the images an epoch, so that 20 minutes hold several. In bf16, which recent CPUs multiply faster."""
    for data in ("FashionMNIST", "MNIST"):
        for seed in range(3):
            yield (
                f"swarm_transformer.py -data {data} -n_hidden 64 -n_iter 10 -bs 10 -lr 0.006 -wc 20 -epoch_images 11000 -cond "
                f"-update_interval 5 -precision bf16 -seed {seed}"
            )


def ssl_fashion() -> Iterator[str]:
    """All images at their full size; DUET's options as in the published commands."""
    for method in (
        "duet --tx sca rot --equi-tx rot --duet-target vm --duet-lambda 1000",
        "simclr --tx sca rot",
        "essl --tx sca --equi-tx rot",
        "essl --tx sca --equi-tx fli",
    ):
        for seed in range(2):
            yield (
                "train_ssl.py --dataset fashionmnist --image-size 28 --encoder cifar10_resnet20 --encoder-width 32 "
                "--precision bf16 --batch-size 256 --lr 0.001 --epochs 12 --warmup-epochs 1 --test-every 12 "
                f"--model {method} --seed {seed}"
            )


def routing_mnist() -> Iterator[str]:
    """Ten tasks of 2,000 images, of two sets; ten of 100 images, for as many steps of 640, with three modules, too."""
    common = "--optimizer adam --loss cross-entropy --batch-size 64 --lr 2e-3"
    learned = ("--decision AAC --routing-lr 0.1", "--decision WPL --routing-lr 0.3")  # rates of pilots with seed 99
    fixed = ("--model per-task-all-fc", "--model per-task-1-fc --width 176", "--model soft-mixture")
    agents = [f"--model {model} --decision AAC --routing-lr 0.1" for model in ("dispatched", "single-agent")]
    sharing = [f"{decision} --modules 3" for decision in learned]
    for data, kinds, budget in (
        ("MNIST-MTL", (*learned, *agents, *fixed), "--epochs 4"),
        ("FashionMNIST-MTL", (*learned, *fixed), "--epochs 4"),
        ("MNIST-MTL", (*sharing, *learned, *fixed), "--epochs 40 --drop-after 20 --task-images 50"),
    ):
        for kind in kinds:
            for seed in range(1, 6):
                yield f"routing_networks.py --data {data} {common} {budget} {kind} --seed {seed}"


FASHION_ZOO = "--dataset fashionmnist --subset 12000"
FASHION_ARCHS = {"mCNN": " --width 16", "cwCNN": " --width 64", "cct_2_3x2_32": ""}


def zoo_fashion() -> Iterator[str]:
    """Four small networks of three architectures."""
    for arch, width in FASHION_ARCHS.items():
        yield (
            f"train_zoo.py --arch {arch} {FASHION_ZOO}{width} --recipe fast --epochs 8 --num_models 4 "
            f"--out results/zoo/fashion-{arch}"
        )


def stitching_fashion() -> Iterator[str]:
    """Cross-validated permutations of mCNNs, any matrix and permutations of the other two: two pairs each."""
    recipes = {"mCNN": ("crossval",), "cwCNN": ("standard", "Grelu"), "cct_2_3x2_32": ("standard", "Grelu")}
    rates = {"crossval": "--stitch_lr 0.2 --bn_batches 50", "standard": "--stitch_epochs 2 --stitch_lr 0.1"}
    rates["Grelu"] = f"--stitch_epochs 4 {rates['crossval']}"
    for arch, own in recipes.items():
        for recipe in own:
            yield (
                f"cifar10_stitching.py --arch {arch} {FASHION_ZOO} --zoo results/zoo/fashion-{arch} --retrain_repeats 2 "
                f"--recipe {recipe} {rates[recipe]}"
            )


# ---- files -----------------------------------------------------------------------------------------------------------------


def sweep(comment: str, lines: Iterable[str]) -> str:
    return "".join(f"# {text}\n" for text in comment.split("\n")) + "\n" + "".join(f"{line}\n" for line in lines)


def published() -> dict[str, str]:
    """The content of the papers' files, by name. A new sweep is a function above and an entry here and in reproduce.sh."""
    of_ssl = "Each transformation by DUET, SimCLR and ESSL"
    return {
        "amortised_clustering.txt": sweep(
            "Amortised clustering: five models, five seeds, an hour each", amortised_clustering()
        ),
        "swarm_images.txt": sweep("SWARM image transformer: 5 days for CIFAR-10, 8 hours for the others", swarm_images()),
        "amortised_mog.txt": sweep("Amortised mixtures of Gaussians: two poolings, three seeds", amortised_mog()),
        "duet_cifar10.txt": sweep(f"{of_ssl}: CIFAR-10, three seeds", duet("cifar10")),
        "duet_cifar100.txt": sweep(f"{of_ssl}: CIFAR-100, three seeds", duet("cifar100")),
        "zoo.txt": sweep("Zoos of 100 networks of an architecture, in four chunks each", zoo()),
        "stitching.txt": sweep(
            "Stitching, by architecture and layer, as published. Needs the networks of zoo.txt", stitching()
        ),
        "stitching_crossval.txt": sweep(
            "Stitching by permutations, cross-validated, in eight chunks each. Needs the networks of zoo.txt",
            stitching_crossval(),
        ),
        "alignment.txt": sweep("Alignment by architecture and measure. Needs the networks of zoo.txt", alignment()),
        "projections.txt": sweep("The rotation test", projections()),
        "routing.txt": sweep("Routing by decision, and its baselines, five seeds each", routing()),
    }


def of_one_machine() -> dict[str, str]:
    """The content of the files of results/, by name."""
    return {
        "clustering_hour.txt": sweep(
            "Amortised clustering: the published model and its peers, an hour each", clustering_hour()
        ),
        "swarm_gpu.txt": sweep("Clustering and mixtures, three seeds: for a GPU, all at once", swarm_gpu()),
        "clustering_small.txt": sweep(
            "Amortised clustering: a small model, three seeds, 42 minutes of a thread each", clustering_small()
        ),
        "images_small.txt": sweep("SWARM image transformer: small, 20 minutes, three seeds", images_small()),
        "ssl_fashion.txt": sweep(
            "DUET, SimCLR and ESSL on Fashion-MNIST, two seeds: for a GPU, several at once", ssl_fashion()
        ),
        "routing_mnist.txt": sweep(
            "Routing on ten tasks of MNIST and Fashion-MNIST, five seeds: many images, and few with few modules",
            routing_mnist(),
        ),
        "zoo_fashion.txt": sweep("Small networks of three architectures on Fashion-MNIST", zoo_fashion()),
        "stitching_fashion.txt": sweep(
            "Stitching of small networks on Fashion-MNIST. Needs the networks of zoo_fashion.txt", stitching_fashion()
        ),
    }


def sweeps() -> dict[str, str]:
    return published() | of_one_machine()


def main() -> None:
    SWEEPS.mkdir(exist_ok=True)
    for name, content in sweeps().items():
        (SWEEPS / name).write_text(content)


if __name__ == "__main__":
    main()
