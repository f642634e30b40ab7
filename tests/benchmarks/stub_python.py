"""A script of benchmarks/ in a copy of the repository, with a `python` that only writes down what it is asked to do."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from running import ROOT
from toy_data import write_drawn_dataset

STUB = """#!/usr/bin/env bash
case "$1" in -c) exec {python} "$@" ;; -m) exit 0 ;; esac
echo "$*" >> "$CALLS"
case "$1" in
  benchmarks/compare.py)
    while [ "$1" != --work ]; do shift; done
    mkdir -p "$2/Toy"; touch "$2/Toy/compare.md" ;;
  benchmarks/short_texts.py) cp "$2" "$3" ;;
  finetune.py)
    while [ "$1" != --output_dir ]; do shift; done
    case "$2" in *"${{FAILS:-none}}"*) echo "out of luck" >&2; exit 1 ;; esac
    if [ -n "${{SLEEPS:-}}" ]; then echo $$ > "$SLEEPS"; exec sleep 600; fi
    mkdir -p "$2/checkpoint-1"; touch "$2/config.json" ;;
esac
"""


class StubPython:
    """Runs `benchmarks/<script>` on a drawn dataset in `folder`."""

    def __init__(self, folder: Path, script: str):
        self.folder = folder
        write_drawn_dataset(folder)
        for name in ("scripts", "benchmarks"):
            shutil.copytree(
                ROOT / name, folder / "repository" / name, ignore=shutil.ignore_patterns("*.py*", "__pycache__")
            )
        shutil.copy(ROOT / "requirements.txt", folder / "repository")
        (folder / "venv" / "bin").mkdir(parents=True)
        (folder / "venv" / "bin" / "activate").write_text(f'export PATH="{folder}/venv/bin:$PATH"\n')
        stub = folder / "venv" / "bin" / "python"
        stub.write_text(STUB.format(python=sys.executable))
        stub.chmod(0o755)
        self.command = ["bash", str(folder / "repository" / "benchmarks" / script)]

    def environment(self, **settings: str) -> dict[str, str]:
        """Nothing of the caller's but PATH."""
        own = {"PATH": os.environ["PATH"], "CALLS": str(self.folder / "calls"), "VENV": str(self.folder / "venv")}
        return own | {"DATASET": "Toy", "SOURCE": str(self.folder / "Toy"), **settings}

    def run(self, **settings: str) -> tuple[subprocess.CompletedProcess, list[str]]:
        """The finished process, and the calls of Python that it made."""
        (self.folder / "calls").write_text("")
        done = subprocess.run(self.command, env=self.environment(**settings), capture_output=True, text=True)
        return done, (self.folder / "calls").read_text().splitlines()
