"""`sftok report` and the benchmark flow: the figures of two runs in one store, the gate, and what is published."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from flows.cli.main import main
from flows.evaluation.evaluate import evaluate
from flows.recipes.registry import RECIPES
from flows.recipes.schema import EvaluateConfig
from flows.results.types import EvaluationReport
from flows.runs.history import records
from flows.runs.journal import RunRecord, StageFailedError, StageRecord
from infra.artifacts.manifest import ArtifactPlan, ArtifactRef, folder_of, publish, ref_of
from infra.artifacts.shards import put
from infra.store.store import Store
from sftok.evaluation.results import Score
from tests.support.sample_evaluation import digits_inputs

PSNR = "reconstruction.psnr@4"


class Runs(NamedTuple):
    """A store with runs, each with an evaluation of its own."""

    store: Store
    report: EvaluationReport
    images: dict[str, bytes]

    def add(self, number: int, *, psnr: float = 0.0, dataset: str = "a", **changes: Any) -> str:
        """A run whose PSNR at 4 steps is so much higher than measured."""
        prepared = ArtifactPlan(kind="images", version=1, config={"dataset": dataset})
        images = publish(
            self.store, prepared, files=[], counts={"accepted": 900}, metrics={}, seconds=1, content_digest=dataset * 32
        )
        report = with_psnr(self.report, psnr)
        plan = ArtifactPlan(
            kind="evaluation", version=2, config={"run": number}, inputs={"images": ref_of(self.store, images)}
        )
        folder = folder_of(self.store, plan.kind, plan.digest)
        files = [put(folder, "evaluation.json", report.model_dump_json().encode())]
        files += [put(folder, f"pictures/{name}", data) for name, data in self.images.items()]
        evaluation = publish(self.store, plan, files=files, counts={}, metrics=report.metrics(), seconds=2)
        stages = {"evaluate": StageRecord(state="Completed", ref=ref_of(self.store, evaluation))}
        record = RunRecord(
            **{
                "run": f"20260301-10000{number}-digits-0000",
                "recipe": RECIPES["digits"](),
                "store": self.store.uri,
                "source": "sklearn:digits",
                "workers": 0,
                "state": "Completed",
                "started_at": f"2026-03-01T10:00:0{number}+00:00",
                "stages": stages,
                "metrics": report.metrics(),
                **changes,
            }
        )
        self.store.write(f"runs/{record.run}/run.json", record.model_dump_json().encode())
        return record.run


def with_psnr(report: EvaluationReport, more: float) -> EvaluationReport:
    def one(score: Score) -> Score:
        return score.model_copy(update={"value": score.value + more}) if score.name == PSNR else score

    steps = tuple(
        step.model_copy(update={"measures": tuple(map(one, step.measures))}) for step in report.reconstruction.by_steps
    )
    return report.model_copy(update={"reconstruction": report.reconstruction.model_copy(update={"by_steps": steps})})


@pytest.fixture(scope="module")
def measured() -> tuple[EvaluationReport, dict[str, bytes]]:
    config = EvaluateConfig(steps=(1, 4), class_reader=True)
    made = evaluate(digits_inputs(train=200, val=40, samples=60), config, seed=0)
    return made.report, made.images


@pytest.fixture
def runs(store: Store, measured) -> Runs:
    return Runs(store, *measured)


def report(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["report", *(str(argument) for argument in arguments)])
    return int(ended.value.code or 0)


def test_the_last_run_is_held_against_the_last_good_one(runs: Runs, tmp_path: Path, capsys) -> None:
    good = runs.add(0)
    runs.add(1, gate="failed", psnr=5)
    last = runs.add(2, psnr=1)
    assert report("--store", runs.store.uri, "--out", tmp_path / "page", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["run"], told["against"]) == (last, good)
    assert told["changes"][PSNR] == pytest.approx(1)
    assert (told["verdicts"][PSNR], told["verdicts"]["reconstruction.psnr@1"]) == ("better", "same")
    assert told["gate"] is None
    names = sorted(path.name for path in (tmp_path / "page").iterdir())
    assert names == ["history.html", "report.html", "report.json", "report.md"]
    page = (tmp_path / "page" / "report.html").read_text()
    assert f'Compared with <span class="mono">{good}</span>' in page
    assert last in (tmp_path / "page" / "history.html").read_text()


def test_several_runs_have_a_page_each(runs: Runs, tmp_path: Path, capsys) -> None:
    names = [runs.add(0), runs.add(1), runs.add(2)]
    chosen = [part for name in names[1:] for part in ("--runs", name)]
    assert report("--store", runs.store.uri, "--out", tmp_path / "pages", *chosen, "--json") == 0
    assert [one["against"] for one in json.loads(capsys.readouterr().out)] == names[:2]
    assert sorted(path.name for path in (tmp_path / "pages").iterdir()) == names[1:]


def test_without_a_folder_the_store_has_the_pages(runs: Runs, capsys) -> None:
    run = runs.add(0)
    assert report("--store", runs.store.uri) == 0
    written = capsys.readouterr().out.splitlines()
    assert f"{runs.store.uri}/history.html" in written
    assert runs.store.exists(f"runs/{run}/report.html")
    page = runs.store.read("history.html").decode()
    assert "20260301-100000-digits-0000" in page


def test_the_gate_fails_with_3_after_the_page_is_written(runs: Runs, tmp_path: Path, capsys) -> None:
    runs.add(0)
    runs.add(1, psnr=-0.6)
    out = ["--store", runs.store.uri, "--out", tmp_path / "page", "--gate"]
    assert report(*out) == 3
    error = capsys.readouterr().err
    assert f"gate: {PSNR} is" in error
    assert "worse by 0.6, and 0.5 is allowed" in error
    assert "The gate failed" in (tmp_path / "page" / "report.html").read_text()
    assert report(*out, "--threshold", "reconstruction.psnr@*=1") == 0
    assert "gate: passed, 2 figures held against 20260301-100000-digits-0000" in capsys.readouterr().err


def test_other_images_are_shown_and_not_judged(runs: Runs, capsys) -> None:
    runs.add(0, dataset="a")
    runs.add(1, dataset="b", psnr=-9)
    assert report("--store", runs.store.uri, "--gate", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["changes"] == {}
    assert set(told["verdicts"].values()) == {"not comparable"}
    assert told["gate"]["held"] == 0
    assert "measured on other images" in told["gate"]["skipped"][0]


def test_published_figures_stand_alone(runs: Runs, capsys) -> None:
    runs.add(0)
    runs.add(1)
    assert report("--store", runs.store.uri, "--against", "published", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["against"] is None
    assert 'id="against"' not in runs.store.read(f"runs/{told['run']}/report.html").decode()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--run", "none"], "there is no run 'none'; the last ones are: 20260301-100000-digits-0000"),
        (["--against", "none"], "there is no run 'none'"),
        (["--run", "20260301-100001-digits-0000"], "is Failed and was not evaluated: run its recipe again"),
        (["--threshold", "reconstruction.psnr"], "write METRIC=LOSS"),
        (["--threshold", "no.such=1", "--against", "20260301-100000-digits-0000"], "'no.such' matches no metric of"),
        (["--out", "/dev/null/x"], "/dev/null/x cannot be written (Not a directory): name another folder"),
    ],
)
def test_bad_input_is_one_line(runs: Runs, capsys, arguments, said) -> None:
    runs.add(0)
    runs.add(1, state="Failed", stages={})
    assert report("--store", runs.store.uri, *arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_store_without_runs_says_how_to_make_one(store: Store, capsys) -> None:
    assert report("--store", store.uri) == 2
    assert "no run of this store was evaluated: `sftok run` makes one" in capsys.readouterr().err


def test_an_evaluation_of_another_version_is_told(runs: Runs, capsys) -> None:
    run = runs.add(0)
    (record,) = records(runs.store)
    ref: ArtifactRef | None = record.stages["evaluate"].ref
    assert ref is not None
    runs.store.write(f"artifacts/evaluation/{ref.digest}/evaluation.json", b'{"schema_version": 2}')
    assert report("--store", runs.store.uri, "--run", run) == 2
    assert "evaluate the run again" in capsys.readouterr().err


@pytest.mark.usefixtures("prefect_api")
class TestFlow:
    def test_publishes_then_fails_at_the_gate(self, runs: Runs) -> None:
        from flows.service.benchmark import GateFailedError, benchmark

        first = runs.add(0)
        passed = benchmark(store=runs.store.uri, gate=False)
        assert (passed.run, passed.comparison) == (first, None)
        last = runs.add(1, psnr=-2)
        with pytest.raises(GateFailedError, match=rf"the gate is failed by run {last}: {PSNR} is"):
            benchmark(store=runs.store.uri, gate=True)
        assert "The gate failed" in runs.store.read(f"runs/{last}/report.html").decode()
        assert {record.run: record.gate for record in records(runs.store)} == {first: None, last: "failed"}
        third = runs.add(2, psnr=-0.1)
        made = benchmark(store=runs.store.uri, gate=True)
        assert (made.run, made.against) == (third, first), "a run that failed at the gate is no baseline for the next"

        from prefect.client.orchestration import get_client
        from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

        with get_client(sync_client=True) as client:
            found = client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(like_="benchmark-")))
        assert {one.key for one in found} == {
            "benchmark-figures", "benchmark-page", "benchmark-history", "benchmark-text",
        }  # fmt: skip
        table = json.loads(next(one.data for one in found if one.key == "benchmark-figures"))
        assert {"figure", "now", "then", "verdict"} == set(table[0])

    def test_a_run_that_was_not_evaluated_is_finished_first(self, run_pipeline, fakes, tmp_path: Path) -> None:
        from flows.service.benchmark import _evaluated

        fakes.failures["evaluate"] = [ValueError("no memory")]
        with pytest.raises(StageFailedError, match="evaluate: no memory"):
            run_pipeline("broken")
        store = Store(tmp_path / "store")
        name = _evaluated(store, None)
        assert name != "broken"
        last = {record.run: record for record in records(store)}[name]
        assert last.stages["prepare"].state == "Cached"
        assert last.stages["evaluate"].state == "Completed"
