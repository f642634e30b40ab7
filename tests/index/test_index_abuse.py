"""What people hand over to index/, broken: a row an abuse (how to break it, the command, the line that is expected).

Every row ends with one line `error: …` and status 2, without a traceback, and leaves nothing new behind.
"""

import argparse
import fcntl
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "index"))

import generate_indices
import main as index_main
from checkpoints import load_checkpoint, model_from_checkpoint
from commands import run_command
from index_world import SMALL, make_index_world, with_header

TRAIN = f"main --data_path w/e.npy --ckpt_dir w/new {SMALL} --warmup_epochs 1"
RESUME = "main --resume w/run --data_path w/e.npy --epochs 6"
MAKE = "generate --ckpt_path w/run --output_file w/o.json"
FLAT = "generate --method flat --data_path w/e.npy --output_file w/o.json"
EXTEND = "generate --extend w/D.index.json --data_path w/more.npy --output_file w/o.json"
TITLES = f"{FLAT} --item_file w/D.item.json"

Break = Callable[[Path], Any]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_index_world(tmp_path_factory.mktemp("sound"))


@pytest.fixture
def world(sound: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy to break; a command that hangs is ended after a minute."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it hangs"))
    signal.alarm(60)
    yield Path(shutil.copytree(sound, tmp_path / "w"))
    signal.alarm(0)


