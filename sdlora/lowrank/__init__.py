"""Low-rank deltas: their laws, the trainable layers, choosing targets, wrapping and unwrapping a model."""
