"""How toybox, the base model that ships with sdlora, and the sample datasets are made and judged."""
