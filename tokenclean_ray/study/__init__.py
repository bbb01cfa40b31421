"""`tokenclean study`: when cleaning helps, by every plan of it on data whose noise is known because it was planted."""
