"""The report is read back from its HTML: what it says, what it does not say, and what it loads."""

import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest

from bench import interval, measure, pareto, plots, result
from bench.errors import ResultError
from bench.figure import Plot
from bench.measure import CurvePoint, Slo
from bench.pages import compare, figures, report, tables
from bench.pages.locust_report import Locust
from bench.records import Record, read
from bench.scrape import Sample
from bench.traffic.load import Happening
from tests.bench import made
from tests.bench.test_axes import said, ticks

HOSTILE = (
    "<script>alert(1)</script>\"'><img src=x onerror=alert(2)> --> $\\frac{ {{ 7*7 }} ]]> \x00"
)
SVG = "{http://www.w3.org/2000/svg}"
VOID = {"meta", "br", "img", "hr", "link", "input"}


class Page(HTMLParser):
    """What a browser would find: tags with attributes, text, and figures by where they stand."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.html = path.read_text()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.figures: list[dict[str, str]] = []
        self.sections: dict[str, str] = {}
        self._stack: list[tuple[str, dict[str, str]]] = []
        self._heading = ""
        self.feed(self.html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.tags.append((tag, attributes))
        if tag == "h2":
            self._heading = attributes.get("id", "")
        if "data-metric" in attributes:
            tables = [around.get("id", "") for name, around in self._stack if name == "table"]
            where = {"table": "".join(tables[-1:]), "section": self._heading}
            self.figures.append({**attributes, **where, "text": ""})
        if tag not in VOID:
            self._stack.append((tag, attributes))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        while self._stack and self._stack.pop()[0] != tag:
            continue

    def handle_data(self, data: str) -> None:
        if self._stack and self._stack[-1][0] == "style":
            return
        self.sections[self._heading] = self.sections.get(self._heading, "") + data
        if self.figures and any(a.get("data-metric") for _, a in self._stack):
            self.figures[-1]["text"] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.sections.values()).split())

    def headline(self) -> list[dict[str, str]]:
        return [figure for figure in self.figures if figure["table"] == "headline-table"]


def page(tmp_path: Path, *folders: str, against: str | None = None) -> Page:
    out = tmp_path / "out" / "report.html"
    base = tmp_path / against if against else None
    report.report([tmp_path / folder for folder in folders], out, base)
    return Page(out)


@pytest.fixture
def unsaved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots are put together and not laid out, which takes most of the time of a report."""
    monkeypatch.setattr(plots, "svg", lambda figure, prefix, label: "<svg></svg>")


# For a test of tables and text; those of plots draw them.
without_plots = pytest.mark.usefixtures("unsaved")


def draw_only(monkeypatch: pytest.MonkeyPatch, *labels: str) -> None:
    """Lay out the plots of these labels, and no others."""
    real = plots.svg

    def svg(figure: Plot, prefix: str, label: str) -> str:
        return real(figure, prefix, label) if label in labels else "<svg></svg>"

    monkeypatch.setattr(plots, "svg", svg)


def shown(text: str) -> float:
    """The number a reader sees, without what stands behind it."""
    return float(text.partition("±")[0].replace(",", "").replace("%", ""))


# --- figures --------------------------------------------------------------------------------


@without_plots
def test_headline_shows_the_measures_and_half_of_their_intervals(tmp_path: Path) -> None:
    repeats = [made.records(460, repeat=repeat, fails=0.01) for repeat in range(3)]
    made.run(tmp_path / "a", "a run", repeats, slo=Slo(ttft_s=0.2))
    windows = [measure.window(each, None) for each in repeats]
    measures = [
        measure.measure(each, Slo(ttft_s=0.2), window)
        for each, window in zip(repeats, windows, strict=True)
    ]
    expected = measure.summary(measures)

    figures = page(tmp_path, "a").headline()

    always = {m for _, columns in tables.HEADLINE for m, _ in columns} - {
        "cached_share",
        "joules_per_output_token",
        "usd_per_million_output_tokens",
    }
    assert {figure["data-metric"] for figure in figures} == always
    tokens = {f["data-metric"]: f for f in figures if f["data-metric"] not in expected}
    assert float(tokens["input_tokens"]["data-value"]) == 100
    assert float(tokens["output_tokens"]["data-value"]) == 40
    for figure in (each for each in figures if each["data-metric"] in expected):
        metric, scale = figure["data-metric"], 1.0
        scale = 100 if metric.endswith("_share") else 1e3 if metric[:4] in ("ttft", "tpot") else 1
        mean, low, high = (expected[metric][key] for key in ("mean", "low", "high"))
        assert mean is not None
        assert low is not None
        assert high is not None
        assert float(figure["data-value"]) == pytest.approx(mean)
        assert shown(figure["text"]) == pytest.approx(mean * scale, rel=0.006)
        half = float(figure["text"].partition("±")[2].replace(",", ""))
        assert half == pytest.approx((high - low) / 2 * scale, rel=0.06)


