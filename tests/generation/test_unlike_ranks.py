"""Ranks started with other settings, prompts, weights or folders end in one line, before any image."""

import os
from pathlib import Path
from unittest.mock import patch

import pytest

from backends import load_backend
from common import same_run
from common.distributed import process_group
from common.errors import SharedError
from common.same_run import check_same
from solvers import Spec

from ..forked import Forked, run_module
from .command import contents, manifest


def each_its_own(module: str, lines: list[list[str]]) -> None:
    """What `python -m module` does with the arguments of this process's rank."""
    same_run.VISIBLE_WITHIN = 0.5
    run_module(module, *lines[int(os.environ["RANK"])])


def run_unlike(*lines: list[str]) -> str:
    """The one line with which ranks of unlike arguments end."""
    done = Forked(each_its_own, "sample", list(lines), ranks=len(lines)).wait()
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return errors[0]


@pytest.fixture
def line(table, tmp_path) -> list[str]:
    (tmp_path / "other.txt").write_text("another prompt\n")
    (tmp_path / "some.txt").write_text("a prompt\n")
    text = f"--predictor {table} --seeds 0-7 --batch 2 --device cpu --outdir {tmp_path / 'out'}"
    return [*text.split(), "--prompt-file", str(tmp_path / "some.txt")]


@pytest.mark.parametrize(
    "more, name",
    [
        (["--prompt-file", "other.txt"], "prompts"),
        (["--guidance", "3"], "guidance"),
        (["--seeds", "0-5"], "seeds"),
        (["--batch", "4"], "output options"),
        (["--solver", "euler", "--num-steps", "4"], "depth, evaluations, predictor, solver"),
    ],
)
def test_ranks_of_other_settings_are_refused(line, tmp_path, more, name):
    other = [*line, *(str(tmp_path / word) if word == "other.txt" else word for word in more)]
    text = run_unlike(line, other)
    assert f"has other {name}" in text
    assert "start all ranks with the same command, files and weights" in text
    assert contents(tmp_path / "out", "*.png") == {}


def test_a_folder_that_is_not_shared_is_refused(line, tmp_path):
    text = run_unlike(line, [*line, "--outdir", str(tmp_path / "elsewhere")])
    assert f"rank 1 writes to {tmp_path / 'elsewhere'} on " in text
    assert f"which is not the folder {tmp_path / 'out'} on " in text
    assert contents(tmp_path, "*.png") == {}


def test_equal_ranks_are_not_refused(line, tmp_path):
    done = Forked(each_its_own, "sample", [line, line], ranks=2).wait()
    assert done.returncode == 0, done.stderr
    assert len(manifest(tmp_path / "out")) == 8


def other_weights(out: Path) -> None:
    """A rank of two whose backbones differ in one number."""
    with process_group("cpu") as ranks:
        backend = load_backend(Spec(backend="digits"), "cpu")
        weight = next(iter(backend.networks().values())).state_dict()
        if ranks.rank == 1:
            first = next(iter(weight.values()))
            first.view(-1)[0] += 1
        try:
            check_same(ranks, {"weights": backend.fingerprint()})
        except SharedError as error:
            (out / f"rank{ranks.rank}").write_text(str(error))


def test_ranks_of_other_weights_are_refused_on_every_rank(tmp_path):
    done = Forked(other_weights, tmp_path, ranks=2).wait()
    assert done.returncode == 0, done.stderr
    texts = [(tmp_path / f"rank{rank}").read_text() for rank in range(2)]
    assert texts[0] == texts[1]
    assert texts[0].startswith("rank 1 on ")
    assert "has other weights than rank 0 on " in texts[0]


def test_an_image_that_is_gone_at_the_end_is_noticed(line, tmp_path):
    """As on storage that only seems to be shared."""
    from click.testing import CliRunner

    import sample
    from generation import generate

    original = generate.write_batches

    def lose_one(*arguments):
        made = original(*arguments)
        next((tmp_path / "out").rglob("*.png")).unlink()
        return made

    with patch.object(generate, "write_batches", lose_one):
        result = CliRunner().invoke(sample.main, line)
    assert "1 of 8 images of this run are not there after all ranks ended" in str(result.exception)
