"""Many runs of one experiment, planned from a file and spread over cores, GPUs and nodes."""
