"""Configurations that others wrote: no secret gets into a file, nothing of them runs, every mistake is one
line.
"""

import builtins
import json

import pytest

from training.config import ConfigError
from training.distill.losses import load_features

from .runs import DISTILL, RDPO, invoke

SECRET = "hf_a_token_that_nobody_else_may_read"


@pytest.fixture(autouse=True)
def secret(monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", SECRET)


@pytest.mark.parametrize("stage", [DISTILL, RDPO], ids=["distill", "rdpo"])
@pytest.mark.parametrize(
    "value", ["${oc.env:SOME_TOKEN}", "x-${oc.env:SOME_TOKEN}", "${oc.decode:${oc.env:SOME_TOKEN}}"]
)
def test_a_resolver_is_refused_in_files_and_overrides(tmp_path, stage, value):
    key = "student.start" if stage is DISTILL else "run.output_root"
    arguments = stage.arguments(tmp_path, "secret", f"{key}={value}")
    assert "calls a resolver" in stage.error(*arguments)
    config = stage.write_config(tmp_path)
    section, name = key.split(".")
    config.write_text(config.read_text().replace(f"{section}: {{", f"{section}: {{{name}: '{value}', ", 1))
    message = stage.error("--config", config, "--dry-run")
    assert message.startswith(f"{config}: '{value}' calls a resolver")
    assert SECRET not in message
    assert not any(SECRET.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_a_key_may_refer_to_another_key(tmp_path):
    config = DISTILL.write_config(tmp_path)
    out = invoke(DISTILL.main, "--config", config, "--override", "train.patience=${train.steps}", "--dry-run")
    assert "patience: 6" in out


@pytest.mark.parametrize(
    "text",
    [
        "train: !!python/object/apply:os.system ['touch ran']",
        "train: !!python/name:os.system",
        "train: !!python/object/new:os.system [ls]",
        "train: !other {}",
        "train: " + "[" * 20000,
        "train: &a [*a]",
        "a: &a [0, 0]\n"
        + "".join(
            f"{b}: &{b} [{', '.join(['*' + a] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
        ),
        "train: !!binary aGk=",
        "\x00",
        "? {a: b}\n: c",
        "x: " + "1" * 2**21,
    ],
    ids=["apply", "name", "new", "tag", "deep", "recursive", "aliases", "binary", "nul", "key", "large"],
)
def test_yaml_runs_nothing_and_is_bounded(tmp_path, text, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text(text)
    assert "a.yaml" in DISTILL.error("--config", "a.yaml", "--dry-run")
    assert [p.name for p in tmp_path.iterdir()] == ["a.yaml"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.seed=4294967296", "train.seed is 4294967296, expected at most"),
        ("bank.first_seed=4294967296", "bank.first_seed is 4294967296"),
        (
            "bank.first_seed=4294967290",
            "with 16 pairs its seeds reach 4294967305, expected at most 4294967295",
        ),
        ("bank.heldout_seed=4294967289", "with 8 pairs its seeds reach 4294967296"),
        ("bank.pairs=99999999999", "bank.pairs is 99999999999"),
    ],
)
def test_noise_of_one_seed_is_never_that_of_another(tmp_path, override, words):
    assert words in DISTILL.error(*DISTILL.arguments(tmp_path, "seeds", override))


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
def test_code_beside_the_weights_of_a_feature_network_never_runs(tmp_path, monkeypatch, file):
    """Not even where the user would answer yes to the library's question."""
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    auto = {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil", "AutoImageProcessor": "evil.Evil"}
    (tmp_path / file).write_text(json.dumps({"model_type": "evil", "auto_map": auto}))
    with pytest.raises(ConfigError, match=r"loss.feature_network .* cannot be loaded"):
        load_features(str(tmp_path), "cpu")
    assert not (tmp_path / "ran").exists()
