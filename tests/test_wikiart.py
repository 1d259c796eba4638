"""WikiArt's stream is read file by file: what was read before a cut is not read again."""

import pytest
from datasets import Dataset, IterableDataset, load_dataset
from tiny_diffusion import wikiart_folder

from oplora.studies.sdxl.wikiart import paintings


def test_a_cut_stream_goes_on_at_the_file_where_it_was_cut(tmp_path, monkeypatch):
    monkeypatch.setenv("OPLORA_CACHE", str(tmp_path / "cache"))
    folder = wikiart_folder(tmp_path / "wikiart")
    whole = load_dataset(str(folder), split="train")
    for number in range(3):
        whole.shard(3, number).to_parquet(folder / "data" / f"train-{number}.parquet")
    (folder / "data" / "train.parquet").unlink()
    shard, read = IterableDataset.shard, []

    def counted(stream, count, number):
        read.append(number)
        if read == [0, 1]:
            raise ConnectionError("cut")
        return shard(stream, count, number)

    monkeypatch.setattr(IterableDataset, "shard", counted)
    with pytest.raises(ConnectionError):
        paintings(str(folder), "claude-monet")
    found = paintings(str(folder), "claude-monet")
    assert read == [0, 1, 1, 2]
    expected = whole.filter(lambda row: row["artist"] == 0)
    assert isinstance(found, Dataset) and len(found) == len(expected) == 6
    for mine, row in zip(found, expected):
        genre = whole.features["genre"].int2str(row["genre"]).replace("_", " ")
        assert mine["text"] == f"A painting of genre {genre}"
        assert mine["image"].tobytes() == row["image"].tobytes()
    assert not list((tmp_path / "cache").glob("*.parts"))
