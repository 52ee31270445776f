"""The parts of cachetrain; the scripts around this package put them together."""
