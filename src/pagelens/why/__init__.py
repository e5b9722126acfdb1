"""The causes, one rule per small file, and the replay that feeds them."""
