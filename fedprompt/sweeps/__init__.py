"""Many runs of one experiment: planned from a file, spread over cores, GPUs and nodes."""
