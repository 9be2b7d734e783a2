"""Ablations: arms that differ only where they may, trained as long on the same batches, and a page that only counts."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import typer

from flows.ablation.charts import Series, arm_chart
from flows.ablation.flow import ablation
from flows.ablation.report import Facts, build_ablation_report, findings
from flows.ablation.request import parse_seeds
from flows.ablation.results import Outcome, Results, read_results, thinned
from flows.cli import ablation as cli_ablation
from flows.cli.exits import Refused
from flows.recipes.ablations import ABLATIONS, Ablation, AblationConfig, Arm, load_ablation, paper_ablation, resolve
from flows.report.script import SCRIPT_HASH
from flows.runs.journal import RunRecord
from flows.runs.run_request import RunRequest
from infra.artifacts.lineage import resolve as resolve_ref
from infra.artifacts.manifest import manifest_of, verify
from infra.compute.device import default_device
from infra.store.store import Store
from sftok.evaluation.alignment import AlignmentMetrics
from tests.flows.report.test_report import Tags as ReportTags
from tests.support.accessibility import serious_findings
from tests.support.browser import Page, chromium, find_browser
from tests.support.fake_stages import FakeStages
from tests.support.small_dataset import draw_images

TINY = ("threads=1", "data.val_fraction=0.3", "data.num_shards=2", "data.num_val_shards=2", "decoding.num_steps=3")
HOSTILE = '</script><script>window.pwned=1</script>"><img src=x onerror=window.pwned=2>'
REFERENCE, OTHER = "SFVR", "vanilla without warming up"


class Tags(ReportTags):
    """All tags; a dot holds a title here."""

    VOID = tuple(tag for tag in ReportTags.VOID if tag != "circle")


def tiny_config(*names: str) -> AblationConfig:
    """The paper's arms of these names on the smallest recipe."""
    config = paper_ablation("digits_tiny")
    return config.model_copy(update={"arms": {name: config.arms[name] for name in names}, "steps": (1, 3)})


def tiny(*names: str) -> Ablation:
    """The same, with two seeds."""
    return resolve(tiny_config(*names), overrides=TINY, seeds=(0, 7))


def command_line(*arguments: str) -> None:
    """The command as it will be called; raises what it refuses."""
    app = typer.Typer()
    app.callback()(lambda: None)
    cli_ablation.register(app)
    app(["ablation", *arguments], standalone_mode=False)


# --- the whole flow --------------------------------------------------------------------------------------------------


class Ran(NamedTuple):
    """An ablation; and what the command line printed of the same again."""

    plan: Ablation
    record: RunRecord
    again: dict[str, Any]


@pytest.fixture
def ran(prefect_api: str, store: Store, tmp_path: Path, home: Path, monkeypatch, capfd) -> Ran:

    draw_images(tmp_path / "images")
    plan, source = tiny(REFERENCE, OTHER), str(tmp_path / "images")
    request = RunRequest(recipe=plan.base, store=store.uri, source=source, last="align", ablation=plan)
    record = ablation(request.on(default_device(), 0.0), "first")

    monkeypatch.setitem(ABLATIONS, "tiny", lambda: tiny_config(REFERENCE, OTHER))
    monkeypatch.setenv("PREFECT_API_URL", prefect_api)
    monkeypatch.setenv("SFTOK_HOME", str(home))
    capfd.readouterr()
    settings = [word for override in TINY for word in ("--set", override)]
    command_line(
        "tiny", "--data", source, "--store", store.uri, "--seeds", "0,7", "--workers", "0", "--json", *settings
    )
    return Ran(plan, record, json.loads(capfd.readouterr().out))


def test_the_flow_ends_with_its_page_and_no_finding_of_a_single_run(
    prefect_api: str, store: Store, fakes: FakeStages, tmp_path: Path
) -> None:
    draw_images(tmp_path / "images")
    plan = tiny(REFERENCE, OTHER)
    source = str(tmp_path / "images")
    request = RunRequest(recipe=plan.base, store=store.uri, source=source, last="align", ablation=plan)
    record = ablation(request.on(default_device(), 0.0), "first")
    assert (record.state, record.findings) == ("Completed", None)
    assert fakes.attempts["ablation_arm"] == 4
    assert store.read("runs/first/report.json") == b'{"findings": ["Nothing differs."]}'


