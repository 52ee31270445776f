"""Counts captions that say nothing: empty ones, and words unknown to a tokenizer, which it makes one and the same
token."""

from collections import Counter
from collections.abc import Callable
from functools import lru_cache

from cachetrain.log import counted, info, warn

_WARN_SHARE = 0.1
_MAX_WORDS, _MAX_LISTED = 100_000, 10


class UnknownWords:
    """Counts captions, and words with unknown tokens; memory is bounded.

    Attributes:
        counts: "captions", and those of them that are "empty", or hold a word that is "unknown".
        words: unknown word -> in how many captions.
    """

    def __init__(self):
        self.counts = Counter()
        self.words = Counter()

    def add(self, caption: str, num_images: int, is_unknown: Callable[[str], bool]) -> None:
        words = {word for word in caption.split() if is_unknown(word)}
        empty = num_images if not caption.strip() else 0
        self.counts.update(captions=num_images, unknown=num_images if words else 0, empty=empty)
        for word in words:
            if word in self.words or len(self.words) < _MAX_WORDS:
                self.words[word] += num_images

    def report(self) -> None:
        """Prints how many captions are empty or hold unknown words, and the most frequent of these; above a tenth of
        the captions as a warning."""
        total, unknown, empty = (self.counts[name] for name in ("captions", "unknown", "empty"))
        if empty:
            line = f"empty: {empty:,} of {counted(total, 'caption')}, which trains like caption dropout"
            (warn if empty > _WARN_SHARE * total else info)(line)
        if unknown:
            words = ", ".join(f"{word!r} {count:,}" for word, count in self.words.most_common(_MAX_LISTED))
            line = f"words that the tokenizer does not know, in {unknown:,} of {counted(total, 'caption')}: {words}"
            (warn if unknown > _WARN_SHARE * total else info)(line)


def unknown_test(tokenizer) -> Callable[[str], bool]:
    """Returns a function that tells whether a word holds tokens that a tokenizer does not know."""

    @lru_cache(65536)
    def is_unknown(word):
        return tokenizer.unk_token_id in tokenizer(word, add_special_tokens=False).input_ids

    return is_unknown
