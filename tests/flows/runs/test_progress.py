"""Progress: bars on a terminal, few lines elsewhere."""

import io

from rich.console import Console

from flows.runs.progress import Bars, Lines


def test_pipe_gets_a_line_now_and_then_and_the_last_one():
    stream = io.StringIO()
    lines = Lines(stream, seconds=3600)
    for step in range(1, 1001):
        lines.update("teacher", step, 1000, {"loss": 1 / step})
    assert stream.getvalue().splitlines() == ["teacher: 1/1000 loss=1", "teacher: 1000/1000 loss=0.001"]


def test_terminal_gets_a_bar_that_goes_away():
    stream = io.StringIO()
    with Bars(Console(file=stream, force_terminal=True, width=120)) as bars:
        bars.update("teacher", 3, 10, {"loss": 0.5})
        bars.line("something [odd] to say")
    drawn = stream.getvalue()
    assert "3/10" in drawn
    assert "loss=0.5" in drawn
    assert "something [odd] to say" in drawn
    assert drawn.endswith("\x1b[2K"), "the bar is still there"
