"""What the cache tools look at: the state of caches, their pictures, statistics of their tensors."""
