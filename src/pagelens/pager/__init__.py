"""User-level paging over userfaultfd; takes any PageSource."""
