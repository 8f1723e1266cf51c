"""launch.sh answers before it sets anything up."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
CFGS = {"distill": "training/distill/cfgs", "train": "training/ppo/cfgs"}


def launch(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([str(ROOT / "launch.sh"), *arguments], capture_output=True, text=True, timeout=60)


def test_help_lists_every_subcommand():
    text = launch("--help").stdout
    cases = [
        line.split(")")[0].strip()
        for line in (ROOT / "launch.sh").read_text().splitlines()
        if ") setup" in line or ") configured" in line
    ]
    assert {"setup", "demo", "test", "sample", "distill", "train"} <= set(cases)
    assert all(f"\n  {name} " in text for name in cases)
    assert launch().stdout == text


def test_an_unknown_command_is_refused():
    done = launch("dance")
    assert done.returncode == 2
    assert done.stderr == "error: unknown command 'dance'; ./launch.sh --help lists them\n"


def test_environment_yml_installs_the_project_as_pyproject_does():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert {"pip": ["-e .[dev]"]} in environment["dependencies"]


def test_an_unknown_configuration_is_refused_before_anything_is_set_up():
    for command, stage in (("distill", "training/distill"), ("train", "training/ppo")):
        done = launch(command, "mars")
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: 'mars' is no configuration of {stage}; expected one of ")
        assert "digits" in done.stderr
        assert launch(command).returncode == 2


def test_a_model_of_ones_own_needs_a_name():
    done = launch("distill", "--model", "folder", "--steps", "8")
    assert done.returncode == 2
    assert done.stderr.startswith(
        "error: the run's name comes first: ./launch.sh distill NAME --model folder"
    )


@pytest.fixture
def printing(tmp_path):
    """launch.sh in a folder with the configurations, whose interpreter prints its arguments."""
    for name in ("launch.sh", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for stage in ("distill", "ppo"):
        shutil.copytree(ROOT / "training" / stage / "cfgs", tmp_path / "training" / stage / "cfgs")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    (tmp_path / ".venv" / ".complete").write_text(f"{tmp_path}\n{(ROOT / 'pyproject.toml').read_text()}")

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
        command = [str(tmp_path / "launch.sh"), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=60, env=os.environ | environment
        )

    return run


def test_distill_with_a_model_of_ones_own_needs_no_configuration(printing):
    for more in (["--model", "a folder"], ["--model=folder"]):
        done = printing("distill", "my", "--steps", "8", *more)
        assert done.stdout == f"-m training.distill.own_model my --steps 8 {' '.join(more)}\n", done.stderr


@pytest.mark.parametrize(
    ("command", "module"), [("distill", "training.distill.launch"), ("train", "training.ppo.launch")]
)
def test_a_stage_has_help_and_goes_on_with_resume(printing, command, module):
    assert printing(command, "--help").stdout == f"-m {module} --help\n"
    started = printing(command, "digits", "--max-steps", "2").stdout
    assert started == f"-m {module} --config {CFGS[command]}/digits.yaml --run-name digits --max-steps 2\n"
    assert printing(command, "digits", "--resume", "latest").stdout == f"-m {module} --resume latest\n"
    assert printing(command, "digits", "--resume=latest").stdout == f"-m {module} --resume=latest\n"


def test_the_number_of_processes_is_a_number(printing):
    for value in ("two", "0", "-1"):
        done = printing("train", "digits", PROCESSES=value)
        assert done.returncode == 2
        assert done.stderr == (
            f"error: PROCESSES='{value}': expected the number of devices to use, such as 4\n"
        )
    done = printing("train", "digits", PROCESSES="2")
    assert done.stdout.startswith("-m torch.distributed.run --standalone --nproc_per_node=2 -m training.ppo")


def test_the_demo_is_one_command(printing):
    assert printing("demo", "--images", "12").stdout == "-m benchmarks.demo --images 12\n"
