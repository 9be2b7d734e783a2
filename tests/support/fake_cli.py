"""The `sftok` command on fake stages, for tests that need a process: python -m tests.support.fake_cli ...

FAKE_FAIL=stage:message raises a ValueError there; FAKE_WAIT=stage:file touches the file and sleeps.
"""

import os
from pathlib import Path

from flows import make
from flows.cli.main import main
from tests.support.fake_stages import FakeStages

if __name__ == "__main__":
    fakes = FakeStages()
    if "FAKE_FAIL" in os.environ:
        stage, _, message = os.environ["FAKE_FAIL"].partition(":")
        fakes.failures[stage] = [ValueError(message)]
    if "FAKE_WAIT" in os.environ:
        stage, _, file = os.environ["FAKE_WAIT"].partition(":")
        fakes.waits[stage] = Path(file)
    make.run_stage = fakes
    main()
