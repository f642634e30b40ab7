#!/usr/bin/env bash
# Set up a virtual environment if there is none, then run all tests, in as many processes as there are cores (four at most).
# Arguments go to pytest: bash tests/run.sh -m "not slow"
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/env.sh
setup_env tests/requirements.txt
ruff check .
ruff format --check .
mypy ./*.py
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
python -m pytest tests -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"
