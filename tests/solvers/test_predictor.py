"""Predictor files in the own format: round trips, errors that name what is wrong, attacks, names of files,
command line.
"""

import copyreg
import os
import pickle
import pickletools
import re
import runpy
import subprocess
import sys
import time
import tracemalloc
from collections import OrderedDict
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import published_writer as writer
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from published_writer import refused, stack_global, text

from solvers import (
    Predictor,
    PredictorError,
    SolverTable,
    Spec,
    compile_tableau,
    load_predictor,
    resolve_predictor_path,
    save_predictor,
)

ROOT = Path(__file__).parents[2]
SPEC = Spec(
    dataset_name="ms_coco",
    backend="ldm",
    backend_config={"resolution": 512},
    num_steps=3,
    num_points=2,
    guidance_rate=7.5,
)
OWN = {
    "format": "epd-predictor/1",
    "table": {"r": [[0.2, 0.9], [0.6, 0.1]], "w": [[0.5, 0.5], [1.0, 0.0]]},
    "sigmas": [9.0, 2.0, 0.1],
}
OWN |= {"spec": asdict(SPEC), "provenance": {"steps": 7, "log": [1.5, None, True, {"a": "b"}]}}


def own(**changes):
    return pickle.dumps(OWN | changes, protocol=4)


def predictor(**changes):
    table = SolverTable(torch.tensor([[0.2, 0.9], [0.6, 0.1]]), torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
    return replace(
        Predictor(table, SPEC, torch.tensor([9.0, 2.0, 0.1], dtype=torch.float64), {"steps": 7}), **changes
    )


def tableau():
    source = predictor()
    return Predictor(
        compile_tableau(source.solver(), source.sigmas),
        replace(SPEC, num_points=None, solver="tableau"),
        source.sigmas,
    )


def assert_same(a, b):
    assert (type(a.table), a.spec, a.provenance) == (type(b.table), b.spec, b.provenance)
    for x, y in ((vars(a.table), vars(b.table)), ({"sigmas": a.sigmas}, {"sigmas": b.sigmas})):
        assert x.keys() == y.keys()
        assert all(torch.equal(x[k], y[k]) if isinstance(x[k], torch.Tensor) else x[k] == y[k] for k in x)


# round trips

plain_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text(st.characters(), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(), max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def predictors(draw):
    n, k = draw(st.integers(1, 5)), draw(st.integers(1, 4))

    def array(low, high):
        rows = draw(st.lists(st.lists(st.floats(low, high), min_size=k, max_size=k), min_size=n, max_size=n))
        return torch.tensor(rows, dtype=torch.float64)

    scales = {name: array(0.01, 3) for name in ("scale_dir", "scale_time") if draw(st.booleans())}
    table = SolverTable(array(0, 1), array(-9, 9).softmax(-1), **scales)
    spec = Spec(
        num_steps=draw(st.none() | st.just(n + 1)),
        guidance_rate=draw(st.none() | st.floats(0, 20)),
        dataset_name=draw(st.none() | st.text(st.characters(), max_size=5)),
        backend_config=draw(st.dictionaries(st.sampled_from("abc"), plain_values, max_size=2)),
        afs=draw(st.booleans()),
        max_order=draw(st.integers(1, 4)),
    )
    sigmas = (
        torch.linspace(draw(st.floats(1, 100)), 0.01, n + 1, dtype=torch.float64)
        if draw(st.booleans())
        else None
    )
    return Predictor(table, spec, sigmas, {"log": draw(plain_values)})


@given(predictors())
@settings(max_examples=100, deadline=None)
def test_round_trip(source):
    with TemporaryDirectory() as folder:
        save_predictor(source, Path(folder) / "run" / "p.pkl")
        assert_same(load_predictor(Path(folder) / "run" / "p.pkl"), source)


def test_round_trip_of_a_tableau(tmp_path):
    save_predictor(tableau(), tmp_path / "p.pkl")
    copy = load_predictor(tmp_path / "p.pkl")
    assert_same(copy, tableau())
    assert copy.solver().depth == 4


def test_a_file_is_plain_data(tmp_path):
    save_predictor(predictor(), tmp_path / "p.pkl")
    document = pickle.loads((tmp_path / "p.pkl").read_bytes())
    r = torch.tensor([[0.2, 0.9], [0.6, 0.1]]).double().tolist()
    assert document == OWN | {"provenance": {"steps": 7}, "table": {"r": r, "w": OWN["table"]["w"]}}
    assert {o.name for o, _, _ in pickletools.genops((tmp_path / "p.pkl").read_bytes())}.isdisjoint(
        {"GLOBAL", "STACK_GLOBAL", "REDUCE"}
    )


def test_secrets_are_never_saved(tmp_path):
    names = ("token", "HF_TOKEN", "api_key", "db_password", "Authorization", "client_secret")
    secrets = {name: f"hf_{name}" for name in names}
    nested = {"resolution": 512, "list": [{"deep": secrets}, (secrets,)]} | secrets
    save_predictor(
        predictor(spec=replace(SPEC, backend_config=nested), provenance={"config": nested}),
        tmp_path / "p.pkl",
    )
    assert b"hf_" not in (tmp_path / "p.pkl").read_bytes()
    copy = load_predictor(tmp_path / "p.pkl")
    assert (
        copy.spec.backend_config
        == copy.provenance["config"]
        == {"resolution": 512, "list": [{"deep": {}}, [{}]]}
    )
    (tmp_path / "q.pkl").write_bytes(own(spec=asdict(SPEC) | {"backend_config": nested}, provenance=nested))
    assert "hf_" not in str(load_predictor(tmp_path / "q.pkl"))


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"provenance": {"a": {"b": torch.ones(1)}}}, "provenance.a.b"),
        ({"provenance": {"a": [[[[[[[[[1]]]]]]]]]}}, "nested"),
        ({"provenance": [1]}, "provenance"),
        ({"spec": replace(SPEC, num_steps=9)}, "num_steps is 9"),
        ({"spec": replace(SPEC, num_points=True)}, "spec.num_points"),
        ({"spec": replace(SPEC, sigma_min=float("nan"))}, "spec.sigma_min"),
        ({"spec": replace(SPEC, backend_config={"f": print})}, "spec.backend_config.f"),
        ({"spec": replace(SPEC, solver="tableau")}, "spec.solver"),
        ({"sigmas": torch.tensor([9.0, float("nan"), 0.1])}, "sigmas"),
        ({"table": SolverTable(torch.rand(4, 2, 2), torch.full((4, 2, 2), 0.5))}, "[4, 2, 2]"),
    ],
)
def test_a_save_that_fails_changes_nothing(tmp_path, changes, word):
    save_predictor(predictor(), tmp_path / "p.pkl")
    before = (tmp_path / "p.pkl").read_bytes()
    with pytest.raises(PredictorError, match=re.escape(word)):
        save_predictor(predictor(**changes), tmp_path / "p.pkl")
    assert (tmp_path / "p.pkl").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["p.pkl"]


