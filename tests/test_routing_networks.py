"""routing_networks.py as its users run it: data, networks, bad input, what a run leaves, stops, comparing runs."""

import csv
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import common.routing as R
import routing_networks as script
from common.datasets import multitask
from common.datasets.images import DataError, ImageSet
from common.models import routed
from common.routing import measures
from tests.command_lines import (
    Terminal,
    assert_help_shows_the_papers_options_first,
    assert_one_line_and_nothing_made,
    exit_status,
)
from tests.reference import Vectors, assert_agrees
from tests.small_images import smooth, write_mnist
from tests.test_images import write_cifar
from tests.test_routing_vectors import load_agents

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]

SMALL = {"train": 18, "test": 9}  # images a task of its class, and as many of others
SHORT = "--data MNIST-MTL --epochs 2 --batch-size 64 --width 4 --optimizer adam --lr 0.01 --device cpu"


@pytest.fixture(scope="module")
def grey(tmp_path_factory: pytest.TempPathFactory) -> str:
    """200 training and 100 test images, as the option that names their place."""
    folder = tmp_path_factory.mktemp("grey")
    write_mnist(folder, smooth(200), smooth(100, seed=1))
    return f"--data-dir {folder}"


@pytest.fixture(autouse=True)
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multitask, "PER_TASK", SMALL)


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing is most of the time of a small run."""
    monkeypatch.setattr(script, "draw", lambda data, training: None)


def run(line: str) -> int:
    return exit_status(script.main, line.split())


def only(results: Path) -> Path:
    (path,) = (results / "routing_networks").iterdir()
    return path


# ---- data ----------------------------------------------------------------------------------------------------------------


def test_one_against_rest() -> None:
    """Half of each task is its class; the other half is spread over all others; drawn by the seed, no image twice in a task."""
    data = smooth(400)
    mtl = multitask.one_against_rest(data, 20, seed=0)
    assert len(mtl) == 400 and torch.equal(torch.bincount(mtl.tasks), torch.full((10,), 40))
    place = {image.numpy().tobytes(): i for i, image in enumerate(data.images)}
    classes = torch.tensor([data.labels[place[image.numpy().tobytes()]] for image in mtl.images])
    assert torch.equal(mtl.labels, (classes == mtl.tasks).long())
    for task in range(10):
        own = mtl.tasks == task
        counts = torch.bincount(classes[own], minlength=10)
        others = counts[torch.arange(10) != task]
        assert counts[task] == 20 and others.sum() == 20 and others.min() >= 2 and others.max() <= 3
        assert len({image.numpy().tobytes() for image in mtl.images[own]}) == 40
    assert torch.equal(multitask.one_against_rest(data, 20, seed=0).images, mtl.images)
    assert not torch.equal(multitask.one_against_rest(data, 20, seed=1).images, mtl.images)
    with pytest.raises(DataError, match="a task needs 41 images of its class: there is one of 40"):
        multitask.one_against_rest(data, 41, seed=0)


def test_small_training_sets(grey: str) -> None:
    """Of as many images as asked for; test images stay as many as they are."""
    args, name = script.parse(script.get_parser(), f"{SHORT} {grey} --task-images 3".split())
    assert "task-images.3" in name
    data = script.Data(args, torch.device("cpu"))
    assert len(data.train) == 10 * 2 * 3 and len(data.test) == 10 * 2 * multitask.PER_TASK["test"]


def test_superclasses() -> None:
    """20 tasks of five different labels; the rest of a division by 5, as the original has it, merges them."""
    fine = torch.arange(100)
    mtl = multitask.superclasses(ImageSet(torch.zeros(100, 3, 32, 32, dtype=torch.uint8), fine, ("",) * 100))
    assert {(int(t), int(label)) for t, label in zip(mtl.tasks, mtl.labels, strict=True)} == {
        (t, label) for t in range(20) for label in range(5)
    }
    merged = [len(set((fine[mtl.tasks == t] % 5).tolist())) for t in range(20)]
    assert merged == [3, 3, 3, 4, 4, 4, 2, 4, 2, 3, 4, 4, 4, 4, 4, 3, 3, 3, 2, 3]
    assert fine[mtl.tasks == 8].tolist() == [3, 42, 43, 88, 97]  # large carnivores


# ---- networks ------------------------------------------------------------------------------------------------------------


def load_model(v: Vectors, net: routed.RoutedNet) -> None:
    """The parameters of a stored example model."""
    for i, conv in enumerate(net.trunk.conv):
        conv.load_state_dict(v.under(f"param/conv/{i}/"))
    net.trunk.batchnorm.load_state_dict(v.under("param/batchnorm/"), strict=False)
    if net.dispatcher is not None:
        load_agents(net.dispatcher.policy, v, "param/dispatcher/policy/")
    for i, (router, selection) in enumerate(zip(net.routers, net.selections, strict=True), 1):
        load_agents(router.policy, v, f"param/decision{i}/policy/")
        if router.value is not None:
            load_agents(router.value, v, f"param/decision{i}/value/")
        for name in ("weight", "bias"):
            stored = [v[f"param/selection{i}/{k}/{name}"] for k in range(len(selection.stack))]
            selection.stack.load_state_dict({name: torch.stack(stored)}, strict=False)


def stored_model(name: str, model: str, kind: str) -> tuple[Vectors, routed.RoutedNet]:
    v = Vectors(f"routing/{name}")

    def make_decision(n: int, n_in: int, n_agents: int, storage: str) -> R.Decision:
        # a ninth of the ratio, which the original applies twice; the original's dispatcher is a table
        storage = "tabular" if model == "dispatched" else storage
        reward = R.CollaborationReward(0.3**2)
        return getattr(R, kind)(n, n_in, n_agents, policy_storage_type=storage, additional_reward_func=reward)

    net = routed.make(model, 3, routed.layer_sizes(32, 3, 48, 5), 3, 3, 3, make_decision)
    load_model(v, net)
    return v, net.eval()


MODELS = {
    "model_routed_wpl": ("routed-all-fc", "WPL"),
    "model_routed_qlearning": ("routed-all-fc", "QLearning"),
    "model_single_actorcritic": ("single-agent", "ActorCritic"),
    "model_dispatched_reinforce": ("dispatched", "REINFORCE"),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_of_the_original(name: str) -> None:
    """Outputs and actions before the first step; of REINFORCE, whose loss is right there, losses and three steps of SGD."""
    v, net = stored_model(name, *MODELS[name])
    x, tasks, labels = v["x"].float() / 8, v["tasks"], v["labels"]
    targets = torch.nn.functional.one_hot(labels, 5).float()
    loss_func = R.Loss(nn.MSELoss(), R.NegLossReward())
    optimizer = torch.optim.SGD(
        [
            {"params": [*net.trunk.parameters(), *net.selections.parameters()], "lr": 0.005},
            {"params": net.routing_parameters(), "lr": 0.002},
        ]
    )
    for step in range(3 if MODELS[name][1] == "REINFORCE" else 1):
        out, records = net(x, tasks)
        for made in records.steps:  # which here only training does
            made.decision.reward_func.register(made.states[:, :, 0], made.actions)
        assert torch.equal(records.actions(), v["actions"][step])
        assert_agrees(out, v["out"][step], 1e-4)
        module_loss, routing_loss = loss_func(out, targets, records, reduce=False)
        assert_agrees(module_loss, v["module_loss"][step], 1e-4)
        if MODELS[name][1] == "REINFORCE":
            assert_agrees(routing_loss, v["routing_loss"][step], 1e-4)
        optimizer.zero_grad()
        (module_loss.mean() + routing_loss.mean()).backward()
        optimizer.step()


@pytest.mark.parametrize("model", routed.MODELS)
def test_networks(model: str) -> None:
    """Shapes, sizes, and that a routing map says what was done."""
    torch.manual_seed(0)
    net = routed.make(
        model, 1, routed.layer_sizes(28, 3, 8, 2), 4, 4, 5, lambda n, i, a, s: R.REINFORCE(n, i, a, policy_storage_type=s)
    )
    x, tasks = torch.randn(12, 1, 28, 28), torch.arange(12) % 4
    out, records = net(x, tasks)
    assert out.shape == (12, 2)
    assert len(records.steps) == {"routed-all-fc": 3, "dispatched": 4, "single-agent": 3}.get(model, 0)
    maps = net.routing(records, tasks)
    assert len(maps) == 3 and all(torch.allclose(m.float().sum(1), torch.ones(12)) for m in maps)
    if model == "per-task-1-fc":
        assert [m.shape[1] for m in maps] == [1, 1, 4]
    if model.startswith("per-task"):
        assert torch.equal(maps[2].argmax(1), tasks)
        assert not net.routing_parameters()
    elif records.steps:
        assert torch.equal(maps[2].argmax(1), records.steps[-1].actions)
    else:
        assert torch.equal(maps[2][3], net.layers[2].table[3].softmax(0))
    with pytest.raises(ValueError, match="there is no model 'shared': choose from per-task-all-fc"):
        routed.make("shared", 1, [(32, 2)], 4, 4, 4, lambda *_: None)


def test_mixture_by_hand() -> None:
    torch.manual_seed(0)
    layer = routed.MixedLayer(5, 3, n_modules=4, n_tasks=2)
    layer.table.data.normal_()
    x, tasks = torch.randn(6, 5), torch.tensor([0, 1, 1, 0, 1, 0])
    out = layer(x, tasks)
    for i in range(6):
        weights = layer.table[tasks[i]].softmax(0)
        expected = sum(weights[k] * (layer.maps.weight[k] @ x[i] + layer.maps.bias[k]) for k in range(4))
        assert_agrees(out[i], expected, 1e-5)


def test_measures_of_maps() -> None:
    apart, together = torch.eye(4), torch.eye(4)[[2, 2, 2, 2]]
    assert measures.modules_used(apart) == pytest.approx(4) and measures.modules_used(together) == pytest.approx(1)
    assert measures.task_overlap(apart) == 0 and measures.task_overlap(together) == 1
    assert measures.task_overlap(torch.full((3, 5), 0.2)) == pytest.approx(0.2)


# ---- command lines -------------------------------------------------------------------------------------------------------


def test_defaults_are_the_published_ones(capsys: pytest.CaptureFixture[str]) -> None:
    args, name = script.parse(script.get_parser(), [])
    expected = {"batch_size": 10, "epochs": 50, "lr": 0.003, "modules": 20, "agents": 20, "depth": 3, "width": 48}
    expected |= {"collaboration": 0.3, "exploration": 0.1, "decision": "WPL", "loss": "mse", "optimizer": "sgd"}
    assert {option: getattr(args, option) for option in expected} == expected and name == "CIFAR100-MTL.routed-all-fc"
    assert args.routing_lr == pytest.approx(0.0009)
    rates = [args.lr * script.lr_factor(args, epoch) for epoch in (0, 4, 5, 9, 10, 49)]
    assert rates == pytest.approx([0.003, 0.003, 0.001, 0.001, 0.0003, 0.0003])
    assert run("--data MNIST-MTL --model dispatched --seed 3 --lr 0.01 --dry-run") == 0
    assert capsys.readouterr().out == "MNIST-MTL.dispatched-lr.0.01-seed.3\n"
    assert_help_shows_the_papers_options_first(script.main, "--batch-size", capsys)


BAD = {
    "--data MNIST": "invalid choice: 'MNIST'",
    "--model shared": "invalid choice: 'shared'",
    "--decision PPO": "invalid choice: 'PPO'",
    "--modules 0": "too small",
    "--exploration 1.1": "out of range",
    "--collaboration -0.1": "out of range",
    "--routing-lr 0": "out of range",
    "--model per-task-all-fc --modules 3": "--modules 3: per-task-all-fc has one for each of the 10 tasks",
    "--agents 3": "--agents 3: routed-all-fc has no choice of agents",
    "--model soft-mixture --decision AAC": "--decision AAC: soft-mixture decides nothing",
    "--task-images 20 --data CIFAR100-MTL": "--task-images 20: CIFAR100-MTL has all images of its classes",
    "--resume --overwrite": "choose one",
    "--module 3": "unrecognized arguments",
    "--compare nowhere": "nowhere is no finished run",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_input_is_one_line(line: str, grey: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "results"
    assert_one_line_and_nothing_made(run(f"{SHORT} {grey} {line} --results-dir {results}"), BAD[line], results, capsys)


def test_missing_data_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str, data_dir: Path) -> None:
        raise DataError(f"{name} is in none of {data_dir}, and cannot be downloaded")

    monkeypatch.setattr("common.datasets.images._download", offline)
    results = tmp_path / "results"
    status = run(f"{SHORT} --data-dir {tmp_path / 'nowhere'} --results-dir {results}")
    assert_one_line_and_nothing_made(status, "MNIST is in none of", results, capsys)


# ---- runs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["routed-all-fc", "per-task-all-fc", "soft-mixture"])
def test_what_a_run_leaves(model: str, grey: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"{SHORT} {grey} --model {model} --results-dir {tmp_path}"
    assert run(line) == 0
    out = capsys.readouterr().out
    assert "(chance 0.5)" in out and "modules used" in out and "200 test images" not in out
    path = only(tmp_path)
    files = {"args.json", "last.pkl", "log", "metrics.csv", "metrics.png", "result.json", "routing.png", "weights.png"}
    assert {file.name for file in path.iterdir()} == files
    with open(path / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    result = json.loads((path / "result.json").read_text())
    assert [row["step"] for row in rows] == ["6", "12"] and result["images"] == {"train": 360, "test": 180}
    assert float(rows[-1]["test_accuracy"]) == pytest.approx(result["test"]["accuracy"])
    by_task = result["test"]["accuracy_by_task"]
    assert list(by_task) == [str(digit) for digit in range(10)]
    assert sum(by_task.values()) / 10 == pytest.approx(result["test"]["accuracy"])
    assert len(result["maps"]) == 3 and all(sum(row) == pytest.approx(1) for layer in result["maps"] for row in layer)
    maps = torch.load(path / "last.pkl", weights_only=True)["extra"]["maps"]  # of both epochs
    assert len(maps) == 2 and maps[1] == result["maps"]
    if model == "per-task-all-fc":
        assert result["test"]["modules_used"] == pytest.approx(10) and result["test"]["task_overlap"] == 0
    assert run(line) == 2 and run(f"{line} --resume") == 0
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize(
    "more",
    [
        "--decision GumbelSoftmax --exploration 0.5 --exploration-end 0.1",
        "--decision RELAX --reward correct --precision bf16",
        "--decision QLearning --modules 3 --depth 2 --exploration-end 0",
        "--model dispatched --agents 2 --decision AAC --loss cross-entropy --optimizer sgd",
        "--model per-task-1-fc --precision bf16",
        "--model single-agent --decision EGreedyREINFORCE --depth 1 --batch-size 359",
    ],
)
def test_variants(more: str, grey: str, tmp_path: Path, no_pictures: None) -> None:
    assert run(f"{SHORT} {grey} {more} --results-dir {tmp_path}") == 0
    path = only(tmp_path)
    with open(path / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    if "exploration-end" in more:
        assert float(rows[0]["exploration"]) > float(rows[1]["exploration"]) == float(more.split()[-1])
    saved = torch.load(path / "last.pkl", weights_only=True)["model"]
    if "per-task" in more:
        return
    history = saved["routers.0.reward_func.history"]
    assert (history >= 0).all() and len(history) == 256


def test_colour_on_a_terminal(tmp_path: Path, no_pictures: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bars for the steps of the epoch, and for the test."""
    write_cifar(tmp_path, "CIFAR100")
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert run(f"--data-dir {tmp_path} --device cpu --epochs 1 --results-dir {tmp_path / 'results'}") == 0
    assert len(json.loads((only(tmp_path / "results") / "result.json").read_text())["test"]["accuracy_by_task"]) == 20
    assert "epoch 1 of 1:" in sys.stderr.getvalue() and "test:" in sys.stderr.getvalue()


