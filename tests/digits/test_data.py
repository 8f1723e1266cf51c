"""The scans, drawings, captions and tokens of the digits backbone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from digits.data import (
    ALL_LABELS,
    COLOURS,
    DIGITS,
    HELD_OUT_LABELS,
    TEMPLATES,
    WEIGHTS,
    Label,
    augment,
    caption,
    enlarge,
    evaluation_prompts,
    load_scans,
    paint,
    parse,
    random_caption,
)
from digits.drawings import draw_batch, drawings, held_out_drawings


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def values(labels, name):
    return {vars(label)[name] for label in labels}


def test_labels():
    assert len(set(ALL_LABELS)) == 10 * len(COLOURS) * len(WEIGHTS) == 180


def test_held_out_labels():
    """One in ten, with every digit, colour and weight among them and each of these also trained on in all
    others.
    """
    assert len(HELD_OUT_LABELS) == 18
    assert set(ALL_LABELS) >= HELD_OUT_LABELS
    seen = set(ALL_LABELS) - HELD_OUT_LABELS
    for labels in (HELD_OUT_LABELS, seen):
        assert values(labels, "digit") == set(range(10))
        assert values(labels, "colour") == set(range(len(COLOURS)))
        assert values(labels, "weight") == set(range(len(WEIGHTS)))
    for one, other in (("digit", "colour"), ("digit", "weight"), ("colour", "weight")):
        pairs = {(vars(c)[one], vars(c)[other]) for c in seen}
        assert len(pairs) == len(values(seen, one)) * len(values(seen, other))


def test_drawings_leave_the_held_out_labels_out_unless_asked():
    scans, digits = load_scans("train")
    grey = enlarge(scans)
    _, labels = drawings(grey, digits, generator())
    assert not HELD_OUT_LABELS & set(labels)
    assert set(ALL_LABELS) - HELD_OUT_LABELS == set(labels)
    _, asked = drawings(grey, digits, generator(), held_out=True)
    assert set(asked) == set(ALL_LABELS)
    for labels_of in (labels, asked):
        assert [c.digit for c in labels_of] == digits.tolist()
    _, batch = draw_batch(grey, digits, 500, generator())
    assert not HELD_OUT_LABELS & set(batch)


def test_the_training_and_the_test_scans_are_apart():
    (train, train_digits), (test, test_digits) = load_scans("train"), load_scans("test")
    assert (len(train), len(test)) == (1437, 360)
    one, other = ({tuple(scan.flatten().tolist()) for scan in scans} for scans in (train, test))
    assert not one & other
    for scans, digits in ((train, train_digits), (test, test_digits)):
        assert scans.shape[1:] == (8, 8)
        assert (scans.min(), scans.max()) == (0, 1)
        shares = digits.bincount(minlength=10) / len(digits)
        assert (shares - 0.1).abs().max() < 0.01
    assert torch.equal(load_scans("train")[0], train)


def test_paint():
    grey = torch.zeros(2, 32, 32)
    grey[:, 8:24, 8:24] = 1
    images = paint(grey, torch.tensor([1, 3]), torch.tensor([1, 1]))
    assert images.shape == (2, 3, 32, 32)
    torch.testing.assert_close(images[:, :, 0, 0], torch.ones(2, 3), rtol=0, atol=2e-3)
    ink = torch.tensor([COLOURS["red"], COLOURS["blue"]])
    torch.testing.assert_close(images[:, :, 16, 16], ink, rtol=0, atol=2e-3)


def test_bolder_is_more_ink():
    grey = enlarge(load_scans("test")[0][:20])
    thin, plain, bold = (
        1 - paint(grey, torch.zeros(20).long(), torch.full((20,), i)).mean((1, 2, 3)) for i in range(3)
    )
    assert (thin < plain).all()
    assert (plain < bold).all()


def test_enlarge_and_augment():
    scans = load_scans("test")[0][:30]
    grey = enlarge(scans)
    assert grey.shape == (30, 32, 32)
    assert grey[:, :3].max() == grey[:, -3:].max() == grey[:, :, :3].max() == grey[:, :, -3:].max() == 0
    moved = augment(grey, generator(1))
    assert torch.equal(moved, augment(grey, generator(1)))
    assert moved.min() >= 0
    assert moved.max() <= 1
    assert (moved - grey).abs().amax((1, 2)).min() > 0.05
    assert (moved - grey).square().mean() < 0.25 * (grey[1:] - grey[:-1]).square().mean()


def test_held_out_drawings():
    images, labels = held_out_drawings()
    assert len(images) == len(labels) == 360 * 18
    assert set(labels) == set(ALL_LABELS)
    i = 360 * 7 + 5
    assert (labels[i].colour, labels[i].weight) == (2, 1)
    scans, digits = load_scans("test")
    assert labels[i].digit == digits[5]
    assert torch.equal(images[i : i + 1], paint(enlarge(scans[5:6]), torch.tensor([2]), torch.tensor([1])))


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("numeral", [False, True])
def test_captions_can_be_read_back(template, numeral):
    for label in ALL_LABELS:
        parts = (
            label,
            Label(label.digit, label.colour),
            Label(label.digit, weight=label.weight),
            Label(label.digit),
        )
        for part in parts:
            text = caption(part, template, numeral)
            assert parse(text) == part
            assert text == " ".join(text.split())
            assert not {"{", "}"} & set(text)
            assert not text.endswith((",", " in"))


def test_captions_of_an_open_part():
    assert caption(Label(3, 1, 2)) == "a bold red handwritten three"
    assert caption(Label(3, 1, 2), numeral=True) == "a bold red handwritten 3"
    assert caption(Label(3), TEMPLATES[1]) == "a handwritten three"
    assert caption(Label(3), TEMPLATES[2]) == "the digit three"
    assert caption(Label(3, 5), TEMPLATES[2]) == "the digit three in purple"


def test_parse():
    assert parse("THIN (red): the digit Seven.") == Label(7, 1, 0)
    assert parse("redder threes") is None
    assert parse("a picture of a cat") is None
    assert parse("") is None
    assert parse("12 cats, 4th row") is None
    assert parse("4") == Label(4)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**40), st.sampled_from(ALL_LABELS))
def test_random_captions_name_their_label(seed, label):
    label_read = parse(random_caption(label, generator(seed)))
    assert label_read.digit == label.digit
    assert label_read.colour in (label.colour, -1)
    assert label_read.weight in (label.weight, -1)


def test_random_captions_leave_parts_open():
    rng = generator()
    texts = [random_caption(Label(3, 1, 2), rng) for _ in range(2000)]
    labels = [parse(text) for text in texts]
    assert sum(c.colour == 1 for c in labels) / 2000 == pytest.approx(0.8, abs=0.04)
    assert sum(c.weight == 2 for c in labels) / 2000 == pytest.approx(0.6, abs=0.05)
    assert sum("3" in text for text in texts) / 2000 == pytest.approx(0.3, abs=0.05)


def test_evaluation_prompts_go_round_the_labels():
    prompts = evaluation_prompts(360)
    assert [parse(p) for p in prompts[:180]] == [parse(p) for p in prompts[180:]]
    assert {parse(p) for p in prompts[:180]} == set(ALL_LABELS)
    assert evaluation_prompts(7) == prompts[:7]
    assert {parse(p) for p in evaluation_prompts(18, HELD_OUT_LABELS)} == HELD_OUT_LABELS
    assert evaluation_prompts(5, ALL_LABELS[::-1]) == prompts[:5]


def test_a_caption_word_is_one_token(digits):
    tokenizer = digits.pipe.tokenizer
    words = {word for text in TEMPLATES for word in text.replace(",", "").split() if "{" not in word}
    words |= {*DIGITS, *COLOURS, *WEIGHTS, *"0123456789", ","}
    assert {"a", "handwritten", "seven", "purple", "bold", "number"} < words
    tokens = {word: tuple(tokenizer(word, add_special_tokens=False).input_ids) for word in words}
    assert all(len(ids) == 1 for ids in tokens.values()), tokens
    assert len(set(tokens.values())) == len(words)


def test_captions_fit_the_text_encoder(digits):
    texts = [caption(label, template) for label in ALL_LABELS for template in TEMPLATES]
    assert (
        max(len(ids) for ids in digits.pipe.tokenizer(texts).input_ids)
        <= digits.pipe.tokenizer.model_max_length
        == 16
    )


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=12))
def test_no_text_holds_an_unknown_token(digits, text):
    """The unknown token is the end of text: it stands at the end only."""
    tokenizer = digits.pipe.tokenizer
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.unk_token_id not in ids
    assert tokenizer(text).input_ids == [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    if text.strip().isascii() and text.isprintable():
        assert tokenizer.decode(ids).replace(" ", "") == text.lower().replace(" ", "")
