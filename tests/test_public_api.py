"""The public face: pinned names, a quick import that pulls in nothing optional."""

import subprocess
import sys

import sparse_attn_modules


def test_public_names_are_pinned():
    assert sparse_attn_modules.__all__ == [
        "BlockMask",
        "Butterfly",
        "CalibratedPattern",
        "CustomPattern",
        "Dense",
        "DensitySchedule",
        "DilatedLocal",
        "DynamicTopK",
        "DynamicTopP",
        "GlobalLocal",
        "Hybrid",
        "ImageToPrompt",
        "LearnedTopK",
        "LocalWindow",
        "MultiScale",
        "Pattern",
        "Random",
        "RegionFocused",
        "SAMAttentionSparse",
        "SparseMultiheadAttention",
        "Streaming",
        "Strided",
        "TokenGrid",
        "Union",
        "ViTSparseAttention",
        "block_sparse_attention",
        "calibrate",
        "patch_model",
        "patch_report",
        "train_selectors",
        "unpatch_model",
    ]
    for name in sparse_attn_modules.__all__:
        assert getattr(sparse_attn_modules, name).__doc__, f"{name} has no docstring"


def test_import_is_quick_and_pulls_in_nothing_optional():
    program = """
import sys, time
import torch
before = set(sys.modules)
start = time.perf_counter()
import sparse_attn_modules
print(time.perf_counter() - start)
optional = ("timm", "segment_anything", "torchvision", "matplotlib", "triton", "peft", "skimage", "tqdm")
print([name for name in optional if name in set(sys.modules) - before])
"""
    runs = [
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split("\n")
        for _ in range(3)
    ]
    assert min(float(run[0]) for run in runs) < 0.2
    assert all(run[1] == "[]" for run in runs)


def test_info_lists_every_backend_with_its_reason():
    shown = subprocess.run(
        [sys.executable, "-m", "sparse_attn_modules", "info"], capture_output=True, text=True, check=True
    ).stdout
    for name, backend in sparse_attn_modules.backends.BACKENDS.items():
        line = next(line for line in shown.split("backends,")[1].splitlines() if line.strip().startswith(name))
        reason = backend.why_not_here()
        assert ("can run" if reason is None else reason) in line
    assert sparse_attn_modules.__version__ in shown
