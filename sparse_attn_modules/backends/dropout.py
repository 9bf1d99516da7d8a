"""Which attention weights are dropped: a pure function of the seed and of the weight's place.

Every backend evaluates the same function, so that they agree under dropout too, and the backward pass finds the mask of
the forward pass again without anything of size N² being kept. The CUDA kernels compute it in ``common/dropout.cuh``.
"""

from __future__ import annotations

import torch
from torch import Tensor

_KEY_STEP = 0x9E3779B1
_RESOLUTION = 2**24


def drop_threshold(dropout_p: float) -> int:
    """Weights whose 24 random bits are below it are dropped."""
    return round(dropout_p * _RESOLUTION)


def inverse_keep(dropout_p: float) -> float:
    """What kept weights are multiplied by: the exact inverse of the probability of being kept, 0 if none is."""
    kept = _RESOLUTION - drop_threshold(dropout_p)
    return _RESOLUTION / kept if kept else 0.0


def row_hashes(seed: Tensor, head: Tensor, query: Tensor) -> Tensor:
    """Random words of rows of weights: int32.

    Args:
        seed: int64 ``[1]``.
        head: batch entry × number of heads + head; integers that broadcast with ``query``.
        query: number of the query token.
    """
    word = _mix(seed.to(torch.int32) + _signed(_KEY_STEP))
    for part in (seed >> 32, head, query):
        word = _mix(word ^ part.to(torch.int32))
    return word


def dropout_factors(rows: Tensor, key: Tensor, dropout_p: float, dtype: torch.dtype) -> Tensor:
    """0 where the weight is dropped, otherwise 1 / probability of being kept.

    Args:
        rows: words of :func:`row_hashes`; broadcasts with ``key``.
        key: number of the key token.
    """
    bits = _mix(rows + key.to(torch.int32) * _signed(_KEY_STEP))
    return (_shifted(bits, 8) >= drop_threshold(dropout_p)).to(dtype) * inverse_keep(dropout_p)


def _mix(word: Tensor) -> Tensor:
    """Finaliser of MurmurHash3 (Appleby, public domain): every input bit moves every output bit."""
    word = (word ^ _shifted(word, 16)) * _signed(0x85EBCA6B)
    word = (word ^ _shifted(word, 13)) * _signed(0xC2B2AE35)
    return word ^ _shifted(word, 16)


def _shifted(word: Tensor, bits: int) -> Tensor:
    """To the right, as if without sign: torch's arithmetic of 32-bit words without sign is incomplete."""
    return word >> bits & (1 << 32 - bits) - 1


def _signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word