@pytest.mark.parametrize(
    "function, error",
    [("fsync", OSError(28, "full")), ("replace", KeyboardInterrupt()), ("fsync", MemoryError())],
)
def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch, function, error):
    save_predictor(predictor(), tmp_path / "p.pkl")

    def fail(*args):
        raise error

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(PredictorError if isinstance(error, OSError) else type(error)):
        save_predictor(predictor(provenance={}), tmp_path / "p.pkl")
    assert_same(load_predictor(tmp_path / "p.pkl"), predictor())
    assert [p.name for p in tmp_path.iterdir()] == ["p.pkl"]


# errors

TABLE, PARTS = OWN["table"], {"sigmas": [1.0], "stages": [[1.0, 0.0]], "output": [1.0, -0.5], "levels": [[0]]}


def with_spec(**changes):
    return {"spec": OWN["spec"] | changes}


def with_tableau(**changes):
    return {"table": None, "tableau": PARTS | changes, "spec": {"solver": "tableau"}, "sigmas": None}


@pytest.mark.parametrize(
    "changes, words",
    [
        (with_spec(colour="red"), ["spec.colour"]),
        (with_spec(**{"a\nb": 1}), ["a\\nb"]),
        (with_spec(num_steps="3"), ["spec.num_steps", "'3'"]),
        (with_spec(num_steps=4), ["num_steps", "4", "3"]),
        (with_spec(num_points=3), ["num_points", "3", "2"]),
        (with_spec(afs=1), ["spec.afs", "1", "bool"]),
        (with_spec(afs=None), ["spec.afs", "None"]),
        (with_spec(guidance_rate=True), ["spec.guidance_rate", "True"]),
        (with_spec(num_steps=True), ["spec.num_steps", "True"]),
        (with_spec(guidance_rate=float("nan")), ["spec.guidance_rate", "nan"]),
        (with_spec(sigma_max="x" * 10_000), ["spec.sigma_max", "xxx"]),
        (with_spec(max_order=5), ["order 5"]),
        (with_spec(max_order=0), ["order 0"]),
        (with_spec(solver="tableau"), ["spec.solver", "tableau"]),
        (with_spec(backend_config=[]), ["spec.backend_config"]),
        ({"spec": None}, ["spec", "None"]),
        ({"format": "epd-predictor/2"}, ["epd-predictor/2", "epd-predictor/1"]),
        ({"format": ["x"] * 9}, ["epd-predictor/1"]),
        ({"colour": "red"}, ["colour"]),
        ({(1, 2): "red"}, ["(1, 2)"]),
        ({"tableau": PARTS}, ["table", "tableau"]),
        ({"table": [1]}, ["table", "[1]"]),
        ({"table": {"r": TABLE["r"]}}, ["table.w"]),
        ({"table": TABLE | {"s": TABLE["r"]}}, ["table.s"]),
        ({"table": TABLE | {"r": None}}, ["table.r", "None"]),
        ({"table": TABLE | {"r": [[0.1, 0.2], [0.3]]}}, ["table.r"]),
        ({"table": TABLE | {"r": [["a", "b"]] * 2}}, ["table.r", "'a'"]),
        ({"table": TABLE | {"r": [[10**400, 0], [0, 0]]}}, ["table.r"]),
        ({"table": TABLE | {"r": [0.1, 0.2]}}, ["table.r", "1 dimension"]),
        ({"table": TABLE | {"r": [[], []]}}, ["r has shape [2, 0]"]),
        ({"table": TABLE | {"w": [[0.5, float("nan")], [1, 0]]}}, ["table.w", "nan"]),
        ({"table": TABLE | {"w": [[0.5, 0.6], [1, 0]]}}, ["w"]),
        ({"table": TABLE | {"w": [[1.5, -0.5], [1, 0]]}}, ["w"]),
        ({"table": TABLE | {"r": [[0.5, 1.2], [1, 0]]}}, ["r"]),
        ({"table": TABLE | {"scale_dir": [[1.0, 0.0], [1, 1]]}}, ["scale_dir"]),
        ({"table": TABLE | {"scale_time": [[1.0, 1.0]]}}, ["scale_time", "[1, 2]"]),
        ({"sigmas": [9.0, 0.1]}, ["sigmas", "2", "3"]),
        ({"sigmas": [0.1, 2.0, 9.0]}, ["sigmas", "descending"]),
        ({"sigmas": [9.0, 2.0, 0.0]}, ["last node is 0"]),
        ({"sigmas": [9.0, 2.0, -1.0]}, ["sigmas", "-1.0"]),
        ({"sigmas": [9.0, float("inf"), 1.0]}, ["sigmas", "inf"]),
        ({"sigmas": "9"}, ["sigmas"]),
        ({"provenance": [("a", 1)]}, ["provenance"]),
        ({"provenance": {"a": b"x"}}, ["provenance.a", "bytes"]),
        (with_tableau(levels=[[7]]), ["tableau.levels", "7"]),
        (with_tableau(levels=[["0"]]), ["tableau.levels", "0"]),
        (with_tableau(levels=[]), ["levels"]),
        (with_tableau(levels=3), ["tableau.levels", "3"]),
        (with_tableau(stages=[[1.0, 1.0]]), ["own or a later level"]),
        (with_tableau(output=[1.0]), ["output [1]"]),
        (with_tableau(sigmas=[float("nan")]), ["tableau.sigmas", "nan"]),
        (with_tableau() | {"spec": {"solver": "epd"}}, ["spec.solver", "epd"]),
        (
            with_tableau() | {"spec": {"solver": "tableau", "num_steps": 9}, "sigmas": [2.0, 1.0]},
            ["num_steps", "9", "2"],
        ),
        (with_tableau() | {"sigmas": []}, ["sigmas"]),
    ],
)
def test_errors_name_the_key_and_the_value(tmp_path, changes, words):
    document = {k: v for k, v in (OWN | changes).items() if not (k == "table" and v is None)}
    message = refused(tmp_path / "p.pkl", pickle.dumps(document, protocol=4))
    assert all(word in message for word in words), message


