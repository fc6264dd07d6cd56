"""``python -m node``: run a node, and ask or administer one."""

import sys

from node.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
