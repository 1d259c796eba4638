"""PEFT's own tests of LoRA, with torch.optim.SGD, Adam and AdamW replaced by their OP form.

    python scripts/run_peft_tests.py            # stock optimizers first, then OP; about 3 minutes

Downloads the source archive of the installed PEFT through pip and runs the cases of its
tests/test_custom_models.py whose config is a LoraConfig, twice. Fails if a case fails with OP
that passes with the stock optimizers. Every tensor has an MLP of its own (width 32, start
"keep"). The suite minimises losses without a minimum at rates up to 100, and an MLP multiplies
every step; so on the OP side, and there only, rates above 1 become 1 and the MLPs' gradient
is clipped at norm 100 (clip="mlp"). Frozen parameters in the list are left out.

The same file is the pytest plugin that does the replacing.
"""

import argparse
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

from oplora.harness.assets import unpack_tar

MAX_RATE, MAX_NORM = 1.0, 100.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-k", default="", help="only the cases that match, as in pytest")
    keyword = parser.parse_args().k
    with tempfile.TemporaryDirectory() as folder:
        tests = download(Path(folder))
        stock = run(tests, "stock", keyword)
        op = run(tests, "op", keyword)
    new = sorted(name for name, passed in op.items() if not passed and stock[name])
    for name, cases in [("stock", stock), ("op", op)]:
        print(f"{name}: {sum(cases.values())} of {len(cases)} passed")
    print(f"failures that the stock optimizers do not have: {len(new)}", *new, sep="\n  ")
    return int(bool(new) or not op or stock.keys() != op.keys())


def download(folder: Path) -> Path:
    """Tests of the installed PEFT version, from its source archive."""
    source = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "-d", str(folder)]
    pip = [sys.executable, "-m", "pip", "download", "-q", f"peft=={version('peft')}", *source]
    subprocess.run(pip, check=True)
    (archive,) = folder.glob("*.tar.gz")
    unpack_tar(archive, folder)
    (tests,) = folder.glob("peft-*/tests")
    (tests / "__init__.py").touch()  # not in the archive, but the tests import one another
    return tests


def run(tests: Path, optimizers: str, keyword: str) -> dict[str, bool]:
    """Whether each case that was not skipped passed."""
    report = tests / f"{optimizers}.xml"
    here = Path(__file__).resolve()
    code = (
        f"import sys; sys.path[:0] = [{str(here.parent)!r}, {str(here.parent.parent)!r}];"
        "import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    )
    options = ["-q", "--tb=short", "-W", "ignore", "-p", here.stem, f"--optimizers={optimizers}"]
    options += [f"--junitxml={report}", "-o", "addopts=", "-k", keyword]
    command = [sys.executable, "-c", code, *options, "tests/test_custom_models.py"]
    status = subprocess.run(command, cwd=tests.parent).returncode
    if status not in (0, 1):  # 1: some cases failed
        raise SystemExit(f"pytest could not run PEFT's tests (exit code {status})")
    cases = ElementTree.parse(report).getroot().iter("testcase")
    return {
        f"{case.get('classname')}.{case.get('name')}": case.find("failure") is None
        and case.find("error") is None
        for case in cases
        if case.find("skipped") is None
    }


# The plugin


def pytest_addoption(parser):
    parser.addoption("--optimizers", choices=["stock", "op"], default="stock")


def pytest_configure(config):
    if config.getoption("--optimizers") == "op":
        import torch

        for name in ("SGD", "Adam", "AdamW"):
            setattr(torch.optim, name, op_form(getattr(torch.optim, name)))


def op_form(optimizer_cls: type):
    """A callable in the place of the class."""
    from oplora import OPOptimizer

    def create(params, lr, **kwargs):
        trained = [p for p in params if p.requires_grad]
        options = dict(lr=min(lr, MAX_RATE), clip="mlp", max_norm=MAX_NORM)
        return OPOptimizer(trained, optimizer_cls, **options, **kwargs)

    return create


def pytest_collection_modifyitems(config, items):
    from peft import LoraConfig

    def is_lora(item):
        params = item.callspec.params if hasattr(item, "callspec") else {}
        return LoraConfig in params.values()

    chosen = [item for item in items if is_lora(item)]
    config.hook.pytest_deselected(items=[item for item in items if not is_lora(item)])
    items[:] = chosen


if __name__ == "__main__":
    sys.exit(main())
