"""Building the CUDA library: what the cache accepts, and what becomes of builds that fail, die or meet."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sparse_attn_modules import build

_NVCC, _NVCC_REASON = build.find_nvcc()
needs_nvcc = pytest.mark.skipif(_NVCC is None, reason=_NVCC_REASON)

_FAKE_NVCC = """#!/bin/sh
echo "$@" >> "$FAKE_NVCC_LOG"
[ -n "$FAKE_NVCC_SLEEP" ] && sleep "$FAKE_NVCC_SLEEP"
[ -n "$FAKE_NVCC_FAIL" ] && echo "error: $FAKE_NVCC_FAIL" && exit 1
[ -n "$FAKE_NVCC_SAY" ] && echo "$FAKE_NVCC_SAY"
while [ $# -gt 0 ]; do
  if [ "$1" = -o ]; then echo compiled > "$2"; fi
  shift
done
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache and a compiler that writes its files at once."""
    home = tmp_path / "cuda"
    (home / "bin").mkdir(parents=True)
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text(_FAKE_NVCC)
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(home))
    monkeypatch.setenv("FAKE_NVCC_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("SPARSE_ATTN_MODULES_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _calls(cache: Path) -> int:
    log = cache.parent / "log"
    return len(log.read_text().splitlines()) if log.exists() else 0


def _in_another_process() -> subprocess.Popen[bytes]:
    code = "from sparse_attn_modules import build; print(build.build_library())"
    root = str(Path(build.__file__).resolve().parents[1])
    environment = {**os.environ, "PYTHONPATH": root}
    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, start_new_session=True
    )


def test_builds_once_and_is_found(cache: Path) -> None:
    assert build.library_path() is None
    library = build.build_library()
    assert library.read_text() == "compiled\n"
    assert build.library_path() == library
    calls = _calls(cache)
    assert build.build_library() == library
    assert _calls(cache) == calls
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert [path for path in cache.iterdir() if path.is_dir()] == []


def test_name_depends_on_sources(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = build.build_library()
    sources = tmp_path / "kernels"
    shutil.copytree(build.find_sources(), sources)
    monkeypatch.setattr(build, "find_sources", lambda: sources)
    assert build.library_path() == before
    with open(sources / "params.h", "a") as file:
        file.write("// changed\n")
    assert build.library_path() is None
    assert build.build_library() != before


def test_into_a_folder(cache: Path, tmp_path: Path) -> None:
    library = build.build_library("sm_90a", into=tmp_path / "wheel")
    assert library.parent == tmp_path / "wheel"
    assert library.exists()
    assert not cache.exists()


def test_carried_library_is_used_for_its_own_sources_only(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "_PACKAGE", tmp_path)
    sources = tmp_path / "kernels"
    shutil.copytree(Path(build.__file__).resolve().parents[1] / "kernels", sources)
    carried = build.build_library(into=tmp_path / "lib")
    assert build.library_path() == carried
    with open(sources / "params.h", "a") as file:
        file.write("// changed\n")
    assert build.library_path() is None


def test_unknown_architecture(cache: Path) -> None:
    with pytest.raises(ValueError, match=r"arch must be one of \['sm_90a'\], got 'sm_10'"):
        build.build_library("sm_10")


def test_failure_shows_the_compiler_s_output(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_NVCC_FAIL", "no such thing")
    with pytest.raises(build.BuildError, match="error: no such thing"):
        build.build_library()
    assert build.library_path() is None
    assert [path for path in cache.iterdir() if path.suffix == ".so"] == []
    monkeypatch.delenv("FAKE_NVCC_FAIL")
    assert build.build_library().exists()


def test_serialised_products_fail_the_build(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_NVCC_SAY", "ptxas info : (C7512) Potential Performance Loss")
    with pytest.raises(build.BuildError, match="serialised"):
        build.build_library()


def test_without_a_compiler(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "find_nvcc", lambda: (None, "no nvcc anywhere"))
    assert build.library_path() is None
    with pytest.raises(build.BuildError, match="no nvcc anywhere"):
        build.build_library()


def test_killed_build_leaves_nothing_in_the_way(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_NVCC_SLEEP", "60")
    process = _in_another_process()
    deadline = time.monotonic() + 60
    while _calls(cache) == 0 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert any(path.is_dir() for path in cache.iterdir()), (
        "the build was killed too early or too late to leave anything"
    )
    monkeypatch.delenv("FAKE_NVCC_SLEEP")
    assert build.build_library().read_text() == "compiled\n"
    assert [path for path in cache.iterdir() if path.is_dir()] == []


def test_two_processes_build_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_NVCC_SLEEP", "0.3")
    processes = [_in_another_process() for _ in range(2)]
    printed = [process.communicate(timeout=120)[0].decode().strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert printed[0] == printed[1]
    units = len(list((build.find_sources() / "sm90").glob("*.cu"))) + 1
    assert _calls(cache) == units + 1


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_folder_that_others_can_write_is_refused(cache: Path, mode: int) -> None:
    build.build_library()
    cache.chmod(mode)
    with pytest.raises(build.BuildError, match="must not be writable by others"):
        build.library_path()
    with pytest.raises(build.BuildError, match="must not be writable by others"):
        build.build_library()


def test_library_that_others_can_write_is_refused(cache: Path) -> None:
    build.build_library().chmod(0o666)
    with pytest.raises(build.BuildError, match="must not be writable by others"):
        build.library_path()


def test_link_in_the_place_of_the_library_is_refused(cache: Path, tmp_path: Path) -> None:
    library = build.build_library()
    library.rename(tmp_path / "elsewhere.so")
    library.symlink_to(tmp_path / "elsewhere.so")
    with pytest.raises(build.BuildError, match="must not be a symbolic link"):
        build.library_path()


def test_folder_of_someone_else_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build.build_library()
    owner = cache.stat().st_uid
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    if owner == 0:
        pytest.skip("folders of the system's administrator are trusted")
    with pytest.raises(build.BuildError, match="must belong to the current user"):
        build.library_path()


def test_folder_that_cannot_be_made(cache: Path) -> None:
    """As in a read-only home; a file stands in for it, which stops the administrator too."""
    cache.write_text("")
    with pytest.raises(build.BuildError, match="SPARSE_ATTN_MODULES_CACHE"):
        build.build_library()


def test_given_folder_that_cannot_be_made(cache: Path, tmp_path: Path) -> None:
    """The cache has no part in it, so it is not named."""
    (tmp_path / "wheel").write_text("")
    with pytest.raises(build.BuildError, match="Choose another folder") as raised:
        build.build_library(into=tmp_path / "wheel")
    assert "SPARSE_ATTN_MODULES_CACHE" not in str(raised.value)


def test_full_disk(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: str, destination: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(build.BuildError, match="No space left on device"):
        build.build_library()
    assert build.library_path() is None


@needs_nvcc
@pytest.mark.timeout(900)
def test_the_kernels_compile(tmp_path: Path) -> None:
    library = build.build_library("sm_90a", into=tmp_path)
    assert 100_000 < library.stat().st_size < 10_000_000
