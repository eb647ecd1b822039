"""The web app: a skin over the same functions that the command line calls."""
