"""Sweeps on a real SLURM: throttle, time limit, preemption, cancelling, a node that dies, two submits at once, chains, GPUs."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.slurm.cluster import Cluster, Project, command_line, wait_until

pytestmark = pytest.mark.slow

Submitting = Callable[..., Project]

ZOO = "train_zoo.py --arch mCNN --width 2 --dataset mnist --batch-size 16 --device cpu"
SHORT = [f"{ZOO} --epochs 1 --seed {seed}" for seed in range(6)]
LONG_EPOCHS = 200
LONG = f"{ZOO} --epochs {LONG_EPOCHS}"  # some ten seconds
LONG_RUN = Path(f"results/zoo/mnist-mCNN-epochs.{LONG_EPOCHS}-batch-size.16-width.2")
WITHOUT_DATA = "swarm_transformer.py -data CIFAR10 -n_hidden 4"
SSL = (
    "train_ssl.py --dataset mnist --encoder cifar10_resnet20 --encoder-width 1 --image-size 8 --batch-size 50 --lr 0.01 "
    "--warmup-epochs 1 --test-every 1000 --tx sca rot --equi-tx rot --device cpu --epochs 12"
)
CLUSTERING = "amortised_clustering.py -type Swarm -n_hidden 4 -n_iter 2 -tasks 40 -bs 4 -lr 0.01 -max_epochs 30 -device cpu"


def weights(project: Project) -> dict[str, torch.Tensor]:
    return torch.load(project.folder / LONG_RUN / "0.pt", weights_only=True)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What LONG leaves that nobody disturbs."""
    project = Project(tmp_path_factory.mktemp("undisturbed"), os.environ | {"OMP_NUM_THREADS": "1"}, LONG)
    subprocess.run([sys.executable, *LONG.split()], cwd=project.folder, env=project.environment, check=True)
    return weights(project)


def assert_same(project: Project, expected: dict[str, torch.Tensor]) -> None:
    found = weights(project)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def epochs_trained(project: Project) -> int:
    table = project.folder / LONG_RUN / "0.csv"
    return len(table.read_text().splitlines()) - 1 if table.exists() else 0


def trains(project: Project) -> None:
    """Wait until LONG has trained for some more epochs, far from its end."""
    already = epochs_trained(project)
    wait_until(lambda: epochs_trained(project) > already + 5, "training")
    assert epochs_trained(project) < LONG_EPOCHS - 10


def test_an_array_of_six_two_at_a_time(cluster: Cluster, submitting: Submitting) -> None:
    project = submitting("# six", "", *SHORT)
    job = project.submit(own=["--at-once", "2"])
    most = 0
    while cluster.call("squeue", "-h", "-j", job):
        most = max(most, cluster.running())
        time.sleep(0.1)
    assert most == 2
    assert project.states() == dict.fromkeys(range(3, 9), "finished")  # by their place in the file
    assert len(list(project.folder.glob("results/zoo/*/0.pt"))) == 6
    # once more: nothing is left, and who starts a line all the same is told so at once
    out, err = project.call("submit.sh")
    assert out.strip() == "" and "nothing is left" in err
    (lines,) = project.folder.glob("results/slurm/sweep-*.lines")
    before = sorted((path, path.stat().st_mtime_ns) for path in project.folder.glob("results/zoo/*/*"))
    batch = [str(project.folder / "slurm" / "array.slurm"), str(project.folder), str(lines)]
    again = cluster.call("sbatch", "--parsable", "--array=3", "--time=5", *batch, cwd=project.folder).strip()
    cluster.wait(again)
    assert "line 3: finished" in project.job_output(3) and "nothing to do" in project.run_output()
    assert before == sorted((path, path.stat().st_mtime_ns) for path in project.folder.glob("results/zoo/*/*"))


def test_a_run_longer_than_its_limit(cluster: Cluster, submitting: Submitting, undisturbed: dict[str, torch.Tensor]) -> None:
    """SLURM's own signal ahead of the limit: saved, requeued, resumed, and the other task of the array left alone.

    The last task of an array has the array's own id: requeueing that would start both again.
    """
    project = submitting(SHORT[0], LONG)
    job = project.submit("--hold", "--time=30")
    cluster.call("scontrol", "release", f"{job}_1")
    wait_until(lambda: project.states()[1] == "finished", "the short run")
    cluster.call("scontrol", "release", f"{job}_2")
    trains(project)
    with frozen(project):  # with a limit of a minute the signal comes at the next tick, and is to come in mid-run
        cluster.call("scontrol", "update", f"JobId={job}_2", "TimeLimit=1")
        time.sleep(cluster.seconds_to_the_next_tick() + 1)
    wait_until(lambda: cluster.tasks(job)["2"]["JobState"] == "PENDING", "the requeue")
    cluster.call("scontrol", "update", f"JobId={job}_2", "TimeLimit=30")  # once is enough
    cluster.wait(job)
    tasks = cluster.tasks(job)
    assert tasks["2"]["Restarts"] == "1" and tasks["1"]["Restarts"] == "0"
    assert tasks["2"]["JobId"] == job, "the last task has another id: this test no longer shows what it is for"
    said = project.job_output(2)
    assert "stopped by USR1, and resumable" in said and "back into the queue" in said and said.rstrip().endswith("finished")
    assert "stopped by SIGUSR1" in project.run_output()
    assert project.job_output(1).count(" on ") == 1
    assert_same(project, undisturbed)


