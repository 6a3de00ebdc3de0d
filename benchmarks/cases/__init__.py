"""One module for each question; each has functions that measure and return rows of the report."""