@without_plots
def test_percentiles_of_too_few_samples_are_absent_with_their_reason(tmp_path: Path) -> None:
    # All in the whole, as so few have no steady state.
    made.run(tmp_path / "a", "short", [made.records(20)])

    html = page(tmp_path, "a")
    figures = {figure["data-metric"]: figure for figure in html.headline()}

    assert "data-value" in figures["ttft_p50_s"]
    for percent, needed in ((95, 72), (99, 368)):
        absent = figures[f"ttft_p{percent}_s"]
        assert "data-value" not in absent
        assert absent["text"].startswith("—")
        assert f"needs {needed} samples" in absent["title"]
    assert interval.samples_needed(0.99) == 368
    assert "p99 368" in html.text


@without_plots
def test_failures_are_not_zeros(tmp_path: Path) -> None:
    made.run(tmp_path / "a", "all fail", [made.records(50, fails=1.0)])

    html = page(tmp_path, "a")
    figures = {figure["data-metric"]: figure for figure in html.headline()}

    assert shown(figures["failed_share"]["text"]) == 100
    for metric, figure in figures.items():
        if metric.startswith(("ttft", "tpot", "e2e")):
            assert "data-value" not in figure
            assert figure["text"] == "—"
    assert "nothing succeeded: 50 http 429" in html.text
    assert "Not shown: all fail: no request succeeded" in html.sections["latency"]


@without_plots
def test_matrix_shows_each_cell(tmp_path: Path) -> None:
    outcome = made.cells(tmp_path / "m", "matrix", "served", per_user=2)
    figures = [f for f in page(tmp_path, "m").figures if f["section"] == "matrix"]

    of = "output_tokens_per_s"
    values = sorted(float(f["data-value"]) for f in figures if f["data-metric"] == of)
    assert values == pytest.approx(sorted(c.summary[of]["mean"] for c in outcome.cells))
    # Two requests are too few for a median of their first tokens; a mean they have.
    assert all("data-value" in figure for figure in figures)


@without_plots
def test_cell_that_was_not_measured_is_empty(tmp_path: Path) -> None:
    outcome = made.cells(tmp_path / "m", "matrix", "served", per_user=2)
    del outcome.cells[4]
    result.write(tmp_path / "m", outcome)

    figures = [f for f in page(tmp_path, "m").figures if f["section"] == "matrix"]

    absent = [f for f in figures if f.get("title") == "this cell was not measured"]
    assert len(figures) == 3 * 18
    assert len(absent) == 3
    assert all("data-value" not in figure for figure in absent)


@without_plots
def test_against_shows_the_ratios_of_compare(tmp_path: Path) -> None:
    def repeats(ttft_s: float, seed: int) -> list[list[Record]]:
        return [made.records(120, repeat=r, ttft_s=ttft_s, seed=seed) for r in range(3)]

    old = made.run(tmp_path / "old", "last week", repeats(0.3, 1))
    new = made.run(tmp_path / "new", "today", repeats(0.1, 2))
    rows = {row.metric: row for row in compare.compare(old, new)}

    html = page(tmp_path, "new", against="old")
    figures = {f["data-metric"]: f for f in html.figures if f["section"] == "against"}

    assert set(figures) == set(rows)
    assert float(figures["ttft_p50_s"]["data-value"]) == pytest.approx(rows["ttft_p50_s"].ratio)
    assert rows["ttft_p50_s"].verdict == "better"
    assert "better" in html.sections["against"]
    assert "last week" in html.sections["against"]


@without_plots
def test_served_matrix_stands_beside_the_engine_alone(tmp_path: Path) -> None:
    made.cells(tmp_path / "base", "baseline", "alone", per_user=3)
    made.cells(tmp_path / "m", "matrix", "served", speed=1.3, per_user=3)

    html = page(tmp_path, "m", "base")

    metrics = {f["data-metric"] for f in html.figures if f["section"] == "against"}
    assert "output_tokens_per_s" in metrics
    # The engine alone has no stream, so the time between its tokens is not known.
    assert not any(metric.startswith("itl_") for metric in metrics)


