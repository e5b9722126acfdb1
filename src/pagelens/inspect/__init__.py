"""Views over several processes or the whole system."""
