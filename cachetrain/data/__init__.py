"""From files to batches: sidecars, captions, the index of pairs, random draws, batching and the data loader."""
