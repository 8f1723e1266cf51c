"""Methods that are one and the same, and the formulas they stand for."""

import pytest
import torch
from problems import epd, noise, nonlinear, random_table

from solvers import DPM, DPM2, EPD, IPNDM, DPMpp, Euler, Heun, UniPC, polynomial, sample

SIGMAS = polynomial(6, 0.02, 10.0)
INTO_ZERO = torch.cat([SIGMAS, SIGMAS.new_zeros(1)])
N = len(SIGMAS) - 1


def run(solver, sigmas=SIGMAS, velocity=nonlinear, finish="none"):
    return sample(solver, velocity, 10 * noise(3, 4), sigmas, finish=finish)


def assert_same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


SAME = {
    "epd r=(0,1) is heun": (epd(N, (0.0, 1.0), (0.5, 0.5)), Heun()),
    "epd r=1/2 is dpm2": (epd(N, (0.5,), (1.0,)), DPM2()),
    "epd r=(0,0.7) is dpm2 r=0.7": (epd(N, (0.0, 0.7), (1 - 1 / 1.4, 1 / 1.4)), DPM2(0.7)),
    "epd r=0 is euler": (epd(N, (0.0,), (1.0,)), Euler()),
    "dpm2 r=1 is heun": (DPM2(1.0), Heun()),
    "ipndm 1 is euler": (IPNDM(1), Euler()),
    "dpm with no inner node is dpm2": (DPM(2), DPM2()),
    "dpmpp 1 is euler": (DPMpp(1), Euler()),
    "epd r=1/2 with afs is dpm2 with afs": (epd(N, (0.5,), (1.0,), afs=True), DPM2(afs=True)),
    "ipndm 1 with afs is euler with afs": (IPNDM(1, afs=True), Euler(afs=True)),
    "plugin of order 2 at r=0 is euler": (epd(N, (0.0,), (1.0,), max_order=2), Euler()),
    "plugin of order 4 at r=0 is euler": (epd(N, (0.0,), (1.0,), max_order=4), Euler()),
}


@pytest.mark.parametrize(("solver", "other"), SAME.values(), ids=SAME)
def test_same_method(solver, other):
    assert_same(run(solver), run(other))


DIFFERENT = {
    "heun, dpm2": (Heun(), DPM2()),
    "dpm2 r=0.3, dpm2": (DPM2(0.3), DPM2()),
    "dpm with an inner node, dpm2": (DPM(3), DPM2()),
    "ipndm 2, 3": (IPNDM(2), IPNDM(3)),
    "ipndm 3, 4": (IPNDM(3), IPNDM(4)),
    "dpmpp 2, 3": (DPMpp(2), DPMpp(3)),
    "unipc 2, 3": (UniPC(2), UniPC(3)),
    "unipc 2, dpmpp 2": (UniPC(2), DPMpp(2)),
    "dpmpp of lower order at the end": (DPMpp(2, lower_order_final=True), DPMpp(2)),
    "unipc of lower order at the end": (UniPC(3, lower_order_final=True), UniPC(3)),
    "plugin, epd": (epd(N, (0.4,), (1.0,), max_order=2), epd(N, (0.4,), (1.0,))),
}


@pytest.mark.parametrize(("solver", "other"), DIFFERENT.values(), ids=DIFFERENT)
def test_an_option_has_an_effect(solver, other):
    assert (run(solver) - run(other)).abs().max() > 1e-4


@pytest.mark.parametrize(
    "solver",
    [Euler(), Heun(), DPM2(), DPM2(0.3), DPM(3), DPMpp(1), DPMpp(2), DPMpp(3), UniPC(1), UniPC(2), UniPC(3)],
)
def test_a_step_into_sigma_0_is_an_euler_step(solver):
    """Heun on nodes + [0] is EDM's sampler."""
    assert_same(run(solver, INTO_ZERO), run(solver, SIGMAS, finish="euler"))


@pytest.mark.parametrize("inner_steps", [3, 5])
def test_dpm_is_dpm2_on_refined_nodes(inner_steps):
    """Within each interval the inner nodes are EDM's, uniform in sigma^(1/7)."""
    pieces = [polynomial(inner_steps, SIGMAS[n + 1].item(), SIGMAS[n].item())[:-1] for n in range(N)]
    assert_same(run(DPM(inner_steps)), run(DPM2(), torch.cat([*pieces, SIGMAS[-1:]])))


def test_ipndm_extrapolates_into_sigma_0():
    """Its weights do not know the nodes: the step into 0 is like the others."""
    assert (run(IPNDM(2), INTO_ZERO) - run(IPNDM(2), SIGMAS, finish="euler")).abs().max() > 1e-4


@pytest.mark.parametrize("order", [1, 2, 3])
def test_first_step_of_the_exponential_methods_is_euler(order):
    for solver in (DPMpp(order), UniPC(order)):
        assert_same(run(solver, SIGMAS[:2]), run(Euler(), SIGMAS[:2]))


def test_unipc_1_predicts_with_euler_and_corrects_with_the_mean_of_both_denoised_images():
    x, s = 10 * noise(3, 4), SIGMAS
    data = x - s[0] * nonlinear(x, s[0])
    for n in range(N - 1):
        ratio = s[n + 1] / s[n]
        predicted = ratio * x + (1 - ratio) * data
        next_data = predicted - s[n + 1] * nonlinear(predicted, s[n + 1])
        x, data = ratio * x + (1 - ratio) * (data + next_data) / 2, next_data
    ratio = s[N] / s[N - 1]
    assert_same(run(UniPC(1)), ratio * x + (1 - ratio) * data)


AFS = {
    "euler": lambda afs: Euler(afs),
    "heun": lambda afs: Heun(afs),
    "dpm2": lambda afs: DPM2(0.4, afs),
    "dpm": lambda afs: DPM(3, afs),
    "ipndm": lambda afs: IPNDM(3, afs),
    "epd": lambda afs: EPD(random_table(N, 2), afs=afs),
    "plugin": lambda afs: EPD(random_table(N, 2), afs=afs, max_order=3),
}


@pytest.mark.parametrize("make", AFS.values(), ids=AFS)
def test_afs_replaces_the_first_evaluation_and_no_other(make):
    """The slope at the first node is x / sqrt(1 + sigma^2), as if the field were that of unit Gaussian data
    there.
    """

    def field(x, sigma):
        analytic = x / (1 + SIGMAS[0] ** 2).sqrt()
        return torch.where((sigma == SIGMAS[0]).reshape(-1, 1), analytic, nonlinear(x, sigma))

    assert_same(run(make(True)), run(make(False), velocity=field))
    assert (run(make(True)) - run(make(False))).abs().max() > 1e-4
