"""`python -m detflow.cli` is `detflow`."""

from detflow.cli import main

main()
