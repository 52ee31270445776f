"""Loading, composing and sampling models."""
