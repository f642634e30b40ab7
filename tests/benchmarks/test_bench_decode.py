"""The benchmarks run, and on the real SmolLM2-135M with real histories beam search finds generate's lists."""

import re

import pytest

from benchmarks import bench_decode, bench_trie

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("model", ["tiny", "smollm2"])
def test_lists_equal_those_of_generate_on_real_histories(model, capsys, request):
    if model == "smollm2":
        model = str(request.getfixturevalue("smollm2_folder"))
    few = "--users 2 --slow_users 1 --repeat 1 --num_beams 10 --tokens 60 --batch_size 2".split()
    bench_decode.main(["--models", model, *few])
    shown = capsys.readouterr().out
    assert "1 of 1 lists equal (b)'s" in shown
    times = {name: float(ms) for name, ms in re.findall(r"\((\w)\).* (\d+\.\d) ms a user", shown)}
    assert set(times) == set("abcd") and times["c"] < times["a"]


def test_a_step_does_not_grow_with_the_catalogue(capsys):
    bench_trie.main(["--items", "1000,200000", "--repeat", "3"])
    rows = re.findall(r"^ *([\d,]+) .* (\d+\.\d+)$", capsys.readouterr().out, re.MULTILINE)
    assert [count for count, _ in rows] == ["1,000", "200,000"]
    assert float(rows[1][1]) < 3  # a busy machine included
