"""Deployed flows in this process, against the tests' Prefect server: forms, names, ends, overlap, zombies, messages."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.recipes.files import load_recipe
from flows.runs.journal import RunRecord, start_journal
from flows.runs.run_request import RunRequest
from flows.service.parameters import CheckDataParameters, PipelineParameters, RetokenizeParameters, ServeOptions
from flows.service.serve import check_options
from infra.compute.rank_count import ONE, RankCount
from infra.settings import Settings
from infra.store.store import Store
from tests.flows.pipeline.test_encode import draw
from tests.support.webhook import save_block, webhook
from tests.support.weights_cli import a_tokenizer, published

BEGIN = """
import sys, time
from flows.recipes.files import load_recipe
from flows.runs.journal import start_journal
from flows.runs.run_request import RunRequest
recipe = load_recipe("digits_tiny", overrides=["teacher.training.steps=3", "seed=4"])
journal = start_journal(RunRequest(recipe=recipe, store=sys.argv[1], source="sklearn:digits"), sys.argv[2])
with journal.kept():
    journal.begin("teacher")
    print("begun", flush=True)
    time.sleep(60)
"""


def record_of(store: Store, run: str) -> RunRecord:
    return RunRecord.model_validate_json(store.read(f"runs/{run}/run.json"))


@pytest.fixture
def run_deployed(prefect_api: str, fakes, store: Store) -> Callable[..., Any]:
    """Call the deployed pipeline on the fakes; the state it ends in."""
    from flows.service.deployments import pipeline

    def run(**changes: Any) -> Any:
        given = {"recipe": "digits", "store": store.uri, "workers": 0, **changes}
        return pipeline(PipelineParameters(**given), return_state=True)

    return run


@pytest.fixture
def told(prefect_api: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """What the notifications' block was sent."""
    with webhook() as (url, got):
        save_block(url)
        monkeypatch.setenv("SFTOK_NOTIFY", "custom-webhook/ops")
        yield got


def flow_runs(name: str) -> list[Any]:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName

    with get_client(sync_client=True) as client:
        return client.read_flow_runs(flow_run_filter=FlowRunFilter(name=FlowRunFilterName(any_=[name])))


