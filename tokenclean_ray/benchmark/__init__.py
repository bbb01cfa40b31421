"""`tokenclean benchmark`: how fast the package is, beside what the machine can do and what people write first."""
