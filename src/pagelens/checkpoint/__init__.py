"""Checkpoints: dump, store, verify, roll back, look into, export and import."""
