"""``securesplit demo``: every part of the product, as separate processes on this machine, ending in a report."""
