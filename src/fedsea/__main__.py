"""`python -m fedsea` is the command `fedsea`."""

from fedsea.cli import main

main()
