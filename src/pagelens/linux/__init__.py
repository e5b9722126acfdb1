"""The live kernel: the only package that opens /proc or makes a system call."""
