"""The command lines that run on the simulated GPU: every script, and in each what takes a way of its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Line:
    """A script and its options, in which DATA and RESULTS stand for folders."""

    script: str
    options: str
    waits: int | None  # at most, in a usual step; None: there are no steps
    relative: float | None = 1e-4  # difference from the CPU's metrics, at most
    draw: bool = False  # pictures, on the device
    stop: int | None = None  # run again, with SIGTERM at this look for a signal, and resumed

    def argv(self, data: Path, results: Path) -> list[str]:
        return [word.replace("DATA", str(data)).replace("RESULTS", str(results)) for word in self.options.split()]

    @property
    def resume(self) -> list[str]:
        return ["-resume", "auto"] if "-results_dir" in self.options.split() else ["--resume"]


def clustering(options: str, waits: int = 2, **more: Any) -> Line:
    """Two waits: the counts of a batch go to the host, which finds the best matching, and that goes back."""
    common = "-n_hidden 8 -n_iter 2 -tasks 20 -bs 6 -max_epochs 2 -lr 0.01 -results_dir RESULTS"
    return Line("amortised_clustering", f"{common} {options}", waits, **more)


def mixture(options: str, **more: Any) -> Line:
    common = "-n_hidden 8 -n_iter 2 -bs 4 -max_epochs 2 -lr 0.01 -results_dir RESULTS"
    return Line("amortised_mog", f"{common} {options}", 0, **more)


def images(options: str, **more: Any) -> Line:
    common = "-data SMALL -n_hidden 4 -n_iter 2 -bs 8 -epoch_images 18 -max_epochs 2 -lr 0.01 -n_samples 1"
    return Line("swarm_transformer", f"{common} {options} -data_dir DATA -results_dir RESULTS", 0, **more)


def ssl(options: str, **more: Any) -> Line:
    common = (
        "--dataset mnist --encoder cifar10_resnet20 --encoder-width 1 --image-size 8 --batch-size 16 --subset 40 --epochs 2"
    )
    common += " --warmup-epochs 1 --test-every 2 --dataset-root DATA --results-dir RESULTS"
    return Line("train_ssl", f"{common} {options}", 0, **more)


def zoo(options: str, **more: Any) -> Line:
    common = "--dataset mnist --subset 60 --epochs 2 --batch-size 16 --num_models 1 --data-dir DATA --out RESULTS"
    return Line("train_zoo", f"{common} {options}", 0, **more)


def stitching(options: str, **more: Any) -> Line:
    common = "--arch mCNN --dataset mnist --zoo DATA/zoo --pairs 0-1 --layers 6 --stitch_epochs 2 --batch-size 16 --subset 60"
    return Line("cifar10_stitching", f"{common} {options} --data-dir DATA --results-dir RESULTS", 0, **more)


def alignment(options: str, **more: Any) -> Line:
    common = "--arch mCNN --dataset mnist --zoo DATA/zoo --pairs 0-1 --layers 6 14 --block 15 --images 30"
    return Line("cifar10_alignment", f"{common} {options} --data-dir DATA --results-dir RESULTS", None, **more)


def rotations(options: str, **more: Any) -> Line:
    common = "--repeats 1 --width 2 --dataset mnist --layers 5 --subset 60 --epochs 2 --batch-size 16"
    return Line("cifar10_projections", f"{common} {options} --data-dir DATA --results-dir RESULTS", 0, **more)


def routing(options: str, **more: Any) -> Line:
    """With SGD: Adam makes whole steps of gradients that are rounding errors."""
    common = "--data CIFAR100-MTL --width 4 --modules 3 --epochs 2 --batch-size 8 --depth 2 --lr 0.03"
    return Line("routing_networks", f"{common} {options} --data-dir DATA --results-dir RESULTS", 2, **more)


ROUNDED: Any = {"relative": None}  # autocast rounds other operators than on a CPU
DRAWN: Any = {"relative": None}  # dropout draws from the device's generator

LINES = {
    "clustering Swarm": clustering("-type Swarm", stop=4, draw=True),
    "clustering Swarm POMA": clustering("-type Swarm -pooling POMA -n_hidden 16 -n_layers 2 -dropout 0.2", stop=4, **DRAWN),
    "clustering Swarm greedy": clustering("-type Swarm -loss greedy"),
    "clustering Swarm bf16": clustering("-type Swarm -precision bf16", **ROUNDED),
    "clustering SetLinear": clustering("-type SetLinear"),
    "clustering SetLinearMax": clustering("-type SetLinearMax"),
    "clustering SetTransformer": clustering("-type SetTransformer", relative=3e-4, stop=4),
    "clustering LSTM": clustering("-type LSTM -max_epochs 1", waits=3),
    "clustering LSTMS": clustering("-type LSTMS -max_epochs 1", waits=3),
    "mixture": mixture("", stop=4),
    "mixture POMA, pooled by attention": mixture("-p POMA -pma -n_hidden 16"),
    "images": images("", stop=5, draw=True),
    "images of a class": images("-cond -learn_loc true -n_layers 2", draw=True),
    "images bf16": images("-precision bf16", **ROUNDED),
    "DUET, von Mises": ssl("--tx sca rot --equi-tx rot --duet-target vm", stop=5, draw=True),
    "DUET, Gaussian": ssl(
        "--dataset cifar10 --subset 20 --batch-size 8 --tx sca jit gra blu fli flv --equi-tx fli --center-crop"
    ),
    "DUET, joint pass": ssl("--tx sca rot --equi-tx sca --joint-pass"),
    "DUET without bins": ssl("--tx sca --duet-bins 0"),
    "DUET bf16": ssl("--tx sca rot --equi-tx rot --precision bf16", **ROUNDED),
    "SimCLR": ssl(
        "--dataset cifar10 --subset 20 --batch-size 8 --model simclr --tx res fli bri con sat hue", stop=5, draw=True
    ),
    "ESSL of classes": ssl("--model essl --tx sca ron --equi-tx ron", stop=5, draw=True),
    "ESSL of a value": ssl("--model essl --tx ccr --equi-tx rot", draw=True),
    "zoo mCNN": zoo("--arch mCNN --width 2", stop=5, draw=True),
    "zoo mCNN_k_sigmoid": zoo("--arch mCNN_k_sigmoid --width 2 --recipe fast --batch-size 16 --epochs 2"),
    "zoo cwCNN": zoo("--arch cwCNN --width 8"),
    "zoo ResNet": zoo("--arch resnet20"),
    "zoo CCT": zoo("--arch cct_2_3x2_32", relative=3e-4, stop=5),
    "stitching, any matrix": stitching("--recipe standard"),
    "stitching, permutation": stitching("--recipe Grelu --bn_batches 2", stop=5, draw=True),
    "stitching, cross-validated": stitching("--recipe crossval --stitch_repeats 2"),
    "stitching, softly sorted": stitching("--wreath --noschedule"),
    "stitching, low rank": stitching("--recipe lowrank --rank 2"),
    "stitching, lasso": stitching("--recipe lasso --multiplier 0.01 --threshold 0.5"),
    "stitching, alternating": stitching("--birkhoff --alternating --pgd_hook --bn_epoch --bn-batches 0"),
    "alignment procrustes": alignment("--similarity procrustes"),
    "alignment cka": alignment("--similarity cka", draw=True),
    "alignment cka, median": alignment("--similarity cka --estimator median"),
    "alignment ortho_procrustes": alignment("--similarity ortho_procrustes"),
    "alignment ortho_cka": alignment("--similarity ortho_cka"),
    "alignment linear_cka": alignment("--similarity linear_cka"),
    "rotations": rotations("--groups orthogonal identity --activations relu", stop=5, draw=True),
    "rotations, sigmoid": rotations("--groups Grelu --activations sigmoid"),
    "routing WPL": routing("--decision WPL", stop=4, draw=True),
    "routing REINFORCE": routing("--decision REINFORCE"),
    "routing REINFORCEBl1": routing("--decision REINFORCEBl1"),
    "routing REINFORCEBl2": routing("--decision REINFORCEBl2"),
    "routing EGreedyREINFORCE": routing("--decision EGreedyREINFORCE"),
    "routing ActorCritic": routing("--decision ActorCritic"),
    "routing AAC": routing("--decision AAC"),
    "routing BootstrapAAC": routing("--decision BootstrapAAC"),
    "routing EGreedyAAC": routing("--decision EGreedyAAC"),
    "routing QLearning": routing("--decision QLearning"),
    "routing SARSA": routing("--decision SARSA"),
    "routing AdvantageLearning": routing("--decision AdvantageLearning"),
    "routing BootstrapAdvantageLearning": routing("--decision BootstrapAdvantageLearning"),
    "routing GumbelSoftmax": routing("--decision GumbelSoftmax"),
    "routing RELAX": routing("--decision RELAX --exploration-end 0", stop=4),
    "routing dispatched": routing("--model dispatched --agents 2 --reward correct"),
    "routing single-agent": routing("--model single-agent --loss cross-entropy"),
    "routing soft-mixture": routing("--model soft-mixture", draw=True),
    "routing per-task-all-fc": routing("--model per-task-all-fc --modules 20"),
    "routing per-task-1-fc": routing("--model per-task-1-fc --modules 20"),
    "DeepSets": Line("deepsets_exercise", "--device cuda --steps 30 --batch-size 16 --seeds 2 --results-dir RESULTS", 0),
}