@pytest.mark.usefixtures("prefect_api")
class TestDeployments:
    def test_prefect_has_forms_schedules_and_limits(self, store) -> None:
        from prefect.client.orchestration import get_client

        from flows.service.schedules import plan
        from flows.service.serve import deployment_of

        options = ServeOptions(
            store=store.uri, pipeline_cron="30 2 * * 6", check_cron="off", timezone="Europe/Berlin", overlap="cancel"
        )
        planned = plan(options)
        for one in planned:
            deployment_of(one, options).apply()
        with get_client(sync_client=True) as client:
            found = {one.full_name: client.read_deployment_by_name(one.full_name) for one in planned}
        assert {"full-pipeline/digits", "retokenize/digits", "check-data/digits"} <= set(found)
        pipeline = found["full-pipeline/digits"]
        assert [(s.schedule.cron, s.schedule.timezone, s.active) for s in pipeline.schedules] == [
            ("30 2 * * 6", "Europe/Berlin", True)
        ]
        assert found["check-data/digits"].schedules == []
        assert pipeline.parameters["parameters"]["store"] == store.uri
        form = pipeline.parameter_openapi_schema["definitions"]["PipelineParameters"]
        assert pipeline.enforce_parameter_schema
        assert set(form["properties"]) >= {"recipe", "store", "data", "seed", "overrides", "workers", "ranks"}
        assert all(field.get("description") for field in form["properties"].values())
        for deployment in found.values():
            assert deployment.global_concurrency_limit.limit == 1
            assert deployment.concurrency_options.collision_strategy == "CANCEL_NEW"
            assert deployment.tags == ["sftok"]

    def test_a_form_that_does_not_fit_is_refused_by_the_server(self, store) -> None:
        from prefect.deployments import run_deployment
        from prefect.exceptions import PrefectHTTPStatusError

        from flows.service.schedules import plan
        from flows.service.serve import deployment_of

        options = ServeOptions(store=store.uri)
        deployment_of(plan(options)[0], options).apply()
        with pytest.raises(PrefectHTTPStatusError, match="409"):
            run_deployment(
                "full-pipeline/digits", parameters={"parameters": {"recipe": "digits", "ranks": 0}}, timeout=0
            )

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"pipeline_cron": "every day"}, r"--pipeline-cron 'every day': not a cron schedule; write minute"),
            ({"check_cron": "61 * * * *"}, r"--check-cron '61 \* \* \* \*': not a cron"),
            ({"timezone": "Mars/Olympus"}, "--timezone Mars/Olympus: unknown"),
            ({"recipes": ("digit",)}, "unknown recipe 'digit', did you mean digits"),
            ({"overrides": ("data.shards=3",)}, "unknown field, did you mean num_shards"),
            ({"recipes": ("digits", "digits")}, "two of them are called digits"),
            ({"ranks": 3}, "cannot be shared by --ranks 3"),
        ],
    )
    def test_what_no_scheduled_run_could_do_is_refused_at_once(self, changes, said) -> None:
        with pytest.raises(ValueError, match=said) as caught:
            check_options(ServeOptions(**changes), contact=False)
        assert "\n" not in str(caught.value)

    def test_dry_run_prints_what_would_be_registered(self, tmp_path, monkeypatch, capsys) -> None:
        import typer

        from flows.cli import serve

        app = typer.Typer()
        serve.register(app)
        app.callback()(lambda: None)  # so that it stays a command with a name
        monkeypatch.setenv("SFTOK_HOME", str(tmp_path / "home"))
        monkeypatch.delenv("PREFECT_API_URL", raising=False)
        store = str(tmp_path / "store")
        app(["serve", "--dry-run", "--store", store, "--set", "teacher.training.steps=3"], standalone_mode=False)
        shown = json.loads(capsys.readouterr().out)
        names = {one["deployment"]: one for one in shown["deployments"]}
        assert names["full-pipeline/digits"]["cron"] == "0 3 * * 0"
        assert (
            names["full-pipeline/digits"]["command"]
            == f"sftok run digits --store {store} --set teacher.training.steps=3"
        )
        assert names["check-data/digits"]["parameters"]["deployment"] in names
        assert not (tmp_path / "store").exists(), "a dry run has written to the store"


@pytest.mark.usefixtures("prefect_api")
class TestRuns:
    def test_a_run_has_one_name_and_a_rerun_ends_cached(self, run_deployed, store, fakes) -> None:
        first = run_deployed()
        assert first.name == "Completed"
        assert "made prepare, teacher" in first.message
        made = fakes.attempts.copy()
        second = run_deployed()
        assert (second.name, second.type.value) == ("Cached", "COMPLETED")
        assert second.message.startswith("nothing changed: all 11 stages were found; report ")
        assert fakes.attempts == made
        names = store.at("runs").folders()
        assert len(names) == 2
        for name in names:
            assert "-digits-" in name
            (flow_run,) = flow_runs(name)
            assert flow_run.labels["sftok.pid"] == record_of(store, name).writer.pid

    def test_a_mistake_is_one_line_and_nothing_is_written(self, run_deployed, store) -> None:
        state = run_deployed(recipe="digit")
        assert state.is_failed()
        assert "unknown recipe 'digit'" in state.message
        assert "\n" not in state.message
        assert not store.at("runs").folders()

    @pytest.fixture
    def free_alarm(self) -> Iterator[None]:
        """As in a run's own process: pytest's time-out holds the alarm, and Prefect then cannot interrupt a call."""
        before = signal.signal(signal.SIGALRM, signal.SIG_DFL)
        yield
        signal.signal(signal.SIGALRM, before)

    @pytest.mark.usefixtures("free_alarm")
    def test_a_stage_whose_time_is_up_is_tried_again(self, run_deployed, store, fakes, tmp_path, monkeypatch) -> None:
        monkeypatch.setenv("SFTOK_STAGE_TIMEOUTS", "teacher=0.6,30")
        fakes.waits["teacher"] = tmp_path / "waits"
        seen = []

        def watch() -> None:
            while not (tmp_path / "waits").exists():
                time.sleep(0.02)
            del fakes.waits["teacher"]
            (name,) = store.at("runs").folders()
            end = time.monotonic() + 20
            while time.monotonic() < end and not seen:
                stage = record_of(store, name).stages["teacher"]
                seen.extend([stage.reason] if stage.state == "Failed" else [])
                time.sleep(0.02)

        watcher = threading.Thread(target=watch)
        watcher.start()
        assert run_deployed().name == "Completed"
        watcher.join()
        assert seen == ["not done within 0.6 s"]
        assert fakes.attempts["teacher"] == 2

    @pytest.mark.parametrize(
        ("given", "said"),
        [("sample=soon", "'sample=soon' is not of the form stage=seconds"), ("encod=3", "'encod' is no stage")],
    )
    def test_timeouts_that_mean_nothing_are_refused(self, monkeypatch, given, said) -> None:
        from flows.pipeline.tasks import timeout_of

        monkeypatch.setenv("SFTOK_STAGE_TIMEOUTS", given)
        with pytest.raises(ValueError, match=said):
            timeout_of("encode")

    def test_timeouts_name_stages_or_all(self, monkeypatch) -> None:
        from flows.pipeline.tasks import timeout_of

        assert timeout_of("encode") is None
        monkeypatch.setenv("SFTOK_STAGE_TIMEOUTS", "encode=7200, 90")
        assert (timeout_of("encode"), timeout_of("align")) == (7200, 90)


