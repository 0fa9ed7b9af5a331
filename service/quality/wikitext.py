"""WikiText's own shape: which lines are rows, where articles begin, and how its spaced-out tokens are prose.

texts --Text--> rows, articles, prose --> protocols

Facts of the data set and of what its readers agreed on, without which no figure of theirs can be repeated:
rows from the hub's `wikitext` loader, articles from its document-level one, prose from lm-eval's `wikitext`.
"""

import io
import re

# in this order; what is put for an expression's match may name its group
CONTRACTIONS = [("s '", "s'")]
SEPARATORS = [(f" @{sign}@ ", sign) for sign in "-,."]
PUNCTUATION = [(f" {sign} ", f"{sign} ") for sign in ":;.!?,"]
ENCLOSED = [
    (rf"{re.escape(opens)}\s*([^{re.escape(closes)}]*?)\s*{re.escape(closes)}", opens + r"\1" + closes)
    for opens, closes in ("()", "[]", "{}", '""', "''")
]
HEADINGS = [("= = = =", "===="), ("= = =", "==="), ("= =", "==")]
REMAINDER = [(" ° ", "°"), (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s")]


def rows(content: str) -> list[str]:
    """Lines with their ends; a line of nothing but space is an empty row."""
    return [line if line.strip() else "" for line in io.StringIO(content)]


def articles(content: str) -> list[str]:
    """Parts that begin with a line ` = Title = `, deeper headings not; a text without such a line is one."""
    found: list[list[str]] = [[]]
    for line in content.split("\n"):
        title = line.replace("= = =", "===").replace("= =", "==").strip()
        if title.startswith("= ") and title.endswith(" ="):
            found.append([])
        found[-1].append(line)
    return [article for lines in found if (article := "\n".join(lines)).strip()]


def prose(article: str) -> str:
    """As lm-eval's task `wikitext`, version 2, reads it."""
    for spaced, joined in CONTRACTIONS + SEPARATORS + PUNCTUATION:
        article = article.replace(spaced, joined)
    for pattern, joined in ENCLOSED:
        article = re.sub(pattern, joined, article)
    for spaced, joined in HEADINGS + REMAINDER:
        article = article.replace(spaced, joined)
    return article


def num_words(article: str) -> int:
    """Of the article before it became prose, as that task counts: a space at either end makes one more."""
    return len(re.split(r"\s+", article))
