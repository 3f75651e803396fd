"""benchmarks/compare.py: bad input, and a whole small comparison."""

from __future__ import annotations

import csv

import compare
import pytest

from race.tasks import TASKS


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--only", "chess"], "unknown task 'chess'; there are " + ", ".join(TASKS))],
)
def test_bad_input(arguments, words, capsys, tmp_path):
    assert compare.main([*arguments, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert words in error and len(error.strip().splitlines()) == 1


def test_search_finds_the_best_rate():
    """On a loss with one valley, from either side."""
    for start in (1e-2, 1.0, 1e3):
        best = compare.search(lambda lr: abs(compare.math.log2(lr) - 3.2), start, 2.0)
        assert abs(compare.math.log2(best) - 3.2) <= 1


def test_a_column_for_every_row(tmp_path):
    name = next(name for name, task in TASKS.items() if task.deterministic)
    assert compare.main(["--only", name, "--seeds", "0", "--out", str(tmp_path)]) == 0
    with open(tmp_path / "compare.csv") as file:
        rows = list(csv.DictReader(file))
    assert rows and {row["task"] for row in rows} == {name}