def test_routing_learns(grey: str, tmp_path: Path, no_pictures: None) -> None:
    """Bright classes against dark ones: chance is 0.5. Modules, routers and all."""
    line = f"{SHORT} {grey} --decision AAC --epochs 14 --batch-size 20 --width 16 --loss cross-entropy --routing-lr 0.1"
    line += " --drop-after 14"
    assert run(f"{line} --results-dir {tmp_path}") == 0
    result = json.loads((only(tmp_path) / "result.json").read_text())
    assert result["test"]["accuracy"] > 0.6
    assert result["test"]["policy_entropy"] < 2.2  # of at most ln 10 = 2.303


@pytest.mark.parametrize("part", ["training", "evaluation"])
def test_a_loss_that_is_not_finite_ends_the_run(
    part: str, grey: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a sentence, in training and in the evaluation; and never reaches a file: a second start continues from before."""
    batch, calls = script.Data.batch, []

    def broken(self: script.Data, split: multitask.MultitaskSet, indices: torch.Tensor) -> tuple[torch.Tensor, ...]:
        calls.append(split)
        x, *rest = batch(self, split, indices)
        return (x * torch.nan if len(calls) == (10 if part == "training" else 7) else x, *rest)

    line = f"{SHORT} {grey} --results-dir {tmp_path}"
    monkeypatch.setattr("common.run.state.SAVE_SECONDS", -1.0)
    with monkeypatch.context() as patch:
        patch.setattr(script.Data, "batch", broken)
        assert run(line) == 1
    epoch, progress = (2, (1, 2, 8)) if part == "training" else (1, (0, 6, 6))
    reason = f"failed: the loss of epoch {epoch} is not finite: a smaller --lr may help\n"
    assert capsys.readouterr().err == f"routing_networks.py: {reason}"
    assert (only(tmp_path) / "log").read_text().endswith(reason)
    last = torch.load(only(tmp_path) / "last.pkl", weights_only=True)
    assert last["progress"] == progress and all(value.isfinite().all() for value in last["model"].values())
    assert run(f"{line} --resume") == 0


def test_compare(grey: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], no_pictures: None) -> None:
    for seed in range(3):
        assert run(f"{SHORT} {grey} --epochs 1 --seed {seed} --results-dir {tmp_path}") == 0
    assert run(f"{SHORT} {grey} --epochs 1 --model per-task-all-fc --results-dir {tmp_path}") == 0
    folders = sorted((tmp_path / "routing_networks").iterdir())
    capsys.readouterr()
    figures = tmp_path / "routing_networks" / "figures-MNIST-MTL"
    assert run(f"--compare {' '.join(map(str, folders))} --results-dir {tmp_path}") == 0
    assert run(f"--compare {' '.join(map(str, folders))} {figures} --results-dir {tmp_path}") == 0  # as a shell's * does next
    table = (figures / "table.md").read_text()
    accuracies = [
        100 * json.loads((folder / "result.json").read_text())["test"]["accuracy"]
        for folder in folders
        if "routed" in folder.name
    ]
    mean = sum(accuracies) / 3
    half = 4.302653 * (sum((a - mean) ** 2 for a in accuracies) / 2) ** 0.5 / 3**0.5
    assert f"| 3 | {mean:.2f} ± {half:.2f} |" in table and "seed" not in table
    assert table.startswith("| run | n |") and table in capsys.readouterr().out
    assert (figures / "comparison.png").exists()