@pytest.mark.slow
def test_two_arms_with_two_seeds_from_images_to_page(ran: Ran, store: Store) -> None:
    plan, first, again = ran
    assert first.state == "Completed"
    names = [f"{arm}, seed {seed}" for seed in (0, 7) for arm in (REFERENCE, OTHER)]
    stages = [f"{name}: {stage}" for name in names for stage in ("teacher", "warm_up", "align", "ablation_arm")]
    assert list(first.stages) == ["prepare", *stages, "ablation_report"]
    for record in first.stages.values():
        verify(store, resolve_ref(store, str(record.ref)))

    # Equal steps, as the manifests count them; teacher shared within a seed, nothing shared between seeds.
    refs = {
        name: {stage: first.stages[f"{name}: {stage}"].ref for stage in ("teacher", "warm_up", "align")}
        for name in names
    }
    for name in names:
        assert [manifest_of(store, refs[name][stage]).counts["steps"] for stage in ("warm_up", "align")] == [4, 4]
    assert refs[names[0]]["teacher"] == refs[names[1]]["teacher"] != refs[names[2]]["teacher"]
    assert len({str(refs[name]["align"]) for name in names}) == 4
    assert first.stages[f"{names[1]}: teacher"].state == "Cached"

    assert {stage["state"] for stage in again["stages"].values()} == {"Cached"}
    assert {name: stage["artifact"] for name, stage in again["stages"].items()} == {
        name: str(stage.ref) for name, stage in first.stages.items()
    }
    assert again["metrics"] == first.metrics
    assert Path(again["report"]).exists()

    told = json.loads(store.read("runs/first/report.json"))
    assert [told["arms"][name]["training_steps"] for name in (REFERENCE, OTHER)] == [{"warm_up": 4, "align": 4}] * 2
    assert [point["step"] for point in told["outcomes"][0]["loss"]] == list(range(1, 9))
    by_seed = told["arms"][REFERENCE]["figures"]["psnr@3"]["by_seed"]
    assert first.metrics[f"{REFERENCE}: psnr@3"] == pytest.approx(sum(by_seed.values()) / 2)
    assert store.read("runs/first/report.html").startswith(b"<!doctype html>")
    assert store.read("runs/first/report.md").startswith(b"# digits")

    arms = {
        key: first.stages[f"{key[0]}, seed {key[1]}: ablation_arm"].ref
        for key in [(a, s) for s in plan.seeds for a in (REFERENCE, OTHER)]
    }
    results = read_results(store, plan, arms)
    assert results.values(REFERENCE, _column(results, "psnr@3")) == list(by_seed.values())


def _column(results: Results, key: str):
    from flows.ablation.results import columns

    return next(column for column in columns(results.sample) if column.key == key)


