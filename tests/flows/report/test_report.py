"""The report page: self-contained, true to its data, safe with any class name, and good in a real browser."""

import json
from html.parser import HTMLParser

import pytest

from flows.evaluation.evaluate import evaluate
from flows.recipes.registry import RECIPES
from flows.recipes.schema import EvaluateConfig
from flows.report.charts import fit_chart, nice_ticks, show, step_charts, sweep_charts
from flows.report.facts import rate_of
from flows.report.render import build_report, confusion_table, duration, markdown_text, tiles
from flows.results.comparison import GateResult, compare
from flows.results.types import (
    ConfusionMatrix,
    Evidence,
    FinalAgreement,
    Finding,
    GeneratorFit,
    LossCurve,
    Rejects,
    ReportData,
    StageRow,
    SweepRow,
)
from infra.artifacts.manifest import Manifest
from sftok.evaluation.results import Protocol, Score
from tests.support.accessibility import serious_findings
from tests.support.browser import chromium, find_browser
from tests.support.sample_evaluation import digits_inputs

HOSTILE = (
    "<script>window.pwned=1</script>",
    '"><img src=x onerror="window.pwned=2">',
    "</style><h1>style</h1>",
    "a|b\n\n# heading",
    "{{ 7 * 7 }}",
    "' style='color:red",
    "javascript:window.pwned=3",
    "日本 <b>",
    "&lt;&amp;",
    "a" * 80,
)
WIDE, NARROW = 1600, 400
SWEEP = tuple(
    SweepRow(
        generator=generator,
        cfg_scale=scale,
        temperature=temperature,
        samples=100,
        class_accuracy=0.9 - 0.02 * temperature + 0.015 * scale,
        seconds_per_image=seconds * (1 if scale == 1 else 2),
    )
    for generator, seconds in (("autoregressive", 0.004), ("masked", 0.001))
    for temperature in (1.0, 1.5)
    for scale in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
)


FIT = GeneratorFit(  # the third position was never hidden
    generator="autoregressive",
    nll=2.625,
    top1=0.25,
    positions=(0, 1, 3),
    by_position=(3.5, 2.5, 1.5),
    frequency_nll=3.75,
    frequency_by_position=(4.0, 3.5, 3.75),
)


FINDINGS = (
    Finding(
        rule="classes-missing",
        severity="serious",
        sentence=f"1 of 10 classes is never drawn right: {HOSTILE[0]}.",
        evidence=(
            Evidence(label=HOSTILE[1], value=0.0125, unit="%"),
            Evidence(label="mean image", value=12.4213, unit="dB"),
        ),
        remedies=("train longer with `--set train_generator.steps=4000`", "guide more strongly"),
    ),
    Finding(rule="copies", severity="minor", sentence="a|b", evidence=(), remedies=("see `--help`",)),
)


def make_data(**changes) -> ReportData:
    names = changes.pop("class_names", None)
    report, images, _ = evaluate(digits_inputs(class_names=names), EvaluateConfig(class_reader=True), seed=0)
    stages = tuple(
        StageRow(
            name=name,
            state=state,
            seconds=seconds,
            digest=digit * 32,
            inputs=inputs,
        )
        for name, state, seconds, digit, inputs in (
            ("prepare", "Cached", 1.2, "a", ()),
            ("train_generator", "Completed", 83.0, "b", ("a" * 32,)),
            ("evaluate", "Completed", 4.0, "c", ("a" * 32, "b" * 32)),
        )
    )
    facts = {
        "run_id": "20260301-101502-digits-9f3c",
        "recipe": "digits",
        "description": "Handwritten digits",
        "created_at": "2026-03-01T10:15:02Z",
        "source": "sklearn:digits",
        "counts": {"found": 900, "accepted": 900, "rejected": 0},
        "stages": stages,
        "evaluation": report,
        "images": images,
        "config": RECIPES["digits"]().as_json(),
        "versions": {"torch": "2.0"},
        "hardware": {"processor": "two cores"},
        "sweep": SWEEP,
        "losses": (
            LossCurve(stage="align", steps=(10, 20, 30), losses=(3.0, 2.0, 1.0)),
            LossCurve(stage="teacher", steps=(1, 500), losses=(5.0, 0.01)),
        ),
        "fit": FIT,
        "rejects": (Rejects(reason="not an image in a known format", count=2, example=HOSTILE[1]),),
        "comparison": compare("now", report, HOSTILE[0], report, same_images=True),
        "findings": FINDINGS,
        "gate": GateResult(against=HOSTILE[0], passed=False, held=3, losses=(f"psnr {HOSTILE[0]}: worse",)),
    }
    return ReportData(**facts | changes)


