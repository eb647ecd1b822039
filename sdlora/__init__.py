"""Train Stable Diffusion LoRAs, mix them, and know what they hold."""

__version__ = "0.1.0"
