"""A fixture of what the command line says about a source that it refuses."""

from collections.abc import Callable
from pathlib import Path

import pytest

from flows.cli.main import main


@pytest.fixture
def refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Plan a run on a source, which is refused with exit code 2; the one line of the error."""

    def refused(source: object, *options: str) -> str:
        monkeypatch.setenv("SFTOK_HOME", str(tmp_path / "home"))
        arguments = ["run", "small64", "--store", str(tmp_path / "store"), "--dry-run", "--data", str(source), *options]
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        printed = capsys.readouterr()
        assert ended.value.code == 2, printed
        (line,) = printed.err.splitlines()
        assert len(line) <= 400
        return line

    return refused
