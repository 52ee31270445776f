"""From sidecars to batches: the sidecar contract, captions, the index of pairs, random draws, batches, the loader."""