def run(world: Path, command: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    """Status and error lines of a command, run as from a terminal."""
    script, *words = command.replace("w/", f"{world}/").split()
    main = {"main": index_main.main, "generate": generate_indices.main}[script]
    capsys.readouterr()
    try:
        run_command(lambda: main(["--device", "cpu", *words]))
    except SystemExit as end:
        return end.code, capsys.readouterr().err.splitlines()
    return 0, capsys.readouterr().err.splitlines()


def listing(world: Path) -> list[str]:
    return sorted(str(path.relative_to(world)) for path in world.rglob("*"))


def refused(world: Path, command: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One line with `line` in it, status 2, no new file."""
    before = listing(world)
    status, errors = run(world, command, capsys)
    assert status == 2 and len(errors) == 1, errors
    assert errors[0].startswith("error: ") and line in errors[0], errors
    assert [name for name in listing(world) if name not in before and "new/" not in name and name != "new"] == []


# ---- ways to break a file ----


def text(name: str, content: str | bytes) -> Break:
    data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    return lambda w: (w / name).write_bytes(data)


def cut(name: str, share: float) -> Break:
    return lambda w: (w / name).write_bytes((w / name).read_bytes()[: int(share * (w / name).stat().st_size)])


def replaced(name: str, make: Callable[[Path], Any]) -> Break:
    """`name` becomes what `make` makes at its place (a pipe, a folder, a link)."""
    return lambda w: ((w / name).unlink(missing_ok=True), make(w / name))


def array(content: Any, **flags: Any) -> Break:
    return lambda w: np.save(w / "e.npy", content, **flags)


def header(words: str) -> Break:
    """An `.npy` with any header."""
    return text("e.npy", with_header(words))


def rows(value: float) -> np.ndarray:
    content = np.random.default_rng(0).normal(size=(90, 12))
    content[7, 3] = value
    return content.astype(np.float32)


def pth(change: Callable[[dict[str, Any]], Any]) -> Break:
    """Change the content of every checkpoint of the run."""

    def apply(world: Path) -> None:
        for path in (world / "run").glob("*.pth"):
            content = load_checkpoint(path)
            change(content)
            torch.save(content, path)

    return apply


def flag(**values: Any) -> Break:
    return pth(lambda content: [setattr(content["args"], name, value) for name, value in values.items()])


def weight(name: str, value: Any) -> Break:
    return pth(lambda content: content["state_dict"].update({name: value}))


def spoiled(number: float) -> Break:
    return pth(lambda content: content["state_dict"]["decoder.mlp_layers.4.bias"].fill_(number))


def every_pth(content: bytes) -> Break:
    return lambda w: [path.write_bytes(content) for path in (w / "run").glob("*.pth")]


def moments(change: Callable[[dict[int, Any]], Any]) -> Break:
    return pth(lambda content: change(content["optimizer"]["state"]))


def index(change: Callable[[dict[str, Any]], Any]) -> Break:
    def apply(world: Path) -> None:
        content = json.loads((world / "D.index.json").read_text())
        change(content)
        (world / "D.index.json").write_text(json.dumps(content))

    return apply


def nothing(_: Path) -> None:
    pass


def best(make: Callable[[Path], Any]) -> Break:
    return replaced("run/best_collision_model.pth", make)


DEEP, DIGITS = "[" * 200_000, '{"0": ' + "9" * 5000 + "}"
BEST, FIRST = "run/best_collision_model.pth", "encoder.mlp_layers.1.weight"
SHAPED = "{'descr': '<f4', 'fortran_order': False, 'shape': %s, }"

FILES: dict[str, tuple[Break, str, str]] = {
    # arrays
    "npy missing": (lambda w: (w / "e.npy").unlink(), TRAIN, "e.npy: no such file"),
    "npy NaN": (array(rows(np.nan)), TRAIN, "e.npy: row 7 has a number that is not finite"),
    "npy inf": (array(rows(np.inf)), FLAT, "e.npy: row 7 has a number that is not finite"),
    "npy too large": (array(rows(1e20)), TRAIN, "beyond 1e+15; scale"),
    "npy PK bytes": (text("e.npy", b"PK\x03\x04" + bytes(50)), TRAIN, "e.npy: is a zip archive"),
    "npy is npz": (lambda w: np.savez(io.FileIO(w / "e.npy", "w"), x=rows(0)), FLAT, "e.npy: is a zip archive"),
    "npy pickled": (array(np.array([[None, 1]]), allow_pickle=True), TRAIN, "e.npy: not a readable .npy"),
    "npy is a pickle": (text("e.npy", b"\x80\x04]\x94."), TRAIN, "e.npy: not a readable .npy"),
    "npy cut": (cut("e.npy", 0.5), TRAIN, "e.npy: not a readable .npy"),
    "npy cut in the header": (cut("e.npy", 0.01), FLAT, "e.npy: not a readable .npy"),
    "npy empty": (text("e.npy", b""), TRAIN, "e.npy: not a readable .npy"),
    "npy text": (text("e.npy", "1 2 3"), TRAIN, "e.npy: not a readable .npy"),
    "npy nested header": (header("(" * 100), TRAIN, "e.npy: not a readable .npy"),
    "npy header a list": (header("[1, 2]"), TRAIN, "e.npy: not a readable .npy"),
    "npy negative shape": (header(SHAPED % "(-3, 4)"), TRAIN, "e.npy: "),
    "npy huge shape": (header(SHAPED % "(10**3, 10**3)".replace("10**3", str(10**30))), TRAIN, "e.npy: not a readable"),
    "npy no axis": (header(SHAPED % "()"), TRAIN, "e.npy: has shape ()"),
    "npy version 9": (text("e.npy", b"\x93NUMPY\x09\x00" + bytes(90)), TRAIN, "e.npy: not a readable .npy"),
    "npy no rows": (array(np.empty((0, 5), np.float32)), TRAIN, "e.npy: is empty"),
    "npy one row with bn": (array(np.ones((1, 12), np.float32)), f"{TRAIN} --bn True", "has one row"),
    "npy equal rows": (array(np.ones((9, 4), np.float32)), TRAIN, "all 9 rows are the same"),
    "npy complex": (array(np.ones((9, 4), complex)), TRAIN, "e.npy: has dtype complex128"),
    "npy big endian": (array(rows(0).astype(">f4")), TRAIN, "e.npy: has dtype >f4"),
    "npy text cells": (array(np.array([["a", "b"]])), TRAIN, "e.npy: has dtype <U1"),
    "npy records": (array(np.zeros((3, 3), [("a", "f4")])), TRAIN, "e.npy: has dtype"),
    "npy a pipe": (replaced("e.npy", os.mkfifo), TRAIN, "e.npy: is a pipe, socket or device"),
    "npy a folder": (replaced("e.npy", Path.mkdir), FLAT, "e.npy: is a folder"),
    "npy a device": (nothing, TRAIN.replace("w/e.npy", "/dev/zero"), "/dev/zero: is a pipe, socket or device"),
    "npy a loop of links": (replaced("e.npy", lambda p: p.symlink_to(p)), TRAIN, "e.npy: cannot be read"),
    "npy under a file": (nothing, TRAIN.replace("w/e.npy", "w/D.item.json/e.npy"), "e.npy: cannot be read"),
    "npy other width": (
        array(np.random.rand(90, 5)),
        f"{MAKE} --data_path w/e.npy",
        "rows are 5 wide, the RQ-VAE takes 12",
    ),
    # checkpoints
    "pth NaN": (spoiled(np.nan), MAKE, "state_dict.decoder.mlp_layers.4.bias has numbers that are not finite"),
    "pth inf": (spoiled(np.inf), RESUME, "state_dict.decoder.mlp_layers.4.bias has numbers that are not finite"),
    "pth cut": (cut(BEST, 0.6), MAKE, "best_collision_model.pth: not a readable checkpoint"),
    "pth empty": (every_pth(b""), RESUME, "_model.pth: not a readable checkpoint"),
    "pth PK bytes": (every_pth(b"PK\x03\x04" + bytes(60)), MAKE, "not a readable checkpoint"),
    "pth JSON": (every_pth(b'{"args": 1}'), MAKE, "not a readable checkpoint"),
    "pth a pipe": (best(os.mkfifo), MAKE, "best_collision_model.pth: is a pipe"),
    "pth a folder": (best(Path.mkdir), MAKE, "best_collision_model.pth: is a folder"),
    "pth a device": (nothing, MAKE.replace("w/run", "/dev/zero"), "/dev/zero: is a pipe, socket or device"),
    "pth none": (lambda w: shutil.rmtree(w / "run"), MAKE, "run: no such file"),
    "pth of a long name": (nothing, MAKE.replace("w/run", f"w/{'x' * 300}"), "File name too long"),
    "run of a long name": (nothing, RESUME.replace("w/run", f"w/{'x' * 300}"), "File name too long"),
    "titles of a long name": (nothing, TITLES.replace("D.item", "x" * 300), "File name too long"),
    "index of a long name": (nothing, EXTEND.replace("D.index", "x" * 300), "File name too long"),
    "pth none to resume": (lambda w: [p.unlink() for p in (w / "run").iterdir()], RESUME, "has no epoch_…_model.pth"),
    "pth a tensor": (lambda w: torch.save(torch.ones(3), w / BEST), MAKE, "not an RQ-VAE checkpoint"),
    "pth no weights": (pth(lambda c: c["state_dict"].clear()), MAKE, "holds no weights"),
    "pth weights a list": (pth(lambda c: c.update(state_dict=[1])), MAKE, "holds no weights"),
    "pth a weight missing": (pth(lambda c: c["state_dict"].pop(FIRST)), MAKE, "do not fit its flags"),
    "pth a weight too many": (weight("x", torch.ones(2)), MAKE, "do not fit its flags (x)"),
    "pth another shape": (weight("encoder.mlp_layers.4.bias", torch.ones(5)), MAKE, "do not fit its flags"),
    "pth a weight a number": (weight(FIRST, 3), MAKE, f"its state_dict.{FIRST} is no tensor"),
    "pth a sparse weight": (weight(FIRST, torch.ones(32, 12).to_sparse()), MAKE, "is no tensor of plain numbers"),
    "pth no axis": (weight(FIRST, torch.tensor(1.0)), MAKE, "do not fit its flags"),
    "pth epoch a word": (pth(lambda c: c.update(epoch="two")), MAKE, "its epoch is 'two'"),
    "pth epoch NaN": (pth(lambda c: c.update(epoch=float("nan"))), RESUME, "its epoch is 'nan'"),
    "pth args a dictionary": (pth(lambda c: c.update(args=vars(c["args"]))), MAKE, "not an RQ-VAE checkpoint"),
    "pth no flags": (
        pth(lambda c: c.update(args=argparse.Namespace())),
        f"{MAKE} --data_path w/e.npy",
        "do not fit its flags",
    ),
    "pth epsilon NaN": (flag(sk_epsilons=[0.0, 0.0, float("nan")]), MAKE, "'nan' is not 0, or a number"),
    "pth epsilon negative": (flag(sk_epsilons=[0.0, 0.0, -0.1]), MAKE, "'-0.1' is not 0, or a number"),
    "pth epsilons too few": (flag(sk_epsilons=[0.0]), MAKE, "do not fit its flags"),
    "pth rounds 0": (flag(sk_iters=0), MAKE, "sk_iters: '0' is not a whole number from 1 on"),
    "pth layers huge": (flag(layers=[10**30]), MAKE, "layers: "),
    "pth layers words": (flag(layers=["a"]), MAKE, "layers: 'a' is not a whole number"),
    "pth layers a number": (flag(layers=32), MAKE, "do not fit its flags"),
    "pth other codes": (flag(num_emb_list=[8, 8, 9]), MAKE, "do not fit its flags"),
    "pth codes a dictionary": (flag(num_emb_list={"a": 1}), MAKE, "num_emb_list: "),
    "pth bn maybe": (flag(bn="maybe"), MAKE, "bn: 'maybe' is not True or False"),
    "pth bn where there is none": (flag(bn=True), MAKE, "do not fit its flags"),
    "pth digits": (flag(epochs=10**600), MAKE, "is not a whole number from 1"),
    "pth thousands of digits": (flag(epochs=10**5000), MAKE, "not a readable checkpoint"),
    "pth learner": (flag(learner="magic"), RESUME, "learner: invalid choice"),
    "pth without its embeddings": (flag(data_path=""), MAKE, "does not say which embeddings"),
    "pth no optimiser": (pth(lambda c: c.pop("optimizer")), RESUME, "optimiser or random state is damaged"),
    "pth optimiser a list": (pth(lambda c: c.update(optimizer=[1])), RESUME, "optimiser or random state is damaged"),
    "pth moments NaN": (moments(lambda s: s[0]["exp_avg"].fill_(np.nan)), RESUME, "moments that are not finite"),
    "pth moments missing": (moments(lambda s: s.pop(2)), RESUME, "moments of some weights are missing"),
    "pth moments cut": (moments(lambda s: s[0].update(exp_avg=torch.ones(3))), RESUME, "moments of another shape"),
    "pth random state": (pth(lambda c: c["resume"].update(rng=torch.ones(3))), RESUME, "random state is damaged"),
    "pth resume a list": (pth(lambda c: c.update(resume=[1])), RESUME, "its resume holds no random state"),
    "pth optimiser of nothing": (pth(lambda c: c.update(optimizer={})), RESUME, "optimiser or random state is damaged"),
    "pth epsilons None": (flag(sk_epsilons=None), RESUME, "--sk_epsilons has 0 values"),
    "pth layers none": (flag(layers=[]), RESUME, "--layers: expected at least one argument"),
    "pth learning rate a flag": (flag(lr="--resume"), RESUME, "lr: "),
    "pth epochs a flag": (flag(epochs="--help"), RESUME, "epochs: "),
    "pth embeddings a device": (flag(data_path="/dev/zero"), MAKE, "/dev/zero: is a pipe"),
    "pth best loss NaN": (pth(lambda c: c.update(best_loss=float("nan"))), RESUME, "is NaN"),
    "pth best loss a word": (pth(lambda c: c.update(best_loss="low")), RESUME, "is damaged"),
    "pth other embeddings": (array(rows(0)), RESUME, "not the embeddings that this run began with"),
    # index files
    "index missing": (lambda w: (w / "D.index.json").unlink(), EXTEND, "D.index.json: no such file"),
    "index key 01": (index(lambda i: i.update({"01": i.pop("1")})), EXTEND, 'has 90 items but no key "1"'),
    "index key ²": (index(lambda i: i.update({"²": i.pop("2")})), EXTEND, 'has 90 items but no key "2"'),
    "index key -1": (index(lambda i: i.update({"-1": i.pop("89")})), EXTEND, 'no key "89"'),
    "index nested": (text("D.index.json", DEEP), EXTEND, "D.index.json: is nested too deeply"),
    "index nested objects": (text("D.index.json", '{"0":' * 100_000), EXTEND, "is nested too deeply"),
    "index digits": (text("D.index.json", DIGITS), EXTEND, "D.index.json: not UTF-8 JSON"),
    "index key twice": (text("D.index.json", '{"0": ["<a_1>"], "0": ["<a_2>"]}'), EXTEND, "has the key '0' twice"),
    "index cut": (cut("D.index.json", 0.7), EXTEND, "D.index.json: not UTF-8 JSON"),
    "index not UTF-8": (text("D.index.json", b'{"0": ["\xff"]}'), EXTEND, "D.index.json: not UTF-8 JSON"),
    "index PK bytes": (text("D.index.json", b"PK\x03\x04"), EXTEND, "D.index.json: not UTF-8 JSON"),
    "index a list": (text("D.index.json", "[]"), EXTEND, "expected a non-empty object"),
    "index empty": (text("D.index.json", "{}"), EXTEND, "expected a non-empty object"),
    "index a pipe": (replaced("D.index.json", os.mkfifo), EXTEND, "D.index.json: is a pipe"),
    "index a folder": (replaced("D.index.json", Path.mkdir), EXTEND, "D.index.json: is a folder"),
    "index tokens a text": (index(lambda i: i.update({"3": "<a_1>"})), EXTEND, 'item "3" has'),
    "index tokens none": (index(lambda i: i.update({"3": []})), EXTEND, 'item "3" has'),
    "index other digits": (index(lambda i: i.update({"3": ["<a_٣>", "<b_1>", "<c_1>"]})), EXTEND, 'item "3" has'),
    "index padded": (index(lambda i: i.update({"3": ["<a_01>", "<b_1>", "<c_1>"]})), EXTEND, 'item "3" has'),
    "index code of 20 digits": (index(lambda i: i["3"].__setitem__(0, f"<a_{'9' * 20}>")), EXTEND, 'item "3" has'),
    "index letters": (index(lambda i: i["3"].__setitem__(1, "<a_1>")), EXTEND, 'item "3" has'),
    "index levels": (index(lambda i: i["3"].pop()), EXTEND, 'item "3" has 2 tokens'),
    "index tokens numbers": (index(lambda i: i.update({"3": [1, 2, 3]})), EXTEND, 'item "3" has'),
    "index a number beyond all": (text("D.index.json", '{"0": 1e999}'), EXTEND, 'item "0" has'),
    "index a surrogate": (text("D.index.json", '{"0": ["\\ud800"]}'), EXTEND, 'item "0" has'),
    "index other codes": (
        index(lambda i: i["3"].__setitem__(0, "<a_9>")),
        f"{EXTEND} --ckpt_path w/run",
        "codes that the RQ-VAE",
    ),
    "index of as many items": (nothing, EXTEND.replace("more", "e"), "old ones first"),
    "index of other items": (
        lambda w: np.save(w / "more.npy", np.roll(np.load(w / "more.npy"), 1, 0)),
        f"{EXTEND} --ckpt_path w/run",
        "not the items of",
    ),
    # titles
    "titles missing": (lambda w: (w / "D.item.json").unlink(), TITLES, "D.item.json: no such file"),
    "titles nested": (text("D.item.json", DEEP), TITLES, "D.item.json: is nested too deeply"),
    "titles a list": (text("D.item.json", "[1]"), TITLES, "expected an object of items"),
    "titles of fewer": (text("D.item.json", '{"0": {"title": "x"}}'), TITLES, 'has no item "1"'),
    "titles a number": (text("D.item.json", '{"0": {"title": 5}}'), TITLES, 'item "0": title is no text'),
    "titles a surrogate": (text("D.item.json", '{"0": {"title": "\\udc00"}}'), TITLES, 'item "0": title is no text'),
    "titles a pipe": (replaced("D.item.json", os.mkfifo), TITLES, "D.item.json: is a pipe"),
    # places
    "output there": (text("o.json", "mine"), MAKE, "o.json: is there already"),
    "output other data": (
        nothing,
        f"{MAKE.replace('o.json', 'D.item.json')} --overwrite",
        "is there and no index file",
    ),
    "output the embeddings": (nothing, f"{MAKE.replace('o.json', 'e.npy')} --overwrite", "is there and no index file"),
    "output a folder": (lambda w: (w / "o.json").mkdir(), f"{MAKE} --overwrite", "o.json: is there and no file"),
    "output a pipe": (lambda w: os.mkfifo(w / "o.json"), f"{MAKE} --overwrite", "o.json: is there and no file"),
    "output the root": (nothing, MAKE.replace("w/o.json", "/"), "--output_file: '/' is not the name of a file"),
    "output the folder above": (nothing, MAKE.replace("w/o.json", "w/.."), "is not the name of a file"),
    "titles the root": (nothing, TITLES.replace("w/D.item.json", "/"), "--item_file: '/' is not the name of a file"),
    "output under a file": (nothing, MAKE.replace("w/o", "w/e.npy/o"), "cannot be written"),
    "output in /proc": (nothing, MAKE.replace("w/o", "/proc/o"), "cannot be written"),
    "output of a long name": (nothing, MAKE.replace("w/o", f"w/{'x' * 300}"), "cannot be written"),
    "report a folder": (lambda w: (w / "o.report.json").mkdir(), MAKE, "o.report.json: is there and no file"),
    "picture a folder": (lambda w: (w / "o.report.png").mkdir(), MAKE, "o.report.png: is there and no file"),
    "runs in a file": (text("new", "mine"), TRAIN, "cannot be written"),
    "runs under a file": (nothing, TRAIN.replace("w/new", "w/e.npy/new"), "cannot be written"),
    "runs in /proc": (nothing, TRAIN.replace("w/new", "/proc/new"), "cannot be written"),
}


@pytest.mark.parametrize("name", FILES)
def test_broken_files_and_places(world: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    breaks, command, line = FILES[name]
    breaks(world)
    refused(world, command, line, capsys)


FLAGS: list[tuple[str, str, str]] = [
    *((TRAIN, f"--{name} {value}", f"--{name}: ") for name, values in {
        "epochs": f"0 -1 nan 1.5 x {10**400}", "batch_size": "0 -5", "eval_step": "0", "num_workers": "-1", "save_limit": "0 -1",
        "warmup_epochs": "-1 inf", "kmeans_iters": "0", "balance_rounds": "-1", "sk_iters": "0 -1",
        "lr": "nan inf 0 -1 x", "weight_decay": "-3 nan inf", "dropout_prob": "1 -0.1 nan", "beta": "-1 nan",
        "quant_loss_weight": "nan -1 inf", "sk_epsilons": "-1 nan inf 1e-320", "e_dim": "0 -1 9999999999", "layers": "0 -3 x",
        "num_emb_list": "1 0 -4 2.5", "seed": f"-1 {2**64} nan", "bn": "maybe 2", "kmeans_init": "maybe", "learner": "magic",
        "lr_scheduler_type": "cosine", "loss_type": "huber", "preset": "slow", "init": "zeros", "kmeans_rows": "some",
    }.items() for value in values.split()),
    *((MAKE, f"--{name} {value}", f"--{name}: ") for name, values in {
        "max_rounds": "-1 nan", "batch_size": "0", "kmeans_iters": "0", "seed": f"-1 {2**64}",
        "num_emb_list": "1 0", "method": "x",
    }.items() for value in values.split()),
    (TRAIN, "--sk_epsilons 0 0.003", "--sk_epsilons has 2 values, --num_emb_list 3"),
    (TRAIN, "--num_emb_list " + "4 " * 27, "26 levels at most"),
    (TRAIN, "--device abacus", "--device abacus: no such device"),
    (TRAIN, "--device meta", "--device meta: no such device"),
    (TRAIN, "--batch", "unrecognized arguments: --batch"),
    (TRAIN, "--sk_epsilons", "expected at least one argument"),
    (TRAIN, "--bn True --batch_size 1", "needs a --batch_size of 2"),
    (TRAIN, "--bn True --init pca", "--init pca: needs"),
    (TRAIN, "--kmeans_rows all --kmeans_init False", "contradicts"),
    (TRAIN, "--data_path=", "--data_path: give"),
    (TRAIN, "--ckpt_dir=", "--ckpt_dir: give"),
    (TRAIN, "--ckpt_dir w/\udce4", "cannot be printed"),
    (RESUME, "--lr 0.5", "--lr: a resumed run goes on with its own"),
    (RESUME, "--seed 1", "--seed: a resumed run goes on with its own"),
    (MAKE, "--num_emb_list " + "4 " * 27, "26 levels at most"),
    (FLAT, "--method random --num_emb_list 4 4", "90 items but only 16"),
    (FLAT, "--method rqkmeans --num_emb_list 4 4", "90 items but only 16"),
    (EXTEND, "--method random", "drop --method"),
    (EXTEND, "--data_path=", "--extend needs the embeddings"),
    (FLAT, "--data_path=", "--method flat needs the embeddings"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "flags", "line"), FLAGS, ids=[f"{c.split()[0]} {f[:40]!r}" for c, f, _ in FLAGS])
def test_flags_out_of_range(
    world: Path, command: str, flags: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(world, f"{command} {flags}", line, capsys)
    assert not (world / "new").exists()


def test_the_sound_world_is_sound(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Otherwise the rows prove nothing; and a well-behaved run says nothing on the error stream."""
    for command in (TRAIN, RESUME, MAKE, f"{FLAT} --overwrite", f"{EXTEND} --overwrite", f"{TITLES} --overwrite"):
        assert run(world, command, capsys) == (0, []), command


@pytest.mark.parametrize("command", [MAKE, TITLES, TRAIN, RESUME])
def test_a_full_disk_is_one_line_and_nothing_is_half_written(
    world: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = listing(world)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        status, errors = run(world, command, capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 2 and len(errors) == 1 and "cannot be written (" in errors[0], errors
    assert [name for name in listing(world) if name not in before and (world / name).is_file()] == []


@pytest.mark.parametrize("flags", ["--lr 1e9", "--lr 1e30", "--quant_loss_weight 1e38 --lr 100"])
def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_what_is_sound(
    world: Path, flags: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """At once, in one line; every checkpoint that is there holds finite weights."""
    before = listing(world)
    status, errors = run(world, f"{TRAIN} {flags} --epochs 3000 --eval_step 1 --lr_scheduler_type constant", capsys)
    assert status == 2 and len(errors) == 1 and "lower --lr" in errors[0], errors
    for name in set(listing(world)) - set(before):
        if name.endswith(".pth"):
            assert ".partial" not in name
            model_from_checkpoint(load_checkpoint(world / name), name)


def test_leftovers_of_a_killed_run_go_and_others_stay(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A real kill in the middle of writing; then a start beside a file that a living process writes."""
    code = f"""
import os, signal, sys
sys.path.append({str(Path(generate_indices.__file__).parent)!r})
from pathlib import Path
from output_files import written_whole
with written_whole(Path(sys.argv[1])) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    for name in ("o.json", "o.report.png", "run/epoch_9_collision_0.0000_model.pth"):
        subprocess.run([sys.executable, "-c", code, str(world / name)])
    left = [name for name in listing(world) if name.endswith(".partial")]
    assert len(left) == 3
    (world / ".o.json.note").write_text("mine")
    with open(world / ".o.json.12345678.partial", "w") as living:
        fcntl.flock(living, fcntl.LOCK_EX)
        assert run(world, MAKE, capsys)[0] == 0 and run(world, RESUME, capsys)[0] == 0
    hidden = [name for name in listing(world) if name.split("/")[-1].startswith(".")]
    assert hidden == [".o.json.12345678.partial", ".o.json.note"]
