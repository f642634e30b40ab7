#!/usr/bin/env bash
# Turn every checkpoint-N of a DeepSpeed run into final-checkpoint-N: a plain model in float32, with the run's JSON,
# tokenizer and train* files.
#
#   cd convert; nohup ./convert.sh ./ckpt/Games/ >convert.log 2>&1 & cd ..
#   bash convert/convert.sh ./ckpt/Games/ --dtype bfloat16      # further words go to convert.py
#
# DIR may be absolute, relative to the current folder, or relative to the root of the repository. What is already
# converted is skipped, so the script can be stopped and started again, and run beside a training that still saves.
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

usage() { sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
fail() { echo "error: $1" >&2; exit 2; }

case "${1:-}" in
    -h | --help) usage; exit 0 ;;
    "") usage >&2; fail "give the folder with the checkpoint-N folders" ;;
esac

dir=${1%/}
shift
shopt -s nullglob
found=""
for candidate in "$dir" "$root/$dir"; do # a folder with checkpoints wins over a bare one of the same name
    [[ $candidate == "$root//"* ]] && continue
    checkpoints=("$candidate"/checkpoint-*/)
    if ((${#checkpoints[@]})); then found=$candidate; break; fi
done
if [[ -z $found ]]; then
    [[ -d $dir || -d $root/$dir ]] || fail "$dir: no such folder, neither here nor in $root"
    fail "$dir: has no checkpoint-N folder"
fi

python=${PYTHON:-python}
[[ -z ${PYTHON:-}${VIRTUAL_ENV:-} && -x $root/.venv/bin/python ]] && python=$root/.venv/bin/python

status=0
for source in "$found"/checkpoint-*/; do
    source=${source%/}
    name=${source##*/}
    [[ $name =~ ^checkpoint-[0-9]+$ ]] || continue
    target=$found/final-$name
    if [[ -f $target/config.json || -f $target/adapter_config.json ]]; then
        echo "$target: is there, skipped"
        continue
    fi
    if [[ ! -f $source/trainer_state.json ]]; then # the trainer writes it last
        echo "$source: not completely saved (no trainer_state.json), left out" >&2
        status=2
        continue
    fi
    "$python" "$root/convert/convert.py" --source "$source" --target "$target" "$@" || status=2
done
exit $status