def test_preempted_and_cancelled(cluster: Cluster, submitting: Submitting, undisturbed: dict[str, torch.Tensor]) -> None:
    project = submitting(LONG)
    job = project.submit()
    trains(project)
    with frozen(project):  # meanwhile nobody else gets at it
        assert project.states() == {1: "running"}
        assert project.submit() == job  # what waits for the sweep has to wait for that
        assert "another process is at it" in run_line(project)
    # SLURM preempts as it requeues: SIGTERM, and after some time SIGKILL
    cluster.call("scontrol", "requeue", f"{job}_1")
    wait_until(lambda: project.states() == {1: "waiting"}, "the queue")
    assert "stopped by TERM, and resumable" in project.job_output(1)
    trains(project)
    cluster.call("scancel", job)
    cluster.wait(job)
    assert project.states() == {1: "resumable"}
    assert "stopped by SIGTERM" in project.run_output()
    again = project.submit()
    assert int(again) > int(job)
    cluster.wait(again)
    assert_same(project, undisturbed)


@contextmanager
def frozen(project: Project) -> Iterator[None]:
    """The run of a project, not what watches over it, stands still: signals reach it when it goes on."""
    (run,) = [process for process, command in processes_of(project).items() if "train_zoo.py" in command]
    os.kill(run, signal.SIGSTOP)
    yield
    os.kill(run, signal.SIGCONT)


def run_line(project: Project) -> str:
    """What a second process at line 1 says, which leaves it alone."""
    (lines,) = project.folder.glob("results/slurm/sweep-*.lines")
    command = [str(project.folder / "slurm" / "run_line.sh"), str(lines), "1"]
    done = subprocess.run(command, cwd=project.folder, env=project.environment, capture_output=True, text=True)
    assert done.returncode == 75
    return done.stdout


def test_a_node_that_dies(cluster: Cluster, submitting: Submitting, undisturbed: dict[str, torch.Tensor]) -> None:
    """A killed slurmd does not matter to a run; with the whole node gone, SLURM starts the run again, and it goes on."""
    project = submitting(LONG)
    job = project.submit()
    trains(project)
    cluster.kill_slurmd()
    trains(project)
    for process in [*processes_of(project), *cluster.daemons_of(job)]:
        os.kill(process, signal.SIGKILL)
    cluster.node_is_down()
    cluster.start_slurmd()
    until = time.monotonic() + 60
    while project.states() == {1: "resumable"} and time.monotonic() < until:  # until SLURM has put it back
        time.sleep(0.5)
    assert project.states() != {1: "resumable"}
    cluster.wait(job)
    assert cluster.tasks(job)["1"]["Restarts"] == "1"
    assert_same(project, undisturbed)


