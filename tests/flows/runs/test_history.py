"""Runs beside each other: what changed, what may be compared, what the gate says, and the page of all runs."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.evaluation.evaluate import evaluate
from flows.recipes.registry import RECIPES
from flows.recipes.schema import EvaluateConfig
from flows.report.history import history_page
from flows.results.comparison import compare, why_not
from flows.results.gate import GateConfig, judge
from flows.results.types import EvaluationReport
from flows.runs.history import before, latest, records, trends
from flows.runs.journal import RunRecord, StageRecord
from infra.artifacts.manifest import ArtifactRef
from infra.store.store import Store
from sftok.evaluation.results import Score
from tests.support.accessibility import serious_findings
from tests.support.browser import Page, chromium, find_browser
from tests.support.sample_evaluation import digits_inputs

HOSTILE = "<script>window.pwned=1</script>"


@pytest.fixture(scope="module")
def report() -> EvaluationReport:
    return evaluate(digits_inputs(train=100, val=40, samples=60), EvaluateConfig(steps=(1, 4)), seed=0).report


def changed(report: EvaluationReport, name: str, **changes: Any) -> EvaluationReport:
    """The report with another value, interval or protocol of one figure."""

    def one(score: Score) -> Score:
        return score.model_copy(update=changes) if score.name == name else score

    generation = report.generation.model_copy(update={"measures": tuple(map(one, report.generation.measures))})
    steps = tuple(
        step.model_copy(update={"measures": tuple(map(one, step.measures))}) for step in report.reconstruction.by_steps
    )
    reconstruction = report.reconstruction.model_copy(update={"by_steps": steps})
    return report.model_copy(update={"generation": generation, "reconstruction": reconstruction})


def compared(now: EvaluationReport, then: EvaluationReport, *, same_images: bool = True):
    return compare("now", now, "then", then, same_images=same_images)


def row_of(comparison, name: str):
    return next(row for row in comparison.rows if row.name == name)


class TestCompare:
    def test_a_run_beside_itself_is_the_same(self, report) -> None:
        made = compared(report, report)
        assert [row.name for row in made.rows] == [score.name for score in report.scores()]
        assert {row.verdict for row in made.rows} == {"same"}
        assert {row.why_not for row in made.rows} == {""}

    @pytest.mark.parametrize(
        ("name", "by", "verdict"),
        [
            ("reconstruction.psnr@4", 1.0, "better"),
            ("reconstruction.psnr@4", -1.0, "worse"),
            ("generation.fd_random", -0.01, "better"),
            ("generation.fd_random", 0.01, "worse"),
            ("generation.verbatim_share", 0.01, "changed"),
        ],
    )
    def test_what_a_change_is_worth_depends_on_the_figure(self, report, name, by, verdict) -> None:
        value = report.find(name).value + by
        row = row_of(compared(changed(report, name, value=value), report), name)
        assert (row.verdict, row.change) == (verdict, pytest.approx(by))

    def test_within_its_interval_nothing_changed(self, report) -> None:
        name = "generation.fd_random"
        value = report.find(name).value
        then = changed(report, name, interval=(value - 0.05, value + 0.05))
        assert row_of(compared(changed(report, name, value=value + 0.04), then), name).verdict == "same"
        assert row_of(compared(changed(report, name, value=value + 0.06), then), name).verdict == "worse"

    def test_other_images_or_another_protocol_are_not_compared(self, report) -> None:
        assert {row.why_not for row in compared(report, report, same_images=False).rows} == {"measured on other images"}
        protocol = report.find("generation.fd_random").protocol
        more = protocol.model_copy(update={"num_images": 50_000})
        assert why_not(more, protocol, same_images=True) == "num images: 50000 now, 60 then"
        bare = protocol.model_copy(update={"extractor_sha256": ""})
        assert why_not(bare, protocol, same_images=True).startswith("extractor sha256: none now, ")
        assert why_not(protocol.model_copy(update={"seeds": {"evaluate": 7}}), protocol, same_images=True) == ""

    def test_figures_of_one_run_alone_are_named(self, report) -> None:
        steps = report.reconstruction.by_steps
        shorter = report.model_copy(
            update={"reconstruction": report.reconstruction.model_copy(update={"by_steps": steps[:1]})}
        )
        made = compared(report, shorter)
        assert set(made.only_now) == {score.name for score in steps[1].measures}
        assert made.only_then == ()


class TestGate:
    GATE = GateConfig(thresholds=("reconstruction.psnr@*=0.5",))

    def test_a_loss_beyond_the_threshold_is_told_in_numbers(self, report) -> None:
        name = "reconstruction.psnr@4"
        value = report.find(name).value
        judged = judge(compared(changed(report, name, value=value - 0.6), report), self.GATE)
        assert not judged.is_passed
        assert judged.held == 2
        (loss,) = judged.losses
        assert str(loss).startswith(
            f"{name} is {value - 0.6:.5g}, it was {value:.5g}: worse by 0.6, and 0.5 is allowed"
        )

    @pytest.mark.parametrize("by", [-0.4, 0.0, 3.0])
    def test_a_smaller_loss_and_a_gain_pass(self, report, by) -> None:
        name = "reconstruction.psnr@4"
        made = compared(changed(report, name, value=report.find(name).value + by), report)
        assert judge(made, self.GATE).is_passed

    def test_what_cannot_be_compared_is_skipped_aloud(self, report) -> None:
        judged = judge(compared(report, report, same_images=False), self.GATE)
        assert judged.is_passed
        assert judged.held == 0
        assert len(judged.skipped) == 2
        assert "measured on other images" in judged.skipped[0]

    @pytest.mark.parametrize("text", ["psnr", "psnr=much", "=0.5", "psnr=-1", "psnr=nan"])
    def test_a_threshold_is_a_figure_and_a_loss(self, text) -> None:
        with pytest.raises(ValueError, match="write METRIC=LOSS, such as"):
            GateConfig(thresholds=(text,))

    def test_a_threshold_of_no_figure_is_an_error(self, report) -> None:
        config = GateConfig(thresholds=("reconstruction.pnsr@4=0",))
        with pytest.raises(ValueError, match=r"threshold 'reconstruction\.pnsr@4' matches no metric of now; there are"):
            judge(compared(report, report), config)


# --- all runs --------------------------------------------------------------------------------------------------------


def write(store: Store, number: int, **changes: Any) -> str:
    """A record as runs leave it."""
    run = f"20260301-10000{number}-digits-0000"
    ref = ArtifactRef(kind="evaluation", digest=f"{number:032x}", uri="x")
    facts: dict[str, Any] = {
        "run": run,
        "recipe": RECIPES["digits_tiny"](),
        "store": store.uri,
        "source": "sklearn:digits",
        "workers": 0,
        "state": "Completed",
        "started_at": f"2026-03-01T10:00:0{number}+00:00",
        "seconds": 10.0 * number,
        "stages": {"evaluate": StageRecord(state="Completed", ref=ref)},
        "metrics": {"generation.class_agreement": 0.9 + number / 100, "reconstruction.psnr@4": 20.0},
        "report": f"{store.uri}/runs/{run}/report.html",
    }
    store.write(f"runs/{run}/run.json", RunRecord(**facts | changes).model_dump_json().encode())
    return run


class TestRecords:
    def test_come_oldest_first(self, store: Store) -> None:
        runs = [write(store, number) for number in (2, 0, 1)]
        assert [record.run for record in records(store)] == sorted(runs)

    def test_of_earlier_versions_are_read(self, store: Store) -> None:
        """A recipe's fields change; what a run was called and how it ended does not."""
        run = write(store, 0)
        told = json.loads(store.read(f"runs/{run}/run.json"))
        told["recipe"] = {"name": "digits", "a_field_that_is_gone": 1}
        told["something_new"] = 2
        store.write(f"runs/{run}/run.json", json.dumps(told).encode())
        (record,) = records(store)
        assert (record.recipe.name, record.state) == ("digits", "Completed")

    def test_that_are_damaged_are_left_out_unless_they_are_asked_for(self, store: Store, caplog) -> None:
        write(store, 0)
        store.write("runs/broken/run.json", b"{")
        assert len(records(store)) == 1
        assert "runs/broken/run.json cannot be read" in caplog.text
        with pytest.raises(ValueError, match=r"runs/broken/run\.json cannot be read .*: it is of another version, or"):
            records(store, ["broken"])
        with pytest.raises(ValueError, match=r"there is no run 'none' in .*; the last ones are: .*broken"):
            records(store, ["none"])

    def test_the_last_good_run_is_completed_evaluated_and_passed_the_gate(self, store: Store) -> None:
        good = write(store, 0)
        write(store, 1, state="Failed", reason="encode: no")
        write(store, 2, stages={})
        write(store, 3, gate="failed")
        other = write(store, 4, recipe=RECIPES["digits"]())
        now = write(store, 5)
        found = records(store)
        assert latest(found).run == now
        assert latest(found, "digits").run == other
        assert before(found, latest(found, "digits_tiny")).run == good
        assert before(found, found[0]) is None


