"""Sentences with human scores, read from a made-up distribution of the same form; pip itself only where it fails."""

import hashlib
import io
import itertools
import re
import tarfile
from pathlib import Path

import pytest

from lig_lens.errors import InputError
from lig_lens.inputs import movie_sentences as module
from lig_lens.inputs.movie_sentences import movie_sentences, near_duplicates, sentiment_lexicon

# Sentences of numbered words, of which no two share any.
APART = [" ".join(f"w{number}x{k}" for k in range(6)) for number in range(37)]
ALIKE = [
    "The best film of the year so far, by a margin.",
    "THE BEST FILM -- of the year; so far: a fact.",
    "By a margin so far and wide, so far, by a margin it wins.",  # shares with the first alone
]
SENTENCES = [*APART, *ALIKE, "Eh.", "eh", "Ça, c’est «bon»", "No."]
LEXICON = ":)\t2.0\t0.8\t[2]\ngood\t1.9\t0.9\t[2]\nok\t1.6\t1.4\t[1]\nok\t1.2\t0.9\t[1]\nfed up\t-1.8\t1.2\t[-2]\n"


def score(number: int) -> float:
    return (number % 9 - 4) * 0.75


def archive(files: dict[str, bytes]) -> bytes:
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return held.getvalue()


@pytest.fixture
def sdist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file like vaderSentiment's, and a cache with nothing in it."""
    lines = [f"{number + 1}\t{score(number)}\t{text}\r\n" for number, text in enumerate(SENTENCES)]
    paper = archive({"paper/_README_.txt": b"", f"paper/{module._SENTENCES}": "".join(lines).encode()})
    data = archive({f"v/{module._PAPER}": paper, f"v/v/{module._LEXICON}": LEXICON.encode(), "v/setup.py": b"1/0"})
    monkeypatch.setattr(module, "_SHA256", hashlib.sha256(data).hexdigest())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "v.tar.gz"
    path.write_bytes(data)
    return path


def test_every_sentence_is_on_one_side_with_its_score(sdist: Path) -> None:
    train, held_out = movie_sentences("train", sdist), movie_sentences("held_out", sdist)
    assert sorted(train + held_out) == sorted((text, score(number)) for number, text in enumerate(SENTENCES))
    assert len(SENTENCES) / 5 <= len(held_out) <= len(SENTENCES) / 5 + len(ALIKE)
    assert movie_sentences(sdist=sdist) == held_out  # the same at every call
    assert [text for text, _ in train] != [
        text for text in SENTENCES if text in dict(train)
    ]  # drawn, not as in the file


def test_no_run_of_words_is_on_both_sides(sdist: Path) -> None:
    runs = {}
    for side in ("train", "held_out"):
        words = [re.sub(r"\W", " ", text).lower().split() for text, _ in movie_sentences(side, sdist)]
        runs[side] = {tuple(one[k : k + 5]) for one in words for k in range(max(1, len(one) - 4))}
    assert not runs["train"] & runs["held_out"]


def test_groups_are_those_of_a_search_over_all_pairs() -> None:
    """Connected parts of the graph of all pairs, found by a closure over them."""
    texts = [*SENTENCES, "one two three four five six", "two three four five six seven", "four five six seven eight"]

    def joined(one: str, other: str) -> bool:
        a, b = (re.sub(r"\W", " ", text).lower().split() for text in (one, other))
        if min(len(a), len(b)) < 5:
            return a == b
        return any(a[i : i + 5] == b[j : j + 5] for i in range(len(a) - 4) for j in range(len(b) - 4))

    reached = [{k for k in range(len(texts)) if k == n or joined(texts[n], texts[k])} for n in range(len(texts))]
    for _ in texts:
        reached = [set().union(*(reached[k] for k in one)) for one in reached]
    assert {frozenset(group) for group in near_duplicates(texts)} == {frozenset(one) for one in reached}
    assert sorted(itertools.chain(*near_duplicates(texts))) == list(range(len(texts)))
    assert max(map(len, near_duplicates(texts))) == 3


def test_the_file_is_needed_once(sdist: Path) -> None:
    first = movie_sentences("train", sdist)
    sdist.unlink()
    assert movie_sentences("train") == first
    assert sentiment_lexicon()["good"] == 1.9


def test_the_last_of_two_scores_of_a_word_counts(sdist: Path) -> None:
    assert sentiment_lexicon(sdist) == {":)": 2.0, "good": 1.9, "ok": 1.2, "fed up": -1.8}


def test_another_file_is_not_taken(sdist: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.tar.gz"
    other.write_bytes(archive({"v/setup.py": b""}))
    with pytest.raises(
        InputError, match=r"other.tar.gz' is not the source distribution of vaderSentiment.*pip download"
    ):
        movie_sentences(sdist=other)
    with pytest.raises(InputError, match=r"Cannot read sdist='.*none': No such file.*Get it by: pip download"):
        movie_sentences(sdist=tmp_path / "none")
    with pytest.raises(InputError, match=r"Cannot read sdist=.*null"):
        movie_sentences(sdist="a\0b")
    with pytest.raises(InputError, match="sdist=3: give a path, or None"):
        movie_sentences(sdist=3)  # type: ignore[arg-type]
    assert len(movie_sentences("held_out", sdist)) > 0  # nothing was left that would be taken for it


def test_unknown_split(sdist: Path) -> None:
    with pytest.raises(InputError, match="Unknown split 'test': use one of 'train', 'held_out'"):
        movie_sentences("test", sdist)


def test_without_network_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(InputError, match=r"pip could not fetch \(ERROR: .*run: pip download.*==3.3.2.*sdist="):
        sentiment_lexicon()
    assert not any((tmp_path / "lig_lens").iterdir())
