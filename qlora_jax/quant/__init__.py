"""Numbers in, packed numbers out."""
