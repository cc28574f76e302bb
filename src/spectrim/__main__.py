"""`python -m spectrim`: the same as the command `spectrim`, where no scripts are on the path."""

from spectrim.cli import main

main()