@pytest.fixture(scope="module")
def data():
    return make_data()


@pytest.fixture(scope="module")
def page(data):
    return build_report(data)


@pytest.fixture(scope="module")
def hostile_page():
    return build_report(make_data(class_names=HOSTILE, recipe=HOSTILE[0], source=HOSTILE[1], description=HOSTILE[2]))


class Tags(HTMLParser):
    """All tags with their attributes; complains where they do not nest."""

    VOID = ("meta", "wbr", "img", "br", "line", "path", "circle", "link", "input")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for seen, attrs in self.seen if seen == tag]


def test_page_needs_nothing_else(page):
    tags = Tags(page.html)
    assert tags.all("script") == [{}], "its own script, and none from elsewhere"
    assert not tags.all("link")
    assert not tags.all("iframe")
    links = [attrs[key] for _, attrs in tags.seen for key in ("src", "href", "srcset") if key in attrs]
    assert links
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in links)
    assert "url(" not in page.html
    assert "@import" not in page.html
    assert len(page.html) < 15e6


def test_page_is_accessible_by_structure(page):
    tags = Tags(page.html)
    assert all(attrs.get("alt") for attrs in tags.all("img"))
    assert all(attrs.get("loading") == "lazy" for attrs in tags.all("img"))
    assert len(tags.all("caption")) == len(tags.all("table"))
    assert all("aria-label" in attrs for attrs in tags.all("svg"))
    ids = [attrs["id"] for _, attrs in tags.seen if "id" in attrs]
    assert len(ids) == len(set(ids))
    targets = {attrs["href"][1:] for attrs in tags.all("a")}
    assert targets <= set(ids)
    assert tags.all("html")[0]["lang"] == "en"


def test_every_figure_stands_in_every_form(data, page):
    for score in data.evaluation.scores():
        assert show(score) in page.html, score.name
        assert show(score) in page.markdown, score.name
    read = json.loads(page.json)
    assert ReportData.model_validate(read | {"images": data.images}) == data
    assert "images" not in read


def test_what_it_is_and_is_not(page):
    for form in (page.html, page.markdown):
        assert "FD (random features)" in form
        assert "is not FID" in form
        assert "ImageNet-1k at 256x256" in form
        assert "not comparable" in form
        assert "SFTok-L" in form
        assert "1.21" in form


def test_stages_and_lineage(page):
    assert "1 min 23 s" in page.html
    assert "prepare, train_generator" in page.html
    assert 'class="cached"' in page.html
    assert "b" * 32 in page.html


def test_markup_in_names_is_text(hostile_page):
    tags = Tags(hostile_page.html)
    assert len(tags.all("script")) == 1
    assert [attrs for _, attrs in tags.seen if any(key.startswith("on") for key in attrs)] == []
    assert all(attrs["src"].startswith("data:") for attrs in tags.all("img"))
    assert len(tags.all("h1")) == 1
    assert "{{ 7 * 7 }}" in hostile_page.html


