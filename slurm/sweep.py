"""Read a sweep, a text file with one command line a run: check its lines, print how they stand, and list what is left to do.

    python slurm/sweep.py status SWEEP                           # a table: status.sh
    python slurm/sweep.py prepare SWEEP [--data-dir DIR]         # what submit.sh and local.sh ask for before they start

An empty line, or one that begins with #, is a comment. Lines go by their number in the file. Words are separated by spaces and
taken as they are: no quotes, no variables. Scripts are in the folder above this file's; all else is below the project's root,
from where this is run:

    results/slurm/NAME.lines          a prepared sweep: key, tab, complete command; a row for each line of the file
    results/slurm/runs/KEY.lock       held by the process at a line, while it lives (run_line.sh)
    results/slurm/runs/KEY.out        what the line's runs have printed
    results/slurm/runs/KEY.exit       how the last one ended; not there while it runs, nor if it was killed
    results/slurm/jobs/               output of the jobs
    results/slurm/snapshots/          the code that queued jobs run
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import io
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

CODE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(CODE))

from common.errors import InputError, one_line  # noqa: E402
from common.gallery.key_metrics import key_metrics, last_row  # noqa: E402
from common.run.command import RESUMABLE  # noqa: E402
from common.run.dotted import split_command_line  # noqa: E402
from common.run.lock import is_locked  # noqa: E402
from common.run.records import read_json, write_text  # noqa: E402
from common.run.run import ARGS, LAST, RESULT  # noqa: E402

RESULTS = Path("results")
RECORDS = RESULTS / "slurm"
STATES = ("finished", "running", "waiting", "failed", "resumable", "new")
# options that a job adds, belong to the site, or make no run; -overwrite would replace what a requeued run has saved
NOT_IN_SWEEPS = (
    "resume", "overwrite", "results_dir", "data_dir", "dataset_root", "dry_run", "to_stdout",
    "help", "compare", "draw", "linear_probe", "knn",
)  # fmt: skip
LOG_LINES = 5  # of a failed run


@dataclass(frozen=True)
class Line:
    """A line of a sweep: its words, and the run, or the models of a zoo, that it makes."""

    number: int  # in the file, from 1
    words: tuple[str, ...]
    final: Path  # where the run is when it has finished, or the zoo
    models: tuple[int, ...] = ()  # of a zoo

    @property
    def key(self) -> str:
        """The name of all files about this line."""
        return hashlib.sha256(" ".join(self.words).encode()).hexdigest()[:16]

    @property
    def path(self) -> Path:
        """The directory of the run, finished or not."""
        return self.final if self.final.exists() else self.final.with_name(f"{self.final.name}.part")

    def record(self, kind: str) -> Path:
        return RECORDS / "runs" / f"{self.key}.{kind}"


@dataclass(frozen=True)
class Task:
    """A task of a job array that SLURM has in its queue."""

    job: str
    state: str  # waiting or running
    left: str  # of its time limit, or why it waits


# ---- lines ---------------------------------------------------------------------------------------------------------------


def read(path: Path) -> list[Line]:
    """All lines of a sweep. Raises OSError, and InputError with the number of a line that cannot be run."""
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}") from None
    lines: list[Line] = []
    for number, text in enumerate(content.splitlines(), 1):
        if not text.strip() or text.lstrip().startswith("#"):
            continue
        try:
            line = parse(number, tuple(text.split()))
        except InputError as error:
            raise InputError(f"{path}, line {number}: {error}") from None
        for other in lines:
            if other.final == line.final and (other.models == line.models or {*other.models} & {*line.models}):
                raise InputError(f"{path}, line {number} is line {other.number} again: both make {line.final}")
        lines.append(line)
    if not lines:
        raise InputError(f"{path} has no command line")
    return lines


def parse(number: int, words: tuple[str, ...]) -> Line:
    """Check a line by the dry run of the script, as a job will run it. Raises InputError."""
    name, *options = words
    if not re.fullmatch(r"\w+\.py", name) or not (CODE / name).is_file():
        raise InputError(f"{name} is no script of this suite")
    for word in words:
        if re.search(r"""['"\\$`]""", word) or not word.isprintable():
            raise InputError(f"{word!r:.80}: words are taken as they are, without quotes or variables, and printable")
    script = importlib.import_module(name.removesuffix(".py"))
    for option in sorted(given(script, options)):
        if option in NOT_IN_SWEEPS:
            reason = "a line makes a run, jobs resume by themselves, and site.sh says where data lie"
            raise InputError(f"{spelling(script, option)} has no place in a sweep: {reason}")
    printed = dry_run(script, [*options, *added(script, "")])
    zoo = re.fullmatch(r"(.+): models (\d+(?:, \d+)*|none)", printed)
    if zoo is None:
        return Line(number, words, RESULTS / script.__name__ / printed)
    if zoo[2] == "none":
        raise InputError(f"there is no model in this chunk of {zoo[1]}")
    return Line(number, words, Path(zoo[1]), tuple(map(int, zoo[2].split(", "))))  # a folder that several lines share


def given(script: ModuleType, options: list[str]) -> set[str]:
    """The options that a line gives, by their names in the parser, whatever way they are spelled."""
    parser = script.get_parser()
    actions = parser._option_string_actions
    typed = {word.partition("=")[0] for word in options}
    with contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()):  # values of --tx are no dotted line
        typed |= {option for option, *_ in split_command_line(parser, options, getattr(script, "NOT_IN_NAME", ()))}
    return {actions[option].dest for option in typed if option in actions}


