"""The networks of index/: one idea a file."""
