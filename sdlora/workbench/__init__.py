"""Tools over files of LoRAs and base models: what they hold, how they get on, and what is made of them."""
