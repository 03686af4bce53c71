"""One deployment a file."""
