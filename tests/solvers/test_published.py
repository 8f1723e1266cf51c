"""Published predictors are read as data: exact tables, and nothing in a file ever runs."""

import io
import pickle
import pickletools
from pathlib import Path
from tempfile import TemporaryDirectory

import published_writer as writer
import pytest
import torch
from hypothesis import given, settings
from published_writer import (
    PublishedLoss,
    PublishedPredictor,
    as_model,
    byte_changes,
    changed,
    loads_or_refuses,
    published_bytes,
    refused,
    write_published,
)

from solvers import load_predictor, save_predictor

SEVEN = {
    "collections.OrderedDict",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_tensor_v2",
    "torch.nn.modules.activation.Sigmoid",
    "torch.nn.modules.activation.Softmax",
    "torch.storage._load_from_bytes",
    "torch_utils.persistence._reconstruct_persistent_obj",
}


def raw_arrays(n=3, k=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    return {name: torch.randn(n, k, generator=generator, dtype=dtype) for name in writer.PARAMETERS}


def sigmoid(x):
    return 1 / (1 + torch.exp(-x.double()))


# the layout, so that the tests below test what they say


def test_layout():
    content = published_bytes({"model": PublishedPredictor(raw_arrays())})
    assert writer.globals_of(content) == SEVEN
    opcodes = [(opcode.name, argument) for opcode, argument, _ in pickletools.genops(content)]
    assert opcodes[0] == ("PROTO", 4)
    assert [argument for name, argument in opcodes if name == "FRAME"] == [len(content) - 11]
    words = [argument for name, argument in opcodes if name == "SHORT_BINUNICODE"]
    order = [
        "model",
        "type",
        "version",
        "module_src",
        "class_name",
        "state",
        "training",
        "_parameters",
        *writer.PARAMETERS,
        "_buffers",
    ]
    order += [
        "_non_persistent_buffers_set",
        "_backward_pre_hooks",
        "_forward_hooks",
        "_modules",
        "sigmoid",
        "softmax",
        *writer.ATTRIBUTES,
    ]
    assert [words.index(word) for word in order] == sorted(words.index(word) for word in order)


def test_layout_of_a_storage():
    file = io.BytesIO(writer.floats(0.0, 1.0, 2.0))
    persistent = []

    class Reader(pickle.Unpickler):
        def persistent_load(self, pid):
            persistent.append(pid)

    magic, protocol, _, _, keys = [Reader(file).load() for _ in range(5)]
    assert (magic, protocol, len(keys)) == (0x1950A86A20F9469CFC6C, 1001, 1)
    assert persistent == [("storage", torch.FloatStorage, keys[0], "cpu", 3, None)]
    assert int.from_bytes(file.read(8), "little") == 3
    assert torch.frombuffer(bytearray(file.read()), dtype=torch.float32).tolist() == [0, 1, 2]


def first_paper(source=writer.SOURCE, **options):
    """A file of the first paper: no backend, a loss object, storages on a GPU."""
    model = PublishedPredictor(raw_arrays(), drop=writer.BACKEND + writer.LATER, source=source, **options)
    return published_bytes({"model": model, "loss_fn": PublishedLoss(source)}, writer.on_gpu)


def test_layout_of_the_first_paper():
    content = first_paper()
    assert writer.globals_of(content) == SEVEN | {f"solvers.{name}" for name in writer.SAMPLERS}
    assert content.count(b"cuda:0") == 6
    assert b"backend" not in content


# reading


def test_decodes_and_keeps_the_order_of_the_points(tmp_path):
    raw = raw_arrays()
    table = load_predictor(write_published(tmp_path / "p.pkl", raw)).table
    assert (table.r.diff() < 0).any(), "the rows of this test are unsorted"
    torch.testing.assert_close(table.r, sigmoid(raw["r_params"]), rtol=1e-6, atol=0)
    weights = raw["weight_s"].double().exp()
    torch.testing.assert_close(table.w, weights / weights.sum(-1, keepdim=True), rtol=1e-6, atol=0)
    assert table.scale_dir is None
    assert table.scale_time is None


@pytest.mark.parametrize("fcn", [False, True])
@pytest.mark.parametrize("direction, times", [(0.05, 0.2), (0.0, 0.2), (0.05, 0.0), (1.0, 1)])
def test_half_ranges(tmp_path, direction, times, fcn):
    raw = raw_arrays()
    path = write_published(tmp_path / "p.pkl", raw, scale_dir=direction, scale_time=times, fcn=fcn)
    table = load_predictor(path).table
    for name, half, fixed in (("scale_dir", direction, fcn), ("scale_time", times, False)):
        expected = 2 * half * sigmoid(raw[f"{name}_params"] / 2) + 1 - half
        if fixed:
            expected[-1] = 1
        if half:
            torch.testing.assert_close(table.arrays()[name], expected, rtol=1e-6, atol=0)
        assert (name in table.arrays()) == bool(half)


def test_settings_and_provenance(tmp_path):
    path = write_published(
        tmp_path / "p.pkl", raw_arrays(), backend="sd3", schedule_type="flowmatch", flowmatch_shift=3
    )
    predictor = load_predictor(path)
    spec = predictor.spec
    assert (spec.dataset_name, spec.backend, spec.backend_config) == ("ms_coco", "sd3", {"resolution": 512})
    assert (spec.num_steps, spec.num_points, spec.guidance_type, spec.guidance_rate) == (4, 2, "cfg", 7.5)
    assert (spec.schedule_type, spec.schedule_rho, spec.flowmatch_mu, spec.flowmatch_shift) == (
        "flowmatch",
        1.0,
        None,
        3.0,
    )
    assert (spec.sigma_min, spec.sigma_max, spec.afs, spec.solver) == (0.03, 14.6, False, "epd")
    assert predictor.sigmas is None
    expected = {
        "format": "published",
        "sampler_stu": "epd",
        "sampler_tea": "dpm",
        "M": 1,
        "alpha": 10.0,
        "img_resolution": 512,
    }
    assert predictor.provenance == expected | {"predict_x0": False, "lower_order_final": True, "fcn": False}


def test_older_files_miss_attributes(tmp_path):
    drop = (
        *writer.LATER,
        *writer.BACKEND,
        "fcn",
        "alpha",
        "scale_dir",
        "scale_time",
        "num_points",
        "max_order",
        "sampler_stu",
    )
    predictor = load_predictor(write_published(tmp_path / "p.pkl", raw_arrays(), drop=drop))
    assert predictor.spec.backend == "ldm", "what ms_coco meant before the key existed"
    assert (predictor.spec.backend_config, predictor.spec.sigma_min, predictor.spec.num_points) == (
        {},
        None,
        None,
    )
    other = write_published(tmp_path / "q.pkl", raw_arrays(), drop=writer.BACKEND, dataset_name="cifar10")
    assert load_predictor(other).spec.backend is None


@pytest.mark.parametrize(
    "student, recorded, order", [("ipndm", 3, 3), ("ipndm", 2, 2), ("ipndm", None, 4), ("epd", 3, 1)]
)
def test_only_the_plugin_extrapolates(tmp_path, student, recorded, order):
    predictor = load_predictor(
        write_published(tmp_path / "p.pkl", raw_arrays(), sampler_stu=student, max_order=recorded, afs=True)
    )
    assert predictor.spec.max_order == predictor.solver().max_order == order
    assert predictor.solver().afs is True


def test_files_of_the_first_paper(tmp_path):
    path = tmp_path / "p.pkl"
    path.write_bytes(first_paper(dataset_name="cifar10", scale_time=0.2))
    table = load_predictor(path).table
    here = load_predictor(write_published(tmp_path / "q.pkl", raw_arrays(), scale_time=0.2)).table
    assert all(torch.equal(table.arrays()[name], value) for name, value in here.arrays().items())


def test_double_storages(tmp_path):
    raw = raw_arrays(dtype=torch.float64)
    table = load_predictor(write_published(tmp_path / "p.pkl", raw)).table
    torch.testing.assert_close(table.r, sigmoid(raw["r_params"]), rtol=1e-14, atol=0)


def test_tokens_are_dropped(tmp_path):
    inner = {"use_auth_token": "hf_3", "keep": [1, {"api_key": "hf_4"}]}
    config = {"variant": "fp16", "token": "hf_1", "Hub_Token": "hf_2", "pipeline_kwargs": inner}
    predictor = load_predictor(write_published(tmp_path / "p.pkl", raw_arrays(), backend_config=config))
    assert predictor.spec.backend_config == {"variant": "fp16", "pipeline_kwargs": {"keep": [1, {}]}}
    save_predictor(predictor, tmp_path / "q.pkl")
    assert b"hf_" in (tmp_path / "p.pkl").read_bytes()
    assert b"hf_" not in (tmp_path / "q.pkl").read_bytes()


def test_the_source_inside_never_runs(tmp_path):
    path, mark = tmp_path / "p.pkl", tmp_path / "it ran"
    source = f"open({str(mark)!r}, 'w')"
    content = published_bytes({"model": PublishedPredictor(raw_arrays(), source=source)})
    for each in (content, first_paper(source)):
        path.write_bytes(each)
        save_predictor(load_predictor(path), tmp_path / "q.pkl")
        assert not mark.exists()
    with writer.published_modules():
        pickle.loads(content)
    assert mark.exists(), "the source is one that would run"


@pytest.mark.parametrize(
    "options", [{}, {"scale_dir": 0.1, "scale_time": 0.3, "fcn": True, "sampler_stu": "ipndm"}]
)
def test_conversion_is_exact_and_plain(tmp_path, options):
    source = load_predictor(write_published(tmp_path / "p.pkl", raw_arrays(), **options))
    save_predictor(source, tmp_path / "q.pkl")
    copy = load_predictor(tmp_path / "q.pkl")
    assert copy.table.arrays().keys() == source.table.arrays().keys()
    assert all(torch.equal(copy.table.arrays()[name], value) for name, value in source.table.arrays().items())
    assert (copy.spec, copy.provenance) == (source.spec, source.provenance)
    names = {opcode.name for opcode, _, _ in pickletools.genops((tmp_path / "q.pkl").read_bytes())}
    assert names.isdisjoint(
        {"GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD", "NEWOBJ", "INST", "OBJ", "BINPERSID", "PERSID"}
    )


@pytest.mark.parametrize(
    "options, word",
    [
        ({"sampler_stu": "heun"}, "heun"),
        ({"scale_dir": -0.1}, "scale_dir"),
        ({"scale_time": float("nan")}, "scale_time"),
        ({"scale_time": 1.5}, "1.5"),
        ({"scale_dir": "0.1"}, "scale_dir"),
        ({"num_steps": 9}, "num_steps is 9"),
        ({"num_points": 3}, "num_points is 3"),
        ({"num_steps": 4.0}, "spec.num_steps"),
        ({"afs": 1}, "spec.afs"),
        ({"sigma_min": float("inf")}, "spec.sigma_min"),
        ({"guidance_rate": "7.5\n"}, "spec.guidance_rate"),
        ({"backend_config": [1]}, "spec.backend_config"),
        ({"backend_config": {"variant": {1, 2}}}, "spec.backend_config.variant"),
        ({"sampler_stu": "ipndm", "max_order": 9}, "order 9"),
        ({"img_resolution": b"512"}, "provenance.img_resolution"),
        ({"num_steps": raw_arrays()["r_params"]}, "spec.num_steps"),
        ({"_parameters": {}}, "r_params"),
        ({"_parameters": [1]}, "no model state"),
        ({"_parameters": {"r_params": 1.0}}, "r_params"),
        ({"_parameters": raw_arrays() | {"weight_s": raw_arrays(k=3)["weight_s"]}}, "w has shape"),
        ({"_parameters": raw_arrays() | {"weight_s": torch.full((3, 2), float("inf"))}}, "w holds nan"),
        (
            {"_parameters": raw_arrays() | {"r_params": raw_arrays(n=2, k=3)["r_params"].t()}},
            "unexpected layout",
        ),
        ({"_parameters": raw_arrays() | {"r_params": torch.zeros(4, 2)[1:]}}, "unexpected layout"),
        ({"_parameters": raw_arrays() | {"r_params": torch.zeros(6)}}, "unexpected layout"),
        ({"_parameters": raw_arrays() | {"r_params": torch.zeros(3, 2, dtype=torch.int64)}}, "LongStorage"),
    ],
)
def test_damaged_values_are_named(tmp_path, options, word):
    assert word in refused(write_published(tmp_path / "p.pkl", raw_arrays(), **options))


def test_lists_with_too_many_items(tmp_path):
    many = [1, 2]
    for _ in range(6):
        many = [many] * 12
    assert "1000000 items" in refused(
        write_published(tmp_path / "p.pkl", raw_arrays(), backend_config={"many": many})
    )
    document = {"format": "epd-predictor/1", "table": {}, "spec": {}, "provenance": {"many": many}}
    assert "1000000 items" in refused(tmp_path / "p.pkl", pickle.dumps(document))


# attacks within a storage, and damage


def storage_attacks(command):
    """Streams that attack, or contradict what a storage is, by name."""
    good = writer.floats(*[0.0] * 6)
    system = writer.call(writer.global_line("os", "system"), command) + b"."
    head = good[: good.index(b"\x80\x02(X\x07\x00\x00\x00storage")]
    begin = b"\x80\x02(" + writer.text("storage")
    return {
        "first": system,
        "second": good[:14] + system,
        "in place of the storage": head + b"\x80\x02" + system,
        "extension": head + b"\x80\x02\x82\x7f.",
        "inst": head + b"(S'" + command.encode() + b"'\nios\nsystem\n.",
        "other storage": good.replace(b"ctorch\nFloatStorage", b"ctorch\nByteStorage"),
        "other module": good.replace(b"ctorch\nFloatStorage", b"cposix\nsystem"),
        "allowed outside only": good.replace(b"ctorch\nFloatStorage", b"ccollections\nOrderedDict"),
        "magic": good.replace(b"\x6c\xfc\x9c\x46", b"\x6c\xfc\x9c\x47"),
        "no bytes": b"",
        "fewer numbers": good[:-1],
        "more numbers": good + b"\0",
        "count": good[:-32] + (2**62).to_bytes(8, "little") + good[-24:],
        "memo": head + b"\x80\x02]r\xff\xff\xff\xff.",
        "a view": good.replace(b"K\x06Ntq", b"K\x06K\x01tq"),
        "no tuple": head + b"\x80\x02NQ." + b"\x80\x02].",
        "a list for a key": head
        + begin
        + writer.text("FloatStorage")
        + b"]NK\x06NtQ.\x80\x02]]a."
        + good[-32:],
        "a list for a class": head + begin + b"]NNK\x06NtQ.\x80\x02]Na." + good[-32:],
        "another pickle": pickle.dumps([1, 2]),
    }


def test_the_stream_of_the_attacks_is_a_storage(tmp_path):
    path = write_published(tmp_path / "p.pkl", raw_arrays(), lambda storage: writer.floats(*[0.0] * 6))
    assert (load_predictor(path).table.r == 0.5).all()


@pytest.mark.parametrize("attack", sorted(storage_attacks("")))
def test_attacks_within_a_storage(tmp_path, attack):
    stream = storage_attacks(f"touch {tmp_path / 'it_ran'}")[attack]
    assert "r_params" in refused(write_published(tmp_path / "p.pkl", raw_arrays(), lambda storage: stream))
    assert not (tmp_path / "it_ran").exists()


TENSOR = writer.stack_global("torch._utils", "_rebuild_tensor_v2")
STORAGE = writer.stack_global("torch.storage", "_load_from_bytes")


@pytest.mark.parametrize(
    "tensor",
    [
        TENSOR + b"(K\x01K\x00K\x03K\x02\x86K\x02K\x01\x86NNtR",  # a number for a storage
        TENSOR
        + b"("
        + STORAGE
        + b"K\x01\x85RK\x00K\x03K\x02\x86K\x02K\x01\x86NNtR",  # a number for its bytes
        TENSOR + b"(%sK\x00K\x06K\x06NNtR",  # numbers for shape and stride
        TENSOR + b"(%sK\x00](K\x03K\x02eK\x02K\x01\x86NNtR",  # a list for the shape
        TENSOR + b"(%sK\x00](K\x00eJ\xff\xff\xff\x7f\x86J\xff\xff\xff\x7fK\x01\x86NNtR",  # a list, times 2^31
        TENSOR + b"(%sK\x00J\xfd\xff\xff\xffJ\xfe\xff\xff\xff\x86J\xfe\xff\xff\xffK\x01\x86NNtR",  # -3 x -2
        TENSOR + b"(%sK\x00K\x02K\x02\x86K\x02K\x01\x86NNtR",  # 4 of the 6 numbers
        TENSOR + b"(%sNK\x03K\x02\x86K\x02K\x01\x86NNtR",  # no offset
    ],
)
def test_tensors_that_are_none(tmp_path, tensor):
    stream = writer.floats(*[0.0] * 6)
    storage = STORAGE + b"B" + len(stream).to_bytes(4, "little") + stream + b"\x85R"
    persistent = writer.stack_global("torch_utils.persistence", "_reconstruct_persistent_obj")
    parameters = b"}" + writer.text("r_params") + tensor.replace(b"%s", storage) + b"s"
    state = b"}" + writer.text("state") + b"}" + writer.text("_parameters") + parameters + b"ss"
    assert "r_params" in refused(tmp_path / "p.pkl", as_model(persistent + state + b"\x85R"))


def test_every_cut_is_noticed(tmp_path):
    content = first_paper()
    for end in [*range(0, len(content), 9), len(content) - 1]:
        refused(tmp_path / "p.pkl", content[:end])


CONTENT = published_bytes({"model": PublishedPredictor(raw_arrays(), scale_dir=0.1)})


@given(byte_changes(CONTENT))
@settings(max_examples=400, deadline=None)
def test_changed_bytes(changes):
    with TemporaryDirectory() as folder:
        loads_or_refuses(Path(folder) / "p.pkl", changed(CONTENT, changes))
