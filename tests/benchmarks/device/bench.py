"""Shared by the sections of a device: times that wait for it, its peak rates, and figures as they are found."""

import functools
import math
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import torch
from torch.utils.flop_counter import FlopCounterMode

from infra.compute.device import NumericsConfig
from tests.benchmarks.table import percent, times

T = TypeVar("T")
Precision = Literal["fp32", "bf16"]
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIDES: dict[Precision, int] = {"fp32": 4096, "bf16": 8192}
QUICK_SIDE = 512
COPIED, QUICK_COPIED = 2**31, 2**24  # bytes
PEAK_ROUNDS = 10
COPY, OURS = "copy", "ours"
TRAINED = NumericsConfig(fp32="tf32", cudnn_benchmark=True)
"""How the published recipes train; all else is measured in IEEE arithmetic."""


@dataclass
class Figure:
    """One result of a section."""

    section: str
    name: str
    value: float | None
    """None: not measured, `note` says why."""
    unit: str
    share: float | None = None
    """of what the device does at best in the same run: `of` says in what."""
    of: str = ""
    beside: dict[str, float] = field(default_factory=dict)
    """how many times the same work done in another way, by the name of the way."""
    note: str = ""

    def line(self) -> str:
        """As it is printed."""
        value = "-" if self.value is None else f"{_number(self.value)} {self.unit}"
        parts = [f"  {self.name:<52}", f"{value:>22}"]
        parts += [f"{percent(self.share)} of {self.of}"] if self.share is not None else []
        parts += [f"{times(ratio)} {name}" for name, ratio in self.beside.items()]
        return "  ".join([*parts, self.note] if self.note else parts).rstrip()


def _number(value: float) -> str:
    if abs(value) >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.4g}"


