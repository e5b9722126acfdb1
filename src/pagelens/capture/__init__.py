"""The recorder, and the capture on disk: facts only."""
