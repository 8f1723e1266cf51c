"""./launch.sh eval from sampling to the report: what it samples, that it goes on, and what it refuses."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from statistics import fmean

import psutil
import pytest
from click.testing import CliRunner

import common.errors
import evaluate
import sample
from evaluation import suite
from evaluation.suite_runs import PRESETS, plan_suite, predictors_of
from evaluation.tables import number
from solvers import UserError

from ..forked import Forked, run_module, start

ROOT = Path(__file__).parent.parent.parent
ARGUMENTS = ("digits", "--baselines", "euler,dpmpp", "--batch", "2", "--device", "cpu")
SETTINGS = {"RUN_DIR": "", "RUN_NAME": "", "PROMPT_FILE": "", "MODEL_ID": "", "PROCESSES": "", "SEEDS": "0-3"}
SETTINGS |= {"PREDICTOR": "exps/digits/distilled.pkl"}
FOLDERS = [
    "epd-distilled-depth4-evals6",
    "euler-depth4-evals4",
    "euler-depth6-evals6",
    "dpmpp-depth4-evals4",
    "dpmpp-depth6-evals6",
]


def run_script(script: str, *arguments: object) -> int:
    """The exit status of a script that an evaluation calls, in this process."""
    command = {"sample.py": sample.main, "evaluate.py": evaluate.main}[script]
    return (
        CliRunner()
        .invoke(command, [str(a) for a in arguments], catch_exceptions=False, standalone_mode=False)
        .exit_code
    )


def run_here(monkeypatch, out: Path, arguments=ARGUMENTS, **environment: str) -> tuple[str, list[str]]:
    """What an evaluation prints, and the scripts it called, which run in this process."""
    called = []

    def call(launcher, script, *arguments):
        assert run_script(script, *arguments) == 0
        called.append(script)

    monkeypatch.setattr(suite, "call", call)
    monkeypatch.chdir(ROOT)
    for name, value in (SETTINGS | {"OUTDIR": str(out)} | environment).items():
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(suite.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output, called


def run_with_forks(*arguments: str) -> None:
    """An evaluation whose scripts are processes of their own, as they are, but forked from it."""

    def call(launcher, script, *arguments):
        if (child := os.fork()) == 0:
            status = 1
            try:
                status = run_script(script, *arguments)
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0

    suite.call = call
    suite.main(arguments)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, str]:
    """An evaluation that nothing interrupted, and what it printed."""
    out = tmp_path_factory.mktemp("eval") / "digits"
    with pytest.MonkeyPatch.context() as monkeypatch:
        text, called = run_here(monkeypatch, out)
    assert called == ["sample.py"] * 5 + ["evaluate.py"]
    return out, text


def contents(out: Path) -> dict[str, bytes]:
    """Every file of an evaluation but locks and what a killed process had not renamed."""
    return {
        str(p.relative_to(out)): p.read_bytes()
        for p in sorted(out.rglob("*"))
        if p.is_file() and p.suffix not in ("", ".tmp")
    }


def test_the_report_has_the_numbers_of_the_summaries(whole):
    out, text = whole
    page = (out / "report.html").read_text()
    for folder in FOLDERS:
        assert f"{folder} " in text
        for metric in ("digits", "judge"):
            scores = out / folder / "scores"
            summary = json.loads((scores / f"{metric}.summary.json").read_text())
            lines = [
                json.loads(line)["score"] for line in (scores / f"{metric}.jsonl").read_text().splitlines()
            ]
            assert summary["mean"] == pytest.approx(fmean(lines))
            assert summary["count"] == len(lines) == 4
            assert number(summary["mean"]) in text
            assert f'value="{summary["mean"]}"' in page
    assert text.endswith(f"report: {out / 'report.html'}\n")


def test_it_ends_with_a_verdict_a_metric_and_cost(whole):
    lines = whole[1].split("\n\n")[-2].splitlines()
    assert [line.split(":")[0] for line in lines] == [
        *("digits at depth 4", "digits at NFE 6", "judge at depth 4", "judge at NFE 6")
    ]
    assert all(": EPD distilled " in line and ", best baseline " in line for line in lines)
    assert all(len(line) <= 100 for line in lines)


def test_a_second_run_makes_nothing_anew(whole, monkeypatch):
    out, text = whole
    before = {p: p.stat().st_mtime_ns for p in out.glob("*/**/*") if p.is_file()}
    again, called = run_here(monkeypatch, out)
    assert called == []
    assert again == text
    assert {p: p.stat().st_mtime_ns for p in out.glob("*/**/*") if p.is_file()} == before


def test_a_second_run_with_a_learned_tableau_samples_nothing(monkeypatch, tmp_path):
    tableau = {"PREDICTOR": "exps/digits/grid/tableau1-g7.5-d4", "SEEDS": "0-1"}
    arguments = ("digits", "--baselines", "euler", "--metrics", "judge", "--device", "cpu")
    _, first = run_here(monkeypatch, tmp_path, arguments, **tableau)
    assert first == ["sample.py", "sample.py", "evaluate.py"]
    assert run_here(monkeypatch, tmp_path, arguments, **tableau)[1] == []


def test_a_run_killed_half_way_ends_in_the_same_files(whole, monkeypatch, tmp_path):
    out = tmp_path / "digits"
    process = Forked(run_with_forks, *ARGUMENTS, environment=SETTINGS | {"OUTDIR": str(out)})
    assert process.signal_when(lambda: (out / FOLDERS[1]).is_dir()).returncode == -signal.SIGKILL
    assert not (out / "report.html").exists()
    _, called = run_here(monkeypatch, out)
    assert called.count("sample.py") in (3, 4)
    assert contents(out) == contents(whole[0])


def test_an_image_or_a_score_that_is_gone_is_made_again(whole, monkeypatch, tmp_path):
    out = shutil.copytree(whole[0], tmp_path / "digits")
    (out / FOLDERS[2] / "000000" / "000002.png").unlink()
    (out / FOLDERS[3] / "scores" / "judge.jsonl").unlink()
    assert run_here(monkeypatch, out)[1] == ["sample.py", "evaluate.py"]
    assert contents(out) == contents(whole[0])


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["mars"], "eval 'mars': expected one of sd15, "),
        (["digits", "--metrics", "beauty"], "--metrics: 'beauty' is no metric, "),
    ],
    ids=["name", "metric"],
)
def test_an_unknown_name_or_metric_is_one_line(tmp_path, arguments, words):
    environment = SETTINGS | {"OUTDIR": str(tmp_path / "out")}
    done = start("evaluation.suite", *arguments, environment=environment).wait()
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {words}")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name, variables, words",
    [
        ("digits", {"SEEDS": "5-1"}, "SEEDS '5-1': the range"),
        ("digits", {"PROMPT_FILE": "absent.txt"}, "PROMPT_FILE absent.txt: cannot be read"),
        ("digits", {"PREDICTOR": "exps/sd15"}, "made for backend ldm, but digits needs digits"),
        ("digits-sd3", {"PREDICTOR": "exps/digits"}, "made for family ldm, but digits-sd3 needs sd3"),
        (
            "sd3-512",
            {"SD3_512_PREDICTOR": "exps/sd3-1024"},
            "made for resolution 1024, but sd3-512 needs 512",
        ),
        ("sd15", {"RUN_NAME": "absent"}, "RUN_NAME 'absent': no run folder"),
        ("sd15", {"RUN_DIR": "absent"}, "predictor 'absent' not found"),
    ],
)
def test_what_cannot_be_done_is_refused(monkeypatch, name, variables, words):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=words) as error:
        plan_suite(name, ["euler"], None, variables)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", PRESETS)
def test_baselines_have_the_depth_and_the_evaluations_of_the_table(monkeypatch, name):
    monkeypatch.chdir(ROOT)
    predictor = next(iter(predictors_of(PRESETS[name], {}).values()))
    plan = plan_suite(name, ["euler", "unipc"], None, {"PREDICTOR": predictor})
    first, *others = (run.settings for run in plan.runs)
    costs = [(run["depth"], run["evaluations"]) for run in others]
    assert costs == [(c, c) for c in (first["depth"], first["evaluations"])] * 2


def test_variables_of_the_published_scripts(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    (tmp_path / "p.csv").write_text("caption\none\ntwo\n")
    variables = {
        "PROMPT_FILE": str(tmp_path / "p.csv"),
        "SEEDS": "7,3,5",
        "FLUX_MODEL_PATH": "weights/flux",
        "OUTDIR": str(tmp_path),
    }
    plan = plan_suite("flux", ["euler"], 2, variables)
    assert plan.pairs == [(3, "two"), (5, "two"), (7, "two")]
    assert plan.outdir == tmp_path
    assert plan.shared == (
        "--seeds",
        "7,3,5",
        "--batch",
        "2",
        "--prompt-file",
        variables["PROMPT_FILE"],
        "--model-path",
        "weights/flux",
    )
    assert plan_suite("flux", [], None, variables | {"MODEL_ID": "a/b"}).shared[-1] == "a/b"


def test_the_newest_run_of_a_name_is_measured(tmp_path):
    for folder in (
        "20250101-000000-tuned",
        "20250301-000000-tuned-1",
        "20250201-000000-tuned",
        "20250401-000000-other",
    ):
        shutil.copytree(ROOT / "exps" / "digits", tmp_path / folder)
    tables = predictors_of(PRESETS["digits"], {"RUN_NAME": "tuned"}, tmp_path)
    assert list(tables.values()) == [str(tmp_path / "20250301-000000-tuned-1")]


def test_a_script_is_started_and_its_exit_status_kept(capfd):
    launcher = [sys.executable, "-c", "import sys; print(sys.argv[1:]); sys.exit(int(sys.argv[-1]))"]
    suite.call(launcher, "sample.py", "--batch", 0)
    assert capfd.readouterr().out == f"[{str(ROOT / 'sample.py')!r}, '--batch', '0']\n"
    with pytest.raises(SystemExit) as end:
        suite.call(launcher, "sample.py", "--batch", 3)
    assert end.value.code == 3


SLEEPS = "import sys, time; print('begun', flush=True); time.sleep(600)"


def suite_that_calls_a_sleeper() -> None:
    """The module run as a program, whose command does nothing but call a script that takes long."""
    common.errors.run_command = lambda command: suite.call([sys.executable, "-c", SLEEPS], "sample.py")
    run_module("evaluation.suite")


def test_a_script_ends_with_what_started_it():
    process, started = Forked(suite_that_calls_a_sleeper), []

    def begun() -> bool:
        if process.printed("stdout") == "begun\n":
            started.extend(psutil.Process(process.pid).children())
        return bool(started)

    assert process.signal_when(begun, signal.SIGTERM, alone=True).returncode == 128 + signal.SIGTERM
    assert psutil.wait_procs(started, timeout=10)[1] == []


def test_processes_are_started_with_torchrun():
    assert suite.launcher_of({}) == [sys.executable]
    assert suite.launcher_of({"PROCESSES": "2"})[1:3] == ["-m", "torch.distributed.run"]
    with pytest.raises(UserError, match="PROCESSES 'two'"):
        suite.launcher_of({"PROCESSES": "two"})