@pytest.mark.usefixtures("prefect_api")
class TestOverlap:
    def test_a_second_run_waits_or_is_cancelled(self, run_deployed, store) -> None:
        from flows.service.concurrency import held, name_of

        with held("digits", store, overlap="wait"):
            state = run_deployed(overlap="cancel")
            assert state.name == "Cancelled"
            assert name_of("digits", store) in state.message
            assert not store.at("runs").folders()
            with held("digits", Store(f"{store.uri}-other"), overlap="cancel"):
                pass  # another store is another limit
        assert run_deployed(overlap="cancel").name == "Completed"

    def test_one_that_waits_gets_its_turn(self, store) -> None:
        from flows.service.concurrency import held

        order = []

        def second() -> None:
            with held("digits", store, overlap="wait"):
                order.append("second")

        with held("digits", store, overlap="wait"):
            waiting = threading.Thread(target=second)
            waiting.start()
            time.sleep(2)
            order.append("first")
        waiting.join(60)
        assert order == ["first", "second"]

    def test_gpus_are_shared_and_too_many_are_refused(self, store) -> None:
        from prefect.client.orchestration import get_client

        from flows.service.concurrency import GPUS, held, set_gpus

        set_gpus(3)
        with held("one", store, overlap="cancel", gpus=2):
            with get_client(sync_client=True) as client:
                assert client.read_global_concurrency_limit_by_name(GPUS).active_slots == 2
            with held("other", store, overlap="cancel", gpus=1):
                pass
        with pytest.raises(ValueError, match=r"asks for 4 GPUs, and the limit sftok-gpus is 3: .*prefect gcl update"):
            held("one", store, overlap="cancel", gpus=4).__enter__()

    def test_the_widest_stage_counts(self) -> None:
        request = RunRequest(recipe=load_recipe("digits_tiny"), store="x", source="x")
        assert request.changed(workers=8, gpus_per_worker=0.5, ranks=ONE).gpus == 4
        assert request.changed(workers=2, gpus_per_worker=1, ranks=RankCount(2, 8)).gpus == 8
        assert request.changed(workers=8, gpus_per_worker=0, ranks=RankCount(8, 8)).gpus == 0


