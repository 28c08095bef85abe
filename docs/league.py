"""Write the tables and figures of docs/league.md from leagues: python docs/league.py SENTIMENT.json DIGITS.json.

The leagues are what `lig-lens league --config configs/league-sentiment.yaml --json SENTIMENT.json` gives, and that of
digits. What stands outside the marks in the page is written by hand.
"""

import re
import sys
from pathlib import Path

import lig_lens as ll

HERE = Path(__file__).parent
PAGE = HERE / "league.md"
# What one figure shows, and by which replacer.
SHOWN = {"sentiment": "mask", "digits": "mean"}
MEASURES = ("between", "comprehensiveness", "sufficiency", "leave_one_out spearman")


def main(names: list[str]) -> None:
    """Put each league between the marks of its model."""
    text = PAGE.read_text(encoding="utf-8")
    for name in names:
        league = ll.League.load(name)
        model = league.model_name
        tables = re.sub(r"^### ", "#### ", league.to_markdown(), flags=re.MULTILINE)
        versus = _against(league, "ca_lig")
        text = _put(text, f"{model} tables", tables)
        text = _put(text, f"{model} versus", versus)
        figure = ll.plots.league(league, replacer=SHOWN[model], measures=MEASURES)
        figure.write_image(HERE / "img" / f"league_{model}.png", scale=1.5)
    PAGE.write_text(text, encoding="utf-8")


def _against(league: ll.League, method: str) -> str:
    """How many replacers' intervals say that a method is better or worse than each other, for each measure."""
    entries = [one for one in league.versus(method) if one.measure in (*MEASURES, "insertion", "deletion")]
    measures = list(dict.fromkeys(one.measure for one in entries))
    lines = [f"| `{method}` against | {' | '.join(measures)} |", f"|---|{'---|' * len(measures)}"]
    for other in dict.fromkeys(one.method for one in entries):
        cells = []
        for measure in measures:
            some = [one for one in entries if one.method == other and one.measure == measure]
            signs = [_better(one.low, one.high, one.better) for one in some]
            cells.append("".join({1: "+", -1: "-", 0: "="}[sign] for sign in signs))
        lines.append(f"| {other} | {' | '.join(cells)} |")
    order = ", ".join(league.replacers)
    return "\n".join([*lines, "", f"Signs in the order {order}: + better, - worse, = not told apart (95 %, paired)."])


def _better(low: float, high: float, better: str) -> int:
    sign = 1 if low > 0 else -1 if high < 0 else 0
    return sign if better == "higher" else -sign


def _put(text: str, mark: str, new: str) -> str:
    start, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    head, rest = text.split(start)
    return f"{head}{start}\n\n{new.strip()}\n\n{end}{rest.split(end)[1]}"


if __name__ == "__main__":
    main(sys.argv[1:])
