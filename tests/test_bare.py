"""The optimizer needs torch and peft alone; the package says its version and its names."""

import re
import subprocess
import sys

from processes import ROOT

import oplora

STUDIES = "diffusers datasets hydra omegaconf torchmetrics pandas matplotlib"
STEP = """
import sys
import torch, oplora
from peft import LoraConfig, get_peft_model
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
model = get_peft_model(net, LoraConfig(r=2, target_modules=["0"]))
A, B = torch.nn.Parameter(torch.randn(2, 4)), torch.nn.Parameter(torch.zeros(4, 2))
x = torch.randn(3, 4)
for made in (oplora.create_oplora_optimizer(model, lr=1e-2), oplora.OPAdamW([[A, B]], lr=1e-2)):
    before = [p.clone() for group in made.param_groups for p in group["params"]]
    (model(x).square().mean() + (x @ (A.T @ B.T + 1)).square().mean()).backward()
    made.step()
    after = [p for group in made.param_groups for p in group["params"]]
    assert any(not torch.equal(p, q) for p, q in zip(before, after))
print("imported:", *(name for name in STUDIES.split() if name in sys.modules))
"""


def test_a_training_step_imports_nothing_of_the_experiments():
    code = f"STUDIES = {STUDIES!r}\n{STEP}"
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.strip() == "imported:"


def test_the_core_depends_on_torch_and_peft_alone():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    core = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.S | re.M)[1]
    assert re.findall(r'^    "([a-z]+)', core, re.M) == ["torch", "peft", "attrs"]


def test_version_and_changelog():
    assert re.fullmatch(r"\d+\.\d+\.\d+", oplora.__version__)
    assert f"## {oplora.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert (ROOT / "oplora" / "py.typed").exists()


def test_dir_lists_the_public_names():
    assert set(oplora.__all__) == {name for name in dir(oplora) if not name.startswith("_")}
    for name in oplora.__all__:
        assert getattr(oplora, name).__name__ == name
