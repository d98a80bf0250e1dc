"""``python -m securesplit``."""

from securesplit.cli.main import main

main()
