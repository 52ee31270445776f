"""The tools' side of caching: what state caches are in, and what is in them."""
