"""`python -m lowmem_wanda`, the same as `python cli.py`."""

from lowmem_wanda.main import main

raise SystemExit(main())
