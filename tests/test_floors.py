"""The lowest versions that ./launch.sh floors installs are those of pyproject.toml."""

import tomllib
from pathlib import Path

import pytest

from .floors import READABLE, check_readable, pinned

ROOT = Path(__file__).parent.parent


def test_every_dependency_of_the_project_is_pinned_to_its_lowest_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = pinned(project)
    assert {text.replace(">=", "==") for text in project["dependencies"]} < set(pins)
    names = [pin.split("==")[0] for pin in pins]
    assert {"open-clip-torch", "scikit-learn", "pytest", "cma", "ruff"} < set(names)
    assert sorted(names) == sorted(set(names))


def test_a_dependency_without_a_lowest_version_is_refused():
    project = {
        "name": "own",
        "dependencies": ["torch>=2.6"],
        "optional-dependencies": {"all": ["own[some]"], "some": ["numpy"]},
    }
    with pytest.raises(SystemExit, match="dependency 'numpy' has no lowest version"):
        pinned(project)


def test_images_that_the_judge_cannot_read_are_refused(tmp_path):
    summary = tmp_path / "digits" / "scores" / "judge.summary.json"
    summary.parent.mkdir(parents=True)
    summary.write_text(f'{{"mean": {READABLE + 0.1}}}')
    check_readable(summary)
    summary.write_text('{"mean": -4.373}')
    with pytest.raises(SystemExit, match=r"the judge gives -4.37 to digits, expected at least -1.5"):
        check_readable(summary)
