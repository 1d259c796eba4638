"""Whether what a run loads from the Hugging Face hub is there, said at once."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

SECONDS = 5.0


def check_hub(config: Any) -> None:
    """ValueError that names models of the config which are neither local nor in the hub's cache.

    Only where the hub cannot be reached, which its own libraries try for minutes. With all of
    them in the cache the hub is not asked again.
    """
    models = list(dict.fromkeys(_models(config)))
    if not models or (not constants.HF_HUB_OFFLINE and reachable()):
        return
    if missing := [name for name, revision in models if not _cached(name, revision)]:
        raise ValueError(
            f"{constants.ENDPOINT} cannot be reached within {SECONDS:g} s and its cache lacks "
            f"{', '.join(missing)}: connect, or give local folders in their place"
        )
    constants.HF_HUB_OFFLINE = True


def reachable() -> bool:
    answers = []

    def ask() -> None:
        try:
            huggingface_hub.utils.get_session().head(constants.ENDPOINT, timeout=SECONDS)
            answers.append(True)
        except Exception:  # of whatever library and kind: there is no answer
            pass

    thread = threading.Thread(target=ask, daemon=True)  # looking up a name knows no time limit
    thread.start()
    thread.join(SECONDS)
    return bool(answers)


def _models(node: Any) -> Iterator[tuple[str, str | None]]:
    """Names and revisions of models that are no local folders."""
    if isinstance(node, dict):
        name = node.get("pretrained_model_name_or_path")
        if isinstance(name, str) and not Path(name).exists():
            yield name, node.get("revision")
        for each in node.values():
            yield from _models(each)


def _cached(name: str, revision: str | None) -> bool:
    try:
        return bool(snapshot_download(name, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return False