def test_every_arm_sees_the_same_batches() -> None:
    """Batches are a function of seed, step and the settings that all arms share; nothing of an arm reaches them."""
    from infra.training.loop import TrainingRun
    from sftok.images.dataset import ImageRows
    from sftok.training.common import TrainingImages

    pixels = torch.randint(0, 256, (21, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    rows = ImageRows([f"{i:02d}" for i in range(21)], pixels, torch.zeros(21, dtype=torch.int64))

    def batches(arm: str, seed: int) -> list[torch.Tensor]:
        recipe = next(one.recipe for one in plan.arms if one.name == arm)
        seen = []
        for stage in (recipe.warm_up, recipe.align):
            stream = TrainingImages(rows, rows, recipe.augment).stream(
                TrainingRun(Store("unused"), seed), stage.training
            )
            seen += [stream.batch(step, 0) for step in range(stage.training.steps)]
        return seen

    plan = tiny(*paper_ablation("digits").arms)
    first = batches(REFERENCE, 0)
    for arm in plan.arms:
        assert all(map(torch.equal, batches(arm.name, 0), first)), arm.name
    assert not torch.equal(batches(REFERENCE, 7)[0], first[0])


# --- what is refused -------------------------------------------------------------------------------------------------


def test_every_ablation_builds_and_its_arms_are_the_papers() -> None:
    for name in ABLATIONS:
        plan = load_ablation(name)
        assert len(plan.seeds) >= 3
        settings = {
            arm.published: (arm.recipe.warm_up.replacement, arm.recipe.align.replacement, arm.recipe.align.replace_prob)
            for arm in plan.arms
            if arm.published
        }
        assert settings == {
            "4.33": ("none", "self_forcing", 1.0),
            "4.40": ("self_forcing", "self_forcing", 1.0),
            "4.59": ("none", "self_forcing", 0.8),
            "4.96": ("none", "self_forcing", 0.5),
            "6.47": ("none", "ground_truth", 1.0),
        }
        assert plan.base.evaluate.steps == (1, 2, 4, 8, 16)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (("align.replacment=none",), r"arm 'mine': recipe digits: align.replacment: unknown field, did you mean repl"),
        (("align.training.steps=9",), r"arm 'mine': align.training.steps = 9, arm 'SFVR' has 700: .* with --set"),
        (("warm_up.training.batch_size=8",), r"warm_up.training.batch_size = 8, arm 'SFVR' has 32"),
        (("align.from_scratch=true",), r"align.from_scratch = True.*set warm_up.replacement as align's"),
        (("seed=3",), r"seed = 3, arm 'SFVR' has 0"),
        (("augment.rotate=0",), r"augment.rotate = 0.0"),
        (("align.replacement=self_forcing",), r"arms 'SFVR' and 'mine' are the same recipe"),
    ],
)
def test_an_arm_that_is_no_arm_is_refused_in_one_line(changes: tuple[str, ...], said: str) -> None:
    config = paper_ablation("digits")
    arms = {"SFVR": config.arms["SFVR"], "mine": Arm(overrides=changes)}
    with pytest.raises(ValueError, match=said) as caught:
        resolve(config.model_copy(update={"arms": arms}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"seeds": ()}, "seeds = none: name each once and at least one"),
        ({"seeds": (1, 1)}, "seeds = 1,1: name each once"),
        ({"seeds": (-1,)}, "seeds = -1"),
        ({"name": "digits_ablatoin"}, "unknown ablation 'digits_ablatoin'; known: digits_ablation"),
        ({"name": "none.toml"}, "recipe file none.toml does not exist"),
        ({"overrides": ["align.nothing=1"]}, "align.nothing: unknown field"),
    ],
)
def test_an_ablation_that_cannot_be_is_refused_in_one_line(given: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        load_ablation(**{"name": "digits_ablation", **given})
    assert "\n" not in str(caught.value)


def test_one_arm_and_a_reference_that_is_none_are_refused() -> None:
    with pytest.raises(ValueError, match="compares two at least"):
        tiny(REFERENCE)
    with pytest.raises(ValueError, match=r"reference = 'SFVR' is not an arm: name one of vanilla, SFVR at ratio 0\.5"):
        tiny("vanilla", "SFVR at ratio 0.5")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("digits_ablation", "--seeds", ""), "seeds = none"),
        (("digits_ablation", "--seeds", "0;1"), "--seeds 0;1"),
        (("digits_ablatoin",), "unknown ablation 'digits_ablatoin'"),
        (("small64",), "small64_ablation has no images of its own"),
        (("digits_ablation", "--set", "align.nothing=1"), "align.nothing: unknown field"),
        (("digits_ablation", "--data", "nowhere"), "nowhere"),
        (("digits_ablation", "--ranks", "3"), "cannot be shared by --ranks 3"),
    ],
)
def test_the_command_line_refuses_before_it_begins(
    arguments: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFTOK_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refused, match=re.escape(said)) as caught:
        command_line(*arguments)
    assert "\n" not in caught.value.format_message()
    assert not (tmp_path / "store").exists()


def test_seeds_of_the_command_line() -> None:
    assert parse_seeds("0, 1,2") == (0, 1, 2)
    assert parse_seeds("") == ()
    with pytest.raises(ValueError, match="--seeds 0;1: write whole numbers"):
        parse_seeds("0;1")


# --- the page --------------------------------------------------------------------------------------------------------


