"""`python -m nfmasq` is the command `nfmasq`."""

import sys

try:
    from nfmasq.cli import main

    main(prog_name="nfmasq")
except KeyboardInterrupt:  # while still importing
    sys.exit(130)
except MemoryError:
    sys.exit("nfmasq: there is not enough memory")
