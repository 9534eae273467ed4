"""python -m qadapter.cli"""

import sys

from qadapter.cli.commands import main

if __name__ == "__main__":
    sys.exit(main())
