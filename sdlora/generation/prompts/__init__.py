"""The prompt language: LoRA tags, A1111's syntax, and how a text becomes conditioning."""
