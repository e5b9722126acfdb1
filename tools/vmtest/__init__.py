"""Runs tests and commands on real kernels in virtual machines.

Why: what pagelens says must be right on kernels that differ (soft-dirty, PAGEMAP_SCAN, merging rules), and
the kernel at hand is only one of them. Debian's own kernel packages boot under qemu with an image made of
this machine's files, so that a guest runs the very same Python, libraries and tests.

Rejected: KVM (not to be had inside most virtual machines and containers; TCG works everywhere), 9p or
virtiofs for the root (Debian's cloud kernels have no 9p, and virtiofs needs a daemon), one big initramfs
(unpacked at every boot and kept in memory, which shows in every figure about memory).

fetch.py kernels; newer.py qemu and CRIU; packages.py what goes into the image; rootfs.py, image.py the disks;
qemu.py the machine; verdict.py how a guest ended; matrix.py `./dev test-kernels`.
"""
