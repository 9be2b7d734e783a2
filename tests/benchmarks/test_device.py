"""The benchmarks of a device: they run from end to end at toy sizes, fit their time, and say what went wrong."""

import json
import time
from pathlib import Path

import pytest
import torch

from tests.benchmarks.__main__ import main
from tests.benchmarks.device.bench import Bench, Figure, operations
from tests.benchmarks.device.sections import SECTIONS, TOTAL_SECONDS


def bench(figures: list[Figure], *, seconds: float = 60) -> Bench:
    return Bench("some", "cpu", is_quick=True, seconds=seconds, samples=8, put=figures.append)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_section_runs_at_toy_size(tmp_path: Path) -> None:
    assert main(["--quick", "--json", str(tmp_path / "figures.json")]) == 0
    told = json.loads((tmp_path / "figures.json").read_text())
    assert {section["state"] for section in told["sections"].values()} == {"done"}
    without = [figure["note"] for figure in told["figures"] if figure["value"] is None]
    assert [note for note in without if not note.startswith("not measured: No module named ")] == []
    assert {figure["section"] for figure in told["figures"]} == set(SECTIONS)
    assert {"kind", "torch", "cpu"} <= set(told["machine"])


def test_all_sections_fit_ten_minutes() -> None:
    assert sum(section.seconds for section in SECTIONS.values()) <= TOTAL_SECONDS


def test_without_a_cuda_device_the_answer_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--device", "cuda"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("no CUDA device: ")
    assert error.count("\n") == 1


def test_an_unknown_section_is_named_with_those_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["encode", "nothing", "--quick"]) == 2
    assert capsys.readouterr().err == f"unknown benchmarks nothing; there are: {', '.join(SECTIONS)}\n"


def test_a_way_that_fails_is_told_and_the_others_are_measured() -> None:
    def fail() -> None:
        raise RuntimeError("out of\nmemory")

    figures: list[Figure] = []
    made = bench(figures)
    ways = {"published": lambda: time.sleep(0.3), "ours, broken": fail, "ours": lambda: None}
    found = made.race("work", ways, items=10, unit="images/s")
    assert list(found) == ["published", "ours"]
    assert [figure.name for figure in figures] == ["work: published", "work: ours, broken", "work: ours"]
    assert figures[1].note == "failed: RuntimeError: out of memory"
    assert figures[2].beside["published"] > 1
    assert made.failed == 1


def test_a_share_is_of_the_product_timed_in_the_same_run() -> None:
    figures: list[Figure] = []
    made = bench(figures)
    peak = made.peak("fp32")
    made.put("work", 10.0, "images/s", flops=peak / 20, precision="fp32")
    assert made.peak("fp32") == peak
    assert figures[-1].share == pytest.approx(0.5)
    assert "50.0 % of fp32" in figures[-1].line()


def test_no_figure_is_begun_when_time_is_over() -> None:
    figures: list[Figure] = []
    made = bench(figures, seconds=-1)
    assert made.race("work", {"ours": lambda: pytest.fail("was called")}, items=1, unit="images/s") == {}
    assert figures[0].note == "not measured: the section's time is over"


def test_operations_are_those_of_both_passes() -> None:
    layer, x = torch.nn.Linear(8, 16, bias=False), torch.randn(4, 8)
    assert operations(lambda: layer(x)) == 2 * 4 * 8 * 16
    assert operations(lambda: layer(x).sum().backward()) == 2 * 2 * 4 * 8 * 16
