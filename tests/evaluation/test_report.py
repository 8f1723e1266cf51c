"""evaluate.py report: the page needs nothing else, and says what the files say."""

import base64
import hashlib
import json
import re
import shutil
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from evaluation.comparison import p_value
from evaluation.report.page import brief
from evaluation.tables import number
from solvers import Predictor, SolverTable, Spec, load_predictor, polynomial, save_predictor

VOID = {"meta", "source", "img", "br", "hr", "input", "link"}
TITLE = 'Digits <b>"&'


class Page(HTMLParser):
    """What is asked of a page: its addresses, images, exact numbers and the rows of its tables; elements must
    be nested well.
    """

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.alts: list[str | None] = []
        self.numbers: list[tuple[float, str]] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.add(tag)
        self.addresses += [
            values[key] for key in ("src", "srcset", "href", "data", "action") if key in values
        ]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "img":
            self.alts.append(values.get("alt"))
        if tag == "svg" and "aria-hidden" not in values:
            self.alts.append(values.get("aria-label"))
        if tag == "data":
            self.numbers.append((float(values["value"]), ""))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if "data" in self.open:
            self.numbers[-1] = self.numbers[-1][0], text
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += text


@pytest.fixture(scope="module")
def learned(evaluation, tmp_path_factory):
    """A run of a solver that was trained on the digits reward, and the folder of its predictor."""
    root = tmp_path_factory.mktemp("learned")
    table = SolverTable.sorted(*(SolverTable.uniform(3, 2).arrays()[k] for k in "rw"))
    save_predictor(
        Predictor(
            table,
            Spec(num_steps=4),
            polynomial(4, 0.03, 15.0),
            {"kind": "rdpo", "reward": {"name": "digits"}},
        ),
        root / "exps/tuned.pkl",
    )
    sha = hashlib.sha256((root / "exps/tuned.pkl").read_bytes()).hexdigest()
    folder = evaluation.make(root / "tuned", light=0.8, solver="epd", predictor=sha, depth=6, evaluations=9)
    evaluation.score(folder, "--exps", root / "exps")
    return folder, root / "exps"


@pytest.fixture(scope="module")
def report(evaluation, scored, learned, tmp_path_factory):
    """The path and the text of a report of three runs."""
    out = tmp_path_factory.mktemp("report") / "page.html"
    runs = [part for run in (*scored, learned[0]) for part in ("--run", run)]
    evaluation.run("report", *runs, "--exps", learned[1], "--out", out, "--title", TITLE)
    return out, out.read_text()


def test_nothing_is_fetched_and_only_the_sorting_runs(report):
    page = Page(report[1])
    assert len(page.addresses) > 24
    assert all(re.match("data:image/(png|jpeg);base64,|#", address) for address in page.addresses)
    assert not page.tags & {"link", "iframe", "object", "embed"}
    assert "://" not in report[1]
    assert not re.search(r"@import|url\((?!#)", report[1])
    scripts = re.findall("<script>(.*?)</script>", report[1], re.DOTALL)
    allowed = re.findall("script-src 'sha256-([^']+)'", report[1])
    assert [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts] == allowed
    assert len(allowed) == 1


def test_addresses_within_the_page_lead_somewhere_and_identifiers_are_unique(report):
    identifiers = re.findall(r'\bid="([^"]+)"', report[1])
    assert len(identifiers) == len(set(identifiers))
    used = {a[1:] for a in Page(report[1]).addresses if a.startswith("#")}
    assert used | set(re.findall(r"url\(#([^)]+)\)", report[1])) <= set(identifiers)


def test_images_have_words_and_are_images(report):
    page = Page(report[1])
    assert all(page.alts)
    words = "judge against serial depth: " + "; ".join(
        rf"{re.escape(name)} \S+ at {cost}"
        for name, cost in (("DPM++ 2M", 6), ("UniPC-2", 8), ("EPD RDPO", 6))
    )
    assert any(re.search(words, alt) for alt in page.alts)
    for address in page.addresses:
        if address.startswith("data:"):
            Image.open(BytesIO(base64.b64decode(address.partition(",")[2]))).verify()


def test_the_numbers_are_those_of_the_files(evaluation, report, scored, learned):
    """Every number shown is the rounding of an exact one, and these are the summaries', the lines' and the
    comparison's.
    """
    shown = Page(report[1]).numbers
    for value, text in shown:
        assert text in (brief(value), brief(value, signed=True), number(value), p_value(value))
    exact = {value for value, _ in shown}
    runs = [*scored, learned[0]]
    for run in runs:
        for metric in ("digits", "judge"):
            summary, lines = evaluation.summary(run, metric), evaluation.lines(run, metric)
            assert {summary["mean"], *summary["interval"]} <= exact
            assert summary["mean"] == pytest.approx(np.mean([line["score"] for line in lines]))
            assert {line["score"] for line in lines} <= exact
    arguments = [part for run in runs for part in ("--run", run)]
    evaluation.run("compare", *arguments, "--out", report[0].with_name("compare.json"))
    for row in json.loads(report[0].with_name("compare.json").read_text())["comparisons"]:
        difference = row["difference"]
        assert {
            difference["mean"],
            difference["standard_error"],
            *difference["interval"],
            row["win_rate"],
            row["sign_test_p"],
        } <= exact


