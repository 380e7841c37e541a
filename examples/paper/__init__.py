"""The experiments of the two Madam papers, in small: one command each (docs/paper.md)."""
