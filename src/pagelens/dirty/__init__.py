"""Dirty-page trackers, one file per backend, behind one interface."""
