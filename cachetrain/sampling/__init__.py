"""Drawing pictures with a model: what to draw, and the one path that draws it."""
