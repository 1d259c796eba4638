"""Models that are nowhere are named at once; what is cached is taken without asking the hub."""

import pytest
from huggingface_hub import constants

from oplora.harness import hub

REVISION = "0123456789" * 4
CONFIG = {"model": {"pretrained_model_name_or_path": "someone/model", "revision": REVISION}}


def test_a_model_that_is_nowhere_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "reachable", lambda: False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="lacks someone/model: connect"):
        hub.check_hub(CONFIG)


def test_without_the_hub_its_cache_is_enough(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "reachable", lambda: False)
    monkeypatch.setattr(hub, "_cached", lambda name, revision: revision == REVISION)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.check_hub(CONFIG)
    assert constants.HF_HUB_OFFLINE


def test_folders_and_a_hub_that_answers_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "reachable", lambda: True)
    hub.check_hub(CONFIG)
    monkeypatch.setattr(hub, "reachable", lambda: pytest.fail("asked for a folder"))
    hub.check_hub({"model": {"pretrained_model_name_or_path": str(tmp_path)}})
    assert not constants.HF_HUB_OFFLINE