def test_markup_in_names_does_not_break_markdown_tables(hostile_page):
    assert "<script" not in hostile_page.markdown
    row = next(line for line in hostile_page.markdown.splitlines() if line.startswith("| a\\|b"))
    assert row.startswith("| a\\|b \\# heading |")
    assert markdown_text("a_b*c`<i>\n|") == "a\\_b\\*c\\`&lt;i\\> \\|"


def test_refuses_a_missing_picture_and_an_endless_number(data):
    images = dict(data.images)
    gone = next(iter(images))
    del images[gone]
    with pytest.raises(ValueError, match=f"images lacks 1 pictures of the evaluation, the first is {gone}"):
        ReportData(**{name: getattr(data, name) for name in ReportData.model_fields} | {"images": images})
    with pytest.raises(ValueError, match="finite"):
        Score(name="psnr", label="PSNR", value=float("inf"), protocol=Protocol(num_images=1))


def test_headlines_say_where_n_differs(data):
    """Distances at different N do not compare: the floor has the samples' N, or says its own."""
    beside = {tile.score.name: [label for label, _ in tile.beside] for tile in tiles(data.evaluation)}
    assert beside["generation.fd_random_same_n"] == ["real held-out"]
    assert beside["generation.class_agreement"] == ["real held-out (N = 100)", "shuffled labels"]
    few = evaluate(digits_inputs(samples=60), EvaluateConfig(steps=(1,)), seed=0).report
    assert [tile.beside[0][0] for tile in tiles(few) if "fd_random" in tile.score.name] == ["real held-out (N = 100)"]


def test_large_class_counts_list_pairs_instead_of_a_matrix():
    names = tuple(f"class {i}" for i in range(40))
    counts = tuple(tuple(9 if i == j else int(j == (i + 1) % 40) for j in range(40)) for i in range(40))
    found = confusion_table(ConfusionMatrix(counts=counts), names)
    assert len(found.pairs) == 10
    assert found.pairs[0] == ("class 0", "class 1", 0.1)
    assert found.recall == [0.9] * 40


def test_charts_are_true_to_the_values(data):
    by_steps = data.evaluation.reconstruction.by_steps
    charts = step_charts(by_steps)
    assert [chart.title for chart in charts][:2] == ["PSNR, dB", "SSIM"]
    for chart, column in zip(charts, zip(*(step.measures for step in by_steps), strict=True), strict=True):
        heights = [-point.y for point in chart.points]
        assert [point.x_label for point in chart.points] == ["1", "2", "4", "8"]
        order = sorted(range(4), key=lambda i: column[i].value)
        assert [heights[i] for i in order] == sorted(heights)


def test_held_out_codes_are_held_against_frequencies_in_every_form(page):
    assert json.loads(page.json)["fit"]["frequency_nll"] == 3.75
    assert "| autoregressive generator | 2.625 |\n| class-and-position unigram baseline | 3.750 |" in page.markdown
    assert "Held-out NLL per token: <b>2.625 nats</b> (class-and-position unigram baseline: <b>3.750</b>)" in page.html
    assert "Top-1 accuracy of the autoregressive generator: 25.0 %" in page.html
    (label,) = [
        svg["aria-label"]
        for svg in Tags(page.html).all("svg")
        if svg["aria-label"].startswith("Held-out NLL per token")
    ]
    assert "generator: 3.50 at the first position, 1.50 at the last" in label
    without = build_report(make_data(fit=None))
    assert "Held-out NLL" not in without.html
    assert "Held-out NLL" not in without.markdown
    masked = build_report(make_data(fit=FIT.model_copy(update={"generator": "masked"})))
    assert "of hidden codes given the visible ones" in masked.html


def test_the_fit_is_drawn_where_it_was_measured():
    chart = fit_chart(FIT)
    generator, frequencies = chart.curves
    assert [point.y for point in generator.points] == sorted(point.y for point in generator.points)  # likelier is lower
    assert generator.points[0].x == frequencies.points[0].x
    assert generator.points[2].x - generator.points[1].x == pytest.approx(2 * (generator.points[1].x - 40), abs=0.03)
    assert [mark.x_label for mark in chart.marks] == ["1", "4"]
    one = {"positions": (0,), "by_position": (3.5,), "frequency_by_position": (4.0,)}
    assert len(fit_chart(FIT.model_copy(update=one)).marks) == 1