def figures(psnr: float, steps: tuple[int, ...] = (1, 8), gain: float = 0.5) -> AlignmentMetrics:
    quality = {"psnr": psnr, "ssim": 0.5, "fd_random": 3 - psnr / 10}
    return AlignmentMetrics.model_validate(
        {
            "num_images": 40,
            "temperature": 0.0,
            "extractor": "random-conv/1, 240 dimensions",
            "extractor_sha256": "ab" * 32,
            "teacher": quality,
            "by_steps": [
                {**quality, "psnr": psnr + gain * (i > 0), "num_steps": n, "code_agreement": 0.4 + i / 10}
                for i, n in enumerate(steps)
            ],
            "cross_entropy": {"all_hidden": 1.0, "truth_given": 0.5, "own_given": 0.7},
            "agreement_steps": 8,
            "truth": {"kl": 5.0, "top1": 0.3},
            "steps": [{"kl": 1 / n, "top1": 0.8} for n in range(1, 8)],
        }
    )


def results(psnrs: dict[str, tuple[float, ...]], *, rename: str = "", gain: float = 0.5) -> Results:
    """Outcomes of these PSNRs at one step, an arm a name and a seed a value."""
    plan = load_ablation("digits_ablation", seeds=range(len(psnrs[REFERENCE])))
    chosen = [arm for arm in plan.arms if arm.name in psnrs]
    if rename:
        chosen[1] = chosen[1].model_copy(update={"name": rename, "note": rename, "overrides": (rename,)})
        psnrs = {REFERENCE: psnrs[REFERENCE], rename: psnrs[OTHER]}
    plan = plan.model_copy(update={"arms": tuple(chosen), "description": rename or plan.description})
    ref = {"kind": "tokenizer", "digest": "0" * 32, "uri": "/somewhere"}
    outcomes = {
        (name, seed): Outcome.model_validate(
            {
                "arm": name,
                "seed": seed,
                "figures": figures(value, gain=gain),
                "training": {"warm_up": 10, "align": 20},
                "loss": [{"step": step, "loss": 3 - step / 20} for step in range(1, 31)],
                "refs": {"align": ref},
            }
        )
        for name, values in psnrs.items()
        for seed, value in enumerate(values)
    }
    return Results(plan, outcomes)


def page(some: Results, source: str = "sklearn:digits"):
    return build_ablation_report(some, Facts("20260301-digits-1a2b", source))


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ((20.0, 21.0, 22.0), "equal in all 3 seeds"),
        ((20.5, 21.5, 22.5), "better in 3 of 3 seeds; mean difference +0.5 (+0.5 to +0.5) dB"),
        ((19.0, 20.0, 23.0), "better in 1 of 3 seeds, worse in 2; mean difference -0.333 (-1 to +1) dB"),
    ],
)
def test_sentences_are_counted(others: tuple[float, ...], said: str) -> None:
    """The same arms, other numbers: the words follow them."""
    some = results({REFERENCE: (20.0, 21.0, 22.0), OTHER: others})
    assert findings(some)["Against SFVR"][0] == f"PSNR at 8 steps: {OTHER} was {said}."
    made = page(some)
    assert said in made.html
    assert said in made.markdown.replace("\\", "")


def test_lower_is_better_for_distances_and_more_steps_may_be_worse() -> None:
    some = results({REFERENCE: (20.0, 21.0), OTHER: (10.0, 11.0)}, gain=-0.25)
    told = findings(some)
    assert told["Against SFVR"][1].startswith(
        f"FD (random features) at 8 steps: {OTHER} was better in 0 of 2 seeds, worse in 2"
    )
    steps = told["8 steps of decoding against 1 step"]
    assert steps[0] == "PSNR: SFVR was better in 0 of 2 seeds, worse in 2; mean difference -0.25 (-0.25 to -0.25) dB."


def test_page_needs_nothing_else_and_shows_every_seed() -> None:
    some = results({REFERENCE: (20.0, 21.0, 22.5), OTHER: (19.0, 21.0, 22.0)})
    html = page(some, "folder <b>&").html
    tags = Tags(html)
    assert len(tags.all("script")) == 1
    assert f"script-src &#39;{SCRIPT_HASH}&#39;" in html or f"script-src '{SCRIPT_HASH}'" in html
    links = [attrs[key] for _, attrs in tags.seen for key in ("src", "href") if key in attrs]
    assert all(link.startswith("#") for link in links)
    assert "url(" not in html
    assert "folder &lt;b&gt;&amp;" in html
    assert len(tags.all("caption")) == len(tags.all("table"))
    assert all("aria-label" in attrs or "aria-hidden" in attrs for attrs in tags.all("svg"))
    assert "n = 3" in html
    told = [attrs["aria-label"] for attrs in tags.all("svg") if (attrs.get("aria-label") or "").startswith("seed 0")]
    assert told[0] == "seed 0: 20.50 dB, seed 1: 21.50 dB, seed 2: 23.00 dB"
    assert len(told) == 2 * 7
    assert "Fewer than three seeds" not in html
    assert "Fewer than three seeds" in page(results({REFERENCE: (20.0,), OTHER: (19.0,)})).html


