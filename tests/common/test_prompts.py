"""Prompt files: what is read from each format, what is refused, and the project's own."""

import json
import os
from pathlib import Path

import pytest

from common.errors import UserError
from common.prompts import check_seeds, parse_seeds, read_prompts

PROMPTS = Path(__file__).parents[2] / "src" / "prompts"


def caption(image: object, text: object) -> dict:
    return {"image_id": image, "id": 7, "caption": text}


def test_coco_json_gives_the_first_caption_of_each_image_by_its_id(tmp_path):
    file = tmp_path / "captions_val.json"
    annotations = [
        caption(30, "a tram"),
        caption(4, " a café\n"),
        caption(30, "no"),
        caption(100, " "),
        caption(100, "a bird"),
    ]
    file.write_text(json.dumps({"info": {}, "images": [], "annotations": annotations}))
    assert read_prompts(file, "--prompt-file") == ["a café", "a tram", "a bird"]


def test_coco_csv_gives_its_captions(tmp_path):
    file = tmp_path / "coco.csv"
    file.write_text('image_id,id,caption\n4,1,"a cat, asleep"\n30,2,a tram\n')
    assert read_prompts(file, "--prompt-file") == ["a cat, asleep", "a tram"]


@pytest.mark.parametrize(
    "content, word",
    [
        ("", "Expecting value"),
        ("{", "Expecting"),
        ("[]", "no list named annotations"),
        ('{"annotations": 3}', "no list named annotations"),
        ('{"annotations": []}', "holds no prompt"),
        ('{"annotations": ["a tram"]}', r"annotations\[0\] lacks"),
        (json.dumps({"annotations": [caption(1, "a"), caption("2", "b")]}), r"annotations\[1\] lacks"),
        (json.dumps({"annotations": [caption(1, None)]}), r"annotations\[0\] lacks"),
        (json.dumps({"annotations": [caption(1, "\ud800")]}), "surrogates"),
        ("[" * 200_000, "recursion"),
    ],
    ids=["empty", "torn", "list", "number", "none", "text", "image", "caption", "surrogate", "deep"],
)
def test_a_malformed_coco_file_is_one_line_that_names_it(tmp_path, content, word):
    file = tmp_path / "captions.json"
    file.write_text(content)
    with pytest.raises(UserError, match=word) as error:
        read_prompts(file, "--prompt-file")
    assert str(error.value).startswith(f"--prompt-file {file}: ")
    assert "\n" not in str(error.value)


def test_errors_of_seeds_begin_with_the_option_that_named_them():
    assert parse_seeds("0,3,10-12") == [0, 3, 10, 11, 12]
    with pytest.raises(UserError, match=r"^SEEDS '3-1': the range 3-1 is reversed"):
        parse_seeds("3-1", "SEEDS")


def test_the_projects_own_prompts():
    train, test = (read_prompts(PROMPTS / f"{part}.txt", "prompts") for part in ("train", "test"))
    assert [len(train), len(test)] == [300, 150]
    assert len({p.casefold() for p in train + test}) == 450
    for part, prompts in (("train", train), ("test", test)):
        assert (PROMPTS / f"{part}.txt").read_text(encoding="utf-8") == "".join(f"{p}\n" for p in prompts)


def test_seeds_and_ranges_of_seeds():
    assert parse_seeds("0,3,10-12") == [0, 3, 10, 11, 12]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("a", "'a'"),
        ("5-3", "reversed"),
        ("1,1", "twice"),
        ("", "neither"),
        ("-3", "neither"),
        ("²", "neither"),
        (str(2**32), "too large"),
        ("1" * 5000, "too large"),
        ("0-4294967295", "4294967296 seeds, expected at most 10000000"),
        ("0-9,5", "seed 5 is there twice"),
        ("7-9,0-8", "seed 7 is there twice"),
    ],
)
def test_other_seeds_are_refused(text, word):
    with pytest.raises(UserError, match=word):
        parse_seeds(text)


@pytest.mark.parametrize(
    ("name", "content", "prompts"),
    [
        ("a.csv", 'id,caption,text\n1,"no, this","yes, this"\n2,no,second\n', ["yes, this", "second"]),
        ("b.txt", "\ufeffone\n\n  two \n", ["one", "two"]),
        ("c.csv", 'text,other\n"two\nlines",1\n,2\nlast,3,4,5\n', ["two\nlines", "last"]),
    ],
)
def test_prompts_of_a_file(tmp_path, name, content, prompts):
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert read_prompts(tmp_path / name, "--prompt-file") == prompts


def test_the_last_seeds_with_noise_of_their_own():
    assert parse_seeds("4294967290-4294967295,007") == [*range(2**32 - 6, 2**32), 7]
    check_seeds([0, 2**32 - 1])
    for seed in (-1, 2**32):
        with pytest.raises(UserError, match=f"seed {seed}: expected 0 to 4294967295"):
            check_seeds([seed])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a cat\n" + b"x" * 2**25, "prompt 2, 'xxxx.*33554432 characters, expected at most 65536"),
        ("text\n" + "x" * 2**23, "8388608 characters"),
        (b"a\0b", "a NUL character; save the text as UTF-8"),
        ("a cat".encode("utf-16-le"), "a NUL character"),
        ("a cat".encode("utf-16"), "cannot be read as UTF-8"),
        ("caf\u00e9".encode("latin-1"), "cannot be read as UTF-8"),
    ],
    ids=["32 MB", "8 MB cell", "nul", "utf-16 without a BOM", "utf-16", "latin-1"],
)
def test_texts_that_are_no_prompts_are_one_line(tmp_path, content, words):
    for name in ("a.txt", "a.csv"):
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        if name == "a.csv" or not isinstance(content, str):
            with pytest.raises(UserError, match=r"a\.(txt|csv)") as error:
                read_prompts(path, "--prompt-file")
            assert len(str(error.value)) < 400


def test_a_pipe_or_a_device_is_no_prompt_file(tmp_path):
    os.mkfifo(tmp_path / "a.txt")
    for path in (tmp_path / "a.txt", Path("/dev/zero")):
        with pytest.raises(UserError, match=f"{path}: cannot be read"):
            read_prompts(path, "--prompt-file")


def test_a_file_without_prompts_is_refused(tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    for name in ("empty.txt", "binary.txt", "missing.txt"):
        with pytest.raises(UserError, match=name):
            read_prompts(tmp_path / name, "--prompt-file")
