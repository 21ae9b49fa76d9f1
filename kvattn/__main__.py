import sys

from kvattn.cli import main

sys.exit(main())
