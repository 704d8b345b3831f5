"""README.md and docs/: links lead somewhere, command lines are accepted, options are those of the scripts, pages are short."""

import argparse
import importlib.util
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.command_lines import dry_run, exit_status, get_parser, main_of, parse
from tests.small_images import smooth, write_mnist

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKING = [*PAGES, *sorted((ROOT / "results").glob("**/README.md")), ROOT / "tests" / "data" / "README.md"]
PAGE_OF = {
    "amortised_clustering": "clustering.md",
    "swarm_transformer": "image_transformer.md",
    "amortised_mog": "mixture_of_gaussians.md",
    "train_ssl": "ssl.md",
    "train_zoo": "zoo_and_stitching.md",
    "cifar10_stitching": "zoo_and_stitching.md",
    "cifar10_alignment": "alignment_and_rotations.md",
    "cifar10_projections": "alignment_and_rotations.md",
    "routing_networks": "routing.md",
    "deepsets_exercise": "deepsets.md",
}
# options of lines whose files, GPU or processes are not here: such a line is parsed, and not tried
NEED_MORE = {"compare", "draw", "linear_probe", "knn", "apply", "complete", "resume", "device", "jobs"}
WORDS = ("at hand", "go on with", "gone on with", "by itself")  # available, resume, automatically


def title(path: Path) -> str:
    return str(path.relative_to(ROOT))


def read(page: Path) -> str:
    return page.read_text()


def prose(text: str) -> str:
    """A page without its code."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    return re.sub(r"`[^`\n]*`", "`code`", re.sub(r"^(?: {4}|\t).*$", "", text, flags=re.M))


# ---- links ---------------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: list[str] = []
    for heading in re.findall(r"^#+ +(.+?) *$", re.sub(r"^```.*?^```", "", read(page), flags=re.S | re.M), flags=re.M):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        anchor = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
        found.append(f"{anchor}-{found.count(anchor)}" if anchor in found else anchor)
    return set(found)


@pytest.mark.parametrize("page", LINKING, ids=title)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(read(page))):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path) if path else page
        if not place.exists() or (anchor and anchor not in anchors(place)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_files_that_a_page_names_are_there(page: Path) -> None:
    """Code and, of results, what is in folders that are committed: others are made by the reader's runs."""
    folders = {path.relative_to(ROOT).parts[:2] for path in committed("results/*/*")}
    named = set(re.findall(r"`((?:common|slurm|tests|benchmarks|docs|results)/[\w./*-]+)`", read(page)))
    kept = {file for file in named if not file.startswith("results/") or Path(file).parts[:2] in folders}
    assert not {file for file in kept if not re.search("[A-Z]{4}", file) and not any(ROOT.glob(file))}  # NAME is any


def test_every_picture_of_a_run_is_shown() -> None:
    """Pictures are the most of what a run leaves: kept are those that a page shows, or that a shown one is made of."""
    shown = set()
    for page in LINKING:
        shown |= {(page.parent / target).resolve() for target in re.findall(r"!\[[^]]*\]\(([^)]+)\)", read(page))}
    made_of = (ROOT / "docs" / "make_pictures.py").read_text()
    unused = [
        title(path)
        for path in committed("results/*.png")
        if path not in shown and str(path.parent.relative_to(ROOT / "results")) not in made_of
    ]
    assert not unused


def committed(pattern: str) -> list[Path]:
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z", pattern], capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git, so nobody knows what is committed")
    return [ROOT / path for path in listed.stdout.split("\0") if path and (ROOT / path).exists()]


# ---- command lines -------------------------------------------------------------------------------------------------------


def command_lines(page: Path) -> Iterator[list[str]]:
    """The words of each command line in the code of a page."""
    text = read(page)
    blocks = re.findall(r"^```(?:sh|bash|shell)?\n(.*?)^```", text, flags=re.S | re.M)
    blocks += re.findall(r"(?:^(?: {4}|\t).*\n?)+", text, flags=re.M)
    blocks += re.findall(r"`((?:python|torchrun) [^`\n]+)`", re.sub(r"^(?: {4}|\t).*$", "", text, flags=re.M))
    for line in re.sub(r"\\\n *", "", "\n".join(blocks)).splitlines():
        if re.match(r"(\w+=\S+ )*(\S*python|torchrun|make|slurm/\w+\.sh) ", line.strip()):
            first = re.split(r" (?:&|&&|\||;)(?: |$)", line)[0]
            words = shlex.split(re.sub(r"\$\w+", "1", re.sub(r"\$\(|\)", " ", first)), comments=True)
            yield words[next(i for i, word in enumerate(words) if not re.fullmatch(r"\w+=\S+", word)) :]


def script_line(words: list[str]) -> tuple[str, list[str]] | None:
    """The script of this suite that a line starts, if it does, and its options."""
    found = [i for i, word in enumerate(words) if re.fullmatch(r"\w+\.py", word)]
    if not found or not re.search(r"python|torchrun", words[0]):
        return None
    return words[found[0]].removesuffix(".py"), words[found[0] + 1 :]


