"""The executable model of paging. Pure: no I/O, no clock, no randomness that is not handed in."""