def processes_of(project: Project) -> dict[int, str]:
    """The batch script and its run: what has the project as its working directory, with the command lines."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is somebody else's
            if (folder / "cwd").resolve() == project.folder:
                found[int(folder.name)] = command_line(folder)
    assert len(found) >= 2
    return found


def test_two_submits_at_once_and_a_line_that_fails(cluster: Cluster, submitting: Submitting) -> None:
    project = submitting(*SHORT[:2], WITHOUT_DATA)
    both = [project.start("submit.sh") for _ in range(2)]
    said = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted("nothing is left" in err for _, err in said) == [False, True]
    (job,) = {out.strip() for out, _ in said}
    cluster.wait(job)
    assert project.states() == {1: "finished", 2: "finished", 3: "failed"}
    assert project.run_output().count("epoch   1") == 2  # each was trained once
    told = project.call("status.sh")[0]
    assert "2 finished, 1 failed" in told and "exit status 2" in told and "CIFAR10 is not there" in told
    assert "FAILED with exit status 2" in project.job_output(3)
    assert cluster.tasks(job)["3"]["JobState"] == "FAILED"


def test_jobs_run_what_was_submitted(cluster: Cluster, submitting: Submitting) -> None:
    project = submitting(SHORT[0])
    job = project.submit("--hold")
    revision = subprocess.run(["git", "rev-parse", "HEAD"], cwd=project.folder, capture_output=True, text=True).stdout.strip()
    script = project.folder / "train_zoo.py"
    script.write_text(script.read_text().replace("finished after", "changed, and finished after"))
    project.write(SHORT[1])  # sweeps may be changed freely
    assert "uncommitted changes" in project.call("submit.sh", status=2)[1]
    (project.folder / "common" / "new.py").touch()  # so may not what a commit has forgotten
    assert "common/new.py" in project.call("submit.sh", status=2)[1]
    changed = project.submit(own=["--uncommitted"])
    cluster.call("scontrol", "release", job)
    cluster.wait(job, changed)
    records = [json.loads(path.read_text()) for path in project.folder.glob("results/zoo/*/0.json")]
    revisions = {record["options"]["seed"]: record["git_revision"] for record in records}
    assert revisions[0] == revision and revisions[1].startswith(f"{revision}-dirty-")
    assert project.run_output().count("changed, and finished") == 1


def test_everything_in_order(cluster: Cluster, submitting: Submitting) -> None:
    """reproduce.sh with sweeps of seconds: stitching begins when the zoo is there, and not without it."""
    project = submitting()
    sweeps = project.folder / "slurm" / "sweeps"
    for i, path in enumerate(sweeps.glob("*.txt")):  # different runs: what has finished is not submitted again
        path.write_text(f"deepsets_exercise.py --steps 2 --batch-size 4 --no-sweep --seed {i}\n")
    stitching = (
        "cifar10_stitching.py --arch mCNN --dataset mnist --zoo results/zoo/mnist-mCNN-epochs.1-batch-size.16-width.2 "
        "--recipe {} --retrain_repeats 1 --stitch_epochs 1 --layers 14\n"
    )
    (sweeps / "stitching.txt").write_text(stitching.format("standard"))
    (sweeps / "stitching_crossval.txt").write_text(stitching.format("lowrank --rank 1"))
    (sweeps / "zoo.txt").write_text("".join(f"{SHORT[0]} --num_models 2 --num_chunks 2 --chunk {i}\n" for i in (0, 1)))
    reproduce = str(project.folder / "slurm" / "reproduce.sh")
    text = Path(reproduce).read_text()
    papers = [path for path in sweeps.glob("*.txt") if re.search(rf"submit {path.stem}\b", text)]
    out = subprocess.run([reproduce], cwd="/", env=project.environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    jobs = out.split()
    assert len(jobs) == len(papers) > 10
    cluster.wait(*jobs)
    tasks = [task for job in jobs for task in cluster.tasks(job).values()]
    zoo, stitched = ([task for task in tasks if task["JobName"].startswith(name)] for name in ("zoo-", "stitching"))
    assert len(zoo) == len(stitched) == 2 and all(task["JobState"] == "COMPLETED" for task in tasks)
    assert min(task["StartTime"] for task in stitched) >= max(task["EndTime"] for task in zoo)
    assert len(list(project.folder.glob("results/cifar10_stitching/*/result.json"))) == 2


@pytest.mark.parametrize("line", [SSL, CLUSTERING], ids=["ssl", "clustering"])
def test_two_processes_of_torchrun(line: str, cluster: Cluster, submitting: Submitting) -> None:
    """multi_gpu.slurm with two tasks and gloo; the signal ahead of the limit reaches both, and they go on together."""
    project = submitting(line)
    job = project.submit("--ntasks=2", "--ntasks-per-node=2", own=["--multi-gpu"])

    def epochs() -> int:
        return sum(len(path.read_text().splitlines()) for path in project.folder.glob("results/*/*/metrics.csv"))

    wait_until(lambda: epochs() > 2, "training")
    cluster.call("scancel", "--batch", "--signal=USR1", f"{job}_1")
    cluster.wait(job)
    assert cluster.tasks(job)["1"]["Restarts"] == "1", project.run_output()
    logs = [path.read_text() for path in project.folder.glob("results/*/*/log")]
    assert "stopped by SIGUSR1 after step" in "".join([project.run_output(), *logs])
    assert "User defined signal" not in project.run_output()  # torchrun waits for the save, and does not die of the signal
    (path,) = project.folder.glob("results/*/*/result.json")
    result = json.loads(path.read_text())
    if line == SSL:
        assert result["processes"] == 2 and result["epochs"] == 12 and result["steps"] == 24


def test_a_zoo_that_takes_all_of_a_node(
    cluster: Cluster, submitting: Submitting, undisturbed: dict[str, torch.Tensor]
) -> None:  # fmt: skip
    """multi_gpu.slurm starts a script of many jobs once, with --jobs; all are stopped ahead of the limit, and go on."""
    project = submitting(f"{LONG} --num_models 2")
    job = project.submit("--ntasks=2", "--ntasks-per-node=2", own=["--multi-gpu"])
    trains(project)
    cluster.call("scancel", "--batch", "--signal=USR1", f"{job}_1")
    cluster.wait(job)
    assert cluster.tasks(job)["1"]["Restarts"] == "1", project.run_output()
    assert "2 processes, each with" in project.run_output() and "stopped by SIGUSR1 with" in project.run_output()
    assert_same(project, undisturbed)
    assert (project.folder / LONG_RUN / "1.json").exists()
