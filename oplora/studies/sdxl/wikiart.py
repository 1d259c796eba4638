"""Paintings of one artist, picked from the WikiArt data set without storing the rest of it."""

import hashlib
import shutil
from functools import partial
from pathlib import Path

from datasets import (
    Dataset,
    Features,
    Image,
    Value,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)
from tqdm import tqdm

from oplora.harness.assets import build_once, cache_folder


def paintings(
    path: str,
    artist: str,
    caption: str = "A painting of genre {genre}",
    unknown_genre: bool = True,
    revision: str | None = None,
) -> Dataset:
    """Columns `image` and `text` of all paintings by `artist`; streamed once, then cached.

    What is cut goes on at the file of the data set that it was cut in.

    path: the data set, on the hub or a local folder, with columns image, artist and genre (class
        labels). unknown_genre: False leaves out those whose genre is "Unknown Genre".
    ValueError if `artist` is none of its artists or has no painting there.
    """
    key = repr((path, artist, caption, unknown_genre, revision))
    name = f"wikiart-{artist}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"

    parts = cache_folder() / f"{name}.parts"

    def build(folder: Path) -> None:
        stream = load_dataset(path, split="train", streaming=True, revision=revision)
        artists, genres = stream.features["artist"], stream.features["genre"]
        if artist not in artists.names:
            raise ValueError(f"no artist {artist!r}: choose one of {', '.join(artists.names)}")
        chosen = artists.str2int(artist)
        # bytes: pixels take 10 times more
        stream = stream.cast_column("image", Image(decode=False))
        features = Features({"image": Image(), "text": Value("string")})

        def build_part(part: Path, number: int) -> None:
            images, texts = [], []
            for row in stream.shard(stream.num_shards, number):
                genre = genres.int2str(row["genre"]).replace("_", " ")
                if row["artist"] == chosen and (unknown_genre or genre != "Unknown Genre"):
                    images.append(row["image"])
                    texts.append(caption.format(genre=genre))
            found = Dataset.from_dict({"image": images, "text": texts}, features=features)
            found.save_to_disk(part)

        found = [
            load_from_disk(build_once(parts / f"{n:04d}", partial(build_part, number=n)))
            for n in tqdm(range(stream.num_shards), desc=f"Paintings by {artist}", unit="file")
        ]
        if not sum(map(len, found)):
            raise ValueError(f"{path} holds no painting by {artist!r}")
        concatenate_datasets(found).save_to_disk(folder)

    paintings = load_from_disk(build_once(cache_folder() / name, build))
    shutil.rmtree(parts, ignore_errors=True)
    return paintings