@without_plots
def test_other_kinds_are_not_compared(tmp_path: Path) -> None:
    made.run(tmp_path / "a", "a run", [made.records(20)])
    made.cells(tmp_path / "m", "matrix", "served", per_user=2)

    html = page(tmp_path, "a", against="m")

    assert "a run cannot be held against a matrix" in html.sections["against"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.012345, "0.0123"), (1.2345, "1.23"), (12.345, "12.3"), (12345.6, "12,346")],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert figures.number(value) == text


# --- what is missing ------------------------------------------------------------------------


@without_plots
def test_missing_records_are_said(tmp_path: Path) -> None:
    made.run(tmp_path / "a", "a run", [made.records(40)])
    (tmp_path / "a" / "records.jsonl").unlink()

    html = page(tmp_path, "a")

    for section in ("latency", "time", "gaps"):
        assert "records.jsonl: No such file" in html.sections[section]
    assert any("data-value" in figure for figure in html.headline())


@without_plots
def test_records_cut_in_the_middle_are_said_and_the_others_shown(tmp_path: Path) -> None:
    made.run(tmp_path / "a", "a run", [made.records(40)])
    path = tmp_path / "a" / "records.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:30], b"{broken\n", *lines[31:]]))

    loaded = report.load(tmp_path / "a")
    html = page(tmp_path, "a")

    assert len(loaded.records) == 30
    assert "line 31 cannot be read" in html.sections["latency"]
    assert any(tag == "svg" for tag, _ in html.tags)


@without_plots
def test_no_server_metrics_are_said(tmp_path: Path) -> None:
    made.run(tmp_path / "a", "a run", [made.records(40)])
    assert "the server's own metrics: none were scraped" in page(tmp_path, "a").sections["time"]


def test_server_metrics_are_drawn_and_gaps_in_them_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_only(monkeypatch, "Timeline of the run")
    server = [Sample(t_s=float(t), running=2.0, waiting=float(t), kv_usage=0.1) for t in range(5)]
    made.run(tmp_path / "a", "a run", [made.records(40)], server=server)

    section = page(tmp_path, "a").sections["time"]

    assert "Server: requests waiting and running" in section
    assert "Server: replicas: the server does not say" in section
    assert "none were scraped" not in section


@without_plots
def test_records_without_a_result_are_still_shown(tmp_path: Path) -> None:
    made.run(tmp_path / "a", "a run", [made.records(400)])
    (tmp_path / "a" / "result.json").unlink()

    html = page(tmp_path, "a")
    figures = {figure["data-metric"]: figure for figure in html.headline()}

    whole = measure.measure(read(tmp_path / "a" / "records.jsonl"))
    assert float(figures["ttft_p99_s"]["data-value"]) == pytest.approx(whole.ttft_p99_s)
    assert "the run left no result" in html.sections["doubts"]
    assert "Not valid" in html.text


@without_plots
def test_unreadable_folder_is_named_beside_the_others(tmp_path: Path) -> None:
    made.run(tmp_path / "a", "a run", [made.records(40)])
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "result.json").write_text('{"benchmark": "run", ')

    html = page(tmp_path, "a", "torn", "nowhere")

    assert "not JSON" in html.sections["doubts"]
    assert "nowhere" in html.sections["doubts"]
    assert html.headline()