def test_the_parts_of_the_errors_are_valid(tmp_path):
    for document in (
        OWN,
        {k: v for k, v in (OWN | with_tableau()).items() if k != "table"},
        OWN | {"table": TABLE | {"scale_dir": None}},
    ):
        (tmp_path / "p.pkl").write_bytes(pickle.dumps(document, protocol=4))
        assert load_predictor(tmp_path / "p.pkl").cost().depth > 0


def test_files_of_another_kind(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "zip.pkl")
    contents = [
        (tmp_path / "zip.pkl").read_bytes(),
        b"",
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
        b"some text\n",
        b"{\n}\n",
        b"\0" * 999,
    ]
    contents += [
        pickle.dumps(value)
        for value in ([1, 2], {}, {"model": 1}, {"model": {"state": {}}}, None, "text", {"table": {}})
    ]
    for content in contents:
        refused(tmp_path / "p.pkl", content)
    assert "empty" in refused(tmp_path / "p.pkl", b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(PredictorError, match="folder holds no predictor"):
        load_predictor(tmp_path / "folder")
    assert "No such file" in refused(tmp_path / "missing.pkl")
    with open(tmp_path / "large.pkl", "wb") as file:
        file.truncate(2**40)
    assert str(2**40) in refused(tmp_path / "large.pkl")
    os.mkfifo(tmp_path / "pipe.pkl")
    assert "not a file" in refused(tmp_path / "pipe.pkl")


def test_every_cut_is_noticed(tmp_path):
    content = own()
    for end in range(len(content)):
        refused(tmp_path / "p.pkl", content[:end])


@given(writer.byte_changes(own()))
@settings(max_examples=400, deadline=None)
def test_changed_bytes(changes):
    with TemporaryDirectory() as folder:
        writer.loads_or_refuses(Path(folder) / "p.pkl", writer.changed(own(), changes))


# attacks

FOREIGN = """
    os.system posix.system builtins.eval builtins.exec builtins.getattr __builtin__.eval subprocess.Popen
    torch.load torch.hub.load operator.attrgetter functools.partial collections.Counter
    collections.defaultdict typing.OrderedDict Collections.OrderedDict torch._utils._rebuild_tensor
    torch._utils._import_dotted_name torch.storage.UntypedStorage torch._load_from_bytes torch.nn.Sigmoid
    torch.nn.modules.activation.ReLU torch.nn.modules.activation.torch
    torch_utils.persistence._src_to_module torch.FloatStorage torch_utils._reconstruct_persistent_obj
    solvers.load_predictor solvers.epd.epd_sampler
"""
DOTTED = [
    ("collections", "OrderedDict.fromkeys"),
    ("torch._utils", "_rebuild_parameter.__globals__"),
    ("solvers", "epd_sampler.x"),
]


@pytest.mark.parametrize("module, name", [tuple(path.rsplit(".", 1)) for path in FOREIGN.split()] + DOTTED)
def test_other_globals_are_refused_and_named(tmp_path, module, name):
    command, unframed = f"touch {tmp_path / 'it_ran'}", pickle.dumps(OWN, protocol=2)
    for function in (writer.global_line(module, name), stack_global(module, name)):
        for content in (
            writer.as_model(function),
            writer.as_model(writer.call(function, command)),
            unframed[:-2] + function + b"u.",
        ):
            assert f"refers to {module}.{name}, " in refused(tmp_path / "p.pkl", content)
    assert not (tmp_path / "it_ran").exists()
    if name == "system":  # the attack is one
        pickle.loads(writer.as_model(writer.call(stack_global(module, name), command)))
        assert (tmp_path / "it_ran").exists()


@pytest.mark.parametrize("name", ["a\nb", "\x1b[2J", "\ud800", "\u2028", "x" * 100_000])
def test_names_cannot_break_the_message(tmp_path, name):
    assert "refers to" in refused(tmp_path / "p.pkl", writer.as_model(stack_global("os", name)))


def test_own_files_hold_no_global_at_all(tmp_path):
    for function in (writer.REBUILD, writer.SIGMOID, writer.ORDERED):
        content = (
            b"\x80\x04}" + text("format") + text("epd-predictor/1") + b"s" + text("spec") + function + b"s."
        )
        assert "builtins only" in refused(tmp_path / "p.pkl", content)


@pytest.mark.parametrize("attack", sorted(writer.unusual_opcodes("")))
def test_unusual_opcodes(tmp_path, attack):
    good, mark = tmp_path / "good.pkl", tmp_path / "it_ran"
    table = load_predictor(writer.write_published(good, {"r_params": torch.zeros(3, 2)})).table
    value = writer.unusual_opcodes(f"touch {mark}")[attack]
    copyreg.add_extension(os.system.__module__, "system", 0x7F)
    try:
        for content in (
            writer.as_model(value),
            b"\x80\x04" + value + b".",
            writer.beside_a_model(good.read_bytes(), value),
        ):
            refused(tmp_path / "p.pkl", content)
    finally:
        copyreg.remove_extension(os.system.__module__, "system", 0x7F)
        copyreg.clear_extension_cache()
    assert not mark.exists()
    assert list(OrderedDict(a=1).items()) == [("a", 1)]
    (tmp_path / "p.pkl").write_bytes(writer.beside_a_model(good.read_bytes(), writer.SIGMOID))
    assert torch.equal(load_predictor(tmp_path / "p.pkl").table.w, table.w), (
        "what is beside a model is ignored"
    )
    assert torch.equal(load_predictor(good).table.w, table.w), "nothing of an attack outlives its file"


@pytest.mark.parametrize("bomb", sorted(writer.bombs()))
def test_bombs_are_quick_and_small(tmp_path, bomb):
    content = writer.bombs()[bomb]
    (tmp_path / "p.pkl").write_bytes(content)
    tracemalloc.start()
    began = time.process_time()
    try:
        refused(tmp_path / "p.pkl")
        used, peak = time.process_time() - began, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert used < 6
    assert peak < min(150 * len(content) + 2**20, 2**26)


# names of files


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(own())
    return path


def test_a_file_or_the_newest_of_a_run_folder(tmp_path):
    run = tmp_path / "run"
    only = touch(run / "table.pkl")
    assert resolve_predictor_path(str(only)) == only
    assert resolve_predictor_path(str(run)) == only
    newest = [touch(run / f"network-snapshot-{n}.pkl") for n in ("000009", "10", "2")][1]
    assert resolve_predictor_path(str(run)) == newest
    newest = [touch(run / f"network-snapshot-export-step{n}.pkl") for n in ("000900", "1000000")][1]
    assert resolve_predictor_path(str(run)) == newest
    newest = [touch(run / f"export/network-snapshot-export-step{n}.pkl") for n in ("99", "000100", "000050")][
        1
    ]
    touch(run / "export/network-snapshot-export-step000101.pkl.tmp")
    assert resolve_predictor_path(str(run)) == newest


def test_names_and_numbers_under_exps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = (
        touch(tmp_path / "exps/00007-a/network-snapshot-000010.pkl"),
        touch(tmp_path / "exps/00007-b/x.pkl"),
    )
    other = touch(tmp_path / "exps/00070-c/x.pkl")
    touch(tmp_path / "exps/²-odd/x.pkl")
    assert resolve_predictor_path("00007-a") == first.relative_to(tmp_path)
    assert resolve_predictor_path("00007-a/network-snapshot-000010.pkl", tmp_path / "exps") == first
    assert [resolve_predictor_path(t, tmp_path / "exps") for t in ("7", "00007", "70")] == [
        second,
        second,
        other,
    ]


def test_a_name_may_leave_the_extension_out():
    grid = ROOT / "exps" / "digits" / "grid"
    assert resolve_predictor_path("digits/grid/epd-g7.5-d6", ROOT / "exps") == grid / "epd-g7.5-d6.pkl"
    assert resolve_predictor_path(str(grid / "epd-g7.5-d6")) == grid / "epd-g7.5-d6.pkl"
    assert resolve_predictor_path("digits/distilled", ROOT / "exps") == grid.parent / "distilled.pkl"


@pytest.mark.parametrize(
    "old, new",
    [
        ("digits-distilled/epd-g7.5-d6", "digits/grid/epd-g7.5-d6.pkl"),
        ("digits-distilled/wide2-g3-d4/network-snapshot-export-best.pkl", "digits/grid/wide2-g3-d4.pkl"),
        ("digits-rdpo/epd-g7.5-d4/", "digits/best.pkl"),
        ("digits-sd3-distilled/epd-g4.5-d4", "digits-sd3/distilled.pkl"),
        ("digits-flux-distilled/epd-g3.5-d4", "digits-flux/distilled.pkl"),
    ],
)
def test_the_folders_of_the_earlier_layout_are_found_in_the_new_one(monkeypatch, old, new):
    monkeypatch.chdir(ROOT)
    assert resolve_predictor_path(f"exps/{old}") == resolve_predictor_path(old) == Path("exps", new)
    assert resolve_predictor_path(str(ROOT / "exps" / old)) == ROOT / "exps" / new


def test_a_folder_of_many_tables_is_refused_with_some_of_their_names():
    with pytest.raises(PredictorError) as caught:
        resolve_predictor_path("digits/grid", ROOT / "exps")
    assert "several predictors (84): epd-g1-d10.pkl, " in str(caught.value)
    assert str(caught.value).endswith(f"name one of them, such as {ROOT / 'exps/digits/grid/epd-g1-d10'}")
    assert len(str(caught.value)) < 500


def test_what_is_not_found_says_where_it_was_looked_for(tmp_path):
    for name in ("a.pkl", "b.pkl"):
        touch(tmp_path / "several" / name)
    (tmp_path / "none").mkdir()
    touch(tmp_path / "00001-run" / "a.pkl")
    for word, expected in (
        ("several", ["a.pkl, b.pkl"]),
        ("none", ["no predictor"]),
        ("nonsense", ["'nonsense'", str(tmp_path / "nonsense")]),
        ("8", [f"{tmp_path / '8'}-*"]),
        ("²", ["'²'"]),
        ("a\nb", ["a\\nb"]),
        ("x" * 5000, ["xxx"]),
        ("a\0b", ["a\\x00b"]),
    ):
        with pytest.raises(PredictorError) as caught:
            resolve_predictor_path(word, tmp_path)
        assert str(caught.value).isprintable()
        assert all(part in str(caught.value) for part in expected)


# the command line


def run(*arguments):
    result = subprocess.run(
        [sys.executable, "-m", "solvers.predictor", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    return result.returncode, result.stdout, result.stderr


@pytest.fixture
def run_here(monkeypatch, capsys):
    """Like run, but within this process: quick."""

    def start(*arguments):
        monkeypatch.setattr(sys, "argv", ["predictor", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_module("solvers.predictor", run_name="__main__")
        return ended.value.code, *capsys.readouterr()

    return start


def test_show_prints_the_table(tmp_path, run_here):
    note = "\x1b[2J\ud800\nspoof"
    scaled = TABLE | {"scale_time": [[1.5, 1], [1, 1]]}
    (tmp_path / "p.pkl").write_bytes(
        own(**with_spec(dataset_name=note), provenance={note: note}, table=scaled)
    )
    status, out, err = run_here("show", tmp_path / "p.pkl")
    assert (status, err) == (0, "")
    assert out.isascii()
    assert "\x1b" not in out
    assert "\nspoof" not in out
    lines = [r"^backend +ldm$", r"^cost +serial depth 4, 6 evaluations", r"\\x1b\[2J\\ud800\\nspoof"]
    for pattern in [*lines, r"^ +1 +2.0000 +0.1000 +0.6000 +0.1000 +1"]:
        assert re.search(pattern, out, re.MULTILINE), pattern


WITHOUT_SETTINGS = {"spec": replace(SPEC, num_steps=None, afs=True), "sigmas": None}


@pytest.mark.parametrize("changes", [{"sigmas": None}, WITHOUT_SETTINGS, {"provenance": {}}])
def test_show_without_nodes_or_settings(tmp_path, run_here, changes):
    save_predictor(predictor(**changes), tmp_path / "p.pkl")
    status, out, err = run_here("show", tmp_path)
    assert (status, err) == (0, "")
    assert ("not stored" in out) == ("sigmas" in changes)
    assert ("serial depth 3, 5" if "spec" in changes else "serial depth 4, 6") in out


def test_show_a_tableau(tmp_path, run_here):
    save_predictor(tableau(), tmp_path / "p.pkl")
    status, out, _ = run_here("show", tmp_path / "p.pkl")
    assert (status, "serial depth 4, 6" in out) == (0, True)


def test_convert(tmp_path, run_here):
    source = writer.write_published(tmp_path / "p.pkl", {"r_params": torch.zeros(3, 2)})
    target = tmp_path / "q.pkl"
    status, out, err = run_here("convert", source, target)
    assert (status, out.strip(), err) == (0, f"wrote {target}", "")
    assert_same(load_predictor(target), load_predictor(source))
    target.write_bytes(b"other")
    status, out, err = run_here("convert", source, target)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    assert "--force" in err
    assert target.read_bytes() == b"other"
    assert run_here("convert", source, target, "--force")[0] == 0
    assert_same(load_predictor(target), load_predictor(source))


def test_bad_input_is_one_line(tmp_path, run_here):
    (tmp_path / "bad.pkl").write_bytes(writer.as_model(stack_global("os", "a\nb")))
    good = touch(tmp_path / "p.pkl")
    status, out, err = run("show", tmp_path / "bad.pkl")
    assert (status, out) == (2, "")
    assert re.fullmatch(
        rf"error: {tmp_path}/bad.pkl: refers to os.a\\nb, which no predictor needs; .*\n", err
    )
    (tmp_path / "folder").mkdir()
    for arguments in (
        ("show", "nonsense"),
        ("convert", good, good / "q.pkl"),
        ("convert", good, tmp_path / "folder", "--force"),
    ):
        status, out, err = run_here(*arguments)
        assert (status, out, err.count("\n")) == (2, "", 1), err
        assert err.startswith("error: ")
    for arguments in (("show",), ("convert", good), ("show", good, good)):
        status, out, err = run_here(*arguments)
        assert (status, out, "Usage:" in err) == (2, "", True)


def test_how_a_machine_ran_the_backbone_is_not_kept(tmp_path):
    spec = Spec(backend="ldm", backend_config={"compile": True, "offload": True, "resolution": 512})
    save_predictor(Predictor(SolverTable.uniform(2, 2), spec), tmp_path / "a.pkl")
    assert load_predictor(tmp_path / "a.pkl").spec.backend_config == {"resolution": 512}
