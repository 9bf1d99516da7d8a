"""What is kept for later calls: made outside the modes, the thread and the memory of the call that needs it first."""

import threading

import pytest
import torch

from sparse_attn_modules.shared_tensors import outside_graphs


def test_made_in_another_thread_for_a_gpu_alone():
    """A CUDA graph that warms up owns what its thread allocates."""
    here = threading.get_ident()
    assert outside_graphs(threading.get_ident, torch.device("cpu")) == here
    assert outside_graphs(threading.get_ident, torch.device("cuda", 0)) != here


def test_errors_reach_the_caller():
    with pytest.raises(ZeroDivisionError):
        outside_graphs(lambda: 1 // 0, torch.device("cuda", 0))
