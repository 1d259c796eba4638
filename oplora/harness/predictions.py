"""Predictions of an evaluation, one JSON line per item, so that a killed run goes on."""

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any


class PredictionFile:
    """A JSON-lines file that predictions are appended to; what it held before is kept.

    A last line that a kill cut off is dropped. Items other than `ids` in the file mean that it
    belongs to another evaluation, which is an error.
    """

    def __init__(self, path: str | Path, ids: Collection[str]):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.by_id = {row["id"]: row for row in _complete_rows(self.path)}
        if strangers := self.by_id.keys() - set(ids):
            raise ValueError(
                f"{path} has a prediction for {min(strangers)!r}, which is not evaluated here:"
                " delete the file, or evaluate the same items"
            )

    def __contains__(self, id: str) -> bool:
        return id in self.by_id

    def append(self, rows: Collection[dict[str, Any]]) -> None:
        """Add rows, each with its item's "id"; they are on disk when this returns."""
        lines = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
        self.by_id |= {row["id"]: row for row in rows}


def _complete_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of the file, after cutting off a last line without its end."""
    if not path.exists():
        return []
    content = path.read_bytes()
    complete = content[: content.rfind(b"\n") + 1]
    if complete != content:
        os.truncate(path, len(complete))
    return [json.loads(line) for line in complete.splitlines()]
