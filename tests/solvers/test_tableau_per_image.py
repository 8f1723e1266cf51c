"""One tableau per image: a batch gives what each image gives alone, and what does not fit is refused."""

import pytest
import torch

from solvers import (
    BASELINES,
    EPD,
    Predictor,
    PredictorError,
    SolverTable,
    Spec,
    Tableau,
    compile_tableau,
    polynomial,
    sample,
    save_predictor,
)

NODES = polynomial(4, 0.2, 8.0)
IMAGES = 5


def velocity(x, sigma):
    """A curved field in which the rows of a batch do not meet; sigma is one number a row."""
    sigma = sigma.expand(len(x)).to(x.dtype).view(-1, *[1] * (x.ndim - 1))
    return torch.tanh(x / (1 + sigma)) + 0.1 * x.roll(1, -1)


def tableaus() -> list[Tableau]:
    """Different tableaus of the same levels."""
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for _ in range(IMAGES):
        r = torch.rand(3, 2, generator=generator, dtype=torch.float64).sort(-1).values
        w = torch.rand(3, 2, generator=generator, dtype=torch.float64).softmax(-1)
        drawn.append(compile_tableau(EPD(SolverTable.sorted(r, w)), NODES))
    return drawn


def stacked(parts: list[Tableau]) -> Tableau:
    arrays = [torch.stack([vars(part)[name] for part in parts]) for name in ("sigmas", "stages", "output")]
    return Tableau(*arrays, levels=parts[0].levels, nodes=NODES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_batch_is_its_images_one_by_one(dtype):
    parts = tableaus()
    x = torch.randn(IMAGES, 3, 4, dtype=dtype, generator=torch.Generator().manual_seed(1))
    together = sample(stacked(parts), velocity, x, NODES)
    alone = torch.cat([sample(part, velocity, x[i : i + 1], NODES) for i, part in enumerate(parts)])
    assert together.dtype == dtype
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-6 if dtype == torch.float32 else 1e-13)
    assert not torch.allclose(together[1:], sample(parts[0], velocity, x, NODES)[1:], atol=1e-3)


def test_levels_are_one_call_each_with_the_sigma_of_every_row():
    whole, calls = stacked(tableaus()), []

    def record(x, sigma):
        calls.append(sigma)
        return velocity(x, sigma)

    sample(whole, record, torch.ones(IMAGES, 2, dtype=torch.float64), NODES)
    assert [len(sigma) for sigma in calls] == [IMAGES * len(level) for level in whole.levels]
    for sigma, level in zip(calls, whole.levels, strict=True):
        assert torch.equal(sigma.view(len(level), IMAGES).T, whole.sigmas[:, list(level)])


def test_gradients_reach_each_image_of_its_own_loss():
    whole = stacked(tableaus())
    leaves = [part.clone().requires_grad_() for part in (whole.sigmas, whole.stages, whole.output)]
    learned = Tableau(*leaves, levels=whole.levels, nodes=NODES)
    x = torch.ones(IMAGES, 2, dtype=torch.float64)
    sample(learned, velocity, x, NODES)[2].sum().backward()
    for leaf in leaves:
        assert leaf.grad[2].abs().sum() > 0
        assert leaf.grad[[0, 1, 3, 4]].abs().sum() == 0


def test_what_does_not_fit_is_refused():
    whole = stacked(tableaus())
    with pytest.raises(ValueError, match=r"one for each of \[5\] images, but there are 2"):
        sample(whole, velocity, torch.ones(2, 2, dtype=torch.float64), NODES)
    with pytest.raises(ValueError, match="one for each of"):
        compile_tableau(whole, NODES)
    with pytest.raises(ValueError, match="do not fit sigmas"):
        Tableau(whole.sigmas, whole.stages[:3], whole.output, whole.levels)
    later = whole.stages.clone()
    later[3, 0, 2] = 0.5  # of one image only
    with pytest.raises(ValueError, match="own or a later level"):
        Tableau(whole.sigmas, later, whole.output, whole.levels)


def test_a_file_holds_one(tmp_path):
    predictor = Predictor(stacked(tableaus()), Spec(solver="tableau"), NODES)
    with pytest.raises(PredictorError, match="expected one tableau"):
        save_predictor(predictor, tmp_path / "a.pkl")


def test_a_baseline_repeated_for_each_image_is_the_baseline():
    one = compile_tableau(BASELINES["dpmpp"], NODES)
    x = torch.randn(IMAGES, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(
        sample(stacked([one] * IMAGES), velocity, x, NODES),
        sample(BASELINES["dpmpp"], velocity, x, NODES),
        rtol=0,
        atol=1e-12,
    )
