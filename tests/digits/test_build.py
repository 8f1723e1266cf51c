"""The training loop of the digits backbone goes on where it stopped, and its script runs."""

import pytest
import torch
from click.testing import CliRunner

from digits import build, build_flow, data, drawings
from digits.data import load_scans
from digits.fit import Training, fit

from ..forked import start

STEPS, SAVE_EVERY = 30, 10


def network():
    torch.manual_seed(3)
    return torch.nn.Sequential(
        torch.nn.Linear(3, 8), torch.nn.BatchNorm1d(8), torch.nn.SiLU(), torch.nn.Linear(8, 1)
    )


class Loss:
    """Regression of a sum of squares; stops the training at its n-th call."""

    def __init__(self, net, stop_at=None):
        self.net, self.stop_at, self.calls, self.values = net, stop_at, 0, []

    def __call__(self, generator):
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        self.calls += 1
        x = torch.randn(32, 3, generator=generator)
        loss = (self.net(x)[:, 0] - x.square().sum(1)).square().mean()
        self.values.append(loss.item())
        return loss


def train(folder, stop_at=None, seed=1, steps=STEPS, ema_decay=0.9):
    net = network()
    loss = Loss(net, stop_at)
    training = Training(steps, 1e-2, folder / "net.pt", seed, ema_decay, SAVE_EVERY)
    return fit(net, loss, training).state_dict(), loss


def equal(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("stop_at", [3, 10, 17, 29])
def test_an_interrupted_training_gives_identical_weights(tmp_path, stop_at):
    (tmp_path / "whole").mkdir()
    whole, _ = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, stop_at)
    assert (tmp_path / "net.pt").exists() == (stop_at >= SAVE_EVERY)
    torch.rand(7)  # the global generator plays no part
    resumed, loss = train(tmp_path)
    assert loss.calls == STEPS - stop_at // SAVE_EVERY * SAVE_EVERY
    assert equal(resumed, whole)


def test_twice_interrupted(tmp_path):
    (tmp_path / "whole").mkdir()
    whole, _ = train(tmp_path / "whole")
    for stop_at in (12, 11):
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, stop_at)
    resumed, loss = train(tmp_path)
    assert loss.calls == 10
    assert equal(resumed, whole)


def test_a_finished_training_is_read(tmp_path):
    first, _ = train(tmp_path)
    again, loss = train(tmp_path)
    assert loss.calls == 0
    assert equal(first, again)
    assert [path.name for path in tmp_path.iterdir()] == ["net.pt"]


def test_another_seed_gives_other_weights(tmp_path):
    (tmp_path / "other").mkdir()
    assert not equal(train(tmp_path)[0], train(tmp_path / "other", seed=2)[0])


def test_it_learns(tmp_path):
    _, loss = train(tmp_path, steps=300)
    assert sum(loss.values[-20:]) < 0.3 * sum(loss.values[:20])


def test_the_moving_average_is_returned(tmp_path):
    """With decay 0 it is the last weights; else it lags behind them."""
    (tmp_path / "last").mkdir()
    last, average = train(tmp_path / "last", ema_decay=0.0)[0], train(tmp_path)[0]
    kept = torch.load(tmp_path / "net.pt", weights_only=True)["modules"]
    assert equal(last, kept)
    assert not equal(average, kept)
    assert torch.equal(average["1.running_mean"], kept["1.running_mean"])


@pytest.mark.parametrize("options", [(), ("--family", "sd3"), ("--family", "flux")], ids=str)
def test_the_script_runs(tmp_path, monkeypatch, options):
    """On a few scans; it leaves nothing behind."""
    monkeypatch.chdir(tmp_path)
    for module in (data, drawings):
        monkeypatch.setattr(module, "load_scans", few_scans)
    monkeypatch.setattr(build, "CHECK_STEPS", dict.fromkeys(build.CHECK_STEPS, 2))
    monkeypatch.setattr(build_flow, "CHECK_STEPS", dict.fromkeys(build_flow.CHECK_STEPS, 2))
    with torch.random.fork_rng():
        result = CliRunner().invoke(build.main, ["--check", *options], catch_exceptions=False)
    assert result.exit_code == 0
    assert result.output.splitlines()[-1] == "build check passed"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_script_runs_on_all_scans(tmp_path):
    done = start("digits.build", "--check", cwd=tmp_path).wait()
    assert done.returncode == 0, done.stderr


def few_scans(split):
    scans, labels = load_scans(split)
    return scans[:30], labels[:30]
