"""The command line: one command per file; commands are thin."""
