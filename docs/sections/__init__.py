"""The parts of the pages that docs/tables.py writes."""
