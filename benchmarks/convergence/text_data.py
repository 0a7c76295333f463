"""Data of the language models: WikiText-2, and the documentation topics that come with Python.

* ``"wikitext2"``: three files in a folder, or the package ``datasets``. In its ``.tokens`` files rare words are
  ``<unk>``; the ``.raw`` files, which have them, are another experiment and refused.
* ``"pydoc"``: ``pydoc_data.topics``, the pages behind ``help("for")``, in every Python. The topics quote each other:
  a paragraph that occurred before is left out, so that none is in two parts. The first 80 % of the words are for
  training, the next 10 % for validation, the last 10 % for testing, cut between paragraphs. Versions of Python have
  different topics: :attr:`Corpus.digest` tells them apart.

A text becomes lower-case words by torchtext's "basic_english" rules (:func:`tokenize`); words outside of the
vocabulary, which is made from the training part alone, are ``<unk>``. Perplexity counts ``<unk>`` as a word like any
other.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from image_data import MissingDataError
from torch import Tensor

PARTS = ("train", "validation", "test")
UNKNOWN = "<unk>"
# cross_entropy's own ignore_index.
NO_TARGET = -100
# n = 2, 3 and 4 divide it.
MULTIPLE = 12
# In the pydoc topics, 42 % of the words in the training part occur once.
MINIMUM_COUNTS = {"wikitext2": 1, "pydoc": 2}
WIKITEXT2_FILES = ("wiki.train", "wiki.valid", "wiki.test")
WIKITEXT2_FOLDER = "wikitext-2"
TRAINING_SHARE, VALIDATION_SHARE = 0.8, 0.1
_RULES = [(mark, f" {mark} ") for mark in "'.,()!?"] + [("<br />", " "), ('"', ""), (";", " "), (":", " ")]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Word numbers of three parts, int64, each one stream; ``vocabulary[number]`` is the word."""

    name: str
    vocabulary: tuple[str, ...]
    train: Tensor
    validation: Tensor
    test: Tensor
    digest: str

    def facts(self) -> dict[str, object]:
        """Sizes, and the share of unknown words, of each part."""
        parts = {name: getattr(self, name) for name in PARTS}
        return {
            "name": self.name,
            "digest": self.digest,
            "vocabulary": len(self.vocabulary),
            "words": {name: len(part) for name, part in parts.items()},
            "unknown_share": {name: (part == 0).double().mean().item() for name, part in parts.items()},
        }


def load(name: str, folder: Path) -> Corpus:
    """``"pydoc"`` or ``"wikitext2"``; the latter from ``folder``, else through ``datasets``.

    Raises:
        MissingDataError: there is neither, or the folder has the .raw files alone.
    """
    texts = {"pydoc": pydoc, "wikitext2": lambda: wikitext2(folder)}[name]()
    return corpus(name, texts, MINIMUM_COUNTS[name])


def corpus(name: str, texts: Mapping[str, Sequence[str]], minimum_count: int) -> Corpus:
    """The parts' words as numbers in the vocabulary of ``texts["train"]``."""
    words = vocabulary(texts["train"], minimum_count)
    numbers = {word: number for number, word in enumerate(words)}
    streams = {part: torch.tensor([numbers.get(word, 0) for word in texts[part]]) for part in PARTS}
    content = "\0".join(" ".join(texts[part]) for part in PARTS)
    return Corpus(name, words, **streams, digest=hashlib.sha256(content.encode()).hexdigest())


def tokenize(text: str) -> list[str]:
    """Lower-case words; each of ' . , ( ) ! ? is a word, " disappears, ; and : and white space separate.

    >>> tokenize('Don\\'t: see "Foo" (1).')
    ['don', "'", 't', 'see', 'foo', '(', '1', ')', '.']
    """
    text = text.lower()
    for old, new in _RULES:
        text = text.replace(old, new)
    return text.split()


def vocabulary(words: Iterable[str], minimum_count: int) -> tuple[str, ...]:
    """<unk>, the words with ``minimum_count`` occurrences from the most frequent to the least, and unused entries up to
    the next multiple of MULTIPLE."""
    counts = Counter(words)
    # WikiText-2 itself writes <unk> for its rare words.
    del counts[UNKNOWN]
    kept = sorted((word for word, count in counts.items() if count >= minimum_count), key=lambda w: (-counts[w], w))
    unused = -(1 + len(kept)) % MULTIPLE
    return (UNKNOWN, *kept, *(f"<unused {i}>" for i in range(unused)))


def pydoc() -> dict[str, list[str]]:
    """The words of the three parts of Python's documentation topics."""
    topics: Mapping[str, str] = importlib.import_module("pydoc_data.topics").topics
    return divide(paragraph for topic in topics.values() for paragraph in re.split(r"\n\s*\n", topic))


def divide(paragraphs: Iterable[str]) -> dict[str, list[str]]:
    """The words of each different paragraph, in three contiguous parts; none of a paragraph in two of them."""
    different = dict.fromkeys(tuple(tokenize(paragraph)) for paragraph in paragraphs)
    total = sum(map(len, different))
    parts: dict[str, list[str]] = {part: [] for part in PARTS}
    before = 0
    for words in different:
        share = before / total
        late = (share >= TRAINING_SHARE) + (share >= TRAINING_SHARE + VALIDATION_SHARE)
        parts[PARTS[late]] += words
        before += len(words)
    return parts


def wikitext2(folder: Path) -> dict[str, list[str]]:
    """The words of WikiText-2's parts, from ``folder`` (``wiki.train.tokens``, ...) or datasets.

    ``datasets`` takes what it has in its cache, and fetches what it has not.
    """
    files = [folder / f"{name}.tokens" for name in WIKITEXT2_FILES]
    if all(file.exists() for file in files):
        texts = [file.read_text(encoding="utf-8") for file in files]
        return {part: tokenize(text) for part, text in zip(PARTS, texts, strict=True)}
    if any((folder / f"{name}.raw").exists() for name in WIKITEXT2_FILES):
        raise MissingDataError(
            f"{folder} has the .raw files of WikiText-2, whose vocabulary is another: put wiki.train.tokens, "
            "wiki.valid.tokens and wiki.test.tokens of wikitext-2-v1.zip there; --data pydoc runs without them"
        )
    missing = (
        f"WikiText-2 is not in {folder}: download wikitext-2-v1.zip and put wiki.train.tokens, wiki.valid.tokens and "
        "wiki.test.tokens there (or pip install datasets); --data pydoc runs without it"
    )
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise MissingDataError(missing) from None
    try:
        found = datasets.load_dataset("Salesforce/wikitext", "wikitext-2-v1")
    except Exception as error:
        raise MissingDataError(f"{missing} (datasets: {' '.join(str(error).split())})") from error
    return {part: tokenize("\n".join(found[part]["text"])) for part in PARTS}


def windows(stream: Tensor, rows: int, length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets, (rows, at most length) each: targets are the inputs one word later.

    The stream is cut into ``rows`` lines of equal length, which are read side by side, ``length`` words at a time.
    Every word but the first is a target once; the end of the last line is filled with input 0 and target NO_TARGET.
    """
    targets = len(stream) - 1
    columns = -(-targets // rows)
    filling = stream.new_zeros(rows * columns - targets)
    inputs = torch.cat([stream[:-1], filling]).view(rows, columns)
    shifted = torch.cat([stream[1:], filling + NO_TARGET]).view(rows, columns)
    return zip(inputs.split(length, 1), shifted.split(length, 1), strict=True)
