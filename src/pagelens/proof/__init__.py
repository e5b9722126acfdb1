"""Model against kernel: the oracle child, comparison, random programs, shrinking."""
