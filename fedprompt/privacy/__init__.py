"""Local noise, the accountant, secure aggregation and inversion attacks."""