def test_trends_need_two_runs_of_a_recipe(store: Store) -> None:
    write(store, 0)
    write(store, 1, recipe=RECIPES["digits"]())
    assert trends(records(store)) == []
    write(store, 2)
    write(store, 3, metrics={})
    first, second = trends(records(store))
    assert (first.recipe, first.metric) == ("digits_tiny", "generation.class_agreement")
    assert [dot.value for dot in first.dots] == [0.9, 0.92]
    assert first.dots[0].y > first.dots[1].y, "higher values lie higher, and SVG counts from the top"
    assert {dot.y for dot in second.dots} == {27.0}
    assert "over 2 runs: first 0.9, last 0.92" in first.summary


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    if not find_browser():
        pytest.skip("needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver)")
    with chromium(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def page(store: Store, tmp_path: Path) -> Path:
    for number in range(4):
        write(store, number, source=HOSTILE)
    write(store, 5, state="Failed", reason=f"encode: {HOSTILE}", report=None, metrics={}, gate="failed")
    write(store, 6, recipe=RECIPES["digits"]())
    file = tmp_path / "history.html"
    file.write_text(history_page(store.uri, records(store), beside=str(tmp_path)), encoding="utf-8")
    return file


ROWS = "[...document.querySelectorAll('tbody tr')].filter(r => !r.hidden).map(r => r.cells[0].textContent.trim())"


class TestInChromium:
    def test_sorts_and_filters_by_itself(self, browser: Page, page: Path) -> None:
        browser.open(page, width=1600)
        runs = browser.evaluate(ROWS)
        assert len(runs) == 6
        assert runs == sorted(runs, reverse=True), "the newest first"
        browser.evaluate("document.querySelectorAll('button.sort')[0].click()")
        assert browser.evaluate(ROWS) == sorted(runs)
        assert browser.evaluate("document.querySelector('th').getAttribute('aria-sort')") == "ascending"
        browser.evaluate("document.querySelectorAll('button.sort')[5].click()")
        took = browser.evaluate("[...document.querySelectorAll('tbody tr')].map(r => +r.cells[5].dataset.value)")
        assert took == sorted(took)
        choose = "(s => {{ s.value = {0!r}; s.dispatchEvent(new Event('input')); }})(document.querySelector('{1}'))"
        browser.evaluate(choose.format("Failed", "[data-filter=state]"))
        assert len(browser.evaluate(ROWS)) == 1
        assert browser.evaluate("document.getElementById('found').textContent") == "1 runs shown"
        browser.evaluate(choose.format("", "[data-filter=state]"))
        browser.evaluate(choose.format("digits", "[data-filter=recipe]"))
        assert len(browser.evaluate(ROWS)) == 1
        assert browser.evaluate("document.querySelectorAll('section[data-item]:not([hidden])').length") == 0

    @pytest.mark.parametrize("width", [400, 1600])
    def test_fits_and_can_be_used_by_everybody(self, browser: Page, page: Path, width: int) -> None:
        for dark in (False, True):
            browser.open(page, width=width, dark=dark)
            assert browser.evaluate("document.documentElement.scrollWidth") <= width
            assert serious_findings(browser) == []
        assert browser.evaluate("window.pwned") is None

    def test_the_checker_finds_what_is_wrong(self, browser: Page, tmp_path: Path) -> None:
        file = tmp_path / "bad.html"
        file.write_text("<!doctype html><title>x</title><p style='color:#ccc'>pale</p><img src='data:,'>")
        browser.open(file, width=400)
        assert {finding.partition(":")[0] for finding in serious_findings(browser)} >= {"image-alt", "color-contrast"}

    def test_links_lead_to_the_reports(self, browser: Page, page: Path, store: Store) -> None:
        browser.open(page, width=1600)
        links = browser.evaluate("[...document.querySelectorAll('tbody a')].map(a => a.href)")
        assert links[0] == Path(f"{store.uri}/runs/20260301-100006-digits-0000/report.html").as_uri()
        assert len(links) == 5, "a run without a report has no link"