@pytest.mark.usefixtures("prefect_api")
class TestZombies:
    def test_a_killed_run_is_marked_and_a_living_one_is_not(self, store) -> None:
        from flows.service.liveness import mark_records

        request = RunRequest(recipe=load_recipe("digits_tiny"), store=store.uri, source="x")
        start_journal(request, "living")._write()
        command = [sys.executable, "-c", BEGIN, store.uri, "killed"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "begun\n"
            assert mark_records(store) == []
            process.kill()
        assert [record.run for record in mark_records(store)] == ["killed"]
        record = record_of(store, "killed")
        assert (record.state, record.stages["teacher"].state) == ("Crashed", "Crashed")
        command = f"sftok run digits_tiny --data sklearn:digits --store {store.uri} --set seed=4"
        command += " --set teacher.training.steps=3 --workers 0"
        gone = f"process {process.pid} of {record.writer.host} is gone"
        assert record.reason == f"teacher: {gone}; resume with: {command}"
        assert record_of(store, "living").state == "Running"
        assert mark_records(store) == []

    def test_another_machines_run_is_marked_when_prefect_says_it_ended(self, store) -> None:
        from flows.service.liveness import mark_records

        journal = start_journal(RunRequest(recipe=load_recipe("digits_tiny"), store=store.uri, source="x"), "far")
        elsewhere = journal.record.writer.model_copy(update={"host": "elsewhere"})
        journal.record = journal.record.model_copy(update={"writer": elsewhere})
        journal._write()
        assert mark_records(store, ended=lambda run: False) == []
        assert [record.run for record in mark_records(store, ended=lambda run: run == "far")] == ["far"]

    def test_prefects_flow_run_is_marked_and_told_of(self, told, store) -> None:
        import prefect
        from prefect.client.orchestration import get_client
        from prefect.states import Running

        from flows.runs.journal import this_process
        from flows.service.liveness import mark_flow_runs

        with subprocess.Popen([sys.executable, "-c", ""]) as gone:
            gone.wait()
        flow = prefect.flow(name="full-pipeline")(lambda parameters: None)
        with get_client(sync_client=True) as client:
            for name, pid in (("dead", gone.pid), ("alive", this_process().pid)):
                given = {"parameters": {"recipe": "digits", "store": store.uri}}
                made = client.create_flow_run(flow, name=name, parameters=given, state=Running())
                writer = this_process()
                labels = {"sftok.host": writer.host, "sftok.pid": pid, "sftok.began": writer.began}
                client.update_flow_run_labels(made.id, labels)
        assert mark_flow_runs({}) == ["dead"]
        assert [flow_runs(name)[0].state_name for name in ("dead", "alive")] == ["Crashed", "Running"]
        assert [one["subject"] for one in told] == ["sftok: dead crashed"]
        assert f"resume: sftok run digits --store {store.uri}" in told[0]["body"]


@pytest.mark.usefixtures("prefect_api")
class TestNotifications:
    def test_a_failure_is_told_with_stage_reason_and_remedy_and_no_secret(
        self, told, run_deployed, fakes, store, monkeypatch
    ) -> None:
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-0451")
        fakes.failures["align"] = [ValueError("https://user:hunter2@host/x refused canary-0451")]
        assert run_deployed(seed=3).is_failed()
        (name,) = store.at("runs").folders()
        (message,) = told
        assert message["subject"] == f"sftok: {name} failed"
        assert message["body"].splitlines() == [
            f"run:    {name}",
            "state:  failed",
            "stage:  align",
            "reason: https://***@host/x refused ***",
            f"resume: sftok run digits --store {store.uri} --seed 3 --workers 0",
        ]

    def test_success_is_not_told(self, told, run_deployed) -> None:
        assert run_deployed().name == "Completed"
        assert told == []

    def test_a_block_that_is_away_does_not_change_the_end(self, run_deployed, monkeypatch, caplog) -> None:
        save_block("http://127.0.0.1:9/", "away")
        monkeypatch.setenv("SFTOK_NOTIFY", "custom-webhook/away")
        assert "unknown recipe" in run_deployed(recipe="digit").message
        assert "custom-webhook/away could not be told" in caplog.text

    def test_a_block_that_is_not_there_is_refused(self, monkeypatch) -> None:
        from flows.service.notify import check_block

        with pytest.raises(ValueError, match=r"SFTOK_NOTIFY = custom-webhook/nobody: .*make that block"):
            check_block("custom-webhook/nobody")
        monkeypatch.setenv("SFTOK_NOTIFY", "ops")
        with pytest.raises(ValueError, match="name a Prefect block as TYPE/NAME"):
            Settings()


@pytest.mark.usefixtures("prefect_api")
class TestCheckData:
    SETTINGS = ("data.num_shards=3", "data.num_val_shards=2", "encode.micro_batch=4", 'encode.variants=["center"]')

    @pytest.fixture
    def asked(self, store: Store, tmp_path: Path) -> CheckDataParameters:
        from flows.service.schedules import plan
        from flows.service.serve import deployment_of

        options = ServeOptions(store=store.uri)
        deployment_of(plan(options)[1], options).apply()
        again = RetokenizeParameters(
            recipe="digits",
            tokenizer=str(published(store, a_tokenizer())),
            data=str(draw(tmp_path / "data", range(12))),
            store=store.uri,
            overrides=self.SETTINGS,
            workers=0,
        )
        return CheckDataParameters(retokenize=again, deployment="retokenize/digits")

    def test_a_change_starts_one_and_no_change_none(self, asked, tmp_path) -> None:
        from prefect.client.orchestration import get_client

        from flows.service.deployments import check_data, retokenize

        def check() -> Any:
            return check_data(asked, return_state=True)

        first = check()
        assert first.name == "Changed"
        with get_client(sync_client=True) as client:
            started = client.read_flow_run(first.message.rpartition(" ")[2])
            assert started.parameters["parameters"]["data"] == str(tmp_path / "data")
        done = retokenize(asked.retokenize, return_state=True)
        assert done.message == "made prepare, encode; found the other 0"
        assert check().name == "Cached"
        assert check().message.startswith("nothing changed: images/")
        assert retokenize(asked.retokenize, return_state=True).name == "Cached"
        draw(tmp_path / "data", range(70, 71))
        state = check()
        assert (state.name, "the listing differs" in state.message) == ("Changed", True)

    def test_codes_that_are_missing_are_a_change(self, asked, store) -> None:
        from flows.service.data_watch import look, request_of
        from flows.service.deployments import retokenize

        retokenize(asked.retokenize, return_state=True)
        assert not look(request_of(asked.retokenize)).changed
        store.at("artifacts", "codes").delete_tree()
        verdict = look(request_of(asked.retokenize))
        assert (verdict.changed, "are not there" in verdict.reason) == (True, True)

    def test_before_the_first_run_there_is_nothing_to_do(self, asked) -> None:
        from flows.service.deployments import check_data

        again = asked.retokenize.model_copy(update={"tokenizer": None})
        state = check_data(asked.model_copy(update={"retokenize": again}), return_state=True)
        assert (state.name, "has made a tokenizer" in state.message) == ("Skipped", True)


def test_the_nightly_report_waits_for_a_first_run(prefect_api, store) -> None:
    from flows.service.deployments import benchmark_report
    from flows.service.parameters import BenchmarkParameters

    assert benchmark_report(BenchmarkParameters(store=store.uri), return_state=True).name == "Skipped"


def test_the_nightly_report_of_an_unfinished_run_holds_its_recipe(run_deployed, fakes, store, monkeypatch) -> None:
    from flows.service import benchmark, concurrency
    from flows.service.deployments import benchmark_report
    from flows.service.parameters import BenchmarkParameters

    fakes.failures["evaluate"] = [ValueError("no memory")]
    assert run_deployed(seed=6).is_failed()
    finish, tried = benchmark._evaluated, []

    def looked(*given: Any) -> str:
        with pytest.raises(concurrency.OverlapError), concurrency.held("digits", store, overlap="cancel"):
            pass
        tried.append(given)
        return finish(*given)

    monkeypatch.setattr(benchmark, "_evaluated", looked)
    benchmark_report(BenchmarkParameters(store=store.uri), return_state=True)
    assert len(tried) == 1
    with concurrency.held("digits", store, overlap="cancel"):
        pass
