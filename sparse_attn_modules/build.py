"""Compiles the CUDA kernels into one shared library, once per machine, and finds it again.

The library uses PyTorch's stable ABI and no Python headers, so one binary serves every Python and every torch from
2.10 on. It lies in a cache directory under a name that hashes everything it depends on: sources, architecture, flags
and compiler. A wheel may carry a library built ahead of time.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import logging
import os
import re
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

__all__ = ["ARCHITECTURES", "BuildError", "build_library", "find_nvcc", "find_sources", "library_path"]

ARCHITECTURES = ("sm_90a",)
_CACHE_VARIABLE = "SPARSE_ATTN_MODULES_CACHE"
_PACKAGE = Path(__file__).resolve().parent
_TORCH_TARGET = "0x020a000000000000"  # 2.10, the oldest torch the library runs on
_FLAGS = (
    "-std=c++17",
    "-O2",  # of host code; device code is always compiled with -O3
    "--expt-relaxed-constexpr",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "-Xptxas=-v",
    "-Xfatbin=-compress-all",  # a quarter of the size
    "-DUSE_CUDA",
)
# The compiler then runs matrix products one after the other: the kernel is right, and several times too slow.
_SERIALISED = re.compile(r"\(C75(1[0-57])\)")

_logger = logging.getLogger("sparse_attn_modules")


class BuildError(RuntimeError):
    """The kernels could not be compiled or stored; the message says why and what helps."""


def find_sources() -> Path:
    """The folder of CUDA sources: beside the package in a checkout, inside it in an installed wheel."""
    for folder in (_PACKAGE / "kernels", _PACKAGE.parent / "kernels"):
        if (folder / "library.cpp").is_file():
            return folder
    raise BuildError(f"the CUDA sources must lie in {_PACKAGE / 'kernels'} or {_PACKAGE.parent / 'kernels'}")


def find_nvcc() -> tuple[Path | None, str]:
    """The CUDA compiler and where it was found; None and where it was sought if there is none.

    Sought in ``CUDA_HOME`` (and ``CUDA_PATH``), on ``PATH``, in pip's ``nvidia-cuda-nvcc``, in ``/usr/local/cuda``.
    """
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        home = os.environ.get(variable)
        if home and (nvcc := Path(home) / "bin" / "nvcc").is_file():
            return nvcc, variable
    if on_path := shutil.which("nvcc"):
        return Path(on_path), "PATH"
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec else ():
        for nvcc in sorted(Path(folder).glob("*/bin/nvcc"), reverse=True):
            return nvcc, "pip's nvidia-cuda-nvcc"
    if (nvcc := Path("/usr/local/cuda/bin/nvcc")).is_file():
        return nvcc, "/usr/local/cuda"
    return None, "no nvcc in CUDA_HOME, on PATH, in pip's nvidia-cuda-nvcc or in /usr/local/cuda"


def library_path(arch: str = "sm_90a") -> Path | None:
    """The library of these very sources if it exists: the one a wheel carries, else the cached one.

    Raises:
        BuildError: if there is one that others could have written.
    """
    carried = _PACKAGE / "lib" / _library_name(arch)
    if carried.is_file():
        return carried
    nvcc, _ = find_nvcc()
    if nvcc is None:
        return None
    cached = _cache_directory() / _cached_name(arch, nvcc)
    if not cached.exists():
        return None
    _check_only_ours(cached.parent)
    _check_only_ours(cached)
    return cached


def build_library(arch: str | None = None, into: str | os.PathLike[str] | None = None) -> Path:
    """Compiles the kernels unless that was done before, and returns the library.

    Args:
        arch: GPU architecture, one of ``ARCHITECTURES``.
        into: folder for the library, as for a wheel to carry; the user's cache if None.

    Raises:
        ValueError: if ``arch`` is not supported.
        BuildError: if there is no compiler, it fails, or the folder cannot be used; with its output or the reason.
    """
    arch = ARCHITECTURES[0] if arch is None else arch
    if arch not in ARCHITECTURES:
        raise ValueError(f"build_library: arch must be one of {list(ARCHITECTURES)}, got {arch!r}")
    nvcc, found = find_nvcc()
    if nvcc is None:
        raise BuildError(f"compiling the CUDA kernels needs nvcc: {found}. pip install nvidia-cuda-nvcc provides it")
    if into is None:
        folder = _cache_directory()
        library = folder / _cached_name(arch, nvcc)
    else:
        folder = Path(into)
        library = folder / _library_name(arch)
    try:
        folder.mkdir(mode=0o700 if into is None else 0o777, parents=True, exist_ok=True)
        if into is None:
            _check_only_ours(folder)
        with _locked(folder / f".{library.stem}.lock"):
            if into is None and library.exists():  # another process may have built it while this one waited
                _check_only_ours(library)
                return library
            _remove_leftovers(folder, library.stem)
            with tempfile.TemporaryDirectory(prefix=f".{library.stem}.", dir=folder) as scratch:
                built = _compile(nvcc, arch, Path(scratch))
                built.chmod(0o755)
                _flush(built)
                os.replace(built, library)
            _flush(folder)
    except OSError as error:
        advice = f"Set {_CACHE_VARIABLE} to a folder of yours" if into is None else "Choose another folder"
        raise BuildError(
            f"cannot store the compiled kernels in {folder}: {error}. {advice} with 50 MB of room"
        ) from error
    return library


def _library_name(arch: str) -> str:
    """Named by the sources, so that a library left from other ones is never loaded."""
    return f"libsparse_attn_modules_{arch}_{_digest_of_sources(arch).hexdigest()[:20]}.so"


def _cached_name(arch: str, nvcc: Path) -> str:
    """Named by the compiler too: the cache outlives it."""
    digest = _digest_of_sources(arch)
    compiler = nvcc.resolve().stat()
    for part in (str(nvcc.resolve()), str(compiler.st_mtime_ns), str(compiler.st_size)):
        digest.update(part.encode() + b"\0")
    return f"libsparse_attn_modules_{arch}_{digest.hexdigest()[:20]}.so"


def _digest_of_sources(arch: str) -> hashlib._Hash:
    digest = hashlib.sha256()
    sources = find_sources()
    for path in sorted(path for path in sources.rglob("*") if path.suffix in (".cpp", ".cu", ".cuh", ".h")):
        digest.update(path.relative_to(sources).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    for part in (arch, *_FLAGS, _TORCH_TARGET):
        digest.update(part.encode() + b"\0")
    return digest


def _cache_directory() -> Path:
    if chosen := os.environ.get(_CACHE_VARIABLE):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "sparse_attn_modules"
    except RuntimeError as error:
        raise BuildError(
            f"there must be a home directory to keep the compiled kernels in, or {_CACHE_VARIABLE}"
        ) from error


def _check_only_ours(path: Path) -> None:
    """A library is code that this process runs: nobody else may be able to put it there."""
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        raise BuildError(f"{path} must not be a symbolic link: it holds code that is run")
    if status.st_uid not in (os.getuid(), 0):
        raise BuildError(f"{path} must belong to the current user, got user {status.st_uid}: it holds code that is run")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise BuildError(
            f"{path} must not be writable by others, got mode {stat.filemode(status.st_mode)}: it holds code that "
            f"is run. chmod go-w {path} corrects it"
        )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock that the system releases when the process ends, however it ends."""
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _logger.warning("waiting for another process that is compiling the CUDA kernels (lock %s)", path)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_leftovers(folder: Path, stem: str) -> None:
    """What a killed build left behind. Called with the lock held, so no build is using it."""
    for leftover in folder.glob(f".{stem}.*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)


def _compile(nvcc: Path, arch: str, scratch: Path) -> Path:
    import torch

    torch_folder = Path(torch.__file__).resolve().parent
    sources = find_sources()
    units = [*sorted((sources / arch.rstrip("a").replace("_", "")).glob("*.cu")), sources / "library.cpp"]
    # Wide heads take longest: they come first, so that all processors are busy to the end.
    units.sort(key=lambda unit: [int(number) for number in re.findall(r"\d+", unit.stem)], reverse=True)
    target = f"-gencode=arch=compute_{arch[3:]},code={arch}"
    flags = [*_FLAGS, target, f"-DTORCH_TARGET_VERSION={_TORCH_TARGET}", f"-I{torch_folder / 'include'}"]
    jobs = min(len(units), len(os.sched_getaffinity(0)))
    started = time.monotonic()
    _logger.warning("compiling the CUDA kernels for %s: once, %d files, %d at a time", arch, len(units), jobs)

    def compile_unit(unit: Path) -> Path:
        compiled = scratch / f"{unit.stem}.o"
        _run([str(nvcc), *flags, "-c", str(unit), "-o", str(compiled)], scratch)
        return compiled

    with ThreadPoolExecutor(jobs) as pool:
        objects = list(pool.map(compile_unit, units))
    library = scratch / _library_name(arch)
    link = ["-shared", "-cudart=static", f"-L{torch_folder / 'lib'}", "-Xlinker=--no-as-needed", "-ltorch"]
    _run([str(nvcc), *link, "-o", str(library), *map(str, objects)], scratch)
    _logger.warning("compiled the CUDA kernels in %.0f s", time.monotonic() - started)
    return library


def _run(command: list[str], scratch: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(scratch)}
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True, env=environment
    )
    if done.returncode != 0:
        raise BuildError(f"compiling the CUDA kernels failed: {' '.join(command)}\n{done.stdout}")
    if _SERIALISED.search(done.stdout):
        raise BuildError(
            f"the compiler serialised matrix products in the CUDA kernels: {' '.join(command)}\n{done.stdout}"
        )


def _flush(path: Path) -> None:
    """Makes sure that a renamed file is whole even if the machine stops right after."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
