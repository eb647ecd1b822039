"""Mixing: adapters and their weights over one pipeline."""
