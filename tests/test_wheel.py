"""What is published: the package alone, whole, under the version that it says it has."""

import re
import subprocess
import sys
import tarfile
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

import langchain_bge_dense

ROOT = Path(__file__).parents[1]
VERSION = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
DIST_INFO = f"langchain_bge_dense-{VERSION}.dist-info"


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the sdist, and the wheel from the sdist, with the hatchling that is installed."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> zipfile.ZipFile:
    (path,) = dist.glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel_holds_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    top_level = {name.split("/")[0] for name in wheel.namelist()}
    assert top_level == {"langchain_bge_dense", DIST_INFO}


def test_wheel_holds_the_package_whole(wheel: zipfile.ZipFile) -> None:
    package = ROOT / "langchain_bge_dense"
    kinds = {".py", ".css", ".html", ".typed"}
    files = (path for path in package.rglob("*") if path.suffix in kinds)
    sources = {path.relative_to(ROOT).as_posix() for path in files}
    packed = {name for name in wheel.namelist() if name.startswith("langchain_bge_dense/")}
    assert packed == sources
    assert "langchain_bge_dense/py.typed" in sources


def test_the_installed_package_says_its_version() -> None:
    assert langchain_bge_dense.__version__ == VERSION


def test_the_changelog_tells_of_this_version() -> None:
    assert f"\n## [{VERSION}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_metadata_says_version_licence_and_extras(wheel: zipfile.ZipFile) -> None:
    metadata = HeaderParser().parsestr(wheel.read(f"{DIST_INFO}/METADATA").decode())
    assert metadata["Version"] == VERSION
    assert metadata["License-Expression"] == "MIT"
    assert f"{DIST_INFO}/licenses/LICENSE" in wheel.namelist()
    assert {"chroma", "milvus", "qdrant", "ray"} <= set(metadata.get_all("Provides-Extra", []))


def test_sdist_holds_no_junk(dist: Path) -> None:
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as sdist:
        names = [name.split("/", 1)[1] for name in sdist.getnames()]
    assert {name.split("/")[0] for name in names} == {
        *{".gitignore", "CHANGELOG.md", "LICENSE", "PKG-INFO", "README.md", "pyproject.toml"},
        "langchain_bge_dense",
    }
    assert not [name for name in names if "__pycache__" in name]
