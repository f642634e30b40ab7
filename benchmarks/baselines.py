"""RecBole beside this repository: its environment, its files of a dataset, and one trained model.

The environment is a folder of `fetch.py`'s cache: RecBole and what it needs in older versions (requirements-recbole.txt), and,
by a line in a `.pth` file, what is the same in ours (torch above all), which is not installed twice. As a program this makes it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_process import to_recbole
from data_process.fetch import cache_folder
from folders import locked
from utils import UserError, read_json, run_main, say, sha256, write_json

HERE = Path(__file__).resolve().parent
REQUIREMENTS = HERE / "requirements-recbole.txt"
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "1000000000000"}  # keep_memory of scripts/env.sh


def recbole_python() -> Path:
    """The Python that has RecBole; its environment is made on the first call.

    Raises:
        UserError: a package could not be installed, or Python is too new for it.
    """
    if sys.version_info >= (3, 13):
        raise UserError(
            "RecBole 1.2.1 needs Python 3.11 or 3.12 (numpy 1.26); leave the baselines out (compare.py --models, BASELINES=)"
        )
    ours = Path(str(importlib.util.find_spec("torch").origin)).parent.parent
    mark = hashlib.sha256(f"{REQUIREMENTS.read_text()}\0{ours}\0{sys.version}".encode()).hexdigest()[:8]
    folder = cache_folder() / f"recbole-env-{mark}"
    python, complete = folder / "bin" / "python", folder / "complete"
    if not complete.is_file():
        with locked(folder):
            if not complete.is_file():
                _make_environment(folder, ours)
    return python


def _make_environment(folder: Path, ours: Path) -> None:
    python = folder / "bin" / "python"
    say(f"setting up RecBole in {folder} (once)")
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, symlinks=True)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python), "install"]
    result = subprocess.run([*command, "--quiet", "--no-deps", "-r", str(REQUIREMENTS)], capture_output=True, text=True)
    if result.returncode:
        reason = (result.stderr.strip() or "pip failed").splitlines()[-1]
        raise UserError(f"RecBole's environment {folder} cannot be made: {reason}")
    site = next((folder / "lib").glob("python*")) / "site-packages"
    (site / "ours.pth").write_text(f"{ours}\n", encoding="utf-8")  # after RecBole's own packages
    (folder / "complete").touch()


def prepare(data_path: str, dataset: str, target: Path, max_his_len: int) -> Path:
    """Write the dataset as RecBole's files to `<target>/<dataset>/`; returns RecBole's settings file."""
    flags = ["--data_path", data_path, "--dataset", dataset, "--target", str(target), "--max_his_len", str(max_his_len)]
    to_recbole.main([*flags, "--overwrite"])
    return target / dataset / f"{dataset}.yaml"


def train(folder: Path, config_file: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What recbole_run.py writes as `trained.json` in `folder`, after training unless that is done.

    Args:
        settings: `{"model", "dataset", "recbole"}` for recbole_run.py; what else it has must only be the same when it goes on.

    Raises:
        UserError: the folder has a run with other settings, another process writes it, or RecBole stopped.
    """
    with locked(folder):
        if not folder.is_dir():
            _run_recbole(folder, config_file, settings)
        if read_json(folder / "settings.json") != settings:
            raise UserError(f"{folder}: was made with other settings or data; name another --work, or delete it")
        return read_json(folder / "trained.json")


def _run_recbole(folder: Path, config_file: Path, settings: dict[str, Any]) -> None:
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    write_json(partial / "settings.json", settings)
    command = [str(recbole_python()), str(HERE / "recbole_run.py"), str(config_file.resolve())]
    environment = KEEP_MEMORY | {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    with open(partial / "stderr.log", "w+b") as log:
        status = subprocess.run(command, cwd=partial, stderr=log, env=environment).returncode
        log.seek(0)
        said = log.read().decode(errors="replace").strip().splitlines()
    if status:
        raise UserError(
            f"{settings['model']}: RecBole stopped: {said[-1] if said else status} ({partial / 'stderr.log'})"
        )
    shutil.rmtree(partial / "log_tensorboard", ignore_errors=True)
    partial.rename(folder)


def data_hashes(data_path: str, dataset: str) -> dict[str, str]:
    """The SHA-256 of the files that a baseline is made of."""
    return {kind: sha256(Path(data_path) / dataset / f"{dataset}.{kind}.json") for kind in ("inter", "item")}


if __name__ == "__main__":
    run_main(recbole_python)