def test_the_sweep_stands_side_by_side_in_every_form(page):
    assert len(json.loads(page.json)["sweep"]) == 24
    assert {"generator", "cfg_scale", "temperature", "class_accuracy", "seconds_per_image", "samples"} <= set(
        json.loads(page.json)["sweep"][0]
    )
    assert page.markdown.count("| autoregressive | ") == 12
    assert "| masked | 1.5 | 6 | 96.0 % | 100 | 2.00 |" in page.markdown
    tags = Tags(page.html)
    assert [svg["aria-label"][:40] for svg in tags.all("svg")].count("Class accuracy of masked samples by guid") == 1
    assert "4 ms per image without guidance, 8 ms per image with" in page.html
    without = build_report(make_data(sweep=()))
    assert 'id="sweep"' not in without.html
    assert "## Guidance" not in without.markdown


def test_sweep_charts_share_their_scale_and_are_true_to_the_values():
    charts = sweep_charts(SWEEP)
    assert [chart.generator for chart in charts] == ["autoregressive", "masked"]
    assert charts[0].ticks == charts[1].ticks
    for chart in charts:
        assert [curve.name for curve in chart.curves] == ["temperature 1", "temperature 1.5"]
        for curve in chart.curves:
            assert [point.x_label for point in curve.points] == ["1", "2", "3", "4", "5", "6"]
            heights = [-point.y for point in curve.points]
            assert heights == sorted(heights)
        assert chart.curves[0].points[0].y < chart.curves[1].points[0].y  # 0.5 * 0.02 higher
    assert sweep_charts(()) == []
    untimed = [row.model_copy(update={"seconds_per_image": None}) for row in SWEEP]
    assert sweep_charts(untimed)[0].seconds == ""


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 1, [0, 0.5, 1]), (14.6, 31.8, [10, 20, 30, 40]), (5, 5, [4.95, 5, 5.05]), (-3, 3, [-4, -2, 0, 2, 4])],
)
def test_ticks_are_round_and_cover_the_values(low, high, ticks):
    assert nice_ticks(low, high) == pytest.approx(ticks)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.44, "0.4 s"), (12.2, "12 s"), (59.7, "1 min 00 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_losses_rejects_and_the_earlier_run_stand_in_every_form(page):
    for form in (page.html, page.markdown):
        assert "not an image in a known format" in form
        assert "The gate failed" in form
        assert "3 figures were checked against" in form
    assert page.html.count('aria-label="Loss of ') == 2
    assert "teacher (logarithmic)" in page.html
    assert "3 at step 10, 1 at step 30" in page.html
    assert "| teacher | 5 | 0.01 | 500 |" in page.markdown
    read = json.loads(page.json)
    assert read["comparison"]["other"] == HOSTILE[0]
    plain = build_report(make_data(comparison=None, gate=None, losses=(), rejects=()))
    assert 'id="against"' not in plain.html
    assert "## Against" not in plain.markdown


def test_what_to_look_at_first_stands_on_top_of_every_form(page):
    top = page.html[page.html.index("<main>") :].split("</section>")[0]
    assert "What to look at first" in top
    assert '<span class="severity serious">serious</span> 1 of 10 classes is never drawn right: &lt;script&gt;' in top
    assert "<b>1.25 %</b>" in top
    assert "<span>mean image <b>12.42 dB</b></span>" in top
    assert "<li>train longer with <code>--set train_generator.steps=4000</code></li>" in top
    markdown = page.markdown[: page.markdown.index("| headline")]
    assert "1. **serious**: 1 of 10 classes is never drawn right: &lt;script" in markdown
    assert "    - train longer with `--set train_generator.steps=4000`" in markdown
    assert "1. **minor**: a\\|b" in markdown
    assert [one["rule"] for one in json.loads(page.json)["findings"]] == ["classes-missing", "copies"]


def test_nothing_to_look_at_takes_one_quiet_line():
    quiet = build_report(make_data(findings=()))
    assert 'id="first"' not in quiet.html
    assert quiet.html.count("No rule found anything to look at first.") == 1
    assert quiet.markdown.count("No rule found anything to look at first.") == 1
    assert "What to look at first" not in quiet.html + quiet.markdown


def test_worst_median_and_best_are_that(data):
    gallery = data.evaluation.reconstruction.extremes
    decibels = [[float(p.caption.split()[0]) for p in row.pictures if p.caption] for row in gallery.rows]
    assert [row.title for row in gallery.rows] == ["worst", "median", "best"]
    assert max(decibels[0]) <= min(decibels[1]) <= max(decibels[1]) <= min(decibels[2])


def test_what_is_predicted_on_the_way_is_drawn():
    """Figure 4a: of the truth, then of every step before the last."""
    found = FinalAgreement(num_steps=4, num_images=40, kl=(9.5, 1.0, 0.5, 0.1), top1=(0.1, 0.7, 0.8, 0.9))
    data = make_data()
    reconstruction = data.evaluation.reconstruction.model_copy(update={"agreement": found})
    evaluation = data.evaluation.model_copy(update={"reconstruction": reconstruction})
    report = build_report(data.model_copy(update={"evaluation": evaluation}))
    assert "truth 9.50; 1.00 at step 1; 0.50 at step 2; 0.10 at step 3" in report.html
    assert "truth 10%; 70% at step 1; 80% at step 2; 90% at step 3" in report.html
    assert "| truth | 9.500 | 10.0 % |" in report.markdown
    assert "| step 3 | 0.100 | 90.0 % |" in report.markdown
    for form in (report.html, build_report(data).html):
        assert "figure 4a" in form, "the published one is always there, apart"


def test_the_codes_use_is_drawn_falling(data):
    usage = data.evaluation.reconstruction.usage
    assert set(usage.series) == {"held-out images", "training images"}
    for shares in usage.series.values():
        assert list(shares) == sorted(shares, reverse=True)
        assert sum(shares) == pytest.approx(1)  # as many bars as codes here


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not find_browser():
        pytest.skip("needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver)")
    with chromium(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(scope="module")
def files(tmp_path_factory, page, hostile_page):
    folder = tmp_path_factory.mktemp("pages")
    for name, report in (("plain", page), ("hostile", hostile_page)):
        (folder / f"{name}.html").write_text(report.html, encoding="utf-8")
    return folder


class TestInChromium:
    @pytest.mark.parametrize("name", ["plain", "hostile"])
    @pytest.mark.parametrize("width", [NARROW, WIDE])
    def test_fits_the_window(self, browser, files, name, width):
        browser.open(files / f"{name}.html", width=width)
        assert browser.evaluate("window.innerWidth") == width
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        cut = "[...document.querySelectorAll('.card')].filter(c => c.scrollWidth > c.clientWidth + 1).length"
        assert browser.evaluate(cut) == 0

    def test_shows_every_picture_without_a_request(self, browser, files):
        browser.logged("performance")
        browser.open(files / "plain.html", width=WIDE, height=12000)
        shown = "Promise.all([...document.images].map(i => i.decode().then(() => i.naturalWidth)))"
        assert set(browser.evaluate(shown)) == {32}
        events = [json.loads(entry["message"])["message"] for entry in browser.logged("performance")]
        asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        assert asked
        assert all(url.startswith(("file:", "data:")) for url in asked)
        assert [entry for entry in browser.logged("browser") if entry["level"] == "SEVERE"] == []

    def test_markup_in_names_does_nothing(self, browser, files):
        browser.open(files / "hostile.html", width=WIDE)
        assert browser.evaluate("window.pwned") is None
        assert browser.evaluate("document.querySelector('h1').textContent") == HOSTILE[0]
        assert browser.evaluate("document.querySelectorAll('.strip figcaption')[0].textContent") == HOSTILE[0]

    def test_the_slider_shows_the_chosen_step(self, browser, files):
        """Moved by the keyboard, as people without a mouse do."""
        browser.open(files / "plain.html", width=WIDE)
        shown = "[...document.querySelectorAll('#slid img:nth-of-type(2)')].map(i => i.alt)"
        assert all("8 decoding steps" in alt for alt in browser.evaluate(shown))
        assert browser.evaluate("document.querySelectorAll('#slid figure').length") == 10
        before = browser.evaluate("document.querySelector('#slid img:nth-of-type(2)').src")
        slider = browser.command("/element", {"using": "css selector", "value": "#steps"})
        left = "\ue012"
        browser.command(f"/element/{next(iter(slider.values()))}/value", {"text": left * 3})
        assert all("in 1 decoding steps" in alt for alt in browser.evaluate(shown))
        assert browser.evaluate("document.getElementById('steps-label').textContent") == "1 decoding step"
        assert browser.evaluate("document.querySelector('#slid img:nth-of-type(2)').src") != before

    def test_tables_sort(self, browser, files):
        browser.open(files / "plain.html", width=WIDE)
        browser.evaluate("document.querySelectorAll('#against button.sort')[1].click()")
        values = browser.evaluate(
            "[...document.querySelectorAll('#against tbody tr')].map(r => +r.cells[1].dataset.value)"
        )
        assert values == sorted(values)
        assert len(values) > 10

    @pytest.mark.parametrize("width", [NARROW, WIDE])
    @pytest.mark.parametrize("dark", [False, True])
    def test_can_be_used_by_everybody(self, browser, files, width, dark):
        browser.open(files / "plain.html", width=width, dark=dark)
        assert serious_findings(browser) == []

    def test_follows_the_colour_scheme(self, browser, files):
        lightness = {}
        for dark in (False, True):
            browser.open(files / "plain.html", width=WIDE, dark=dark)
            for what, element in (("paper", "document.body"), ("ink", "document.querySelector('h2')")):
                style = "backgroundColor" if what == "paper" else "color"
                colour = browser.evaluate(f"getComputedStyle({element}).{style}")
                lightness[what, dark] = sum(int(part) for part in colour[4:-1].split(","))
        assert lightness["paper", False] > 600 > 200 > lightness["ink", False]
        assert lightness["paper", True] < 200 < 600 < lightness["ink", True]

    def test_text_can_be_read(self, browser, files):
        """No text below 9 px as laid out, at either width; SVG text is scaled with its drawing."""
        sizes = """[...document.querySelectorAll('svg text')].map(
            t => parseFloat(getComputedStyle(t).fontSize) * t.ownerSVGElement.getScreenCTM().a)"""
        for width in (NARROW, WIDE):
            browser.open(files / "plain.html", width=width)
            assert min(browser.evaluate(sizes)) > 9


def test_a_training_states_what_its_steps_took_in_and_other_stages_what_they_did() -> None:
    trained = {"images_per_s": 1234.4, "mfu": 0.2716}
    assert rate_of(manifest("tokenizer", {"steps": 10}, trained)) == "1,234 images/s, 27 % of peak"
    assert rate_of(manifest("generator", {"steps": 10}, {"tokens_per_s": 2.5})) == "2.5 tokens/s"
    assert rate_of(manifest("codes", {"rows": 300}, {})) == "150 rows/s"
    assert rate_of(manifest("teacher", {"parameters": 3}, {})) == ""  # imported


def manifest(kind: str, counts: dict[str, int], metrics: dict[str, float]) -> Manifest:
    return Manifest.model_construct(kind=kind, counts=counts, metrics=metrics, seconds=2.0)
