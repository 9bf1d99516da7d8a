"""Block-sparse attention for vision transformers: patch a model in one line, or build with the parts."""

from .block_mask import BlockMask
from .functional import block_sparse_attention
from .modules import SAMAttentionSparse, SparseMultiheadAttention, ViTSparseAttention
from .patching import DensitySchedule, calibrate, patch_model, patch_report, train_selectors, unpatch_model
from .patterns import (
    Butterfly,
    CalibratedPattern,
    CustomPattern,
    Dense,
    DilatedLocal,
    DynamicTopK,
    DynamicTopP,
    GlobalLocal,
    Hybrid,
    ImageToPrompt,
    LearnedTopK,
    LocalWindow,
    MultiScale,
    Pattern,
    Random,
    RegionFocused,
    Streaming,
    Strided,
    Union,
)
from .token_grid import TokenGrid

__version__ = "0.1.0"

__all__ = [
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
