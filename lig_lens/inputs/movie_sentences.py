"""Sentences of film reviews with the sentiment that people read in them, and a lexicon of words with theirs.

Both come with the source distribution of vaderSentiment (Hutto and Gilbert 2014, ICWSM), which holds more than what it
installs. People scored each sentence and each word from -4 (most negative) to 4; given here are the means. The
sentences are those that Pang and Lee (2005) took from Rotten Tomatoes; from which review each comes is not told.
"""

import hashlib
import io
import os
import random
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from lig_lens.arguments import checked
from lig_lens.errors import InputError, check_choice
from lig_lens.files import cached_folder

VERSION = "3.3.2"
_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
_FETCH = f"pip download --no-binary :all: --no-deps vaderSentiment=={VERSION}"
_SENTENCES, _LEXICON = "movieReviewSnippets_GroundTruth.txt", "vader_lexicon.txt"
_PAPER = "hutto_ICWSM_2014.tar.gz"  # holds the sentences
_SPLITS = ("train", "held_out")
_HELD_OUT = 0.2
# So many words in a row that two sentences share make them near-duplicates.
_SHARED = 5


@checked
def movie_sentences(split: str = "held_out", sdist: str | os.PathLike[str] | None = None) -> list[tuple[str, float]]:
    """Sentences of film reviews, each with its mean score; fetched once with pip, then read from the user's cache.

    A fifth is held out. Sentences that have five words in a row in common are on the same side, also by way of others.
    The order is drawn, so that the first n are a sample of all.

    Args:
        split: `"held_out"`, or `"train"`, on which `load_model("sentiment")` was trained.
        sdist: `vaderSentiment-3.3.2.tar.gz`, where it was fetched otherwise; needed once.

    Returns:
        Text and mean score, above 0 for positive sentences.

    Raises:
        InputError: another split, pip cannot fetch the file, or it is not what was expected.
    """
    check_choice("split", split, _SPLITS)
    lines = (_folder(sdist) / _SENTENCES).read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines]
    scored = [(text, float(score)) for _, score, text in rows]
    groups = near_duplicates([text for text, _ in scored])
    random.Random(0).shuffle(groups)
    sides: dict[str, list[tuple[str, float]]] = {name: [] for name in _SPLITS}
    for group in groups:
        side = "held_out" if len(sides["held_out"]) < _HELD_OUT * len(scored) else "train"
        sides[side] += [scored[number] for number in group]
    return sides[split]


@checked
def sentiment_lexicon(sdist: str | os.PathLike[str] | None = None) -> dict[str, float]:
    """Words and their mean scores, from the same file; lower-case words, emoticons and a few phrases.

    A few stand in it twice with different scores. The last one counts, as it does for vaderSentiment.

    Args:
        sdist: see `movie_sentences`.

    Raises:
        InputError: see `movie_sentences`.
    """
    lines = (_folder(sdist) / _LEXICON).read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines]
    return {word: float(score) for word, score, *_ in rows}


def near_duplicates(texts: list[str]) -> list[list[int]]:
    """Numbers of texts in groups: those that have five words in a row in common, or all where they are shorter."""
    before = list(range(len(texts)))  # of each text one of its group, itself where it is the first

    def first(number: int) -> int:
        while before[number] != number:
            number = before[number] = before[before[number]]
        return number

    seen: dict[tuple[str, ...], int] = {}
    for number, text in enumerate(texts):
        words = re.findall(r"\w+", text.lower())
        for start in range(max(1, len(words) - _SHARED + 1)):
            one, other = first(number), first(seen.setdefault(tuple(words[start : start + _SHARED]), number))
            before[max(one, other)] = min(one, other)
    groups: dict[int, list[int]] = {}
    for number in range(len(texts)):
        groups.setdefault(first(number), []).append(number)
    return list(groups.values())


def _folder(sdist: str | os.PathLike[str] | None) -> Path:
    """Both files in the user's cache."""

    def fill(folder: Path) -> None:
        with tempfile.TemporaryDirectory() as fetched:
            file = _fetched(Path(fetched)) if sdist is None else Path(sdist)
            for name, data in _read(file).items():
                (folder / name).write_bytes(data)

    return cached_folder(f"vadersentiment-{VERSION}", (_SENTENCES, _LEXICON), fill)


def _fetched(folder: Path) -> Path:
    """The source distribution, from wherever pip is set up to look."""
    wanted = folder / "wanted.txt"
    wanted.write_text(f"vaderSentiment=={VERSION} --hash=sha256:{_SHA256}\n")  # pip runs what it fetches
    options = ["--no-binary", ":all:", "--no-deps", "--retries", "1", "--quiet", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, "--requirement", str(wanted)]
    ran = subprocess.run(command, capture_output=True, text=True)
    files = sorted(folder.glob("*.tar.gz"))
    if ran.returncode or not files:
        said = [line for line in ran.stderr.splitlines() if line.startswith("ERROR")] or ran.stderr.splitlines()
        raise InputError(
            f"The movie sentences come with the source distribution of vaderSentiment {VERSION}, which pip could not "
            f"fetch ({said[-1].strip() if said else 'it says nothing'}). Where there is a network, run: {_FETCH}; then "
            "give the path of the file once, as sdist='...tar.gz'."
        )
    return files[0]


def _read(sdist: Path) -> dict[str, bytes]:
    """Both files by name; the sentences are in an archive inside the archive."""
    try:
        data = sdist.read_bytes()
    except (OSError, ValueError) as error:  # a name that holds a null character
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"Cannot read sdist={str(sdist)!r}: {reason}. Get it by: {_FETCH}") from error
    found = hashlib.sha256(data).hexdigest()
    if found != _SHA256:
        raise InputError(
            f"{str(sdist)!r} is not the source distribution of vaderSentiment {VERSION} (its SHA-256 begins with "
            f"{found[:12]}, not {_SHA256[:12]}). Get it by: {_FETCH}"
        )
    outer = _members(data, (_LEXICON, _PAPER))
    return _members(outer.pop(_PAPER), (_SENTENCES,)) | outer


def _members(archive: bytes, names: tuple[str, ...]) -> dict[str, bytes]:
    """Files of an archive, by their names without folders."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        files = {Path(member.name).name: tar.extractfile(member) for member in tar if Path(member.name).name in names}
        return {name: file.read() for name, file in files.items() if file is not None}
