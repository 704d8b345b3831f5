"""Trained models on a user's own points and images: -apply, -draw and -complete, with good input and bad."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import norm

import amortised_clustering
import amortised_mog
import common
import swarm_transformer
from common import checkpoint, points
from common.datasets import clustering, mixtures
from common.datasets.mixtures import draw_sets
from common.models.sets import MODEL_TYPES
from tests.command_lines import exit_status

CLUSTERING = "-n_hidden 8 -n_iter 2 -n_heads 2 -n_layers 2 -seed 3 -type"
GARBAGE = bytes(range(128, 256)) * 9


def save(script, line: str, path: Path, *more: object) -> Path:
    """An untrained model of a command line, as a file of weights alone."""
    args = script.get_parser().parse_args(line.split())
    checkpoint.save({"model": script.make_model(args).state_dict(), "description": script.describe(args, *more)}, path)
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models."""
    folder = tmp_path_factory.mktemp("models")
    for kind in MODEL_TYPES:
        save(amortised_clustering, f"{CLUSTERING} {kind}", folder / f"{kind}.pkl")
    for n_dim in (1, 2, 3):
        save(amortised_mog, f"-n_hidden 8 -n_iter 2 -n_clust 3 -n_dim {n_dim} -seed 1", folder / f"mixture{n_dim}.pkl")
    save(swarm_transformer, "-data SMALL -n_hidden 4 -n_iter 1 -cond", folder / "colour.pkl", [f"Class {i}" for i in range(10)])
    save(swarm_transformer, "-data MNIST -n_hidden 4 -n_iter 1", folder / "grey.pkl")
    return folder


def run(script, model: Path, *words: object) -> int:
    return exit_status(script.main, ["-resume", str(model), *map(str, words), "-device", "cpu"])


def a_task(n: int = 300, seed: int = 0) -> np.ndarray:
    """Points as they are drawn for training."""
    tasks = clustering.make_tasks(200, seed)
    index = int((tasks.sizes - n).abs().argmin())
    return tasks.points.split(tasks.sizes.tolist())[index].double().numpy()


def write_csv(path: Path, table: np.ndarray, header: str = "", separator: str = ",") -> Path:
    rows = [separator.join(map(repr, row)) for row in table.tolist()]
    path.write_text("\n".join([*([header] if header else []), *rows]) + "\n")
    return path


def assert_refused(status: int, message: str, folder: Path, before: set[Path], capsys: pytest.CaptureFixture) -> None:
    """Exit status 2, one line with this message, and no file written."""
    error = capsys.readouterr().err
    assert status == 2 and message in error and error.count("\n") == 1
    assert set(folder.iterdir()) == before


# ---- points: what is read ------------------------------------------------------------------------------------------------

