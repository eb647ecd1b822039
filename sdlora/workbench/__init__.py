"""Tools that make models and LoRAs out of whole base models, one tensor at a time."""
