"""`python -m nfmasq` is the command `nfmasq`."""

from nfmasq.cli import main

main(prog_name="nfmasq")
