"""`python -m bmgraph`."""

from bmgraph.cli.main import main

main()
