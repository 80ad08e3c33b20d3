"""4-bit weights in the formats of other libraries."""
