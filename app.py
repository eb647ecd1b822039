"""The web app: `python app.py`, with the flags of `sdlora app`."""

import sys

from sdlora.cli import main

if __name__ == "__main__":
    main(["app", *sys.argv[1:]])