def dry_run(script: ModuleType, options: list[str]) -> str:
    """The output of a script's dry run, a line. Raises InputError if it refuses the options."""
    printed, complaint = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(complaint):
            status = script.main([*options, spelling(script, "dry_run") or "--dry-run"])
    except SystemExit as stopped:
        status = stopped.code
    if status:
        raise InputError(complaint.getvalue().strip() or f"ends with exit status {status}")
    return printed.getvalue().strip()


def spelling(script: ModuleType, *names: str) -> str | None:
    """The first of these options that the script has, with its dashes."""
    spellings = {action.dest: action.option_strings for action in script.get_parser()._actions}
    return next((spellings[name][0] for name in names if name in spellings), None)


def added(script: ModuleType, data_dir: str) -> list[str]:
    """The options that a job adds: it resumes, and reads data where the site has them."""
    resume, data = spelling(script, "resume"), spelling(script, "data_dir", "dataset_root")
    return [*([resume, "auto"] if resume else []), *([data, data_dir] if data and data_dir else [])]


def complete(line: Line, data_dir: str) -> str:
    """The line as a job runs it."""
    script = importlib.import_module(line.words[0].removesuffix(".py"))
    return " ".join([*line.words, *added(script, data_dir)])


# ---- how they stand ------------------------------------------------------------------------------------------------------


def queue() -> dict[str, Task]:
    """This user's tasks in SLURM's queue, by the keys of their lines. Empty where no SLURM answers."""
    if shutil.which("squeue") is None:
        return {}
    command = ["squeue", "--me", "--noheader", "--array", "--format=%K|%F|%T|%L|%r|%j"]
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode:  # locks still tell what runs
        print(f"squeue does not answer: {answer.stderr.strip().partition(chr(10))[0]}", file=sys.stderr)
    tasks = {}
    for row in answer.stdout.splitlines():
        number, job, state, left, reason, name = row.split("|", 5)
        prepared = RECORDS / f"{name}.lines"  # jobs are called after it
        if number.isdigit() and prepared.is_file():
            key = prepared.read_text().splitlines()[int(number) - 1].partition("\t")[0]
            waits = state == "PENDING"
            tasks[key] = Task(f"{job}_{number}", "waiting" if waits else "running", reason if waits else left)
    return tasks


def state_of(line: Line, tasks: dict[str, Task]) -> str:
    """One of STATES. A line is resumable if it was begun and nobody is at it."""
    if is_finished(line):
        return "finished"
    if is_locked(line.record("lock")):
        return "running"
    if line.key in tasks:
        return tasks[line.key].state
    ended = line.record("exit")
    if ended.exists() and int(ended.read_text()) not in (0, RESUMABLE):
        return "failed"
    return "resumable" if is_begun(line) else "new"


def is_finished(line: Line) -> bool:
    if line.models:
        return all(has_model(line, index) for index in line.models)
    return (line.path / RESULT).exists()


def is_begun(line: Line) -> bool:
    if line.models:
        return any((line.final / f"{index}.last.pkl").exists() or has_model(line, index) for index in line.models)
    return (line.path / LAST).exists()


def has_model(line: Line, index: int) -> bool:
    """True if the training of a zoo's model is over."""
    return (line.final / f"{index}.pt").exists() and not (line.final / f"{index}.last.pkl").exists()


# ---- progress ------------------------------------------------------------------------------------------------------------