def test_costs_and_guidance(report):
    rows = {row[0]: row for row in Page(report[1]).rows if len(row) == 8}
    assert rows["solver"][1:] == [
        *("serial depth", "NFE", "guidance", "digits", "difference", "judge", "difference")
    ]
    assert rows["UniPC-2 · depth 8 · 8 NFE"][1:4] == ["8", "8", "7.5 (× 2 rows)"]
    assert rows["EPD RDPO · depth 6 · 9 NFE"][1:4] == ["6", "9", "7.5 (× 2 rows)"]
    assert rows["DPM++ 2M · depth 6 · 6 NFE"][5] == "reference"


def test_what_was_trained_on_is_marked_everywhere(report):
    rows = Page(report[1]).rows
    marked = [(row[0], i) for row in rows if len(row) == 8 for i, cell in enumerate(row) if "trained" in cell]
    assert marked == [("EPD RDPO · depth 6 · 9 NFE", 4)]
    samples = [row for row in rows if "seed" in row[0] and len(row) == 4][1:]
    assert len(samples) == 8
    assert all("trained on" in row[3] and "trained on" not in row[1] + row[2] for row in samples)
    name = "EPD RDPO · depth 6 · 9 NFE"
    assert [row[-1] for row in rows if row[:2] == [name, "digits"] and len(row) == 9] == ["this run"]


def test_text_is_escaped(evaluation, scored, report, tmp_path):
    assert "<title>Digits &lt;b&gt;&#34;&amp;</title>" in report[1]
    folder = shutil.copytree(scored[0], tmp_path / "a<i>b")
    evaluation.run("report", "--run", folder, "--out", tmp_path / "page.html")
    assert "a<i>b" not in (tmp_path / "page.html").read_text()


def test_the_solver_table_is_there_in_numbers(report, learned):
    table = load_predictor(learned[1] / "tuned.pkl").table
    rows = Page(report[1]).rows
    start = next(
        i for i, row in enumerate(rows) if row == ["interval", "σ from", "σ to", "r1", "r2", "w1", "w2"]
    )
    for n in range(3):
        assert rows[start + 1 + n][3:] == [number(v) for v in [*table.r[n].tolist(), *table.w[n].tolist()]]


def test_plots_are_beside_the_page(report):
    names = sorted(path.name for path in report[0].parent.glob("*.png"))
    assert names == ["page-family-1.png", "page-table-1.png"]
    for name in names:
        Image.open(report[0].with_name(name)).verify()


def test_a_run_without_a_manifest_has_no_costs(evaluation, scored, tmp_path):
    folder = shutil.copytree(scored[0], tmp_path / "found")
    shutil.rmtree(folder / "scores")
    (folder / "manifest.jsonl").unlink()
    (tmp_path / "prompts.txt").write_text("a red seven\n" * 8)
    evaluation.score(folder, "--prompts", tmp_path / "prompts.txt", metrics="judge")
    evaluation.run("report", "--run", folder, "--out", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "no manifest holds their costs: found." in text
    row = next(row for row in Page(text).rows if row[0] == "found")
    assert row[1:4] == ["–"] * 3
    assert "trained on?" in row[4]


def test_large_images_are_made_smaller(evaluation, tmp_path):
    folder = evaluation.make(tmp_path / "large", range(2), size=600)
    evaluation.score(folder, metrics="digits")
    evaluation.run("report", "--run", folder, "--out", tmp_path / "page.html")
    jpegs = [
        a for a in Page((tmp_path / "page.html").read_text()).addresses if a.startswith("data:image/jpeg")
    ]
    assert [Image.open(BytesIO(base64.b64decode(a.partition(",")[2]))).size for a in jpegs] == [
        (256, 256)
    ] * 2


@pytest.fixture(scope="module")
def chromium():
    """The machine's Chromium, driven by playwright; skipped where either is not there."""
    playwright = pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium here")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize("width", [1280, 390], ids=["desk", "phone"])
def test_the_page_fits_and_fetches_nothing(chromium, report, width):
    """Light and dark: nothing sticks out, nothing is fetched, the console stays empty."""
    backgrounds = set()
    for scheme in ("light", "dark"):
        page = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        messages, requests = [], []
        page.on("console", lambda message, log=messages: log.append(message.text))
        page.on("pageerror", lambda error, log=messages: log.append(str(error)))
        page.on("request", lambda request, log=requests: log.append(request.url))
        page.goto(report[0].resolve().as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
        assert page.title() == TITLE
        assert {url for url in requests if not url.startswith("data:")} == {report[0].resolve().as_uri()}
        assert messages == []
        backgrounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        page.close()
    assert len(backgrounds) == 2
