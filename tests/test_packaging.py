"""The wheel holds what the tree holds, and nothing lands outside sparse_attn_modules."""

import subprocess
import sys
import sysconfig
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())


def sources_in_the_tree():
    """Path in the wheel of every source file in the repository."""
    files = {
        f"sparse_attn_modules/{path.relative_to(ROOT / 'sparse_attn_modules')}"
        for path in (ROOT / "sparse_attn_modules").rglob("*.py")
    }
    for folder, suffixes in (("patching", {".py"}), ("kernels", {".cpp", ".cu", ".cuh", ".h"})):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in suffixes:
                files.add(f"sparse_attn_modules/{path.relative_to(ROOT)}")
    return {name for name in files if "__pycache__" not in name}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    source = tmp_path_factory.mktemp("source") / "tree"
    # A copy, so that building leaves nothing behind in the repository.
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    for name in filter(None, tracked):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    return source


def build_wheel(source, folder):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(source)],
        check=True,
        timeout=500,
    )
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel_names(source, tmp_path_factory):
    wheel = build_wheel(source, tmp_path_factory.mktemp("wheel"))
    assert wheel.name.endswith("-py3-none-any.whl")
    return zipfile.ZipFile(wheel).namelist()


def test_wheel_with_the_library_is_for_one_platform_and_every_python(source, wheel_names, tmp_path):
    library = source / "sparse_attn_modules" / "lib" / "libsparse_attn_modules_sm_90a_0123.so"
    library.parent.mkdir()
    library.write_bytes(b"\x7fELF")
    wheel = build_wheel(source, tmp_path)
    tag = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name.endswith(f"-py3-none-{tag}.whl")
    assert set(zipfile.ZipFile(wheel).namelist()) - set(wheel_names) == {f"sparse_attn_modules/lib/{library.name}"}


def test_wheel_holds_every_source(wheel_names):
    packaged = {name for name in wheel_names if ".dist-info/" not in name}
    assert packaged == sources_in_the_tree()


def test_wheel_installs_one_top_level_name(wheel_names):
    assert {name.split("/")[0].split("-")[0] for name in wheel_names} == {"sparse_attn_modules"}
    assert any(name.endswith("LICENSE") for name in wheel_names)


def test_patching_is_importable_where_it_is_mapped_to():
    import sparse_attn_modules.patching

    assert Path(sparse_attn_modules.patching.__file__).parent.name == "patching"


def test_version_is_said_once_and_the_same():
    import sparse_attn_modules

    assert sparse_attn_modules.__version__ == PYPROJECT["project"]["version"]
    assert metadata.version("sparse_attn_modules") == sparse_attn_modules.__version__
