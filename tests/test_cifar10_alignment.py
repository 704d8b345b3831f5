"""cifar10_alignment.py as its users run it: the published command, what a run leaves, resuming, comparing, bad input."""

import csv
import json
import signal
from pathlib import Path

import pytest
import torch

import cifar10_alignment as script
from common.datasets.augmentation import Preprocessing, as_rgb_32
from common.models import zoo
from common.symmetry import similarity
from common.symmetry.measures import features_of
from tests.command_lines import assert_one_line_and_nothing_made, exit_status
from tests.small_images import smooth, write_mnist

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zoo of four mCNNs of width 4, untrained, another of CCTs, and 40 test images."""
    folder = tmp_path_factory.mktemp("alignment")
    for arch, width in (("mCNN", 4), ("cct_2_3x2_32", None)):
        (folder / arch).mkdir()
        for i in range(4 if width else 2):
            torch.manual_seed(i)
            torch.save(zoo.make(arch, width=width).state_dict(), folder / arch / f"{i}.pt")
    write_mnist(folder / "data", smooth(20), smooth(40, seed=1))
    return folder


def run(line: str, place: Path, results: Path, arch: str = "mCNN") -> int:
    common = f"--arch {arch} --dataset mnist --data-dir {place / 'data'} --zoo {place / arch} --results-dir {results}"
    return exit_status(script.main, [*common.split(), *line.split()])


def directory(results: Path) -> Path:
    (found,) = (path for path in (results / "cifar10_alignment").iterdir() if not path.name.startswith("figures"))
    return found


def test_the_published_lines(capsys: pytest.CaptureFixture[str]) -> None:
    for measure, pairs in (("procrustes", 32), ("cka", 16)):
        assert (
            script.main(f"--repeats={pairs} --progress --batched --arch=resnet20 --similarity={measure} --dry-run".split()) == 0
        )
        assert capsys.readouterr().out == f"resnet20-{measure}-repeats.{pairs}\n"


@pytest.mark.parametrize("measure", script.MEASURES)
def test_what_a_run_leaves(measure: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its values are those of whole features, compared layer by layer; mean and deviation over pairs."""
    assert run(f"--similarity {measure} --pairs 0-1 2-3 --block 15", place, tmp_path) == 0
    path = directory(tmp_path)
    files = {"args.json", "last.pkl", "log", "result.json", "similarity.csv", "similarity.png"}
    files |= {f"{stem}.{kind}" for stem in ("untrained", "run0", "run1") for kind in ("json", "pt")}
    assert {file.name for file in path.iterdir()} == files
    result = json.loads((path / "result.json").read_text())
    assert [layer["index"] for layer in result["layers"]] == [3, 6, 10, 14]
    networks = [zoo.load(place / "mCNN" / f"{i}.pt", "mCNN") for i in range(4)]
    x = Preprocessing("MNIST").normalise(as_rgb_32(smooth(40, seed=1)).images)
    names = [layer["name"] for layer in result["layers"]]
    maps = [features_of(network, x, names) for network in networks]
    of = getattr(similarity, script.MEASURES[measure])
    expected = torch.tensor([[[of(a, b) for b in maps[i + 1]] for a in maps[i]] for i in (0, 2)])
    for i in range(2):
        torch.testing.assert_close(torch.load(path / f"run{i}.pt", weights_only=True), expected[i].float(), atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.tensor(result["published"]), expected.mean(0).float(), atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.tensor(result["published_deviation"]), expected.std(0).float(), atol=1e-5, rtol=0)
    with open(path / "similarity.csv") as file:
        assert len(list(csv.DictReader(file))) == 16
    out = capsys.readouterr().out
    assert f"{measure} of layers with themselves" in out and "untrained" in out
    assert run(f"--similarity {measure} --pairs 0-1 2-3", place, tmp_path) == 2
    assert run(f"--similarity {measure} --pairs 0-1 2-3 --resume", place, tmp_path) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_blocks_of_images_have_bars(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for measure, titles in (("cka", ["wreath_cka, means: ", "wreath_cka: "]), ("procrustes", ["wreath_procrustes: "])):
        assert run(f"--similarity {measure} --pairs 0-1 --block 15 --progress", place, tmp_path) == 0
        error = capsys.readouterr().err
        assert all(title in error for title in ["jobs: ", *titles])


def test_dead_channels_are_reported(place: Path, tmp_path: Path) -> None:
    """In both networks: as published they are the perfect match of each other; the live-only value leaves them out."""
    (tmp_path / "zoo").mkdir()
    for i in range(2):
        network = zoo.load(place / "mCNN" / f"{i}.pt", "mCNN")
        state = network.state_dict()
        state["1.weight"][:2] = 0
        state["1.bias"][:2] = 0  # of four
        torch.save(state, tmp_path / "zoo" / f"{i}.pt")
    assert run(f"--pairs 0-1 --layers 3 --zoo {tmp_path / 'zoo'}", place, tmp_path / "results") == 0
    result = json.loads((directory(tmp_path / "results") / "result.json").read_text())
    assert result["layers"][0]["dead_channels"] == [2, 2]
    assert result["live"][0][0] < result["published"][0][0]


def test_layers_that_are_dead_have_no_similarity(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """null in JSON, nan in what is printed, grey in the picture; nothing fails on them."""
    (tmp_path / "zoo").mkdir()
    for i in range(2):
        state = zoo.load(place / "mCNN" / f"{i}.pt", "mCNN").state_dict()
        state["1.weight"].zero_()
        state["1.bias"].zero_()
        torch.save(state, tmp_path / "zoo" / f"{i}.pt")
    assert run(f"--similarity cka --pairs 0-1 --zoo {tmp_path / 'zoo'}", place, tmp_path) == 0
    path = directory(tmp_path)
    result = json.loads((path / "result.json").read_text(), parse_constant=pytest.fail)
    assert result["published"][0][0] is None and "layer    3 nan" in capsys.readouterr().out
    assert exit_status(script.main, ["--compare", str(path), "--results-dir", str(tmp_path)]) == 0


def test_tokens_of_a_transformer_have_their_channels(place: Path, tmp_path: Path) -> None:
    assert run("--similarity ortho_procrustes --pairs 0-1 --images 8", place, tmp_path, "cct_2_3x2_32") == 0
    result = json.loads((directory(tmp_path) / "result.json").read_text())
    assert [layer["channels"] for layer in result["layers"]] == [64, 128, 128, 128]
    network = zoo.load(place / "cct_2_3x2_32" / "0.pt", "cct_2_3x2_32")
    images = Preprocessing("MNIST").normalise(as_rgb_32(smooth(40, seed=1)[:8]).images)
    (tokens,) = features_of(network, images, [result["layers"][-1]["name"]])
    maps = script.tokens_as_maps(tokens)
    assert maps.shape[1] == 128 and torch.equal(maps[:, :, 2, 3], tokens[:, 2 * maps.shape[3] + 3])


def test_a_run_resumes_where_it_stood(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = "--similarity cka --repeats 3"
    assert run(line, place, tmp_path / "whole") == 0
    whole = json.loads((directory(tmp_path / "whole") / "result.json").read_text())
    compare, begun = script.compare_networks, []

    def interrupted(args: object, job: script.PairJob, *more: object) -> object:
        begun.append(job.name)
        if len(begun) == 3:
            signal.raise_signal(signal.SIGTERM)
        return compare(args, job, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(script, "compare_networks", interrupted)
    assert run(line, place, tmp_path / "parts") == 75
    assert "stopped by SIGTERM in run1: --resume auto continues from there" in capsys.readouterr().out
    assert {path.name for path in directory(tmp_path / "parts").glob("*run*")} == {"run0.json", "run0.pt"}
    path = directory(tmp_path / "parts") / "run0.json"
    kept = path.read_text()
    for name, damage in (("published", None), ("live", [[1.0]]), ("dead", [[0] * 4]), ("pair", None), ("seconds", "1")):
        path.write_text(json.dumps(json.loads(kept) | {name: damage}))
        assert run(f"{line} --resume", place, tmp_path / "parts") == 2
        (error,) = capsys.readouterr().err.splitlines()
        assert f"run0.json is damaged: {name} is " in error
    path.write_text(kept)
    assert run(f"{line} --resume", place, tmp_path / "parts") == 0
    assert begun == ["untrained", "run0", "run1", "run1", "run2"]  # what is done is not computed again
    parts = json.loads((directory(tmp_path / "parts") / "result.json").read_text())
    assert parts.pop("seconds") > 0 and whole.pop("seconds") > 0
    assert parts == whole


def test_pairs_that_cannot_be_compared_are_left_out_and_repeated(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = "--pairs 0-1 1-2 2-3"
    assert run(line, place, tmp_path / "whole") == 0
    whole = json.loads((directory(tmp_path / "whole") / "result.json").read_text())
    compare, calls = script.layer_similarities, []

    def broken(*arguments: object, **settings: object) -> object:
        calls.append(arguments)
        if len(calls) in (1, 3):
            raise ValueError("it is broken")
        return compare(*arguments, **settings)  # type: ignore[arg-type]

    with monkeypatch.context() as context:
        context.setattr(script, "layer_similarities", broken)
        assert run(line, place, tmp_path / "parts") == 1 and len(calls) == 4
    path = directory(tmp_path / "parts")
    parts = json.loads((path / "result.json").read_text())
    assert parts["failed"] == {
        "untrained": "two untrained networks cannot be compared: it is broken",
        "run1": "pair 1-2 cannot be compared: it is broken",
    }
    assert parts["pairs"] == [[0, 1], [2, 3]] and parts["untrained"] is None
    records = [json.loads((path / f"run{i}.json").read_text())["published"] for i in (0, 2)]
    torch.testing.assert_close(torch.tensor(parts["published"]), torch.tensor(records).mean(0))
    assert not (path / "run1.json").exists() and (path / "run1.failed.json").exists() and (path / "similarity.png").exists()
    assert "2 jobs failed, --retry-failed repeats them" in capsys.readouterr().out
    assert exit_status(script.main, ["--compare", str(path), "--results-dir", str(tmp_path)]) == 0
    assert "untrained nan" in capsys.readouterr().out

    assert run(f"{line} --retry-failed", place, tmp_path / "parts") == 0
    parts = json.loads((path / "result.json").read_text())
    assert parts.pop("seconds") > 0 and whole.pop("seconds") > 0 and parts == whole
    assert not list(path.glob("*.failed.json"))


def test_a_run_of_which_no_pair_can_be_compared(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights are finite, and features overflow: there is a result, without tables and pictures."""
    (tmp_path / "zoo").mkdir()
    for i in range(2):
        state = zoo.load(place / "mCNN" / f"{i}.pt", "mCNN").state_dict()
        state["1.weight"].fill_(1e38)
        torch.save(state, tmp_path / "zoo" / f"{i}.pt")
    assert run(f"--pairs 0-1 --zoo {tmp_path / 'zoo'}", place, tmp_path) == 1
    path = directory(tmp_path)
    result = json.loads((path / "result.json").read_text())
    assert set(result["failed"]) == {"run0"} and "too large to be squared" in result["failed"]["run0"]
    assert result["pairs"] == result["layers"] == result["published"] == [] and len(result["untrained"]) == 4
    assert not list(path.glob("similarity.*"))
    assert exit_status(script.main, ["--compare", str(path), "--results-dir", str(tmp_path)]) == 2
    assert "no pair that could be compared" in capsys.readouterr().err


def test_a_run_resumes_with_the_same_networks_and_options_alone(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A zoo that has grown would draw other pairs; one that was trained anew has other weights."""
    folder = tmp_path / "zoo"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.pt").write_bytes((place / "mCNN" / f"{i}.pt").read_bytes())
    line = f"--repeats 2 --zoo {folder} --name mine"
    compare = script.compare_networks
    monkeypatch.setattr(script, "compare_networks", lambda *a: signal.raise_signal(signal.SIGTERM) or compare(*a))
    assert run(line, place, tmp_path) == 75
    capsys.readouterr()
    assert run(f"{line} --similarity cka --resume", place, tmp_path) == 2
    error = capsys.readouterr().err
    assert "was made with similarity procrustes, not cka" in error and "--name NAME starts another" in error
    for i in (3, 4, 5):
        (folder / f"{i}.pt").write_bytes((place / "mCNN" / "3.pt").read_bytes())
    assert run(f"{line} --resume", place, tmp_path) == 2 and "was made with drawn_pairs" in capsys.readouterr().err
    for i in (3, 4, 5):
        (folder / f"{i}.pt").unlink()
    (folder / "0.pt").write_bytes((place / "mCNN" / "3.pt").read_bytes())
    assert run(f"{line} --resume", place, tmp_path) == 2 and "was made with networks" in capsys.readouterr().err
    (folder / "0.pt").write_bytes((place / "mCNN" / "0.pt").read_bytes())
    monkeypatch.undo()
    assert run(f"{line} --resume", place, tmp_path) == 0
    assert run(f"{line} --similarity cka --resume", place, tmp_path) == 2  # it has finished, but as something else
    assert "was made with similarity procrustes" in capsys.readouterr().err


def test_comparing(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for measure in ("cka", "procrustes"):
        assert run(f"--similarity {measure} --pairs 0-1 2-3", place, tmp_path) == 0
    assert run("--similarity cka --estimator median --pairs 0-1 2-3", place, tmp_path) == 0
    runs = [str(path) for path in (tmp_path / "cifar10_alignment").iterdir()]
    capsys.readouterr()
    assert exit_status(script.main, ["--compare", *runs, "--results-dir", str(tmp_path)]) == 0
    folder = tmp_path / "cifar10_alignment" / "figures-mCNN-mnist"
    assert {path.name for path in folder.iterdir()} == {"diagonals.csv", "diagonals.png", "similarities.png"}
    with open(folder / "diagonals.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["similarity"] for row in rows] == ["procrustes"] * 4 + [*["cka"] * 4, *["cka (median)"] * 4] and {
        row["n"] for row in rows
    } == {"2"}
    runs = [
        str(path) for path in (tmp_path / "cifar10_alignment").iterdir()
    ]  # with the figures' directory: as the page in docs has it
    assert exit_status(script.main, ["--compare", *runs, "--results-dir", str(tmp_path)]) == 0
    capsys.readouterr()
    broken = tmp_path / "broken"
    broken.mkdir()
    for content, message in (
        (None, "no finished run"),
        ("{", "is damaged"),
        ('{"script": "train_ssl"}', "no run of cifar10_al"),
    ):
        if content:
            (broken / "result.json").write_text(content)
        assert exit_status(script.main, ["--compare", str(broken), "--results-dir", str(tmp_path)]) == 2
        assert message in capsys.readouterr().err
    assert exit_status(script.main, ["--compare", runs[0], runs[0], "--results-dir", str(tmp_path)]) == 2


BAD = {
    "--similarity cosine": "invalid choice: 'cosine'",
    "--estimator median": "--estimator median is for --similarity cka",
    "--pairs 0-9": "the zoo has no 9.pt",
    "--pairs 0-1 0-1": "--pairs 0-1 0-1 names a pair twice",
    "--zoo ZOO/widths --pairs 0-1": "1.pt is not like 0.pt: 0.weight is (3, 3, 3, 3) there, not (2, 3, 3, 3)",
    "--repeats 13": "4 networks make 12 pairs, not 13",
    "--pairs 0-1 --layers 4": "--layers 4: mCNN has 3 6 10 14",
    "--pairs 0-1 --images 41": "--images 41 is more than the 40 test images",
    "--images 3": "3 is too small",
    "--zoo ZOO/one": "holds 1 networks (0.pt, 1.pt, ...): two are needed",
    "--zoo ZOO/broken --pairs 0-1": "1.pt: 0.weight is not finite",
    "--zoo ZOO/classes --pairs 0-1": "0.pt tells 7 classes apart, the images have 10",
    "--arch resnet20 --pairs 0-1": "0.pt is no resnet20",
    "--resume --overwrite": "choose one",
}


@pytest.mark.parametrize("line", ["--pairs a/b", "--pairs 1-1", "--pairs 0-1 0-1", "--pairs 0-1 --layers 4"])
def test_a_dry_run_refuses_what_the_run_would(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(script.main, ["--arch", "mCNN", *line.split(), "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("cifar10_alignment.py: error: --") and error.count("\n") == 1


@pytest.mark.parametrize("line", BAD)
def test_bad_input_is_one_line(line: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for zoo_of, numbers, classes in (("one", [0], 10), ("broken", [0, 1], 10), ("classes", [0, 1], 7), ("widths", [0, 1], 10)):
        (tmp_path / zoo_of).mkdir()
        for i in numbers:
            state = zoo.make("mCNN", classes, width=2 + (zoo_of == "widths" and i == 1)).state_dict()
            if zoo_of == "broken" and i == 1:
                state["0.weight"][0] = torch.nan
            torch.save(state, tmp_path / zoo_of / f"{i}.pt")
    status = run(line.replace("ZOO", str(tmp_path)), place, tmp_path / "results")
    assert_one_line_and_nothing_made(status, BAD[line], tmp_path / "results", capsys)
