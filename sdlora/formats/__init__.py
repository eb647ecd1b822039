"""LoRA files: their names for modules, reading into adapters, writing, what they say about themselves."""
