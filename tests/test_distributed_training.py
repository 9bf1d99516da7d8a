"""Patched models in data-parallel training: DDP, FSDP2 and Accelerate, over two processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("timm")
pytest.importorskip("accelerate")

SCRIPT = Path(__file__).with_name("distributed_checks.py")
CHECKS = [line.split("(")[0][4:] for line in SCRIPT.read_text().splitlines() if line.startswith("def check_")]
PROCESSES = 2


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What each check raised in each process, an empty text if nothing; all made in one go, for imports take long."""
    folder = tmp_path_factory.mktemp("checks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={PROCESSES}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, SCRIPT, folder], capture_output=True, text=True, env=environment, timeout=500)
    texts = {file.stem: file.read_text() for file in folder.iterdir()}
    assert texts, done.stderr
    return texts


@pytest.mark.parametrize("check", CHECKS)
def test_over_two_processes(check, outcomes):
    for rank in range(PROCESSES):
        name = f"{check}-{rank}"
        assert name in outcomes, "not reached: an earlier check failed"
        assert not outcomes[name], outcomes[name]
