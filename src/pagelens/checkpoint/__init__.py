"""Dump, store, verify, roll back, export and import of process memory."""
