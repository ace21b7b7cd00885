"""Proves that the documents name only what there is: every link, path and target of make in them; and that README.md
has lines of at most 120 characters and paragraphs of at most six lines.

    python -m pytest dev/test_docs.py
"""
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = [str(path.relative_to(ROOT)) for part in ("", "dev", "data") for path in sorted((ROOT / part).glob("*.md"))]
# In data/ stand the data sets of whoever reads, so only what has one of these endings is ours there.
PATH = re.compile(r"(?<![\w/.*-])((?:scripts|dev)/[\w./*-]+|data/\w+\.(?:py|md)|train_gpt_\w+\.cu)(?![\w/*])")


def leads_somewhere(doc, path, heading):
    target = (ROOT / doc).parent / path if path else ROOT / doc
    if not heading or not target.exists():
        return target.exists()
    return heading in [re.sub(r"[^\w -]", "", line.lstrip("# ")).lower().replace(" ", "-")
                       for line in target.read_text().splitlines() if line.startswith("#")]


def missing_from(doc, text):
    """The links, paths and targets of make in this text of a document that lead nowhere."""
    text = re.sub(r"\s+", " ", text)
    missing = [f"link {link}" for link in re.findall(r"\]\(([^)]+)\)", text)
               if not link.startswith("https://") and not leads_somewhere(doc, *link.partition("#")[::2])]
    missing += [f"path {path}" for path in {path.rstrip(".-") for path in PATH.findall(text)}
                if not any(ROOT.glob(path))]
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    code = " ".join(re.findall(r"```.*?```|`[^`]+`", text))
    return missing + [f"make {target}" for target in set(re.findall(r"\bmake ([\w-]+)(?![\w/-])", code)) - targets]


@pytest.mark.parametrize("doc", DOCS)
def test_a_document_names_what_there_is(doc):
    assert not missing_from(doc, (ROOT / doc).read_text())


def test_what_is_not_there_is_seen():
    """The test above can fail: on each kind of name, in each kind of place."""
    text = "[a](nothing.md#b) [a](#no-such) ![a](dev/logs/nothing.png) `scripts/nothing --x` in dev/nothing.\n" \
           "`make nothing`, make do\n```sh\npython3 data/nothing.py\n" \
           "make nothing2 # train_gpt_nothing.cu, dev/nothing_*.h\n```\n" \
           "[b](README.md#quickstart) [b](#what-you-need) `scripts/setup`, dev/*.md. `make test` data/mine/train_*.bin"
    assert sorted(missing_from("README.md", text)) == [
        "link #no-such", "link dev/logs/nothing.png", "link nothing.md#b", "make nothing", "make nothing2",
        "path data/nothing.py", "path dev/logs/nothing.png", "path dev/nothing", "path dev/nothing_*.h",
        "path scripts/nothing", "path train_gpt_nothing.cu"]


def test_the_readme_has_short_lines_and_paragraphs():
    text = (ROOT / "README.md").read_text()
    assert not [line for line in text.splitlines() if len(line) > 120]
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    assert not [p for p in prose.split("\n\n") if not p.lstrip().startswith("|") and len(p.strip().splitlines()) > 6]
