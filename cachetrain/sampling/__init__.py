"""Drawing pictures with a model: prompt files, rendering, samples during training, watching a run."""
