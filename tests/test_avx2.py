"""The numeric tests again as a CPU without AVX-512 computes: other kernels and sums, bfloat16 without instructions."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
# Read when torch, oneDNN and MKL are first used: hence a process of its own. As `make test-avx2` has them.
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
QUICK = ("sftok/model/test_prepared.py", "generator/sampling/test_autoregressive.py", "infra/compute/test_precision.py")
WHOLE = ("sftok", "generator", "infra")
SCRIPT = """\
import sys, pytest, torch
assert torch.backends.cpu.get_cpu_capability() == "AVX2"
sys.exit(pytest.main(sys.argv[1:]))
"""


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="this run has no AVX-512 as it is")
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("places", [QUICK, pytest.param(WHOLE, marks=pytest.mark.slow)])
def test_numbers_hold_without_avx_512(places: tuple[str, ...]) -> None:
    command = [sys.executable, "-c", SCRIPT, "-q", "-p", "no:cacheprovider", *(f"tests/{place}" for place in places)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | AVX2, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