def progress(line: Line) -> str:
    """The models, jobs or metrics of a run so far, in a few words."""
    if line.models:
        done = sum(has_model(line, index) for index in line.models)
        failed = sum((line.final / f"{index}.failed.json").exists() for index in line.models)
        begun = [index for index in line.models if (line.final / f"{index}.last.pkl").exists()]
        rows = [last_row(line.final / f"{index}.csv", {}) for index in begun]
        return "; ".join(filter(None, [f"{done} of {len(line.models)} models{and_failed(failed)}", *rows]))
    if (line.path / RESULT).exists():
        result = read_json(line.path / RESULT)
        metrics = ", ".join(f"{name} {metric.mean:.4g}" for name, metric in key_metrics(result).items())
        return metrics + and_failed(len(result.get("failed", {})))
    jobs = [*line.path.glob("cells/*.json"), *line.path.glob("run*.json")]  # stitching layers, trainings, pairs
    if jobs:
        failed = sum(path.name.endswith(".failed.json") for path in jobs)
        return f"{len(jobs) - failed} done{and_failed(failed)}"
    args = line.path / ARGS
    return last_row(line.path / "metrics.csv", read_json(args) if args.exists() else {})


def and_failed(n: int) -> str:
    return f", {n} failed" if n else ""


# ---- commands ------------------------------------------------------------------------------------------------------------


def status(path: Path, lines: list[Line]) -> None:
    """Print how the lines of a sweep stand."""
    tasks = queue()
    states = [state_of(line, tasks) for line in lines]
    print(f"{path}: {summary(states)}\n{'line':>5}  {'state':<9}  {'job':<10}  {'left, or why':<16}  figures so far")
    for line, state in zip(lines, states):
        task = tasks.get(line.key) if state in ("running", "waiting") else None
        job, left = (task.job, task.left) if task else ("", "")
        print(f"{line.number:>5}  {state:<9}  {job:<10}  {left:<16}  {progress(line)}".rstrip())
        print(f"{'':7}{' '.join(line.words)}")
        if state == "failed":
            output = line.record("out")
            print(f"       exit status {line.record('exit').read_text().strip()}; the end of {output}:")
            last = output.read_text(errors="replace").splitlines()[-LOG_LINES:] if output.exists() else []
            print("".join(f"         | {text}\n" for text in last), end="")


def summary(states: list[str]) -> str:
    counts = [f"{states.count(state)} {state}" for state in STATES if state in states]
    return f"{len(states)} {'lines' if len(states) > 1 else 'line'}: {', '.join(counts)}"


def prepare(path: Path, lines: list[Line], data_dir: str, *, show: bool) -> None:
    """Print what starts the lines: the prepared file, numbers of lines that nobody is at, jobs that have others.

    `show` writes nothing, and says which commands those would be.
    """
    tasks = queue()
    states = [state_of(line, tasks) for line in lines]
    left = [line for line, state in zip(lines, states) if state not in ("finished", "running", "waiting")]
    jobs = sorted({tasks[line.key].job.partition("_")[0] for line in lines if line.key in tasks}, key=int)
    commands = {line.number: f"{line.key}\t{complete(line, data_dir)}" for line in lines}
    content = "".join(f"{commands.get(number, '')}\n" for number in range(1, lines[-1].number + 1))
    prepared = RECORDS / f"{path.stem}-{hashlib.sha256(content.encode()).hexdigest()[:8]}.lines"
    print(f"{path}: {summary(states)}", file=sys.stderr)
    if show:
        for line in left:
            print(f"{line.number:>5}  {complete(line, data_dir)}", file=sys.stderr)
    else:
        write_text(prepared, content)
    print(prepared, ",".join(str(line.number) for line in left), ":".join(jobs), sep="\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("status", "prepare"))
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--data-dir", default="", help="where data lie [each script's default]")
    parser.add_argument("--show", action="store_true", help="write nothing, and say what would be run")
    args = parser.parse_args(argv)
    if args.sweep.is_relative_to(Path.cwd()):
        args.sweep = args.sweep.relative_to(Path.cwd())  # for messages
    try:
        if len(args.data_dir.split()) > 1:
            raise InputError(f"--data-dir {args.data_dir!r}: words are separated by spaces, so a path has none")
        lines = read(args.sweep)
        if args.command == "status":
            status(args.sweep, lines)
        else:
            prepare(args.sweep, lines, args.data_dir, show=args.show)
    except (InputError, OSError) as error:
        print(f"{parser.prog}: error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
