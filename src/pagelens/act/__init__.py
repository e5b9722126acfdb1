"""Commands that change something, and prove it."""
