"""test_ddp.py with torchrun: the same files from any number of processes and nodes, after kills, and no hang."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from running import free_port, together
from scoring_world import make_world

import test as test_script
import test_ddp as test_ddp_script

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
USERS = 31  # no number of processes used here divides it


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"), users=USERS)


def flags(world: Path, results: Path) -> list[str]:
    """Flags of test.py and test_ddp.py."""
    found = ["--ckpt_path", world / "ckpt", "--data_path", world, "--dataset", "toy", "--results_file", results]
    found += [
        "--test_batch_size",
        "4",
        "--num_beams",
        "8",
        "--metrics",
        "hit@1,hit@8,ndcg@8",
        "--test_prompt_ids",
        "0,2,7",
    ]
    return [str(flag) for flag in found]


def start(world: Path, results: Path, processes: int, *torchrun: str, more: tuple[str, ...] = ()) -> subprocess.Popen:
    """test_ddp.py under torchrun."""
    where = torchrun or (f"--master_port={free_port()}",)
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", *where),
            *("test_ddp.py", *flags(world, results), *more),
        ],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen, code: int | None = 0) -> str:
    output, _ = process.communicate(timeout=120)
    assert code is None or process.returncode == code, output
    return output


def in_process(world: Path, results: Path, *more: str) -> Path:
    """The results file of test.py, run here and with one thread, as the processes of torchrun have."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    test_script.main([*flags(world, results), *more])
    torch.set_num_threads(threads)
    return results


@pytest.fixture(scope="module")
def single(world, tmp_path_factory) -> Path:
    """The results file of an uninterrupted test.py."""
    return in_process(world, tmp_path_factory.mktemp("single") / "r.json")


def assert_same(results: Path, single: Path, count: int = 3 * USERS) -> None:
    """Predictions equal to the byte (items, scores, order), and the same metrics to the last digit."""
    names = sorted(path.name for path in results.parent.iterdir())
    assert names == ["r.json", "r.predictions.jsonl"]
    predictions = results.with_name("r.predictions.jsonl").read_text().splitlines()
    wanted = single.with_name("r.predictions.jsonl").read_text().splitlines()
    assert len(predictions) == len(wanted) == count
    for line, other in zip(map(json.loads, predictions), map(json.loads, wanted), strict=True):
        scores, others = line.pop("scores"), other.pop("scores")
        assert line == other
        assert scores == pytest.approx(others, abs=1e-5)
    found, expected = json.loads(results.read_text()), json.loads(single.read_text())
    for key in ("mean_results", "min_results", "max_results", "all_prompt_results"):
        assert found[key] == expected[key]


@pytest.mark.parametrize("processes", [2, 3, 5])  # one process: tests/test_scoring.py
def test_any_number_of_processes_gives_the_same(world, single, tmp_path, processes):
    together(test_ddp_script.main, flags(world, tmp_path / "r.json"), processes)
    assert_same(tmp_path / "r.json", single)


def test_two_nodes(world, single, tmp_path):
    """The same from two nodes: both have a local rank 0, so a local rank that is taken for a global one would show."""
    together(test_ddp_script.main, flags(world, tmp_path / "r.json"), nodes=2)
    assert_same(tmp_path / "r.json", single)


def test_two_nodes_without_a_disk_that_both_see_stop_with_one_line(world, tmp_path):
    """Two torchrun agents on loopback."""
    port, nodes = free_port(), []
    for node in (0, 1):
        where = ("--nnodes=2", f"--node_rank={node}", "--master_addr=127.0.0.1", f"--master_port={port}")
        nodes.append(start(world, tmp_path / str(node) / "r.json", 1, *where))
    said = [finish(node, code=1) for node in nodes]
    assert "every process must see this folder" in said[1]


def predictions(folder: Path) -> int:
    """How many predictions there are in the files of an unfinished run."""
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("part-*.jsonl"))


def wait_for_lines(run: subprocess.Popen, folder: Path, count: int) -> None:
    """Return as soon as a run has `count` predictions."""
    while predictions(folder) < count:
        assert run.poll() is None
        time.sleep(0.01)


def test_killed_processes_lose_nothing(world, tmp_path):
    """kill -9 of everything, then another number of processes: the files of an uninterrupted run."""
    every = ("--test_prompt_ids", "all", "--test_batch_size", "1", "--num_beams", "40")  # slow enough to be caught
    whole = in_process(world, tmp_path / "whole/r.json", *every)
    run = start(world, tmp_path / "cut/r.json", 3, more=every)
    wait_for_lines(run, tmp_path / "cut/r.partial", 20)
    for pid in [run.pid, *children(run.pid)]:
        os.kill(pid, signal.SIGKILL)
    finish(run, code=-signal.SIGKILL)
    output = finish(start(world, tmp_path / "cut/r.json", 2, more=every))
    assert "going on: " in output
    assert_same(tmp_path / "cut/r.json", whole, 17 * USERS)


def children(parent: int) -> list[int]:
    """The processes that a process has started: torchrun's workers."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rsplit(")", 1)[1].split()[1]) == parent:
                found.append(int(stat.parent.name))
    return found


def test_a_process_that_dies_ends_the_run_with_its_error(world, tmp_path):
    (tmp_path / "r.partial/part-00001.jsonl").mkdir(parents=True)  # process 1 finds what is not its own
    output = finish(start(world, tmp_path / "r.json", 3), code=1)
    assert "part-00001.jsonl: was not written by a test" in output
    assert not (tmp_path / "r.json").exists()


def test_a_process_that_is_killed_ends_the_run(world, tmp_path):
    run = start(world, tmp_path / "r.json", 3, more=("--test_prompt_ids", "all", "--test_batch_size", "1"))
    wait_for_lines(run, tmp_path / "r.partial", 3)
    victim = next(pid for pid in children(run.pid) if environment(pid).get("RANK") == "2")
    os.kill(victim, signal.SIGKILL)
    assert "Signal 9" in finish(run, code=1)


def environment(pid: int) -> dict[str, str]:
    try:
        pairs = Path(f"/proc/{pid}/environ").read_text().split("\0")
    except OSError:
        return {}
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def test_a_mistake_is_told_once(world, tmp_path):
    (tmp_path / "r.json").write_text("{}")
    output = finish(start(world, tmp_path / "r.json", 2), code=1)
    assert output.count("error: ") == 1 and "name another --results_file" in output
