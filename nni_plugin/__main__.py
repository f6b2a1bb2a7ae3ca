"""`python -m nni_plugin`: the command line where its script `nni-plugin` is not on the path."""

import sys

from nni_plugin.cli import main

if __name__ == "__main__":
    sys.exit(main())
