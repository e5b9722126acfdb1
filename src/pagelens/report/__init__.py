"""Faces of a capture: terminal, HTML, files. Reads captures, never /proc."""
