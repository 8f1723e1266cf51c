"""SolverTable: what it accepts, and its canonical order."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import noise, nonlinear, random_table

from solvers import EPD, SolverTable, polynomial, sample

HALF = torch.full((2, 2), 0.5)
R = torch.tensor([[0.2, 0.8], [0.5, 0.1]])


def test_shapes_and_types():
    table = SolverTable(R, HALF, scale_time=torch.ones(2, 2))
    assert (table.num_intervals, table.num_points) == (2, 2)
    assert sorted(table.arrays()) == ["r", "scale_time", "w"]
    assert all(value.dtype == torch.float64 for value in table.arrays().values())
    assert table.scale_dir is None
    images = random_table(3, 4, 2, scales=True)
    assert (images.num_intervals, images.num_points) == (4, 2)
    assert images.rows()[0].shape == (3, 4, 2)


def test_rows():
    table = random_table(4, 3, scales=True)
    for value, name in zip(table.rows(), ("r", "w", "scale_dir", "scale_time"), strict=True):
        assert torch.equal(value, table.arrays()[name])
    for scale in random_table(4, 3).rows()[2:]:
        assert torch.equal(scale, torch.ones(4, 3, dtype=torch.float64))


def test_uniform():
    table = SolverTable.uniform(3, 4)
    assert table.r.shape == table.w.shape == (3, 4)
    torch.testing.assert_close(table.r[1], torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=torch.float64))
    assert (table.w == 0.25).all()


@pytest.mark.parametrize("name", ["r", "w", "scale_dir", "scale_time"])
def test_a_wrong_shape_or_a_value_that_is_not_finite(name):
    arrays = {"r": R, "w": HALF, "scale_dir": torch.ones(2, 2), "scale_time": torch.ones(2, 2)}
    for bad in (math.nan, math.inf):
        value = arrays[name].clone()
        value[1, 0] = bad
        with pytest.raises(ValueError, match=f"{name} holds .*, which is not a finite number"):
            SolverTable(**arrays | {name: value})
    if name != "r":
        with pytest.raises(ValueError, match=rf"{name} has shape \[2, 1\], expected .* as r \[2, 2\]"):
            SolverTable(**arrays | {name: arrays[name][:, :1]})


def test_no_points_or_no_intervals():
    for shape in ((3,), (0, 2), (2, 0)):
        with pytest.raises(ValueError, match=rf"r has shape \[{', '.join(map(str, shape))}\]"):
            SolverTable(torch.zeros(shape), torch.zeros(shape))


@pytest.mark.parametrize("make", [SolverTable, SolverTable.sorted])
def test_values_out_of_range(make):
    for r in (-0.01, 1.01):
        with pytest.raises(ValueError, match=r"outside \[0, 1\]"):
            make(torch.tensor([[0.5, r]]), torch.tensor([[0.5, 0.5]]))
    for w in ([0.5, 0.4], [1.2, -0.2], [0.5, 0.501]):
        with pytest.raises(ValueError, match="not >= 0 with sum 1"):
            make(torch.tensor([[0.2, 0.5]]), torch.tensor([w]))
    for scale in (0.0, -1.0):
        with pytest.raises(ValueError, match="a scale_dir is not positive"):
            make(R, HALF, scale_dir=torch.full((2, 2), scale))
        with pytest.raises(ValueError, match="a scale_time is not positive"):
            make(R, HALF, scale_time=torch.full((2, 2), scale))
    with pytest.raises(ValueError, match="r holds nan, which is not a finite number"):
        make(torch.tensor([[0.5, math.nan]]), torch.tensor([[0.5, 0.5]]))


def test_the_ends_are_allowed():
    table = SolverTable(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 1.0]]))
    assert table.r.tolist() == [[0.0, 1.0]]


POSITIONS = st.lists(
    st.sampled_from([0.0, 1e-7, 0.25, 0.5, 0.5 + 5e-7, 0.75, 1 - 1e-7, 1.0]) | st.floats(0, 1),
    min_size=1,
    max_size=6,
)


@settings(max_examples=200, deadline=None)
@given(POSITIONS)
def test_sorted_positions(positions):
    """Ascending, apart, inside (0, 1), close to where they were; sorted again they stay."""
    r = torch.tensor([positions], dtype=torch.float64)
    points = r.shape[-1]
    table = SolverTable.sorted(r, torch.full_like(r, 1 / points))
    assert (table.r.diff() > 0.999e-6).all()
    assert table.r[0, 0] > 0.999e-6
    assert table.r[0, -1] < 1 - 0.999e-6
    assert (table.r - r.sort().values).abs().max() < 1e-6 * (points + 1)
    again = SolverTable.sorted(**table.arrays())
    torch.testing.assert_close(again.r, table.r, rtol=0, atol=1e-15)
    assert torch.equal(again.w, table.w)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 5), st.booleans())
def test_sorted_is_the_same_solver(seed, points, per_image):
    """Weights and scales go with their positions."""
    table = random_table(*([2] if per_image else []), 3, points, seed=seed, scales=True)
    ordered = SolverTable.sorted(**table.arrays())
    order = table.r.argsort(-1)
    for name, value in ordered.arrays().items():
        torch.testing.assert_close(value, table.arrays()[name].gather(-1, order), rtol=0, atol=1e-5)
    x, sigmas = noise(2, 4), polynomial(4, 0.1, 5.0)
    torch.testing.assert_close(
        sample(EPD(ordered), nonlinear, x, sigmas),
        sample(EPD(table), nonlinear, x, sigmas),
        rtol=0,
        atol=1e-4,
    )


def test_coincident_positions_keep_their_order():
    w = torch.tensor([[0.2, 0.3, 0.5]], dtype=torch.float64)
    table = SolverTable.sorted(torch.tensor([[0.5, 0.5, 0.25]], dtype=torch.float64), w)
    torch.testing.assert_close(
        table.r, torch.tensor([[0.25, 0.5, 0.5 + 1e-6]], dtype=torch.float64), rtol=0, atol=1e-12
    )
    assert table.w.tolist() == [[0.5, 0.2, 0.3]]
    top = SolverTable.sorted(torch.ones(1, 3, dtype=torch.float64), w).r
    torch.testing.assert_close(
        top, torch.tensor([[1 - 3e-6, 1 - 2e-6, 1 - 1e-6]], dtype=torch.float64), rtol=0, atol=1e-12
    )