def objection(words: list[str]) -> str:
    """Why a command line cannot be typed as it stands, or nothing."""
    line = script_line(words)
    if line is not None and "..." not in words:
        script, options = line
        if script not in PAGE_OF or given(script, options) & NEED_MORE:
            status, output = parse(script, options)
        else:
            status, output = dry_run(script, options)
        return output if status else ""
    if "-m" in words[:3] and words[words.index("-m") + 1] != "pytest":
        return "" if importlib.util.find_spec(words[words.index("-m") + 1]) else "no such module"
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M)
        return "" if {*words[1:]} <= {*targets} else "no such target"
    files = [word for word in words if re.match(r"(slurm|tests|docs|benchmarks)/", word)]
    return ", ".join(f"there is no {file}" for file in files if not (ROOT / file).exists())


def given(script: str, options: list[str]) -> set[str]:
    """Names of the options that a line has, but for -h."""
    actions = get_parser(script)._option_string_actions
    return {actions[word.partition("=")[0]].dest for word in options if word.partition("=")[0] in actions}


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_command_lines_are_accepted(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    refused = [f"{shlex.join(words)}: {reason}" for words in command_lines(page) if (reason := objection(words))]
    assert not refused, "\n".join(refused)


def test_readme_has_a_line_of_every_script() -> None:
    scripts = {line[0] for words in command_lines(ROOT / "README.md") if (line := script_line(words))}
    assert scripts >= {*PAGE_OF, "collect_results"}


# what makes README.md's last line of a script, which is for two CPU cores, one of seconds; other scripts' tests have such lines
SHORTER = {
    "amortised_clustering": "-n_hidden 8 -tasks 20 -bs 5 -max_epochs 1",
    "deepsets_exercise": "--steps 5 --seeds 1 --no-sweep",
    "train_zoo": "--subset 100 --width 2 --epochs 1 --batch-size 30",
    "cifar10_stitching": "--subset 100 --layers 3 --pairs 0-1",
    "cifar10_alignment": "--images 50 --layers 3 6 --pairs 0-1",
}


@pytest.mark.slow
def test_small_lines_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines for two CPU cores, with less of everything; stitching and alignment use the networks of the zoo before them."""
    lines = [line for words in command_lines(ROOT / "README.md") if words[0] == "python" and (line := script_line(words))]
    small = {script: options for script, options in lines if script in SHORTER and not given(script, options) & NEED_MORE}
    write_mnist(tmp_path / "data" / "FashionMNIST" / "raw", smooth(200), smooth(60, seed=1))
    monkeypatch.chdir(tmp_path)
    for script, shorter in SHORTER.items():
        options = without(get_parser(script), small[script], shorter.split())
        assert exit_status(main_of(script), [*options, *shorter.split()]) == 0, script
    assert {path.parent.parent.name for path in tmp_path.glob("results/*/*/result.json")} == {*SHORTER} - {"train_zoo"}


def without(parser: argparse.ArgumentParser, options: list[str], others: list[str]) -> list[str]:
    """Options without those that others replace, and without their values."""
    kept: list[str] = []
    skip = False
    for word in options:
        option = word.partition("=")[0]
        if option in parser._option_string_actions:
            skip = option in others
        if not skip:
            kept.append(word)
    return kept


# ---- options -------------------------------------------------------------------------------------------------------------


def table_options(page: Path) -> Iterator[tuple[str, str]]:
    """Options in the first column of the tables whose head begins with `option`, and the cell of the column `script`."""
    head: list[str] = []
    for line in read(page).splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|"):
            head = []
        elif not head:
            head = cells
        elif head[0].lower() in ("option", "options"):
            scripts = cells[head.index("script")] if "script" in head else ""
            for code in re.findall(r"`([^`]*)`", cells[0]):
                yield from ((option, scripts) for option in re.findall(r"(?:^| )(--?[a-z][\w-]*)", code))


@pytest.mark.parametrize("script", PAGE_OF)
def test_options_of_a_script_are_those_of_its_page(script: str) -> None:
    parser = get_parser(script)
    actions = [action for action in parser._actions if action.dest != "help"]  # some have two spellings
    letter = script.split("_")[-1][0].upper()  # in a column `script` of a page of two
    own = {option for option, scripts in table_options(ROOT / "docs" / PAGE_OF[script]) if not scripts or letter in scripts}
    shared = {option for option, _ in table_options(ROOT / "docs" / "reading_runs.md")}
    missing = [action.option_strings[0] for action in actions if not {*action.option_strings} & (own | shared)]
    unknown = sorted(own - {option for action in actions for option in action.option_strings})
    assert (missing, unknown) == ([], []), "what the page lacks, and what the script does not have"


def test_every_script_has_a_page() -> None:
    assert {path.stem for path in ROOT.glob("*.py")} == {*PAGE_OF, "collect_results"}


# ---- words and lengths ---------------------------------------------------------------------------------------------------


def test_pages_are_short() -> None:
    lengths = {title(page): len(read(page).splitlines()) for page in [*PAGES, ROOT / "results" / "README.md"]}
    assert lengths.pop("README.md") <= 200
    assert {page: n for page, n in lengths.items() if n > 300} == {}


def test_words_are_the_usual_ones() -> None:
    texts = {title(page): prose(read(page)) for page in PAGES}
    texts |= {f"{script}.py -h": get_parser(script).format_help() for script in PAGE_OF}
    found = {(where, word) for where, text in texts.items() for word in WORDS if word in " ".join(text.split())}
    assert not found
