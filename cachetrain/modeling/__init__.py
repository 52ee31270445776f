"""Loading, composing and conditioning models."""