TABLES = {  # content, options: coordinates, sets
    "plain": ("1,2\n3,4\n", {}, [[1, 2], [3, 4]], [""]),
    "header": ("x,y\n1,2\n3,4", {}, [[1, 2], [3, 4]], [""]),
    "header of savetxt": ("# x y\n1 2\n3 4", {}, [[1, 2], [3, 4]], [""]),
    "blanks, and blank lines": ("\n  1   2\n\n 3 4\n \n", {}, [[1, 2], [3, 4]], [""]),
    "semicolons, as a spreadsheet writes them": ("\ufeffx;y\r\n1;2\r\n3;4\r\n", {}, [[1, 2], [3, 4]], [""]),
    "tabs": ("1\t2\n3e0\t+4.0\n", {}, [[1, 2], [3, 4]], [""]),
    "a column of sets": ("set,x,y\nb,1,2\na,3,4\nb,5,6", {}, [[1, 2], [3, 4], [5, 6]], ["b", "a"]),
    "chosen by number": ("1,2,7\n3,4,8\n", {"set_column": "3"}, [[1, 2], [3, 4]], ["7", "8"]),
    "chosen by name": ('x,"t, u",y\n1,"a, b",2\n3,c,4', {"set_column": "t, u"}, [[1, 2], [3, 4]], ["a, b", "c"]),
    "a text column left out": ("x,name,y\n1,ann,2\n3,bob,4", {"columns": "y,x"}, [[2, 1], [4, 3]], [""]),
    "without header, left out": ("1,ann,2\n3,bob,4", {"columns": "1,3"}, [[1, 2], [3, 4]], [""]),
    "one point": ("1,2", {}, [[1, 2]], [""]),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_read(name: str, tmp_path: Path) -> None:
    content, chosen, coordinates, sets = TABLES[name]
    path = tmp_path / "points.csv"
    path.write_text(content, newline="")
    read = points.read(path, n_dim=2, **chosen)
    assert read.coordinates.tolist() == coordinates and list(read.set_names) == sets
    assert sorted(np.concatenate(read.sets()).tolist()) == list(range(len(coordinates)))


def test_arrays_are_read(tmp_path: Path) -> None:
    array = np.arange(24).reshape(2, 4, 3)
    np.save(tmp_path / "sets.npy", array)
    read = points.read(tmp_path / "sets.npy", n_dim=3)
    assert read.set_names == ("0", "1") and [part.tolist() for part in read.sets()] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert (read.coordinates == array.reshape(8, 3)).all()
    np.save(tmp_path / "one.npy", array[0].astype(np.float16))
    read = points.read(tmp_path / "one.npy", n_dim=2, set_column="1")
    assert read.set_names == ("0", "3", "6", "9") and (read.coordinates == array[0, :, 1:]).all()


BAD = {  # content, further options: message
    "empty": (b"", "", "is empty"),
    "blank": (b" \n\n", "", "is empty"),
    "a header alone": (b"x,y\n", "", "holds no points"),
    "text": (b"x,y\n1,2\n3,ann\n", "", "line 3, column 2 (y) is no number, but 'ann'"),
    "a text column": (b"name,x,y\nann,1,2\n", "", "column 1 (name) is no number, but 'ann': -columns chooses"),
    "a text column without header": (b"1,2\nann,4\n", "", "line 2, column 1 is no number, but 'ann'"),
    "nan": (b"x,y\n1,2\n\n3,nan\n4,nan\n", "", "line 4, column 2 (y) is nan (2 such points in all)"),
    "infinite": (b"1,2\n-inf,4", "", "line 2, column 1 is -inf"),
    "too large": (b"1,2\n1e999,4", "", "line 2, column 1 is 1e999"),
    "missing": (b"1,2\n3,\n", "", "line 2, column 2 is empty"),
    "one column": (b"1\n2\n", "", "1 column of coordinates (x1), the model takes 2"),
    "three columns": (b"1,2,3\n1,2,3\n", "", "3 columns of coordinates (x1, x2, x3), the model takes 2"),
    "ragged": (b"1,2\n3,4\n5,6,7\n", "", "line 3 has 3 columns, the first has 2"),
    "ragged blanks": (b"1 2\n3 4\n5\n", "", "line 3 has 1 columns, the first has 2"),
    "more blanks": (b"1 2\n3 4 5\n", "", "line 2 has 3 columns, the first has 2"),
    "more quotation marks": (b'1,"2"\n"3",4,"5, 6"\n', "", "line 2 has 3 columns, the first has 2"),
    "decimal commas": (b"1,5;2,5\n3,5;4,5\n", "", "line 1, column 1 is 1,5: decimal points"),
    "a number of Python's alone": (b"x,y\n1_000,2\n", "", "line 2, column 1 (x) is no number, but '1_000'"),
    "a point without set": (b"set,x,y\n,1,2\nb,3,4\n", "", "points without a set (column 1 is empty)"),
    "an open quotation mark": (b'x,y\n1,"2\n3,4"\n', "", "line"),
    "binary": (GARBAGE, "", "neither a .npy nor a text"),
    "binary with zeros": (b"\0\1\2" * 99, "", "neither a .npy nor a table"),
    "Latin-1": ("x,y\n1,2\n3,\xe9".encode("latin-1"), "", "UTF-8"),
    "no such column": (b"x,y,z\n1,2,3", "-columns x,w", "has no column 'w': choose from x, y, z; or 1 to 3"),
    "no such number": (b"1,2,3", "-set 4", "has no column '4': choose from 1 to 3"),
    "a column twice": (b"x,y\n1,2", "-columns x,1", "names a column twice"),
    "the sets' column": (b"x,y,set\n1,2,3", "-columns x,set", "one of them for the sets"),
    "alike": (b"x,x,y\n1,2,3", "-columns x,y", "2 columns 'x'"),
    "too large to scale": (b"1e200,2\n-1e200,4", "", "too large to be scaled"),
    "too large for float32": (b"1e200,2\n-1e200,4", "-raw", "leave -raw out"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_tables(name: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    content, chosen, message = BAD[name]
    path = tmp_path / "points.csv"
    path.write_bytes(content)
    status = run(amortised_clustering, trained / "Swarm.pkl", "-apply", path, *chosen.split())
    assert_refused(status, message, tmp_path, {path}, capsys)


def write_npz(path: Path) -> None:
    with open(path, "wb") as file:
        np.savez(file, np.zeros((2, 2)))


BAD_ARRAYS = {
    "pickled": (lambda path: np.save(path, np.array([{}, 2]), allow_pickle=True), "it holds Python objects"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-3]), "it is damaged"),
    "garbage": (lambda path: path.write_bytes(GARBAGE), "is no .npy"),
    "several": (write_npz, "is no .npy"),
    "complex": (lambda path: np.save(path, np.zeros((3, 2), complex)), "real numbers"),
    "a vector": (lambda path: np.save(path, np.zeros(3)), "real numbers"),
    "no points": (lambda path: np.save(path, np.zeros((0, 2))), "holds no points"),
    "no sets": (lambda path: np.save(path, np.zeros((0, 5, 2))), "holds no points"),
    "not finite": (lambda path: np.save(path, [[1, 2], [3, np.nan]]), "row 1 of 2 (from 0) is not finite"),
    "three columns": (lambda path: np.save(path, np.zeros((5, 3))), "3 columns of coordinates"),
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_bad_arrays(name: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write, message = BAD_ARRAYS[name]
    path = tmp_path / "points.npy"
    np.save(path, np.zeros((5, 2)))
    write(path)
    assert_refused(run(amortised_clustering, trained / "Swarm.pkl", "-apply", path), message, tmp_path, {path}, capsys)


def test_no_file(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for script, model in ((amortised_clustering, "Swarm.pkl"), (amortised_mog, "mixture2.pkl")):
        for where, message in ((tmp_path / "nowhere.csv", "there is no file"), (tmp_path, "is a directory"), ("/", "-o FILE")):
            assert_refused(run(script, trained / model, "-apply", where), message, tmp_path, set(), capsys)


def test_a_set_of_too_many_points(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is bounded by the largest set, however many there are."""
    monkeypatch.setattr(points, "MAX_POINTS", 150)
    path = write_csv(tmp_path / "points.csv", np.column_stack([a_task(300)[:290], np.arange(290) % 2]), "x,y,set")
    assert run(amortised_clustering, trained / "Swarm.pkl", "-apply", path) == 0
    capsys.readouterr()
    write_csv(path, a_task(300))
    status = run(amortised_clustering, trained / "Swarm.pkl", "-apply", path, "-overwrite", "-o", tmp_path / "o.csv")
    assert "points, at most 150" in capsys.readouterr().err and status == 2 and not (tmp_path / "o.csv").exists()


# ---- labels --------------------------------------------------------------------------------------------------------------


def labelled(path: Path) -> list[list[str]]:
    with open(path, newline="") as file:
        return list(csv.reader(file))


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_labels_do_not_depend_on_the_order(kind: str, trained: Path) -> None:
    """To the last bit, also of equal points, and for models that read a sequence."""
    task, model = a_task(120), common.load(trained / f"{kind}.pkl")
    task = np.concatenate([task, task[:30]])
    labels, confidences, _ = amortised_clustering.label(model, task, 1.0, "fp32")
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(task))
        found = amortised_clustering.label(model, task[order], 1.0, "fp32")
        assert (found[0] == labels[order]).all() and (found[1] == confidences[order]).all()
    assert len(np.unique(labels)) > 1  # or the test would show nothing


def test_lines_in_another_order_get_the_same_labels(trained: Path, tmp_path: Path) -> None:
    """Whatever sets they are of, and each beside its point."""
    table = np.concatenate([a_task(120), a_task(140, 1)])
    lines = [f"{x!r},{y!r},{i // 120}" for i, (x, y) in enumerate(table.tolist())]
    found = []
    for name, order in (("a", np.arange(len(lines))), ("b", np.random.default_rng(0).permutation(len(lines)))):
        path = tmp_path / f"{name}.csv"
        path.write_text("\n".join(["x,y,set", *(lines[i] for i in order)]))
        assert run(amortised_clustering, trained / "LSTM.pkl", "-apply", path) == 0
        header, *rows = (tmp_path / f"{name}.labels.csv").read_text().splitlines()
        assert header == "x,y,set,label,confidence" and len(rows) == len(lines)
        assert all(row.startswith(lines[i] + ",") for i, row in zip(order, rows, strict=True))
        found.append(sorted(rows))
    assert found[0] == found[1]


def test_labels_are_those_of_the_model(trained: Path, tmp_path: Path) -> None:
    """Of points as they are, and the same ones of points in other units."""
    task = a_task()
    np.save(tmp_path / "points.npy", task)
    assert run(amortised_clustering, trained / "Swarm.pkl", "-apply", tmp_path / "points.npy", "-raw") == 0
    args = amortised_clustering.get_parser().parse_args(f"{CLUSTERING} Swarm".split())
    x = torch.from_numpy(task).float()[None]
    with torch.no_grad():
        expected = amortised_clustering.make_model(args).eval()(x)[0].softmax(1)
    header, *rows = labelled(tmp_path / "points.labels.csv")
    assert header == ["x1", "x2", "label", "confidence"]
    values = np.array(rows, float)
    assert (values[:, :2] == task).all() and (values[:, 2] == expected.argmax(1).numpy()).all()
    assert np.abs(values[:, 3] - expected.max(1)[0].numpy()).max() < 1e-4
    with Image.open(tmp_path / "points.labels.png") as picture:
        assert picture.format == "PNG"

    for name, table in (("a", task), ("b", task * [1e-6, 1e6] + [1, -1e7])):
        write_csv(tmp_path / f"{name}.csv", table)
        assert run(amortised_clustering, trained / "Swarm.pkl", "-apply", tmp_path / f"{name}.csv") == 0
    first, second = (np.array(labelled(tmp_path / f"{name}.labels.csv"), float)[:, 2:] for name in "ab")
    assert (first[:, 0] == second[:, 0]).mean() > 0.99 and np.abs(first - second)[:, 1].max() < 1e-3


def test_columns_of_the_user_are_kept(trained: Path, tmp_path: Path) -> None:
    """As they were written, quotation marks included; a column `label` is not hidden by another."""
    path = tmp_path / "points.csv"
    path.write_text('x;"a; b";y;label\n1.50;"n; m";2;7\n3;k;4;8\n')
    assert run(amortised_clustering, trained / "Swarm.pkl", "-apply", path, "-columns", "x,y", "-o", tmp_path / "o.csv") == 0
    header, *rows = (tmp_path / "o.csv").read_text().splitlines()
    assert header == 'x;"a; b";y;label;predicted_label;confidence'
    assert rows[0].startswith('1.50;"n; m";2;7;') and rows[1].startswith("3;k;4;8;") and len(rows) == 2
    path.write_text('"x","y","label",predicted_label\n1,2,3,4\n')
    assert run(amortised_clustering, trained / "Swarm.pkl", "-apply", path, "-columns", "x,y", "-o", tmp_path / "p.csv") == 0
    header, _ = (tmp_path / "p.csv").read_text().splitlines()
    assert header == '"x","y","label",predicted_label,predicted_predicted_label,confidence'


def test_names_are_drawn_as_they_are(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Not as formulas, and without warnings of letters that the font does not have."""
    for script, model in ((amortised_clustering, "Swarm.pkl"), (amortised_mog, "mixture2.pkl")):
        path = tmp_path / f"$a_{{$ {model}\udcff.csv"
        path.write_text("set,$x^{$,\u65e5\n$b_{$,1,2\nc,3,4\n")
        assert run(script, trained / model, "-apply", path) == 0
        assert capsys.readouterr().err.count("\n") == 1  # few points
    assert run(swarm_transformer, trained / "grey.pkl", "-draw", 1, "-o", tmp_path / "$a_{$.npy") == 0


def test_ctrl_c_leaves_nothing(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    path = write_csv(tmp_path / "points.csv", a_task())
    for name in ("label", "write_with_columns"):
        with monkeypatch.context() as patch:
            patch.setattr(amortised_clustering, name, stop)
            assert run(amortised_clustering, trained / "Swarm.pkl", "-apply", path) == 130
        assert set(tmp_path.iterdir()) == {path} and capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("n", [1, 2])
def test_few_points_get_an_answer(n: int, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """And a line that says that these are few; the same for points in one place."""
    for script, model in ((amortised_clustering, "Swarm.pkl"), (amortised_mog, "mixture2.pkl")):
        path = write_csv(tmp_path / f"{model}.csv", np.full((n, 2), 0.1))
        assert run(script, trained / model, "-apply", path) == 0
        printed = capsys.readouterr()
        assert "unlike anything" in printed.err and f"{n} point" in printed.err and printed.err.count("\n") == 1


def test_points_unlike_training_sets_are_told() -> None:
    task, ranges = a_task(), {}
    for deviation in (None, 1.0):
        ranges[deviation] = points.feature_ranges(clustering.training_sets(300), deviation)
    cases = {  # points, deviation that they are scaled to: what is odd about them
        "usual": (task, 1.0, ""),
        "other units": (1000 * task + 7, 1.0, ""),
        "raw": (task, None, ""),
        "other units, raw": (1000 * task + 7, None, "largest deviation of a coordinate"),
        "elsewhere, raw": (task + 7, None, "mean of a coordinate"),
        "few": (task[:50], 1.0, "50 points (training sets: 100 to 1,000)"),
        "many": (np.concatenate([task] * 5)[:1200], 1.0, "1,200 points"),
        "an outlier": (np.concatenate([task, [[1e3, 1e3]]]), 1.0, "farthest coordinate, in deviations"),
        "a line": (np.column_stack([task[:, 0], 2 * task[:, 0]]), 1.0, "eigenvalue"),
        "a constant": (task * [1, 0] + 0.1, 1.0, "smallest deviation of a coordinate 0 "),
    }
    for name, (table, deviation, message) in cases.items():
        scaled = points.scaling_to(table, deviation)(table)
        found = ", ".join(points.oddities(scaled, clustering.N_ENTITIES, ranges[deviation]))
        assert message in found and bool(message) == bool(found), name


def test_typical_deviations() -> None:
    tasks = clustering.make_tasks(2000, 1)
    squares = [part.var(0).mean().item() for part in tasks.points.split(tasks.sizes.tolist())]
    assert math.sqrt(np.mean(squares)) == pytest.approx(clustering.typical_deviation(), rel=0.02)
    for n_clust in (1, 4):
        sets = draw_sets(1000, 2, n_clust, torch.Generator().manual_seed(1))
        squares = [part[mask].var(0).mean().item() for part, mask in zip(sets.points, sets.mask, strict=True)]
        assert math.sqrt(np.mean(squares)) == pytest.approx(mixtures.typical_deviation(n_clust), rel=0.02)


# ---- files and options ---------------------------------------------------------------------------------------------------


def test_files_are_not_replaced_unasked(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model, path = trained / "Swarm.pkl", write_csv(tmp_path / "points.csv", a_task())
    (tmp_path / "points.labels.png").write_text("mine")
    before = set(tmp_path.iterdir())
    refusals = {
        "": "points.labels.png is there: -overwrite",
        f"-o {path}": "would be replaced, and is read here",
        f"-o {path} -overwrite": "would be replaced, and is read here",
        f"-o {tmp_path}/labels": "is a .csv file",
        "-o=": "is a .csv file",
        f"-o {tmp_path}/no/labels.csv": "is no directory",
        f"-o {300 * 'x'}.csv": "File name too long",
    }
    for words, message in refusals.items():
        assert_refused(run(amortised_clustering, model, "-apply", path, *words.split()), message, tmp_path, before, capsys)
    content = path.read_bytes()
    assert run(amortised_clustering, model, "-apply", path, "-overwrite") == 0
    assert set(tmp_path.iterdir()) == before | {tmp_path / "points.labels.csv"} and path.read_bytes() == content
    assert (tmp_path / "points.labels.png").read_bytes()[:4] == b"\x89PNG"


def test_models_that_are_of_no_use(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = write_csv(tmp_path / "points.csv", a_task())
    (tmp_path / "damaged.pkl").write_bytes((trained / "Swarm.pkl").read_bytes()[:-50])
    weights = {"model": checkpoint.read(trained / "Swarm.pkl")["model"]}
    checkpoint.save(weights, tmp_path / "old.pkl")
    before = set(tmp_path.iterdir())
    refusals = {
        trained / "mixture2.pkl": "is a model of amortised_mog.py, this is amortised_clustering.py",
        trained / "colour.pkl": "is a model of swarm_transformer.py",
        tmp_path / "damaged.pkl": "damaged",
        tmp_path / "old.pkl": "earlier version",
        path: "damaged, or no checkpoint",
        tmp_path / "none.pkl": "none.pkl",
        tmp_path: "no best.pkl",
    }
    for model, message in refusals.items():
        assert_refused(run(amortised_clustering, model, "-apply", path), message, tmp_path, before, capsys)
    assert_refused(
        run(amortised_mog, trained / "Swarm.pkl", "-apply", path), "amortised_clustering.py", tmp_path, before, capsys
    )
    status = run(swarm_transformer, trained / "Swarm.pkl", "-draw", 2, "-o", tmp_path / "drawn.npy")
    assert_refused(status, "a model of amortised_clustering.py", tmp_path, before, capsys)


OPTIONS = {
    (amortised_clustering, "-apply p.csv"): "-resume FILE",
    (amortised_clustering, "-apply p.csv -resume auto"): "-resume FILE",
    (amortised_clustering, "-apply p.csv -resume best.pkl -lr 0.1"): "-apply trains nothing, and has no use for -lr",
    (amortised_clustering, "-apply p.csv -resume best.pkl -type Swarm"): "has no use for -type",
    (amortised_clustering, "-type Swarm -o x.csv"): "-o is of use with -apply alone",
    (amortised_clustering, "-type Swarm -raw"): "-raw is of use with -apply alone",
    (amortised_mog, "-set 3"): "-set is of use with -apply alone",
    (amortised_mog, "-apply p.csv -resume best.pkl -dry_run"): "has no use for -dry_run",
    (swarm_transformer, "-draw 3 -complete x.npy -resume best.pkl"): "-draw or -complete: choose one",
    (swarm_transformer, "-data MNIST -classes 3"): "-classes is of use with -draw or -complete alone",
    (swarm_transformer, "-draw 3 -resume best.pkl -data MNIST"): "-draw trains nothing, and has no use for -data",
    (swarm_transformer, "-draw 0 -resume best.pkl"): "0 is too small",
}


@pytest.mark.parametrize(("script", "line"), OPTIONS, ids=lambda value: getattr(value, "__name__", value))
def test_options_that_do_not_go_together(script, line: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert_refused(exit_status(script.main, line.split()), OPTIONS[script, line], tmp_path, set(), capsys)


def test_one_process_is_enough(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "::1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert_refused(run(amortised_mog, Path("best.pkl"), "-apply", "p.csv"), "without torchrun", tmp_path, set(), capsys)


@pytest.mark.slow
def test_a_run_can_be_used(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Its directory, its best.pkl, and what common.export makes of them: the same labels."""
    line = "-type Swarm -n_hidden 4 -n_iter 1 -tasks 10 -bs 5 -max_epochs 1"
    assert exit_status(amortised_clustering.main, [*line.split(), "-results_dir", str(tmp_path / "r")]) == 0
    (run_directory,) = (tmp_path / "r" / "amortised_clustering").iterdir()
    before = set(run_directory.iterdir())
    path = write_csv(tmp_path / "points.csv", a_task(), "x,y")
    exported = common.export(run_directory, tmp_path / "small.pkl")
    for model, out in ((run_directory, "a.csv"), (run_directory / "best.pkl", "b.csv"), (exported, "c.csv")):
        assert run(amortised_clustering, model, "-apply", path, "-o", tmp_path / out) == 0
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes() == (tmp_path / "c.csv").read_bytes()
    assert set(run_directory.iterdir()) == before


# ---- mixtures ------------------------------------------------------------------------------------------------------------


def test_mixtures(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """In the points' own units, whatever they are; what is printed is the likelihood of what is written."""
    task = a_task()
    shift, scale = np.array([5.0, -300.0]), np.array([0.01, 7.0])
    tables = []
    for name, table in (("a", task), ("b", task * scale + shift), ("c", task[::-1])):
        path = write_csv(tmp_path / f"{name}.csv", table, "u,v")
        assert run(amortised_mog, trained / "mixture2.pkl", "-apply", path) == 0
        header, *rows = labelled(tmp_path / f"{name}.mixture.csv")
        assert header == ["gaussian", "weight", "mean_u", "mean_v", "deviation_u", "deviation_v"] and len(rows) == 3
        found = np.array(rows, float)
        weights, means, deviations = found[:, 1], found[:, 2:4], found[:, 4:]
        assert weights.sum() == pytest.approx(1) and (np.diff(weights) <= 0).all() and (deviations > 0).all()
        density = (norm.pdf(table[:, None], means, deviations).prod(2) * weights).sum(1)
        printed = capsys.readouterr().out.split("log-likelihood ")[1].split()[0]
        assert float(printed) == pytest.approx(np.log(density).mean(), abs=1e-3)
        tables.append(found)
    a, b, c = tables
    assert (a == c).all()
    assert np.allclose(b[:, 2:4], a[:, 2:4] * scale + shift, rtol=1e-4) and np.allclose(b[:, 4:], a[:, 4:] * scale, rtol=1e-4)


def test_mixtures_of_sets(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Also in one and three dimensions; that of other points' dimensions is refused."""
    for n_dim in (1, 3):
        sets = np.random.default_rng(0).normal(size=(12, 110, n_dim))
        np.save(tmp_path / f"{n_dim}.npy", sets)
        assert run(amortised_mog, trained / f"mixture{n_dim}.pkl", "-apply", tmp_path / f"{n_dim}.npy") == 0
        header, *rows = labelled(tmp_path / f"{n_dim}.mixture.csv")
        assert header[:3] == ["set", "gaussian", "weight"] and len(header) == 3 + 2 * n_dim
        assert [row[:2] for row in rows[:4]] == [["0", "1"], ["0", "2"], ["0", "3"], ["1", "1"]] and len(rows) == 36
        assert "... and 2 sets more" in capsys.readouterr().out
    before = set(tmp_path.iterdir())
    status = run(amortised_mog, trained / "mixture2.pkl", "-apply", tmp_path / "3.npy", "-o", tmp_path / "o.csv")
    assert_refused(status, "3 columns of coordinates (x1, x2, x3), the model takes 2", tmp_path, before, capsys)


# ---- images --------------------------------------------------------------------------------------------------------------


def draw(model: Path, out: Path, *words: object) -> np.ndarray:
    assert run(swarm_transformer, model, *words, "-o", out, "-overwrite") == 0
    with Image.open(out.with_suffix(".png")) as picture:
        assert picture.format == "PNG"
    return np.load(out)


def test_images_are_drawn(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the seed; the classes in turn, by name or number."""
    monkeypatch.setattr(swarm_transformer, "DRAWN_AT_ONCE", 4)
    out = tmp_path / "drawn.npy"
    grey = draw(trained / "grey.pkl", out, "-draw", 2)
    assert grey.shape == (2, 28, 28) and grey.dtype == np.uint8
    colour = draw(trained / "colour.pkl", out, "-draw", 6, "-classes", "3,5,CLASS 7")
    assert "6 images of the classes, in turn: class 3, class 5, class 7" in capsys.readouterr().out
    assert colour.shape == (6, 16, 16, 3)
    assert (draw(trained / "colour.pkl", out, "-draw", 6, "-classes", "class 3,class 5,7") == colour).all()
    assert (draw(trained / "colour.pkl", out, "-draw", 6, "-classes", "3,5,7", "-seed", 1) != colour).any()
    assert len(draw(trained / "colour.pkl", out, "-draw", 1)) == 1

    args = swarm_transformer.parse(swarm_transformer.get_parser(), "-data SMALL -n_hidden 4 -n_iter 1 -cond".split())
    model, gen = swarm_transformer.make_model(args).eval(), torch.Generator().manual_seed(0)
    classes = torch.tensor([3, 5, 7, 3, 5, 7])
    expected = torch.cat([model.sample(len(part), part, generator=gen) for part in classes.split(4)])
    assert (expected.permute(0, 2, 3, 1).numpy() == colour).all()


def test_images_are_completed(trained: Path, tmp_path: Path) -> None:
    """From a .npy, a PNG, a folder of PNGs: the top halves stay as they are."""
    gen = np.random.default_rng(0)
    grey, colour = gen.integers(0, 256, (3, 28, 28), np.uint8), gen.integers(0, 256, (2, 16, 16, 3), np.uint8)
    np.save(tmp_path / "grey.npy", grey.astype(np.int64))
    assert run(swarm_transformer, trained / "grey.pkl", "-complete", tmp_path / "grey.npy") == 0
    completed = np.load(tmp_path / "grey.completed.npy")
    assert (completed[:, :14] == grey[:, :14]).all() and (completed[:, 14:] != grey[:, 14:]).any()
    (tmp_path / "folder").mkdir()
    for i, image in enumerate(grey):
        Image.fromarray(image).convert(("L", "RGB", "RGBA")[i]).save(tmp_path / "folder" / f"{i}.png")
    assert (draw(trained / "grey.pkl", tmp_path / "o.npy", "-complete", tmp_path / "folder") == completed).all()
    np.save(tmp_path / "colour.npy", colour)
    found = draw(trained / "colour.pkl", tmp_path / "o.npy", "-complete", tmp_path / "colour.npy", "-classes", 3)
    assert found.shape == colour.shape and (found[:, :8] == colour[:, :8]).all()
    Image.fromarray(colour[0]).save(tmp_path / "one.png")
    found = draw(trained / "colour.pkl", tmp_path / "o.npy", "-complete", tmp_path / "one.png", "-classes", 3)
    assert found.shape == (1, 16, 16, 3) and (found[0, :8] == colour[0, :8]).all()


BAD_IMAGES = {
    "size.npy": (np.zeros((2, 27, 28), np.uint8), "(N, 28, 28)"),
    "one.npy": (np.zeros((28, 28), np.uint8), "(N, 28, 28)"),
    "none.npy": (np.zeros((0, 28, 28), np.uint8), "holds no images"),
    "floats.npy": (np.zeros((2, 28, 28)), "integers 0..255"),
    "large.npy": (np.full((2, 28, 28), 256), "values 256..256"),
    "pickled.npy": (np.array([{}, 1]), "it holds Python objects"),
    "size.png": (np.zeros((28, 27), np.uint8), "27 x 28 pixels"),
    "colour.png": (np.arange(28 * 28 * 3, dtype=np.uint8).reshape(28, 28, 3), "in colour"),
    "clear.png": (np.zeros((28, 28, 4), np.uint8), "transparent"),
    "deep.png": (np.zeros((28, 28), np.uint16), "8 bits"),
    "garbage.png": (GARBAGE, "cannot be read as a PNG"),
    "garbage.npy": (GARBAGE, "cannot be read"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_images(name: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    content, message = BAD_IMAGES[name]
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif path.suffix == ".png":
        Image.fromarray(content).save(path)
    else:
        np.save(path, content, allow_pickle=True)
    assert_refused(run(swarm_transformer, trained / "grey.pkl", "-complete", path), message, tmp_path, {path}, capsys)


def test_classes_and_folders_that_are_not_there(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    np.save(tmp_path / "images.npy", np.zeros((2, 16, 16, 3), np.uint8))
    before, out = set(tmp_path.iterdir()), ("-o", tmp_path / "o.npy")
    refusals = {
        ("colour.pkl", "-draw", 2, "-classes", "horse"): "there is no class 'horse': choose from class 0, class 1",
        ("colour.pkl", "-draw", 2, "-classes", ""): "there is no class ''",
        ("grey.pkl", "-draw", 2, "-classes", "3"): "without -cond",
        ("colour.pkl", "-complete", tmp_path / "images.npy"): "-classes says what the images show, of class 0",
        ("colour.pkl", "-complete", tmp_path, "-classes", "3"): "has no PNGs",
        ("colour.pkl", "-complete", tmp_path / "nothing.npy", "-classes", "3"): "there is no file",
    }
    for (model, *words), message in refusals.items():
        assert_refused(run(swarm_transformer, trained / model, *words, *out), message, tmp_path, before, capsys)
