"""Stages without arithmetic: real plans, manifests and reports around files of a line."""

import json
import math
import time
from collections import Counter
from pathlib import Path

from flows.results.types import Evidence, Finding
from flows.stage import Result, Stage, Work
from infra.artifacts.shards import put

IMAGES = {"found": 1797, "accepted": 1797, "rejected": 0, "train": 1617, "val": 180, "classes": 10}
FINDING = Finding(
    rule="copies",
    severity="serious",
    sentence="31 % of the samples repeat the codes of a training image.",
    evidence=(Evidence(label="samples", value=0.31, unit="%"),),
    remedies=("train on more images",),
)
METRICS = {"accuracy": 0.93, "psnr_of_a_copy": math.inf}


class FakeStages:
    """Stands in for `flows.make.run_stage`: counts attempts, and raises or waits where it is told to."""

    def __init__(self) -> None:
        self.attempts: Counter[str] = Counter()
        self.at: dict[str, list[float]] = {}
        self.failures: dict[str, list[Exception]] = {}
        self.waits: dict[str, Path] = {}

    def __call__(self, stage: Stage, work: Work) -> Result:
        self.attempts[stage.name] += 1
        self.at.setdefault(stage.name, []).append(time.monotonic())
        work.progress(1, 2, {"loss": 0.5})
        if self.failures.get(stage.name):
            raise self.failures[stage.name].pop(0)
        if stage.name in self.waits:
            self.waits[stage.name].touch()
            time.sleep(60)
        work.progress(2, 2, {"loss": 0.25})
        files = [put(work.out, f"{stage.name}.txt", f"{work.plan.digest}\n".encode())]
        if stage.name.endswith("report"):
            files += [put(work.out, "report.html", b"<h1>digits</h1>"), put(work.out, "report.md", b"# digits")]
            findings = [FINDING.as_json()] if stage.name == "report" else ["Nothing differs."]
            files += [put(work.out, "report.json", json.dumps({"findings": findings}).encode())]
        content = f"{1:032x}" if stage.name == "prepare" else None
        counts = {"rows": 1} | (IMAGES if stage.name == "prepare" else {})
        return Result(files, counts, METRICS if stage.name == "evaluate" else {}, content)
