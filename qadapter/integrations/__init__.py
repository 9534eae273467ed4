"""One file or folder per outside project; none is imported until it is asked for."""
