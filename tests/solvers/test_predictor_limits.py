"""Small files that would take much memory or time are refused before they do."""

import pickle
import time
import tracemalloc

import pytest

from solvers import PredictorError, load_predictor


def document(intervals: int, points: int = 1) -> dict:
    """A table of equal points; its rows are one list, so that the file is small."""
    r, w = [k / (points + 1) for k in range(1, points + 1)], [1 / points] * points
    return {"format": "epd-predictor/1", "table": {"r": [r] * intervals, "w": [w] * intervals}, "spec": {}}


@pytest.mark.parametrize(("intervals", "points"), [(40_000, 1), (4, 40_000)])
def test_a_table_of_too_many_evaluations(tmp_path, intervals, points):
    path = tmp_path / "large.pkl"
    path.write_bytes(pickle.dumps(document(intervals, points), protocol=4))
    tracemalloc.start()
    with pytest.raises(PredictorError, match=r"takes \d+ evaluations, more than a sampler has \(4096\)"):
        load_predictor(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 * 2**20


def test_the_largest_table_loads(tmp_path):
    path = tmp_path / "largest.pkl"
    path.write_bytes(pickle.dumps(document(512, 7), protocol=4))
    assert load_predictor(path).table.num_intervals == 512


def test_integers_of_one_hash(tmp_path):
    path = tmp_path / "colliding.pkl"
    keys = {(2**61 - 1) * i: 0 for i in range(2, 3000)}
    path.write_bytes(pickle.dumps(document(2) | {"provenance": keys}, protocol=4))
    begin = time.perf_counter()
    with pytest.raises(PredictorError, match="more than 1000 integers of more than 4 bytes"):
        load_predictor(path)
    assert time.perf_counter() - begin < 5