class Bench:
    """A section's run on one device, within its time."""

    def __init__(
        self, section: str, device: str, *, is_quick: bool, seconds: float, samples: int, put: Callable[[Figure], None]
    ) -> None:
        """Begin to measure.

        Args:
            section: its name.
            device: cpu or cuda.
            is_quick: toy sizes and one round, to see that everything runs.
            seconds: no figure is begun after them.
            samples: images of the section that draws, decodes and judges them.
            put: called with every figure.
        """
        self.section, self.device, self.is_quick, self.samples = section, torch.device(device), is_quick, samples
        self.failed = 0
        self._limits: dict[str, float] = {}
        self._ends, self._put = time.perf_counter() + seconds, put

    @property
    def is_over(self) -> bool:
        """Whether the section's time is over."""
        return time.perf_counter() > self._ends

    def wait(self) -> None:
        """Wait until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def clear(self) -> None:
        """Give the device's cached memory back, before work of another size."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def once(self, way: Callable[[], object]) -> float:
        """Seconds of one call."""
        self.wait()
        began = time.perf_counter()
        way()
        self.wait()
        return time.perf_counter() - began

    def seconds(self, way: Callable[[], object], *, rounds: int = 5, warm: int = 2) -> float:
        """The shortest time of some calls, after some that are not counted."""
        for _ in range(1 if self.is_quick else warm):
            way()
        return min(self.once(way) for _ in range(1 if self.is_quick else rounds))

    def race(
        self,
        title: str,
        ways: Mapping[str, Callable[[], object]],
        *,
        items: float,
        unit: str,
        flops: float | None = None,
        precision: Precision = "bf16",
        rounds: int = 5,
        warm: int = 2,
    ) -> dict[str, float]:
        """Time ways to do the same work and tell of each; ours beside the others, which stand before them.

        Args:
            title: what the work is.
            ways: by name, those of others first; ours have names that begin with `ours`.
            items: what one call does, in units.
            unit: of the speed, such as images/s.
            flops: operations of one item.
            precision: of the product that the share is of.
            rounds: calls that are timed.
            warm: calls before them.

        Returns:
            Items a second of each way that did not fail.
        """
        found: dict[str, float] = {}

        def measure(name: str, way: Callable[[], object]) -> None:
            speed = items / self.seconds(way, rounds=rounds, warm=warm)
            others = {other: rate for other, rate in found.items() if not other.startswith(OURS)}
            beside = others if name.startswith(OURS) else {}
            self.put(f"{title}: {name}", speed, unit, flops=flops, precision=precision, beside=beside)
            found[name] = speed

        for name, way in ways.items():
            self.attempt(f"{title}: {name}", functools.partial(measure, name, way))
        return found

    def attempt(self, name: str, work: Callable[[], object]) -> None:
        """Do work that puts figures; if it fails, or time is over, that is the figure, and the section goes on."""
        if self.is_over:
            self.put(name, None, "", note="not measured: the section's time is over")
            return
        try:
            work()
        except ImportError as error:
            self.put(name, None, "", note=f"not measured: {error}")
        except Exception as error:  # whatever it is, the other figures are worth having
            self.failed += 1
            traceback.print_exc(limit=-8, file=sys.stderr)
            self.put(name, None, "", note=f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
            self.clear()

    def put(
        self,
        name: str,
        value: float | None,
        unit: str,
        *,
        flops: float | None = None,
        precision: Precision = "bf16",
        beside: Mapping[str, float] | None = None,
        note: str = "",
    ) -> None:
        """Tell a figure.

        Args:
            name: what was measured.
            value: in units of `unit`, a second or not; None if it could not be measured.
            unit: of the value.
            flops: operations of one item, where the value is items a second: gives the share of the peak.
            precision: of the product that the share is of.
            beside: the same figure of other ways, by their names: gives ratios.
            note: what else is to be said.
        """
        share = None if flops is None or value is None else value * flops / self.peak(precision)
        ratios = {way: value / other for way, other in (beside or {}).items() if value is not None and other}
        self._put(Figure(self.section, name, value, unit, share, precision if share is not None else "", ratios, note))

    def peak(self, precision: Precision) -> float:
        """Operations a second of a large square product, measured once."""
        if precision not in self._limits:
            side = QUICK_SIDE if self.is_quick else SIDES[precision]
            a, b = (torch.randn(side, side, device=self.device, dtype=DTYPES[precision]) for _ in "ab")
            self._limits[precision] = 2 * side**3 / self.seconds(lambda: a @ b, rounds=PEAK_ROUNDS)
            self.put(f"product {side}^3, {precision}", self._limits[precision] / 1e12, "TFLOP/s")
        return self._limits[precision]

    def bandwidth(self) -> float:
        """Bytes a second that a copy on the device reads and writes, measured once."""
        if COPY not in self._limits:
            source = torch.empty(QUICK_COPIED if self.is_quick else COPIED, dtype=torch.uint8, device=self.device)
            target = torch.empty_like(source)
            self._limits[COPY] = 2 * len(source) / self.seconds(lambda: target.copy_(source), rounds=PEAK_ROUNDS)
            self.put("copy on the device", self._limits[COPY] / 1e9, "GB/s")
        return self._limits[COPY]

    def note_memory(self, name: str) -> None:
        """Tell the peak of the device's memory since the last call."""
        if self.device.type == "cuda":
            self.put(name, torch.cuda.max_memory_allocated(self.device) / 2**30, "GiB")
            torch.cuda.reset_peak_memory_stats(self.device)


def lazily(make: Callable[[], Callable[..., T]]) -> Callable[..., T]:
    """What `make` makes, made at the first call: what has to be compiled is, within what may fail and take time."""
    made = functools.cache(make)
    return lambda *inputs: made()(*inputs)


def be_quick() -> None:
    """Make this process one of a dry run: nothing is compiled, which would take longer than everything else."""
    torch.set_num_threads(1)  # toys gain nothing from more, and lose where the cores are busy
    torch.compile = lambda function, **_: function  # type: ignore[assignment, method-assign]
    torch.nn.Module.compile = lambda *_, **__: None  # type: ignore[method-assign]


def operations(work: Callable[[], object]) -> float:
    """Operations of the matrix products, convolutions and attention in some work, gradients' included."""
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


def share_equal(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Share of equal codes."""
    share = (found.cpu() == wanted.cpu()).double().mean().item()
    assert not math.isnan(share)
    return share
