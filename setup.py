"""What pyproject.toml cannot say: a wheel with the compiled kernels is for one platform and for every Python."""

from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel


class MaybeCompiled(Distribution):
    def has_ext_modules(self) -> bool:
        return any((Path(__file__).parent / "sparse_attn_modules" / "lib").glob("*.so"))


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        # The library uses torch's stable ABI and nothing of Python's.
        platform = super().get_tag()[2]
        return "py3", "none", platform


setup(distclass=MaybeCompiled, cmdclass={"bdist_wheel": Wheel})
