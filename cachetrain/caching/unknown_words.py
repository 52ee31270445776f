"""Counts captions with words that a tokenizer does not know, which the encoder sees as one and the same token."""

from collections import Counter
from collections.abc import Callable
from functools import lru_cache

from cachetrain.log import info, warn

_WARN_SHARE = 0.1
_MAX_WORDS, _MAX_LISTED = 100_000, 10


class UnknownWords:
    """Counts captions, and words with unknown tokens; memory is bounded.

    Attributes:
        counts: "captions", and those of them that are "unknown".
        words: unknown word -> in how many captions.
    """

    def __init__(self):
        self.counts = Counter()
        self.words = Counter()

    def add(self, caption: str, num_images: int, is_unknown: Callable[[str], bool]) -> None:
        words = {word for word in caption.split() if is_unknown(word)}
        self.counts.update(captions=num_images, unknown=num_images if words else 0)
        for word in words:
            if word in self.words or len(self.words) < _MAX_WORDS:
                self.words[word] += num_images

    def report(self) -> None:
        """Prints how many captions hold unknown words, and the most frequent; above a tenth of them as a warning."""
        total, unknown = self.counts["captions"], self.counts["unknown"]
        if unknown:
            words = ", ".join(f"{word!a} {count:,}" for word, count in self.words.most_common(_MAX_LISTED))
            line = f"{unknown:,} of {total:,} captions hold words that the tokenizer does not know: {words}"
            (warn if unknown > _WARN_SHARE * total else info)(line)


def unknown_test(tokenizer) -> Callable[[str], bool]:
    """Returns a function that tells whether a word holds tokens that a tokenizer does not know."""

    @lru_cache(65536)
    def is_unknown(word):
        return tokenizer.unk_token_id in tokenizer(word, add_special_tokens=False).input_ids

    return is_unknown
