#!/usr/bin/env bash
# vaderSentiment 3.3.2: fourteen entries of its lexicon stand in it twice, with different scores.
#
# One would guess: a lexicon has one score for a word, and the file can be read in any order, or summed up.
# What happens: `fav`, `lmao`, `lol`, `ok`, `sob` and others come twice. Scores differ by up to 4.5 on a scale from -4 to
# 4, and two change their sign: `d:` is -2.9 and 1.2, `d=` is -3.0 and 1.5. The analyser keeps the last one and says
# nothing.
# Why it matters here: relevance of words is compared with the lexicon's scores; whoever keeps the first one, as a table
# that drops duplicates does, compares with others.
# What is done about it: `sentiment_lexicon` keeps the last one, as the analyser does, and says so
# (`tests/test_movie_sentences.py`).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-$folder/venv/bin/python} # FINDINGS_PYTHON: one that has the packages
if [ -z "${FINDINGS_PYTHON:-}" ]; then
    python3 -m venv "$folder/venv"
    "$python" -m pip install --quiet vaderSentiment==3.3.2
fi
cd "$folder"

"$python" - <<'EOF'
import sys
from importlib.metadata import version
from pathlib import Path

from vaderSentiment import vaderSentiment

print("vaderSentiment", version("vaderSentiment"))
scores = {}
for line in (Path(vaderSentiment.__file__).parent / "vader_lexicon.txt").read_text(encoding="utf-8").splitlines():
    word, score, *_ = line.split("\t")
    scores.setdefault(word, []).append(float(score))
twice = {word: found for word, found in scores.items() if len(set(found)) > 1}
used = vaderSentiment.SentimentIntensityAnalyzer().lexicon
print("expected: no word with two scores")
print(f"seen: {len(twice)}: {twice}")
print(f"seen: the analyser takes {({word: used[word] for word in twice})}")
sys.exit(None if len(twice) == 14 and all(used[word] == found[-1] for word, found in twice.items()) else "No longer so.")
EOF
