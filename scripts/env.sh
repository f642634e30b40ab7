# Sourced by run.sh, test.sh and tests/run.sh: the virtual environment, and small helpers.

# setup_env REQUIREMENTS: activate the environment that is active or .venv (made if missing) and install what is pinned.
# Nothing is installed again as long as the requirement files are unchanged. VENV names another folder.
setup_env() {
  local folder="${VENV:-${VIRTUAL_ENV:-.venv}}" python="${PYTHON:-python3}" stamp wanted
  if [ -e "$folder/bin/activate" ]; then python="$folder/bin/python"; fi
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "error: Python 3.11 or newer is needed; name one with PYTHON=/path/to/python3.11" >&2; exit 2; }
  if [ ! -e "$folder/bin/activate" ]; then
    echo "setting up $folder (a few minutes, once)"
    "$python" -m venv --clear "$folder" || { echo "error: cannot make $folder (Debian: apt install python3-venv)" >&2; exit 2; }
  fi
  # shellcheck disable=SC1091
  source "$folder/bin/activate"
  stamp="$folder/.installed-${1//\//-}"
  wanted="$(cat requirements.txt "$1" | cksum)"
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    python -m pip install --quiet --disable-pip-version-check -r "$1"
    echo "$wanted" > "$stamp"
  fi
}

# usage [ARGUMENT]: of a script in benchmarks/: print the comment at its top for -h and --help, refuse anything else
usage() {
  case "${1:-}" in
    "") ;;
    -h | --help) sed -n '2,/^set /p' "benchmarks/${0##*/}" | sed '$d;s/^# \{0,1\}//'; exit 0 ;;
    *) echo "error: $1: settings are environment variables; --help lists them" >&2; exit 2 ;;
  esac
}

# count_gpus: how many CUDA devices PyTorch sees.
count_gpus() { python -c 'import torch; print(torch.cuda.device_count())'; }

# keep_memory: for training on the CPU; nothing where there is a GPU. glibc gives large blocks back to the system, and every step asks
# for them anew, page by page; now a process keeps them (benchmarks/bench_train.py --compare memory). What the caller set stays.
keep_memory() {
  if [ "${GPUS:-$(count_gpus)}" != 0 ]; then return; fi
  export MALLOC_MMAP_MAX_="${MALLOC_MMAP_MAX_:-0}" MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-1000000000000}"
}