def test_published_figures_stand_apart() -> None:
    html = page(results({REFERENCE: (20.0,), OTHER: (19.0,)})).html
    before, _, apart = html.partition('<section id="published">')
    assert "4.33" not in re.sub(r"<style>.*?</style>", "", before, flags=re.DOTALL).partition("figure 4a, ImageNet")[0]
    assert "4.33" in apart
    assert apart.index("not comparable") < apart.index("4.33")
    assert "10.110" in before.partition("figure 4a, ImageNet")[2]  # the paper's KL of the truth, in its own box


def test_hostile_names_do_nothing() -> None:
    some = results({REFERENCE: (20.0, 21.0), OTHER: (19.0, 22.0)}, rename=HOSTILE)
    made = page(some, HOSTILE)
    tags = Tags(made.html)
    assert len(tags.all("script")) == 1
    assert not tags.all("img")
    assert HOSTILE not in made.html
    assert "<script>" not in made.markdown
    assert json.loads(made.json)["arms"][HOSTILE]["figures"]["psnr@8"]["by_seed"] == {"0": 19.5, "1": 22.5}


def test_outcomes_that_do_not_compare_are_refused(store: Store) -> None:
    """Guards against arms of two runs, one of which trained longer."""
    from flows.ablation import results as ablation_results

    some = results({REFERENCE: (20.0,), OTHER: (19.0,)})
    longer = {
        key: outcome.model_copy(update={"training": {"warm_up": 10, "align": 20 + (key[0] == OTHER)}})
        for key, outcome in some.outcomes.items()
    }
    with pytest.raises(ValueError, match=r"training steps: .*21.* of 'vanilla without warming up', seed 0, but"):
        ablation_results.check_equal(longer)
    ablation_results.check_equal(some.outcomes)


def test_curves_and_ticks() -> None:
    chart = arm_chart("t", [Series("a", 0, [0.0, 1.0], [[1.0, 3.0], [2.0, 2.0]])], {0.0: "1"}, axis="x")
    assert [dot.y for dot in chart.curves[0].dots][2] == [dot.y for dot in chart.curves[0].dots][3]
    assert chart.curves[0].path.count("L") == 1
    assert chart.summary == "a: 2.000 at 1, 2.000"
    assert arm_chart("t", [Series("a", 0, [0.5], [[1.0]], apart=1)], {}, axis="x").curves[0].path == ""


def test_long_logs_are_thinned_by_means() -> None:
    points = results({REFERENCE: (20.0,), OTHER: (19.0,)}).outcomes[REFERENCE, 0].loss
    few = thinned(points, 7)
    assert [point.step for point in few] == [5, 10, 15, 20, 25, 30]
    assert few[0].loss == pytest.approx(sum(3 - step / 20 for step in range(1, 6)) / 5)
    assert thinned([], 5) == []


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory):
    with chromium(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.skipif(find_browser() is None, reason="no Chromium here")
def test_in_a_browser(browser: Page, tmp_path: Path) -> None:
    some = results({REFERENCE: (20.0, 21.0), OTHER: (22.0, 22.0)}, rename=HOSTILE)
    file = tmp_path / "page.html"
    file.write_text(page(some, HOSTILE).html)
    for width, dark in ((1600, False), (400, True)):
        browser.open(file, width=width, dark=dark)
        assert browser.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert serious_findings(browser) == []
    assert browser.evaluate("window.pwned") is None
    browser.evaluate("document.querySelectorAll('#arms button.sort')[2].click()")
    assert browser.evaluate("document.querySelector('#arms tbody th').textContent").startswith(REFERENCE)
    browser.evaluate("document.querySelectorAll('#arms button.sort')[2].click()")
    assert browser.evaluate("document.querySelector('#arms tbody th').textContent").strip() == HOSTILE
    assert [entry["message"] for entry in browser.logged("browser")] == []
