"""README.md and docs/: every command and every relative link in them exists."""

import re

import pytest

from .commands import PAGES, ROOT, check, command_lines

TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
LINES = sorted({(page, line) for page, text in TEXTS.items() for line in command_lines(text)})
LINK = re.compile(r"\]\(([^)\s]+)\)")
LINKS = sorted({(page, link) for page, text in TEXTS.items() for link in LINK.findall(text)})
FOLDERS = (
    "backends|benchmarks|common|digits|docs|evaluation|exps|generation|integrations|rewards|solvers|src|tests"
    "|training"
)
NAMED = re.compile(rf"`((?:{FOLDERS})/[\w./*-]*)`")
NOT_SHIPPED = {
    "src/prompts/MS-COCO_val2014_30k_captions.csv",
    "digits/grid/epd-g7.5-d6",
}  # the second under exps


@pytest.mark.parametrize(("page", "line"), LINES)
def test_a_command_exists_with_its_options(page, line):
    check(line)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("python nowhere.py", "there is no nowhere.py"),
        ("python -m training.nowhere", "there is no module training.nowhere"),
        ("python sample.py --no-such-option 3", "has no option --no-such-option"),
        ("python evaluate.py nothing", "has no subcommand nothing"),
        ("./launch.sh dance", "has no command dance"),
        ("./launch.sh distill mars --model m --pears 3", "has no option --pears"),
        ("./launch.sh train mars", "there is no training/ppo/cfgs/mars.yaml"),
        ("A=1 torchrun --nproc_per_node=8 sample.py --seed 3", "has no option --seed"),
        ("./train_flux.sh --fast", "takes --resume alone"),
    ],
)
def test_a_command_that_does_not_exist_is_noticed(line, reason):
    (extracted,) = command_lines(f"```sh\n{line}\n```\n")
    assert extracted == line
    with pytest.raises(ValueError, match=reason):
        check(line)


def test_commands_are_taken_from_all_that_a_page_marks_as_code():
    page = "A `python a.py` and\n\n    X=1 python b.py \\\n        --c   # why\n\n```sh\n./launch.sh d\n```\n"
    assert list(command_lines(page)) == ["./launch.sh d", "X=1 python b.py --c   # why", "python a.py"]


@pytest.mark.parametrize(("page", "link"), LINKS)
def test_a_relative_link_leads_to_a_file(page, link):
    if not re.match(r"[a-z]+:|#", link):
        assert (ROOT / page).parent.joinpath(link.partition("#")[0]).exists()


@pytest.mark.parametrize("page", TEXTS)
def test_a_file_named_in_backticks_exists(page):
    assert sum(len(NAMED.findall(text)) for text in TEXTS.values()) > 20
    named = {path.rstrip("/").replace("NAME", "*") for path in NAMED.findall(TEXTS[page])} - NOT_SHIPPED
    assert [path for path in sorted(named) if not any(ROOT.glob(path))] == []
