"""The command lines of the documentation, and what each of them runs."""

import importlib
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
PAGES += sorted((ROOT / "benchmarks").glob("*.md"))
STARTS = ("python", "torchrun", "./launch.sh", "./train_flux.sh")
ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=\S*")
LAUNCHERS = {  # a subcommand of launch.sh: the module that gets its options
    "sample": "sample",
    "distill": "training.distill.launch",
    "train": "training.ppo.launch",
    "eval": "evaluation.suite",
    "show": "solvers.predictor",
    "demo": "benchmarks.demo",
    "build": "digits.build",
}
CONFIGURED = {"distill": "training/distill/cfgs", "train": "training/ppo/cfgs"}


@dataclass(frozen=True)
class Run:
    """A module, or a script at the root, and the arguments that a command line gives it."""

    module: str
    arguments: list[str]


def command_lines(text: str) -> Iterator[str]:
    """The shell lines of a page that start one of the project's commands: indented, fenced, and between
    backticks.
    """
    blocks = [block for _, block in re.findall(r"^```(sh|bash|console)?\n(.*?)^```", text, re.M | re.S)]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    blocks.append("\n".join(line[4:] for line in prose.splitlines() if line.startswith("    ")))
    lines = re.sub(r"\\\n\s*", "", "\n".join(blocks)).splitlines()
    unindented = "\n".join(line for line in prose.splitlines() if not line.startswith("    "))
    lines += [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", unindented)]
    for line in lines:
        words = line.strip().split()
        while words and ASSIGNMENT.fullmatch(words[0]):
            words.pop(0)
        if words and words[0] in STARTS:
            yield line.strip()


def words_of(line: str) -> list[str]:
    """The words of a shell line, but for variables before them, comments and "..."; a <placeholder> is one
    word.
    """
    line = re.sub(r"<[^<>]*>", "PLACEHOLDER", line)
    words = [word for word in shlex.split(line, comments=True) if word != "..."]
    while ASSIGNMENT.fullmatch(words[0]):
        words.pop(0)
    return words


def run_of(line: str) -> Run | None:
    """What a line runs, or None where that is none of the project's Python; an unknown one: ValueError."""
    program, *words = words_of(line)
    if program == "./train_flux.sh":
        if [w for w in words if w.startswith("-") and w not in ("--resume", "--help", "-h")]:
            raise ValueError("train_flux.sh takes --resume alone")
        return None
    if program == "./launch.sh":
        return launched(words)
    if program == "torchrun":
        while words and words[0].startswith("--"):
            words.pop(0)
    if words[0] == "-c":
        return None
    if words == ["-m"]:  # the program alone, in prose
        return None
    if words[0] == "-m":
        return Run(words[1], words[2:])
    if not (ROOT / words[0]).is_file():
        raise ValueError(f"there is no {words[0]}")
    return Run(".".join(Path(words[0]).with_suffix("").parts), words[1:])


def launched(words: list[str]) -> Run | None:
    """What launch.sh runs with some words."""
    usage = (ROOT / "launch.sh").read_text(encoding="utf-8")
    name = words[0] if words else "--help"
    if f"\n  {name} " not in usage and name != "--help":
        raise ValueError(f"launch.sh has no command {name}")
    rest = words[1:]
    if name == "distill" and any(word.partition("=")[0] == "--model" for word in rest):
        return Run("training.distill.own_model", rest)
    if name in CONFIGURED and rest:
        config, *rest = rest
        if config != "PLACEHOLDER" and not (ROOT / CONFIGURED[name] / f"{config}.yaml").is_file():
            raise ValueError(f"there is no {CONFIGURED[name]}/{config}.yaml")
    if name == "show":
        rest = ["show", *rest]
    return Run(LAUNCHERS[name], rest) if name in LAUNCHERS else None


def command_of(module: str) -> click.Command:
    """The click command of a module, or of the package's __main__; none: ValueError."""
    if not (ROOT / Path(*module.split("."))).with_suffix(".py").is_file():
        module = f"{module}.__main__"
        if not (ROOT / Path(*module.split("."))).with_suffix(".py").is_file():
            raise ValueError(f"there is no module {module.removesuffix('.__main__')}")
    main = vars(importlib.import_module(module)).get("main")
    if not isinstance(main, click.Command):
        raise ValueError(f"{module} has no click command main")
    return main


def check(line: str) -> None:
    """Refuse a line whose module, subcommand or option does not exist: ValueError."""
    run = run_of(line)
    if run is None or run.module == "pytest" or run.module.startswith("tests."):
        return
    command, arguments = command_of(run.module), list(run.arguments)
    if isinstance(command, click.Group) and arguments and arguments[0] != "--help":
        name = arguments.pop(0)
        if name not in command.commands:
            raise ValueError(f"{run.module} has no subcommand {name}")
        command = command.commands[name]
    known = {"--help"} | {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
    normalize = command.context_settings.get("token_normalize_func", str)
    for word in arguments:
        option = normalize(word.partition("=")[0])
        if re.match(r"--?[A-Za-z]", word) and option not in known:
            raise ValueError(f"{run.module} has no option {option}")
