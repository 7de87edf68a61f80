"""The door: `python cli.py --help`."""

from lowmem_wanda.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
