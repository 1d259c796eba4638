"""Paintings of one artist, picked from the WikiArt data set without storing the rest of it."""

import hashlib
from pathlib import Path

from datasets import Dataset, Features, Image, Value, load_dataset, load_from_disk
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

    path: the data set, on the hub or a local folder, with columns image, artist and genre (class
        labels). unknown_genre: False leaves out those whose genre is "Unknown Genre".
    ValueError if `artist` is none of its artists or has no painting there.
    """
    key = repr((path, artist, caption, unknown_genre, revision))
    name = f"wikiart-{artist}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"

    def build(folder: Path) -> None:
        stream = load_dataset(path, split="train", streaming=True, revision=revision)
        artists, genres = stream.features["artist"], stream.features["genre"]
        if artist not in artists.names:
            raise ValueError(f"no artist {artist!r}: choose one of {', '.join(artists.names)}")
        chosen = artists.str2int(artist)
        stream = stream.cast_column(
            "image", Image(decode=False)
        )  # bytes: pixels take 10 times more
        rows = []
        for row in tqdm(stream, desc=f"Paintings by {artist}"):
            genre = genres.int2str(row["genre"]).replace("_", " ")
            if row["artist"] == chosen and (unknown_genre or genre != "Unknown Genre"):
                rows.append({"image": row["image"], "text": caption.format(genre=genre)})
        if not rows:
            raise ValueError(f"{path} holds no painting by {artist!r}")
        features = Features({"image": Image(), "text": Value("string")})
        Dataset.from_list(rows, features=features).save_to_disk(folder)

    return load_from_disk(build_once(cache_folder() / name, build))