def test_nothing_to_show_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match="nowhere"):
        report.report([tmp_path / "nowhere"], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


@without_plots
def test_interrupted_run_without_records(tmp_path: Path) -> None:
    made.run(tmp_path / "a", "a run", [[]], interrupted=True)

    html = page(tmp_path, "a")

    assert "interrupted" in html.sections["doubts"]
    assert "records.jsonl is empty" in html.sections["time"]


@without_plots
def test_doubts_stand_before_the_figures_and_are_an_alert(tmp_path: Path) -> None:
    made.run(tmp_path / "good", "good", [made.records(300)])
    made.run(tmp_path / "bad", "bad", [made.records(300, fails=0.2)])

    html, sound = page(tmp_path, "good", "bad"), page(tmp_path, "good")

    assert list(html.sections)[1:4] == ["ran", "doubts", "headline"]
    assert "1 of 2 results is not valid" in html.sections[""]
    assert any(attributes.get("role") == "alert" for _, attributes in html.tags)
    assert "Valid" in sound.sections[""]
    assert not any(attributes.get("role") == "alert" for _, attributes in sound.tags)


# --- the demo -------------------------------------------------------------------------------


def demo(folder: Path, answer: str = "Black.", error: str = "") -> Locust:
    heard = made.records(400, users=10, fails=0.02)
    heard[200] = msgspec.structs.replace(
        made.records(201, users=10)[200], kind="example", text=answer, error=error
    )
    return made.locust(folder, heard, {200: "What is a black hole?"}, 10)


@without_plots
def test_demo_shows_its_summary_and_examples(tmp_path: Path) -> None:
    outcome = demo(tmp_path / "l")

    html = page(tmp_path, "l")
    tiles = {f["data-metric"]: f for f in html.figures if f["section"] == "demo"}

    assert outcome.requests == 400
    for metric, figure in tiles.items():
        value = getattr(outcome, metric)
        if value is None:
            assert "data-value" not in figure
            assert "needs 368 samples" in figure["title"]
        else:
            assert float(figure["data-value"]) == pytest.approx(value), metric
    assert {"requests_per_s", "output_tokens_per_s"} < set(tiles)
    assert {f"e2e_{of}_s" for of in ("mean", "p50", "p95")} < set(tiles)
    section = html.sections["demo"]
    assert "What is a black hole?" in section
    assert "Black." in section
    assert f"first token {figures.number(outcome.examples[0].ttft_s * 1e3)} ms" in section
    assert "http 429: rate limit reached" in section


@without_plots
def test_demo_without_examples_says_why(tmp_path: Path) -> None:
    made.locust(tmp_path / "l", made.records(30, users=3), {}, 3)
    section = page(tmp_path, "l").sections["demo"]
    assert "the run ended before all users were there" in section


# --- every kind -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a result of each kind."""
    root = tmp_path_factory.mktemp("every")
    server = [Sample(t_s=t / 2, running=3.0, waiting=0.0, kv_usage=0.2) for t in range(20)]
    repeats = [made.records(150, repeat=repeat) for repeat in range(2)]
    made.run(root / "run", "a run", repeats, server=server, slo=Slo(ttft_s=0.2))
    made.cells(root / "matrix", "matrix", "a matrix", per_user=2)
    made.cells(root / "baseline", "baseline", "a baseline", per_user=2)
    made.sweep(root / "sweep", "a sweep")
    made.search(root / "search", "a search")
    demo(root / "locust")
    return root


KINDS = ("run", "matrix", "baseline", "sweep", "search", "locust")


@without_plots
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_alone(every: Path, kind: str) -> None:
    html = page(every, kind)
    assert html.headline()
    assert f"python -m bench {kind}" in html.sections["ran"]
    assert "abc1234" in html.sections["ran"]
    assert "A processor" in html.sections["ran"]


@without_plots
def test_searches_say_what_was_found(every: Path) -> None:
    section = page(every, "sweep", "search").sections["throughput"]
    assert "throughput levels off at 16 users" in section
    assert "4 requests/s kept the objective; 8 did not" in section
    assert "unresolved: the rates in between are too near" in section


@pytest.fixture(scope="module")
def together(every: Path) -> Page:
    return page(every, *KINDS)


def test_all_kinds_together_are_one_page_that_loads_nothing(together: Page) -> None:
    html = together

    assert len(html.html) < 2_000_000
    assert not [tag for tag, _ in html.tags if tag in ("script", "link", "iframe", "img", "object")]
    for _, attributes in html.tags:
        for name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
            assert attributes.get(name, "#")[:1] == "#" or attributes[name].startswith("data:")
        assert not [name for name in attributes if name.startswith("on")]
        assert "url(" not in attributes.get("style", "").replace("url(#", "")
    style = html.html[html.html.index("<style>") : html.html.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert any(
        a.get("http-equiv") == "Content-Security-Policy" and "default-src 'none'" in a["content"]
        for _, a in html.tags
    )


def test_ids_are_unique_and_references_resolve(together: Page) -> None:
    html = together
    ids = [attributes["id"] for _, attributes in html.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    references = [
        attributes[name][1:]
        for _, attributes in html.tags
        for name in ("href", "xlink:href")
        if attributes.get(name, "").startswith("#")
    ]
    assert references
    assert set(references) <= set(ids)
    assert html.html.count("url(#") == sum(html.html.count(f"url(#{each})") for each in set(ids))


def test_plots_take_their_colours_and_font_from_the_page(together: Page) -> None:
    plots = together.html.split("<svg ")[1:]
    assert len(plots) > 8
    for part in plots:
        plot = "<svg " + part.partition("</svg>")[0] + "</svg>"
        tree = ElementTree.fromstring(plot)
        assert tree.get("role") == "img"
        assert "var(--ink)" in plot or "var(--muted)" in plot
        assert "#0a0b" not in plot
        assert "#000000" not in plot
        assert "DejaVu" not in plot


def test_every_plot_of_a_page_has_different_ticks_and_says_its_values(together: Page) -> None:
    svgs = re.findall(r'<svg class="plot".*?</svg>', together.html, re.DOTALL)
    for svg in svgs:
        for axis, texts in ticks(svg).items():
            assert len(set(texts)) == len(texts), axis
        assert said(svg)


def test_results_of_one_name_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_only(monkeypatch, "Cumulative distributions of latency")
    for folder in ("first", "second"):
        made.run(tmp_path / folder, "a run", [made.records(40)])
    section = page(tmp_path, "first", "second").sections["latency"]
    assert "a run (first)" in section
    assert "a run (second)" in section


# --- untrusted text -------------------------------------------------------------------------


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    # Everything that a server, a model or a command line has a say in.
    each = made.records(120)
    for record in each[::2]:
        record.kind = HOSTILE
    for record in each[::9]:
        record.status, record.error, record.chunk_s = 500, f"http 500: {HOSTILE}", []
    made.run(
        tmp_path / "a",
        HOSTILE,
        [each],
        events=[Happening(at_s=1.0, what=HOSTILE)],
        command=HOSTILE,
        target={"url": HOSTILE, "model": HOSTILE, "endpoint": HOSTILE},
        workload=HOSTILE,
        commit=HOSTILE,
        machine={**made.MACHINE, "processor": HOSTILE},
        doubts=[HOSTILE],
        valid=False,
    )
    heard = made.records(60, users=4)
    heard[20].kind, heard[20].text = "example", HOSTILE
    heard[30].kind, heard[30].error = "example", HOSTILE
    about = {"name": f"{HOSTILE} two", "errors": [{"reason": HOSTILE, "count": 1, "text": HOSTILE}]}
    made.locust(tmp_path / "l", heard, {20: HOSTILE, 30: HOSTILE}, 4, **about)

    html = page(tmp_path, "a", "l", against="a")

    for plot in html.html.split("<svg ")[1:]:
        ElementTree.fromstring("<svg " + plot.partition("</svg>")[0] + "</svg>")
    tags = {tag for tag, _ in html.tags}
    assert not tags & {"script", "img"}
    assert not [name for _, attributes in html.tags for name in attributes if name[:2] == "on"]
    for section in ("ran", "doubts", "headline", "latency", "time", "against", "demo"):
        assert "<script>alert(1)</script>" in html.sections[section], section
    assert "{{ 7*7 }}" in html.text
    assert " 49 " not in html.html.partition("What was run")[0]


def test_heat_bears_a_single_gap(tmp_path: Path) -> None:
    record = Record(index=0, planned_s=0.0, sent_s=0.0, chunk_s=[0.1, 0.1], end_s=0.1, status=200)
    made.run(tmp_path / "a", "one", [[record]])
    html = page(tmp_path, "a")
    assert "gaps in the cell" in html.sections["gaps"]


# --- users against GPUs, sessions, GPUs ------------------------------------------------------


def curve(*points: tuple[int, float, float]) -> list[CurvePoint]:
    """Points of a curve: users, tokens/s of a user, tokens/s of a GPU."""
    return pareto.front(
        [
            CurvePoint(
                users=users,
                efficiency={
                    "user_tokens_per_s": {"mean": mine, "low": 0.9 * mine, "high": 1.1 * mine},
                    "gpu_tokens_per_s": {"mean": all_of_them, "low": None, "high": None},
                    "joules_per_output_token": {"mean": 0.5, "low": None, "high": None},
                },
            )
            for users, mine, all_of_them in points
        ]
    )


def test_a_curve_of_users_against_gpus_says_its_values_when_pointed_at(tmp_path: Path) -> None:
    points = curve((1, 100.0, 100.0), (4, 80.0, 320.0), (8, 60.0, 300.0))
    assert [point.front for point in points] == [True, True, False]
    fields = made.header("pareto", "mine") | {"curve": points}
    result.write(tmp_path / "a", made.typed(pareto.Curve, fields))
    html = page(tmp_path, "a")
    assert "pareto" in html.sections
    assert (
        "<title>4 users: 80 tokens/s a user, 320 a GPU, 0.5 J an output token</title>" in html.html
    )


def test_a_point_without_gpus_is_on_no_front() -> None:
    points = curve((1, 100.0, 0.0), (4, 80.0, 320.0))
    assert [point.front for point in points] == [None, True]


@without_plots
def test_sessions_are_shown_by_turn(tmp_path: Path) -> None:
    records = made.records(40)
    for index, record in enumerate(records):
        record.session, record.turn, record.cached_tokens = index // 2, index % 2 + 1, index % 2
    shown = measure.sessions(records, dict.fromkeys(range(20), 2))
    made.run(tmp_path / "a", "talk", [records], sessions=[msgspec.to_builtins(shown)])
    section = page(tmp_path, "a").sections["sessions"]
    assert "20 of 20 sessions were done" in section
    assert "turn 2" in section
    assert "Of the prompt tokens of a session 0.5 % (0.5 to 0.5) came" in section


def test_gpus_are_drawn_over_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_only(monkeypatch, "Timeline of the run")
    samples = [
        {"t_s": t / 2, "gpu": 0, "utilisation": 0.5, "memory_gib": 10.0, "joules": 100.0 * t}
        for t in range(20)
    ]
    made.run(tmp_path / "a", "mine", [made.records(60)], gpu=[samples])
    html = page(tmp_path, "a").html
    assert "GPU: power" in html
    assert "200 W at" in html


@without_plots
def test_sections_with_nothing_in_them_are_folded(tmp_path: Path) -> None:
    made.run(tmp_path / "a", "mine", [made.records(60)])
    html = page(tmp_path, "a").html
    folded = html.split('<details class="empty">')[1:]
    assert any("Throughput against latency" in part.split("</details>")[0] for part in folded)
    assert not any("Over time" in part.split("</details>")[0] for part in folded)


@without_plots
def test_a_result_without_records_folds_what_is_drawn_from_them(tmp_path: Path) -> None:
    made.run(tmp_path / "a", "mine", [made.records(60)])
    (tmp_path / "a" / result.RECORDS).unlink()
    (tmp_path / "a" / result.RESULT).rename(tmp_path / "moved.json")
    html = page(tmp_path, "moved.json").html
    folded = " ".join(part.split("</details>")[0] for part in html.split('class="empty">')[1:])
    for title in ("Latency", "Over time", "Gaps between tokens"):
        assert title in folded
    assert "mine: the result is a single file, without records of its requests" in folded
    # What the result has stays.
    assert "Headline" not in folded


def test_a_point_is_pointed_at_where_it_is_drawn() -> None:
    """On both kinds of axes, after the layout has moved them; text of others stays text."""
    at_s, tokens = [0.0, 1.0, 2.0], [2.0, 8.0, 4.0]
    line = plots.Curve(label="a<b>&", x=at_s, y=tokens)
    linear = plots.timeline([plots.Panel(title="t", y_title="tokens/s", curves=[line])], "t")
    logarithmic = plots.curves([("t", "ms", [line])], "tokens/s", "c")
    for svg, corners in ((linear, [0, 2, 4]), (logarithmic, [0, 1, 2])):
        tree = ElementTree.fromstring(svg)
        drawn = [
            [float(number) for number in re.findall(r"-?[\d.]+", path.attrib["d"])]
            for path in tree.iter(f"{SVG}path")
            if "fill: none; stroke: var(--series-0)" in path.attrib.get("style", "")
        ]
        line_of = max(drawn, key=len)
        points = list(zip(line_of[::2], line_of[1::2], strict=True))
        circles = list(tree.iter(f"{SVG}circle"))
        assert [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in circles] == [
            pytest.approx(points[corner], abs=0.02) for corner in corners
        ]
        assert all("a<b>&" in (circle[0].text or "") for circle in circles)


def test_a_gap_of_a_stream_that_came_at_once_has_no_place_in_a_heat_map(tmp_path: Path) -> None:
    records = made.records(40)
    records[3].odd = "one piece: a stream was asked for, and the whole answer came at once"
    made.run(tmp_path, "mine", [records])
    report.report([tmp_path], tmp_path / "page.html")
