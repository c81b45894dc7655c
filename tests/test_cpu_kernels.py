"""Matrix kernels of a CPU: which mode MKL is given, and that products of any number of rows have the same bits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.worker import cpu_kernels
from pipeline.worker.cpu_kernels import MKL_MODE, choose_reproducible_kernels, reproducible_mode

CPUINFO = Path("/proc/cpuinfo")
PROCESSOR = """\
processor\t: 0
vendor_id\t: {vendor}
flags\t\t: fpu sse2 {flags} ht

processor\t: 1
vendor_id\t: {vendor}
flags\t\t: fpu sse2 {flags} ht
"""
NEW_INTEL = PROCESSOR.format(vendor="GenuineIntel", flags="avx avx2 avx512f avx512bw")

# the bits of a row, alone and among others, in float32 as models on a CPU are
PRODUCTS = """
from pipeline.worker.cpu_kernels import choose_reproducible_kernels
choose_reproducible_kernels()
import torch
torch.set_num_threads(1)
torch.manual_seed(0)
for width, num_outputs in ((64, 261), (576, 192), (576, 1536), (1536, 576)):
    weight, bias, states = torch.randn(num_outputs, width), torch.randn(num_outputs), torch.randn(20, width)
    for added in (None, bias):
        expected = torch.nn.functional.linear(states, weight, added)
        for count in range(1, 21):
            found = torch.nn.functional.linear(states[:count], weight, added)
            assert torch.equal(found, expected[:count]), (width, num_outputs, count)
print("equal")
"""


@pytest.mark.parametrize(
    ("processor", "mode"),
    [
        (NEW_INTEL, "AVX512,STRICT"),
        (PROCESSOR.format(vendor="GenuineIntel", flags="avx avx2"), "AVX2,STRICT"),
        (PROCESSOR.format(vendor="GenuineIntel", flags="avx"), None),
        (PROCESSOR.format(vendor="AuthenticAMD", flags="avx avx2 avx512f"), None),
        ("", None),  # no Linux
    ],
    ids=["intel-avx512", "intel-avx2", "intel-old", "amd", "no-linux"],
)
def test_the_mode_is_the_best_that_mkl_has_for_the_processor(processor, mode):
    assert reproducible_mode(processor) == mode


class CpuInfo:
    """In the place of `Path`, with another text or none."""

    def __init__(self, text):
        self.text = text

    def __call__(self, path):
        assert path == str(CPUINFO)
        return self

    def read_text(self, **options):
        if self.text is None:
            raise FileNotFoundError(str(CPUINFO))
        return self.text


@pytest.mark.parametrize(("text", "mode"), [(NEW_INTEL, "AVX512,STRICT"), (None, None)], ids=["intel", "no-linux"])
def test_the_mode_is_set_for_the_processor_of_the_machine(monkeypatch, text, mode):
    monkeypatch.setattr(cpu_kernels, "Path", CpuInfo(text))
    # set first, so that what is chosen is taken back afterwards
    monkeypatch.setenv(MKL_MODE, "")
    monkeypatch.delenv(MKL_MODE)
    choose_reproducible_kernels()
    assert os.environ.get(MKL_MODE) == mode


def test_a_mode_that_the_user_chose_is_kept(monkeypatch):
    monkeypatch.setattr(cpu_kernels, "Path", CpuInfo(NEW_INTEL))
    monkeypatch.setenv(MKL_MODE, "COMPATIBLE")
    choose_reproducible_kernels()
    assert os.environ[MKL_MODE] == "COMPATIBLE"


@pytest.mark.skipif(
    not CPUINFO.exists() or reproducible_mode(CPUINFO.read_text(encoding="utf-8", errors="replace")) is None,
    reason="MKL has no reproducible mode for this processor",
)
def test_a_row_has_the_same_bits_in_products_of_any_number_of_rows():
    """In a process of its own: MKL reads its mode at its first call."""
    environment = {name: value for name, value in os.environ.items() if name != MKL_MODE}
    found = subprocess.run(
        [sys.executable, "-c", PRODUCTS], env=environment, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout == "equal\n"
