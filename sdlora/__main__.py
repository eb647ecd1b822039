"""`python -m sdlora` is the command `sdlora`; `accelerate launch -m sdlora train ...` is that on several processes."""

from sdlora.cli import main

main()
